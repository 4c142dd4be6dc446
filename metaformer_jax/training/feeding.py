"""Transfers batches to the devices ahead of the step that uses them."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from metaformer_jax.training import sharding


class PlacedBatches(Iterator[dict[str, jax.Array]]):
    """Batches as global arrays over all devices, made from each process's share.

    The next batch is being transferred while a step computes.

    Args:
        batches: this process's shares, see `data.loader`.
        mesh: the devices.
        fields: of a batch that the step takes.

    Attributes:
        num_replaced: examples in this process's share of the last batch that replace bad ones.
        indices: positions in the source of the examples in this share.
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
