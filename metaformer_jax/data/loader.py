"""Order, sharding and batches: which examples a process sees, and when.

Everything here is a function of the seed and of positions in the data, so that the global batch of
a step is the same in every run, on any number of processes, workers and threads, resumed or not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from metaformer_jax.data.sources import BadRecordError, Source
from metaformer_jax.data.workers import Chunk, Chunks, LocalChunks, WorkerDiedError, WorkerPool

# Workers hand over so many images at a time: a batch is soon there, as all of them work at it.
_MAX_CHUNK = 16
# Bad examples in a row before the data set is given up.
_MAX_NEIGHBOURS = 100
_MAX_NAMED = 20

TrainTransformFn = Callable[[bytes, np.random.Generator], UInt8[np.ndarray, "h w c"]]
EvalTransformFn = Callable[[bytes], UInt8[np.ndarray, "h w c"]]


class DataError(RuntimeError):
    """The data cannot be read on: too many bad examples, or a worker has died."""


class Example(TypedDict):
    """One image, ready for the device."""

    image: UInt8[np.ndarray, "h w c"]
    label: int
    index: int
    bad: int


class Batch(TypedDict):
    """The examples of one step (on this process).

    `mask` is False where an example only fills up. `index` is each example's place in the source,
    and `bad` that of an example which could not be read and was replaced, or else -1.
    """

    image: UInt8[np.ndarray, "b h w c"]
    label: Int32[np.ndarray, " b"]
    mask: Bool[np.ndarray, " b"]
    index: Int32[np.ndarray, " b"]
    bad: Int32[np.ndarray, " b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """Who reads and transforms.

    Attributes:
        num_workers: processes beside this one; 0 for threads of this one alone.
        num_threads: threads in each of them.
    """

    num_workers: int = 0
    num_threads: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one process takes of every batch: its part of neighbouring examples.

    Attributes:
        batch_size: examples per step over all processes.
        process_index: this process.
        num_processes: all processes.

    Raises:
        ValueError: `batch_size` does not divide by the processes.
    """

    batch_size: int
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_processes:
            below, above = (
                (self.batch_size + extra) // self.num_processes * self.num_processes
                for extra in (0, self.num_processes - 1)
            )
            raise ValueError(
                f"`batch_size` must be a positive multiple of the {self.num_processes} processes, "
                f"got {self.batch_size}. Use {f'{below} or ' if below > 0 else ''}"
                f"{max(above, self.num_processes)}."
            )

    @property
    def size(self) -> int:
        """Examples per step of this process."""
        return self.batch_size // self.num_processes

    @property
    def chunk_size(self) -> int:
        """The largest divisor of the size that is not above `_MAX_CHUNK`."""
        return max(n for n in range(1, min(self.size, _MAX_CHUNK) + 1) if self.size % n == 0)

    def first_position(self, step: int) -> int:
        """The position, in the order of all steps, of this process's first example of a step."""
        return step * self.batch_size + self.process_index * self.size


@dataclasses.dataclass(frozen=True)
class _Load:
    """Reads and transforms one example, or the nearest after it that can be read."""

    source: Source
    transform: Callable[[bytes, Any], UInt8[np.ndarray, "h w c"]]

    def __call__(self, index: int, rng: np.random.Generator | None) -> Example:
        index = int(index)
        for neighbour in range(index, index + _MAX_NEIGHBOURS):
            position = neighbour % len(self.source)
            try:
                record = self.source[position]
                image = self.transform(record["image"], rng)
            except (BadRecordError, OSError):
                continue
            return {
                "image": image,
                "label": record["label"],
                "index": index,
                "bad": index if position != index else -1,
            }
        raise DataError(
            f"Images must be readable, got {_MAX_NEIGHBOURS} in a row that are not, from "
            f"{self.why_bad(index)}"
        )

    def why_bad(self, index: int) -> str:
        """Names an example, and says what ails it."""
        rng = np.random.default_rng(index)
        return why_bad(self.source, lambda data: self.transform(data, rng), index)


