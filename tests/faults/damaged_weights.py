"""Reads damaged weights of every kind in a process that a crash may end.

    python damaged_weights.py FOLDER SEED NUMBER KIND ...

prints how many inputs of each kind ended how.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
from flax import nnx
from mutations import attempt, mutations

from metaformer_jax.models import Attention, MetaFormer, MetaFormerSpec, SepConv
from metaformer_jax.training import recipes
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights import CheckpointError, converted, files, workdir
from metaformer_jax.weights.convert import to_tensors, variables_of

SPEC = MetaFormerSpec(
    depths=(1, 1), dims=(8, 8), token_mixers=(SepConv, Attention), res_scale_init=(None, 1.0)
)


@functools.cache
def model():
    return MetaFormer(SPEC, num_classes=3, image_size=16, rngs=nnx.Rngs(0))


def variables():
    return {path: np.asarray(variable[...]) for path, variable in variables_of(model()).items()}


def record():
    made = converted.make_record("caformer_s18", model())
    return dataclasses.replace(made, date="2026-01-01T00:00:00+00:00")


def same(actual, expected):
    return actual.keys() == expected.keys() and all(
        actual[key].dtype == value.dtype and np.array_equal(actual[key], value)
        for key, value in expected.items()
    )


def plausible(actual, expected):
    """Arrays by name, as any intact file could hold them."""
    del expected
    return all(isinstance(key, str) and value.size >= 0 for key, value in actual.items())


def of_same_shapes(actual, expected):
    return actual.keys() == expected.keys() and all(
        (actual[key].shape, actual[key].dtype) == (value.shape, value.dtype)
        for key, value in expected.items()
    )


def write_foreign(path):
    safetensors.numpy.save_file(to_tensors(variables(), "sail"), path)


def write_portable(path):
    converted.write_portable_file(path, variables(), record(), force=True)


def write_torch(path, *, zip_format):
    tensors = {key: torch.tensor(t) for key, t in to_tensors(variables(), "sail").items()}
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=zip_format)


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


# How a file is written, where it is damaged, and what may come out beside a refusal.
FILES = {
    "portable.safetensors": (write_portable, None, same),
    "header.safetensors": (write_foreign, lambda content: range(header_bytes(content)), plausible),
    "data.safetensors": (
        write_foreign,
        lambda content: range(header_bytes(content), len(content)),
        of_same_shapes,
    ),
    "zip.pth": (functools.partial(write_torch, zip_format=True), None, same),
    "legacy.pth": (functools.partial(write_torch, zip_format=False), None, plausible),
}


def read_damaged_files(kind, folder, seed, number):
    write, places, fits = FILES[kind]
    path = folder / kind
    write(path)
    whole = path.read_bytes()
    expected, _ = files.read_tensors(path)
    within = None if places is None else np.array(places(whole))
    endings = collections.Counter()
    for damaged in mutations(whole, number, seed=seed, within=within):
        path.write_bytes(damaged)
        read, error = attempt(lambda: files.read_tensors(path)[0], CheckpointError)
        # Lengths that the header does not announce are no whole file.
        ok = error or (fits(read, expected) and (kind[:4] != "data" or len(damaged) == len(whole)))
        assert ok, f"{kind}: {seed} gave other tensors"
        assert error is None or str(path) in str(error)
        endings["refused" if error else "read"] += 1
        files.read_metadata(path) if error is None else None
    return endings


def write_folder(path):
    converted.write_folder(path, variables(), record(), force=True)


def write_workdir(path):
    state = TrainState(
        step=np.int32(1),
        params=nnx.traversals.unflatten_mapping(variables()),
        frozen={},
        opt_state={"mu": np.ones(3, np.float32)},
        ema={},
        num_skipped=np.int32(0),
    )
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(jax.tree.map(jnp.asarray, state), [], recipes.digits())


# How a folder is written, and how its tensors are read.
FOLDERS = {
    "folder": (write_folder, converted.read_folder),
    "workdir": (write_workdir, workdir.read_workdir),
}


def read_damaged_folders(kind, folder, seed, number):
    write, read = FOLDERS[kind]
    path = folder / kind
    write(path)
    expected, beside = read(path)
    endings = collections.Counter()
    parts = sorted(part for part in path.rglob("*") if part.is_file())
    for index, part in enumerate(parts):
        whole = part.read_bytes()
        share = -(-number // len(parts))
        for damaged in [None, *mutations(whole, share, seed=seed * 1000 + index)]:
            part.unlink() if damaged is None else part.write_bytes(damaged)
            given, error = attempt(lambda: read(path), CheckpointError)
            ok = error or (same(given[0], expected) and given[1] == beside)
            assert ok, f"{part}: {seed} gave other tensors"
            endings["refused" if error else "read"] += 1
        part.write_bytes(whole)
    assert same(read(path)[0], expected)
    return endings


def main(folder, seed, number, *kinds):
    counts = {}
    for kind in kinds:
        if kind in FILES:
            endings = read_damaged_files(kind, pathlib.Path(folder), int(seed), int(number))
        else:
            endings = read_damaged_folders(kind, pathlib.Path(folder), int(seed), int(number))
        counts[kind] = endings
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
