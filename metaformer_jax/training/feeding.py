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
        num_replaced: examples of the last batch that stand in for bad ones, on this process.
        indices: places in the source of the last batch's examples, likewise.
    """

    def __init__(self, batches: Iterable[Any], mesh: Mesh, *, fields: tuple[str, ...]):
        self._batches = iter(batches)
        self._mesh = mesh
        self._fields = fields
        self._placed: collections.deque[tuple[dict[str, jax.Array], Any]] = collections.deque()
        self.num_replaced = 0
        self.indices = np.zeros(0, np.int32)

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._placed) < 2:
            batch = next(self._batches, None)
            if batch is None:
                break
            local = {field: batch[field] for field in self._fields}
            about = {field: batch[field] for field in ("bad", "index")}
            self._placed.append((sharding.shard_batch(local, self._mesh), about))
        if not self._placed:
            raise StopIteration
        placed, about = self._placed.popleft()
        self.num_replaced = int(np.sum(about["bad"] >= 0))
        self.indices = about["index"]
        return placed
