"""What the blocks of one stage cost on a TPU by its compiler's estimate, which needs no TPU.

    PYTHONPATH=. python benchmarks/stages.py --mixer attention --dim 320 --resolution 14

A whole model takes minutes to compile; a stage of two blocks, forward and backward, half of one.
"""

import argparse
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.models import (
    Attention,
    IdentityMixing,
    ImageKeys,
    MetaFormerBlock,
    Pooling,
    SepConv,
    layer_norm,
    without_kernels,
)
from metaformer_jax.models.layers import image_layer_norm
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.stages import REMAT, run_blocks
from metaformer_jax.training.hlo import read_program
from metaformer_jax.training.memory import memory_of
from metaformer_jax.training.topology import topology_devices

# With the norms of the families that have them.
MIXERS = {
    "convolution": (SepConv, layer_norm),
    "attention": (Attention, layer_norm),
    "identity": (IdentityMixing, image_layer_norm),
    "pooling": (Pooling, image_layer_norm),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixer", choices=MIXERS, default="attention")
    parser.add_argument("--dim", type=int, default=320)
    parser.add_argument("--resolution", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=REMAT)
    parser.add_argument("--scan", type=int, default=0)
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--topology", default="v5e:1x1")
    arguments = parser.parse_args()
    devices = topology_devices(arguments.topology)
    print("remat     estimated cycles  temporaries", flush=True)
    for remat in arguments.remat:
        with contextlib.nullcontext() if arguments.kernels else without_kernels():
            compiled = _compiled(arguments, remat, devices[0])
        program, memory = read_program(compiled.as_text()), memory_of(compiled)
        temporaries = f"{memory.temporaries / 2**20:,.0f} MiB"
        print(f"{remat:8} {program.cycles / 1e6:15.2f} M {temporaries:>12}", flush=True)


def _compiled(arguments, remat, device):
    """The gradients of a stage's parameters and input, in bfloat16, with dropped paths."""
    token_mixer, norm = MIXERS[arguments.mixer]

    def build():
        return nnx.List(
            MetaFormerBlock(
                arguments.dim,
                token_mixer=token_mixer,
                norm=norm,
                resolution=(arguments.resolution,) * 2,
                drop_path_rate=0.1,
                res_scale_init=1.0 if arguments.mixer == "attention" else None,
                dtype=jnp.bfloat16,
                rngs=nnx.Rngs(0),
            )
            for _ in range(arguments.blocks)
        )

    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    shape = (arguments.batch_size, arguments.resolution, arguments.resolution, arguments.dim)

    def loss(params, x, keys):
        blocks = nnx.merge(graphdef, params, rest)
        with compiled_for(device.platform):
            x = run_blocks(blocks, x, rngs=ImageKeys(keys), remat=remat, scan=arguments.scan)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), arguments.batch_size))
    place = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (params, jax.ShapeDtypeStruct(shape, jnp.bfloat16), keys),
    )
    # Kernels are made for the device of the mesh.
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*inputs)
        return traced.lower(lowering_platforms=(device.platform,)).compile()


if __name__ == "__main__":
    main()
