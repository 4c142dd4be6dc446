"""Checksums of a folder's files and of tensors, by which every later change to them shows."""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from metaformer_jax.weights.errors import CheckpointError

# The file that holds them, beside what they are of.
CHECKSUMS_NAME = "checksums.json"
_PIECE_BYTES = 16 << 20


def write_checksums(folder: str | os.PathLike[str], *, without: Collection[str] = ()) -> None:
    """Writes `checksums.json`: for each file in the folder its size and CRC-32C.

    Args:
        folder: all files in it, at any depth, count.
        without: files directly in it that change later.
    """
    folder = pathlib.Path(folder)
    files = {
        name: [path.stat().st_size, crc32c(path)]
        for name, path in sorted(_files(folder).items())
        if name not in without
    }
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"files": files}, indent=1) + "\n")


def check_files(folder: str | os.PathLike[str]) -> None:
    """Compares each file with its checksum; files that have none may be there as well.

    All files are read, at about 5 GB/s from memory.

    Raises:
        CheckpointError: one is missing, is shorter or longer, or holds something else; or the
            checksums are missing or damaged.
    """
    folder = pathlib.Path(folder)
    expected = _read_checksums(folder)
    there = _files(folder)
    for name, (size, checksum) in expected.items():
        path = there.get(name)
        if path is None:
            raise CheckpointError(f"{folder} must hold {name}, got no such file.")
        if (actual := path.stat().st_size) != size:
            raise CheckpointError(f"{path} must have {size} bytes, got {actual}.")
        if (actual_checksum := crc32c(path)) != checksum:
            raise CheckpointError(
                f"{path} must have the CRC-32C {checksum}, got {actual_checksum}: its content "
                "has changed."
            )


def crc32c(path: str | os.PathLike[str]) -> str:
    """The CRC-32C of a file's content, as eight hexadecimal digits."""
    checksum = _checksum()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            checksum.update(piece)
    return checksum.hexdigest().decode()


def crc32c_of_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The CRC-32C of names, types, shapes and values, and of what is said beside them."""
    checksum = _checksum(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        checksum.update(f"{name} {tensor.dtype} {tensors[name].shape}\n".encode())
        checksum.update(tensor.reshape(-1).view(np.uint8))
    return checksum.hexdigest().decode()


def _checksum(data: bytes = b"") -> Any:
    # Models are made and trained where this package is not installed.
    import google_crc32c

    return google_crc32c.Checksum(data)


def _read_checksums(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    path = folder / CHECKSUMS_NAME
    try:
        files = json.loads(path.read_bytes())["files"]
        return {str(name): (int(size), str(checksum)) for name, (size, checksum) in files.items()}
    except OSError as error:
        raise CheckpointError(
            f"{folder} must hold {CHECKSUMS_NAME}, which is written last, got {error.strerror}."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be as it was written, got content that is damaged."
        ) from error


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.name != CHECKSUMS_NAME and path.is_file()
    }
