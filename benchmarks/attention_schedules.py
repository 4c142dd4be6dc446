"""What attention's kernels for TPUs take for an image by the compiler's schedule, without a TPU.

    PYTHONPATH=. python benchmarks/attention_schedules.py --heads 10 16 --tokens 196

The compiler writes the instructions of a kernel to a file, with those in which the chip waits for a
result; their number is the time of one image in cycles, unless reading and writing it takes longer.
"""

import argparse
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.models import attention_mosaic
from metaformer_jax.training.topology import topology_devices

_BUNDLES = re.compile(r"total scheduled bundles: *(\d+)")
_IMAGES = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[10, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[196])
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--topology", default="v5e:1x1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read when the compiler is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')}"
        )
        device = topology_devices(arguments.topology)[0]
        print(
            "heads  tokens  forward: scheduled, assumed  backward: scheduled, assumed", flush=True
        )
        for tokens in arguments.tokens:
            for heads in arguments.heads:
                shape = (_IMAGES, tokens, heads * arguments.head_dim)
                figures = _figures(shape, heads, device, pathlib.Path(folder))
                print(f"{heads:5} {tokens:7} {figures}", flush=True)


def _figures(shape, heads, device, folder):
    *sizes, channels = shape
    place = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    packed, mixed = (
        jax.ShapeDtypeStruct((*sizes, size), jnp.bfloat16, sharding=place)
        for size in (3 * channels, channels)
    )

    def attend(packed):
        return attention_mosaic.attend(packed, heads)

    def gradients(packed, mixed, cotangent):
        return attention_mosaic.gradients(packed, mixed, cotangent, heads)

    columns = []
    for function, arrays in ((attend, (packed,)), (gradients, (packed, mixed, mixed))):
        for old in folder.iterdir():
            old.unlink()
        with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
            lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",))
            text = lowered.compile().as_text()
        assumed = int(re.search(r'"kernel_cycles":"(\d+)"', text)[1]) / _IMAGES
        schedules = folder.glob("*-attention_*-schedule-analysis_packed-bundles-post-ra.txt")
        # What comes before and after the kernel is scheduled by itself.
        scheduled = max(int(_BUNDLES.search(path.read_text())[1]) for path in schedules)
        columns.append(f"{scheduled:18,} {assumed:10,.0f}")
    return "".join(columns)


if __name__ == "__main__":
    main()
