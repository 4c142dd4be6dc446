"""Order, sharding and batches: which examples a process sees, and when.

Everything here is a function of the seed and of positions in the data, so that the global batch of
a step is the same in every run, on any number of processes and threads, resumed or not.
"""

from collections.abc import Callable, Iterator
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from metaformer_jax.data.sources import Example, Source


class Batch(TypedDict):
    """The examples of one step (on this process); `mask` is False where one only fills up."""

    image: UInt8[np.ndarray, "b h w c"]
    label: Int32[np.ndarray, " b"]
    mask: Bool[np.ndarray, " b"]


def training_batches(
    source: Source,
    transform: Callable[[Example, np.random.Generator], Example],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """This process's part of the batches from `start_step` on, shuffled anew each epoch, endless.

    Args:
        source: the examples.
        transform: the augmentation; its generator is the example's own in each epoch.
        batch_size: examples per step over all processes.
        seed: order and augmentation.
        start_step: the first batch is that of this step; those before are not read.
        process_index: this process.
        num_processes: all processes.
        num_threads: threads that read and transform.

    Raises:
        ValueError: `batch_size` does not divide by the processes.
    """
    _check_divides(batch_size, num_processes)
    # Each process takes its share after the random transform: before it, the processes would
    # share their random numbers.
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    examples = examples.random_map(transform)[process_index::num_processes]
    batches = examples.batch(batch_size // num_processes, batch_fn=_stack)[start_step:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    return iter(batches.to_iter_dataset(options))


def evaluation_batches(
    source: Source,
    transform: Callable[[Example], Example],
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[Batch]:
    """This process's part of all examples, once each, in order; the last batch is filled up.

    Raises:
        ValueError: `batch_size` does not divide by the processes.
    """
    _check_divides(batch_size, num_processes)
    share = batch_size // num_processes
    examples = grain.MapDataset.source(source).map(transform)
    for start in range(0, len(source), batch_size):
        # Every process runs every step, also one whose examples have run out.
        mine = range(start + process_index * share, start + (process_index + 1) * share)
        present = [examples[index] for index in mine if index < len(source)]
        yield _stack(present or [examples[0]], size=share, present=len(present))


def _stack(examples: list[Example], size: int | None = None, present: int | None = None) -> Batch:
    size = len(examples) if size is None else size
    present = len(examples) if present is None else present
    fill = [examples[-1]] * (size - len(examples))
    return {
        "image": np.stack([example["image"] for example in [*examples, *fill]]),
        "label": np.array([example["label"] for example in [*examples, *fill]], np.int32),
        "mask": np.arange(size) < present,
    }


def _check_divides(batch_size: int, num_processes: int) -> None:
    if batch_size < 1 or batch_size % num_processes:
        raise ValueError(
            f"`batch_size` must be a positive multiple of the {num_processes} processes, "
            f"got {batch_size}."
        )
