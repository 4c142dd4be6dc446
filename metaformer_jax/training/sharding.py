"""The mesh, and where on it batches and parameters live."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def create_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh of all devices: `data` copies of the parameters, each split over `fsdp` devices.

    Args:
        data: devices along the axis; -1 takes all that `fsdp` leaves.
        fsdp: devices that share one copy of parameters and optimiser state.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    shape = (len(devices) // fsdp if data == -1 and fsdp > 0 else data, fsdp)
    if min(shape) < 1 or shape[0] * shape[1] != len(devices):
        raise ValueError(
            f"`mesh.data` x `mesh.fsdp` must be the {len(devices)} devices present, got "
            f"{data} x {fsdp}. Set mesh.data=-1 to use all that mesh.fsdp leaves."
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def over_parameters(tree: Any, mesh: Mesh) -> Any:
    """For each array (or shape) its sharding over `fsdp`: along its largest divisible axis."""

    def sharding(leaf: Any) -> NamedSharding:
        parts = mesh.shape["fsdp"]
        axes = [axis for axis, size in enumerate(leaf.shape) if parts > 1 and size % parts == 0]
        if not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(sharding, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, split over all devices, of what each process holds of the batch."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
