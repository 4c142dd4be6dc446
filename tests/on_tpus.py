"""Programs for TPUs, traced where there are none."""

import contextlib

import jax
import jax.numpy as jnp

from metaformer_jax.models.lowering.platform import compiled_for


@contextlib.contextmanager
def traced_for(chip):
    """A context in which programs are traced for a chip of this kind; None for one not known."""
    device = jax.sharding.AbstractDevice(chip, 1, platform="tpu") if chip else None
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with compiled_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        yield


def assert_places_have_32_bits(function, *arrays, num_kernels):
    """The compiler refuses kernels whose blocks have places of 64 bits, whatever JAX's default."""
    with jax.enable_x64(True):
        traced = jax.make_jaxpr(function)(*arrays)
    kernels = [eqn.params for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
    assert len(kernels) == num_kernels
    for kernel in kernels:
        for mapping in kernel["grid_mapping"].block_mappings:
            places = mapping.index_map_jaxpr.out_avals
            assert all(place.dtype == jnp.int32 for place in places)
