"""Files read by ranges of bytes: local ones, and remote ones (gs://, ...) through fsspec."""

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

# What remote file systems call the things that change when a file does.
_VERSION_FIELDS = ("generation", "etag", "md5hash", "mtime", "updated", "lastmodified", "created")
# Requests and small reads at a time: each waits for a disk or for a network.
_THREADS = 32
# A prepared ImageNet has 1,088 files, and many systems let a program open 1,024 until it asks.
_OPEN_FILES = 1 << 16

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclasses.dataclass(frozen=True)
class FileState:
    """What tells one state of a file from another without reading it.

    Attributes:
        size: in bytes.
        version: the time of the last change, or a number that a remote store counts up.
    """

    size: int
    version: str


class RangeFile(Protocol):
    """A file that several threads may read at once."""

    def read(self, start: int, end: int) -> bytes:
        """The bytes `[start, end)`, fewer where the file ends before."""
        ...


def is_remote(path: str) -> bool:
    """Whether a path names a file on another machine, as `gs://bucket/file` does."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of an entry of a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def list_folder(folder: str) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    try:
        if not is_remote(folder):
            return sorted(os.listdir(folder))
        files, path = _file_system(folder)
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False))
        return sorted(names)
    except (FileNotFoundError, NotADirectoryError):
        return []


def state(path: str) -> FileState:
    """Size and version of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not is_remote(path):
        status = os.stat(path)
        return FileState(status.st_size, str(status.st_mtime_ns))
    files, inner = _file_system(path)
    info = {key.lower(): value for key, value in files.info(inner).items()}
    version = [str(info[field]) for field in _VERSION_FIELDS if field in info]
    return FileState(int(info["size"]), " ".join(version))


def open_file(path: str) -> RangeFile:
    """Opens a file for reading by ranges; it closes itself when nobody holds it any more."""
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


def read_file(path: str) -> bytes:
    """The whole content of a file."""
    return open_file(path).read(0, state(path).size)


def in_threads(
    function: Callable[[Input], Output], inputs: Sequence[Input], *, num_threads: int = _THREADS
) -> list[Output]:
    """The function of each input, in order; the first error stops the rest."""
    with ThreadPoolExecutor(max(1, min(num_threads, len(inputs)))) as pool:
        try:
            return list(pool.map(function, inputs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class OpenOnce:
    """Files of a list, each opened when it is first asked for, once in every process.

    Args:
        paths: the files; only these are pickled.
        opener: opens one.
    """

    def __init__(self, paths: Sequence[str], opener: Callable[[str], Any]):
        self._paths = tuple(paths)
        self._opener = opener
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Any:
        file = self._open.get(number)
        if file is None:
            with self._lock:
                if number not in self._open:
                    allow_open_files()
                    self._open[number] = self._opener(self._paths[number])
                file = self._open[number]
        return file

    def __reduce__(self) -> tuple[type["OpenOnce"], tuple[Any, ...]]:
        return OpenOnce, (self._paths, self._opener)


def allow_open_files() -> None:
    """Raises this process's soft limit of open files towards its hard limit."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _LocalFile:
    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        # Records are read in random order: what follows one is not worth fetching.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._descriptor, end - start, start)


class _RemoteFile:
    def __init__(self, path: str):
        self._files, self._path = _file_system(path)

    def read(self, start: int, end: int) -> bytes:
        return self._files.cat_file(self._path, start=start, end=end) if end > start else b""


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    # An unknown scheme, or a scheme whose package is missing; fsspec says which.
    except (ValueError, ImportError) as error:
        raise ValueError(f"{path!r} must be a path that fsspec reads, got: {error}.") from error
