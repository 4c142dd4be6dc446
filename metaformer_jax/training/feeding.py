"""Batches on the devices, ahead of the step that takes them."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from metaformer_jax.training import sharding


class PlacedBatches(Iterator[dict[str, jax.Array]]):
    """Global arrays of what each process holds of the batch, split over all devices.

    The next batch is on its way while a step computes.

    Args:
        batches: this process's parts, see `data.loader`.
        mesh: the devices.
        fields: what the step takes of a batch.

    Attributes:
        num_replaced: examples of the last batch that stand in for bad ones.
    """

    def __init__(self, batches: Iterable[Any], mesh: Mesh, *, fields: tuple[str, ...]):
        self._batches = iter(batches)
        self._mesh = mesh
        self._fields = fields
        self._placed: collections.deque[tuple[dict[str, jax.Array], int]] = collections.deque()
        self.num_replaced = 0

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._placed) < 2:
            batch = next(self._batches, None)
            if batch is None:
                break
            local = {field: batch[field] for field in self._fields}
            num_replaced = int(np.sum(batch["bad"] >= 0))
            self._placed.append((sharding.shard_batch(local, self._mesh), num_replaced))
        if not self._placed:
            raise StopIteration
        placed, self.num_replaced = self._placed.popleft()
        return placed
