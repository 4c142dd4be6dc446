"""TFRecord files read by position, without TensorFlow.

The format has no index: each record stands behind its length, so that the n-th is found by walking
over all before it. That is done once for a file, and what was found is kept.

A record is: length (8 bytes), CRC of the length (4), data, CRC of the data (4); little-endian.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from metaformer_jax.data import storage
from metaformer_jax.data.records import Shard, ShardPositions, check_present, wrong_count
from metaformer_jax.data.sources import BadRecordError
from metaformer_jax.paths import cache_folder

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_FRAME_BYTES = _HEADER.size + _FOOTER.size
# Local headers are read one by one. Over a network a request costs as much as some megabytes.
_REMOTE_WINDOW_BYTES = 8 << 20
_INDEX_VERSION = b"metaformer_jax record index 1\n"


class TfRecords(ShardPositions):
    """Records in TFRecord files.

    The first opening walks over the files: one small read for each record of a local file, the
    whole content of a remote one. What it finds is kept in `index_folder` and found again as long
    as names, sizes and times of the files stay as they are.

    Args:
        shards: the files.
        index_folder: by default `index` in `$METAFORMER_JAX_CACHE` or in the user's cache folder.

    Raises:
        ValueError: a file is missing, is cut, is damaged, or has another number of records than
            announced.
    """

    def __init__(
        self, shards: Sequence[Shard], *, index_folder: str | os.PathLike[str] | None = None
    ):
        super().__init__(shards)
        paths = [shard.path for shard in self.shards]
        self._boundaries = _load_or_make_index(
            self.shards, check_present(paths), pathlib.Path(index_folder or default_index_folder())
        )
        counts = [shard.num_records + 1 for shard in self.shards]
        self._first = np.cumsum([0, *counts])
        self._files = storage.OpenOnce(paths, storage.open_file)

    def __getitem__(self, index: int) -> bytes:
        number, position = self.locate(index)
        at = int(self._first[number]) + position
        start, end = self._boundaries[at : at + 2].tolist()
        data = _read_checked(self._files[number], start, end)
        if data is None:
            raise _damaged(self.describe(index))
        return data


def read_records(path: str, *, num_records: int) -> Iterator[bytes]:
    """The records of a whole file, one after the other.

    Raises:
        ValueError: the file is cut, is damaged or has another number of records.
    """
    boundaries = find_records(path, num_records=num_records)
    file = storage.open_file(path)
    for position, (start, end) in enumerate(itertools.pairwise(boundaries.tolist())):
        data = _read_checked(file, start, end)
        if data is None:
            raise _damaged(f"record {position} of {path}")
        yield data


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C of data, as TFRecord files store it.

    >>> hex(masked_crc32c(b"123456789"))
    '0xc78ab0e5'
    """
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def default_index_folder() -> pathlib.Path:
    """`index` in `paths.cache_folder`."""
    return cache_folder() / "index"


def find_records(path: str, *, num_records: int) -> np.ndarray:
    """Where the records of a file begin, and where the last one ends: `[num_records + 1]` bytes.

    Raises:
        ValueError: the file is cut, is damaged or has another number of records.
    """
    size = storage.state(path).size
    file = storage.open_file(path)
    window_bytes = _REMOTE_WINDOW_BYTES if storage.is_remote(path) else _HEADER.size
    fail = functools.partial(wrong_count, path, announced=num_records)
    boundaries = [0]
    position = window_start = 0
    window = b""
    while position < size:
        if position + _HEADER.size > window_start + len(window):
            window_start = position
            window = file.read(position, min(size, position + window_bytes))
            if len(window) < _HEADER.size:
                raise fail(found=len(boundaries) - 1, problem=" whole ones")
        inside = position - window_start
        length, crc = _HEADER.unpack_from(window, inside)
        if masked_crc32c(window[inside : inside + 8]) != crc:
            problem = f" before a damaged one at byte {position:,}"
            raise fail(found=len(boundaries) - 1, problem=problem)
        position += length + _FRAME_BYTES
        if position > size:
            raise fail(found=len(boundaries) - 1, problem=" whole ones")
        boundaries.append(position)
    if len(boundaries) - 1 != num_records:
        raise fail(found=len(boundaries) - 1)
    return np.array(boundaries, np.int64)


def _read_checked(file: storage.RangeFile, start: int, end: int) -> bytes | None:
    """The data of a record, or nothing where they are not what was written."""
    stored = file.read(start + _HEADER.size, end)
    data, crc = stored[: -_FOOTER.size], stored[-_FOOTER.size :]
    whole = len(stored) == end - start - _HEADER.size and crc == _FOOTER.pack(masked_crc32c(data))
    return data if whole else None


def _damaged(description: str) -> BadRecordError:
    return BadRecordError(
        f"{description} must have the checksum that is stored with it, got another. The file is "
        "damaged: copy or prepare it again."
    )


def _load_or_make_index(
    shards: Sequence[Shard], states: Sequence[storage.FileState], folder: pathlib.Path
) -> np.ndarray:
    """The boundaries of all shards, one after the other."""
    fingerprint = hashlib.sha256(_INDEX_VERSION)
    for shard, state in zip(shards, states, strict=True):
        fingerprint.update(f"{shard.path}\n{shard.num_records} {state}\n".encode())
    path = folder / f"{fingerprint.hexdigest()}.index"
    length = sum(shard.num_records + 1 for shard in shards)
    boundaries = _load_index(path, fingerprint.digest(), length)
    if boundaries is None:
        found = storage.in_threads(
            lambda shard: find_records(shard.path, num_records=shard.num_records), shards
        )
        boundaries = np.concatenate(found)
        _save_index(path, fingerprint.digest(), boundaries)
    return boundaries


def _load_index(path: pathlib.Path, fingerprint: bytes, length: int) -> np.ndarray | None:
    """What was kept, or nothing where it is missing, damaged or of other files."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    if digest != _digest(fingerprint, data) or len(data) != 8 * length:
        return None
    return np.frombuffer(data, "<i8")


def _save_index(path: pathlib.Path, fingerprint: bytes, boundaries: np.ndarray) -> None:
    data = boundaries.astype("<i8").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same index: each writes its own file, the last one stays.
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with open(descriptor, "wb") as file:
                file.write(_digest(fingerprint, data) + data)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        warnings.warn(
            f"The index of the records cannot be kept in {path.parent} ({error}): every start "
            "will make it anew. Set METAFORMER_JAX_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def _digest(fingerprint: bytes, data: bytes) -> bytes:
    return hashlib.sha256(fingerprint + data).digest()
