"""Records of sharded files by their position: shards, and the ArrayRecord form of them."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from metaformer_jax.data import storage
from metaformer_jax.data.sources import BadRecordError, checked_index


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records, and which of them count.

    Attributes:
        path: local, or on a remote store.
        num_records: all in the file.
        skip: records at its beginning that do not count.
        take: records after these that do.
    """

    path: str
    num_records: int
    skip: int
    take: int


class Records(Protocol):
    """The records of a list of shards, as one list of bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def describe(self, index: int) -> str:
        """Shard and record number."""
        ...


class ShardPositions:
    """Finds the shard of a record: index 0 is the first record of the first shard that counts."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = tuple(shards)
        self._ends = list(itertools.accumulate(shard.take for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The number of a record's shard, and its position in that file."""
        index = checked_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        shard = self.shards[number]
        return number, index - (self._ends[number] - shard.take) + shard.skip

    def describe(self, index: int) -> str:
        """Shard and record number."""
        number, position = self.locate(index)
        return f"record {position} of {self.shards[number].path}"


class ArrayRecords(ShardPositions):
    """Records in ArrayRecord files.

    Raises:
        ValueError: a file is missing, is cut, or has another number of records than announced.
    """

    def __init__(self, shards: Sequence[Shard]):
        super().__init__(shards)
        paths = [shard.path for shard in self.shards]
        for path in paths:
            if storage.is_remote(path) and not path.startswith("gs://"):
                raise ValueError(
                    f"ArrayRecord files must be local or on gs://, got {path}. Copy them, or "
                    "prepare the data set as TFRecord files."
                )
        check_present(paths)
        storage.in_threads(check_count, self.shards)
        self._readers = storage.OpenOnce(paths, _open_reader)

    def __getitem__(self, index: int) -> bytes:
        number, position = self.locate(index)
        try:
            return self._readers[number].read([position])[0]
        # Whatever is wrong, the reader raises this; it compares a hash of every record.
        except (RuntimeError, IndexError) as error:
            raise BadRecordError(
                f"{self.describe(index)} cannot be read: {error}. Copy or prepare the file again."
            ) from error


def check_count(shard: Shard) -> None:
    """Compares an ArrayRecord file with what is announced of it.

    Raises:
        ValueError: it has another number of records; a cut file has none.
    """
    found = 0
    try:
        reader = _open_reader(shard.path)
        found = reader.num_records()
        # What kept it from opening comes out here.
        reader.close()
    except RuntimeError as error:
        if not storage.is_remote(shard.path):
            # One that may not be read says so.
            open(shard.path, "rb").close()
        problem = f" ({error})"
        raise wrong_count(
            shard.path, found=found, announced=shard.num_records, problem=problem
        ) from error
    if found != shard.num_records:
        raise wrong_count(shard.path, found=found, announced=shard.num_records)


def check_present(paths: Sequence[str]) -> list[storage.FileState]:
    """Size and version of each file.

    Raises:
        ValueError: files are missing.
    """
    states = storage.in_threads(_state_if_there, paths)
    missing = [path for path, state in zip(paths, states, strict=True) if state is None]
    if missing:
        raise ValueError(
            f"All {len(paths)} files of the split must be there, got {len(paths) - len(missing)}: "
            f"{missing[0]} is missing{_others(len(missing))}. Copy or prepare the data set again."
        )
    return [state for state in states if state is not None]


def wrong_count(path: str, *, found: int, announced: int, problem: str = "") -> ValueError:
    """The error of a file whose records are not as many as the metadata announce."""
    return ValueError(
        f"{path} must have the {announced:,} records that dataset_info.json announces, got "
        f"{found:,}{problem}. The file is cut or of another preparation: copy or prepare it again."
    )


def _others(missing: int) -> str:
    return f", and {missing - 1} more" if missing > 1 else ""


def _state_if_there(path: str) -> storage.FileState | None:
    try:
        return storage.state(path)
    except FileNotFoundError:
        return None


def _open_reader(path: str) -> Any:
    from array_record.python import array_record_module

    # Without reading ahead: records are asked for in random order.
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
