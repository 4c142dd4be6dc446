"""Prints the parity table: every architecture, through real files of both layouts.

The reference weights are written with torch, in the sail layout as a `.pth` and in the timm
layout as a `.safetensors`; loaded by `create_model`; run; and held to the published logits.

    PYTHONPATH=. python tests/parity_table.py [PATTERN]
"""

import fnmatch
import pathlib
import sys
import tempfile

import numpy as np
import reference
import torch
from flax import nnx
from safetensors.torch import save_file

import metaformer_jax
from metaformer_jax.weights import recognise
from metaformer_jax.weights.convert import to_tensors, variables_of
from metaformer_jax.weights.files import read_tensors


def check(architecture: str, layout: str, logits: np.ndarray, folder: pathlib.Path) -> float:
    """The relative error of the logits; also holds the way back to be bit-identical."""
    tensors = reference.state_dict(architecture, layout)
    in_torch = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    path = folder / ("sail.pth" if layout == "sail" else "timm.safetensors")
    if layout == "sail":
        torch.save(in_torch, path)
    else:
        save_file(in_torch, path)
    assert recognise(read_tensors(path)[0]).layout == layout
    model = metaformer_jax.create_model(architecture, pretrained=path, rngs=nnx.Rngs(0))
    model.eval()
    back = to_tensors(variables_of(model), layout)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    return reference.relative_error(model(reference.images(len(logits), 224, 224)), logits)


def main(pattern: str = "*") -> int:
    """Prints one line per architecture; 1 if any error is above 1e-4."""
    forward = np.load(reference.DATA / "forward.npz")
    timm = reference.timm_table()["architectures"]
    errors = []
    print(f"{'architecture':<20} {'sail .pth':>12} {'timm .safetensors':>18}")
    for architecture in fnmatch.filter(reference.checkpoint_table()["architectures"], pattern):
        logits = forward[f"{architecture}@224/logits"]
        columns = []
        for layout in ("sail", "timm"):
            if layout == "timm" and architecture not in timm:
                columns.append("-")
                continue
            with tempfile.TemporaryDirectory() as folder:
                errors.append(check(architecture, layout, logits, pathlib.Path(folder)))
            columns.append(f"{errors[-1]:.1e}")
        print(f"{architecture:<20} {columns[0]:>12} {columns[1]:>18}", flush=True)
    print(
        f"{len(errors)} checkpoints, largest relative error {max(errors):.1e}; back bit-identical"
    )
    return int(max(errors) > 1e-4)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
