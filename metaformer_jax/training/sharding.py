"""The device mesh, and how batches and parameters are sharded over it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
# The first axis sharded over all devices; and the whole array on every device.
BATCH, EVERYWHERE = PartitionSpec(AXES), PartitionSpec()


def create_mesh(
    *, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices: `data` copies of the parameters, each sharded over `fsdp` devices.

    Args:
        data: number of devices along this axis; -1 for all that `fsdp` leaves.
        fsdp: number of devices that share one copy of parameters and optimiser state.
        devices: to be used; None for those present.

    Raises:
        ValueError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp if data == -1 and fsdp > 0 else data, fsdp)
    if min(shape) < 1 or shape[0] * shape[1] != len(devices):
        raise ValueError(
            f"`config.mesh.data` x `config.mesh.fsdp` must be the {len(devices)} devices present, "
            f"got {data} x {fsdp}. Set config.mesh.data=-1 to use all that config.mesh.fsdp leaves."
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, EVERYWHERE)


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis sharded over all devices."""
    return NamedSharding(mesh, BATCH)


def parameter_specs(tree: Any, mesh: Mesh) -> Any:
    """For each array (or shape), its sharding over `fsdp`: along its largest divisible axis."""

    def spec(leaf: Any) -> PartitionSpec:
        parts = mesh.shape["fsdp"]
        axes = [axis for axis, size in enumerate(leaf.shape) if parts > 1 and size % parts == 0]
        if not axes:
            return EVERYWHERE
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*[None] * largest, "fsdp")

    return jax.tree.map(spec, tree)


def placed(specs: Any, mesh: Mesh) -> Any:
    """The shardings of these specs on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def gather(tree: Any, specs: Any) -> Any:
    """Within `shard_map`: whole arrays from the shards of the devices along `fsdp`."""

    def whole(spec: PartitionSpec, leaf: jax.Array) -> jax.Array:
        if spec == EVERYWHERE:
            return leaf
        return jax.lax.all_gather(leaf, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.tree.map(whole, specs, tree, is_leaf=_is_spec)


def add_up(tree: Any, specs: Any) -> Any:
    """Within `shard_map`: the sum over all devices, of which each keeps its own shard."""

    def total(spec: PartitionSpec, leaf: jax.Array) -> jax.Array:
        if spec == EVERYWHERE:
            return jax.lax.psum(leaf, AXES)
        part = jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(part, "data")

    return jax.tree.map(total, specs, tree, is_leaf=_is_spec)


def on_each_device(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Applies a function to each device's part of its arguments, without communication."""
    return jax.shard_map(function, mesh=mesh, in_specs=BATCH, out_specs=BATCH)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, sharded over all devices, from each process's share of the batch."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