class Batches(Iterator[Batch]):
    """An iterator over batches, to be closed, that keeps count of bad examples.

    Attributes:
        bad: what could not be read so far: place in the source, and how it was met.
    """

    def __init__(
        self,
        chunks: Chunks,
        load: _Load,
        share: Share,
        *,
        workers: Workers,
        max_bad_fraction: float,
    ):
        self.bad: dict[int, str] = {}
        self._load = load
        self._chunks_per_batch = share.size // share.chunk_size
        self._max_bad_fraction = max_bad_fraction
        self._chunks: WorkerPool | LocalChunks = (
            WorkerPool(chunks, num_workers=workers.num_workers, num_threads=workers.num_threads)
            if workers.num_workers
            else LocalChunks(chunks, num_threads=workers.num_threads)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, and with them the batches."""
        self._chunks.close()

    def __next__(self) -> Batch:
        try:
            images, abouts = self._chunks.take(self._chunks_per_batch)
        except WorkerDiedError as error:
            raise DataError(
                f"A worker that reads data has died: {error}. Was it killed for want of memory? "
                "Lower `config.data.num_workers`; the last checkpoint is good."
            ) from error
        batch: Any = {"image": images}
        batch |= {key: np.concatenate([about[key] for about in abouts]) for key in abouts[0]}
        self._note_bad(batch["bad"])
        return batch

    def _note_bad(self, bad: Int32[np.ndarray, " b"]) -> None:
        for index in bad[bad >= 0].tolist():
            if index not in self.bad:
                self.bad[index] = self._load.why_bad(index)
        source, max_bad = self._load.source, self._max_bad_fraction
        check_few_bad(source, [*self.bad], max_bad, why_bad=self.bad.__getitem__)


def check_few_bad(
    source: Source,
    bad: Sequence[int],
    max_bad_fraction: float,
    *,
    why_bad: Callable[[int], str],
) -> None:
    """Makes sure that no more of a source's examples are bad than may be.

    Args:
        source: the examples.
        bad: the places in it of those that cannot be read.
        max_bad_fraction: part of the source's examples that may turn out bad.
        why_bad: names the example in one of the places, and says what ails it.

    Raises:
        DataError: more are bad.
    """
    max_bad = max_bad_fraction * len(source)
    if len(bad) > max_bad:
        raise DataError(
            f"At most {int(max_bad)} of {len(source)} examples may be bad "
            f"(`config.data.max_bad_fraction`), got {len(bad)}:\n"
            + "\n".join(f"  {why_bad(index)}" for index in bad[:_MAX_NAMED])
        )


def why_bad(source: Source, transform: EvalTransformFn, index: int) -> str:
    """Names an example, and says what ails it: it is read and transformed once more."""
    try:
        transform(source[index]["image"])
    except (BadRecordError, OSError) as error:
        return f"{source.describe(index)}: {error}"
    return f"{source.describe(index)}: it could not be read, and now can"


def training_batches(
    source: Source,
    transform: TrainTransformFn,
    *,
    share: Share,
    seed: int,
    start_step: int = 0,
    workers: Workers | None = None,
    max_bad_fraction: float = 1e-3,
) -> Batches:
    """This process's part of the batches from `start_step` on, shuffled anew each epoch, endless.

    An example that cannot be read is replaced by the next one in the source that can.

    Args:
        source: the examples.
        transform: decodes and augments; its generator is the example's own in each epoch.
        share: the batch and this process's part of it.
        seed: order and augmentation.
        start_step: the first batch is that of this step; those before are not read.
        workers: who reads.
        max_bad_fraction: part of the source's examples that may turn out bad.

    Raises:
        DataError: while iterating, when there are more bad examples, or a worker has died.
    """
    load = _Load(source, transform)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    examples = order.random_map(load)
    chunks = _Chunks(examples.__getitem__, share, start_step, end=None)
    return Batches(
        chunks, load, share, workers=workers or Workers(), max_bad_fraction=max_bad_fraction
    )


def evaluation_batches(
    source: Source,
    transform: EvalTransformFn,
    *,
    share: Share,
    workers: Workers | None = None,
    max_bad_fraction: float = 1e-3,
) -> Batches:
    """This process's part of all examples, once each, in order; the last batch is filled up.

    An example that cannot be read does not count.

    Raises:
        DataError: while iterating, when there are more bad examples, or a worker has died.
    """
    load = _Load(source, lambda data, _: transform(data))
    chunks = _Chunks(lambda index: load(index, None), share, 0, end=len(source))
    return Batches(
        chunks, load, share, workers=workers or Workers(), max_bad_fraction=max_bad_fraction
    )


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The examples of one process, in order, as small batches: random access for Grain."""

    load: Callable[[int], Example]
    share: Share
    start_step: int
    end: int | None

    def __len__(self) -> int:
        per_batch = self.share.size // self.share.chunk_size
        # Every process runs every step, also one whose examples have run out.
        steps = 2**40 if self.end is None else -(-self.end // self.share.batch_size)
        return steps * per_batch

    def __getitem__(self, index: int) -> Chunk:
        size = self.share.chunk_size
        step, within = divmod(index, self.share.size // size)
        first = self.share.first_position(self.start_step + step) + within * size
        last = first + size if self.end is None else min(first + size, self.end)
        examples = [self.load(position) for position in range(first, last)] or [self.load(0)]
        present = max(0, last - first)
        examples += [examples[-1]] * (size - len(examples))
        bad = np.array([example["bad"] for example in examples], np.int32)
        mask = np.arange(size) < present
        if self.end is not None:
            # One that stands in for another would count twice.
            mask &= bad < 0
        images = [example["image"] for example in examples]
        if len(forms := {(image.shape, image.dtype) for image in images}) > 1:
            raise ValueError(
                "`transform` must give images of one shape and type, got "
                f"{' and '.join(f'{shape} {dtype}' for shape, dtype in sorted(forms))}."
            )
        about = {
            "label": np.array([example["label"] for example in examples], np.int32),
            "mask": mask,
            "index": np.array([example["index"] for example in examples], np.int32),
            "bad": bad,
        }
        return Chunk(images, about)
