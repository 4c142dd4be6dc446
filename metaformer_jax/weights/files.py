"""Reading and writing checkpoint files: PyTorch's `.pth`, without running it, and safetensors."""

import argparse
import contextlib
import hashlib
import os
import pathlib
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from metaformer_jax.paths import local_path
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.integrity import crc32c_of_tensors

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Under which training scripts keep the weights. The first that is there counts: where a script
# keeps an average of the weights as well, that average is what it evaluates.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers put before every key: DataParallel, torch.compile, and usually Lightning modules.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# The number of averaged models, which torch's AveragedModel keeps beside the keys under "module.".
_NUM_AVERAGED = "n_averaged"
# What the header of a safetensors file says beside the tensors begins with this where this project
# wrote it.
OWN_KEY = "metaformer_jax"
_CHECKSUM_KEY = f"{OWN_KEY}_crc32c"
_FOLDER_ATTRIBUTE = 0x10
_PIECE_BYTES = 1 << 20
# By which torch tells its two formats apart.
_ZIP_MAGIC = b"PK\x03\x04"
# Some 150 bytes describe a tensor, and the largest model has 900 of them.
_MAX_HEADER_BYTES = 16 << 20


# What torch may build besides tensors and Python's own values: NumPy's numbers, by the name of its
# first version as well, and the arguments of a program.
_NUMBER = np.float64(0).__reduce__()[0]
_PLAIN = [
    argparse.Namespace,
    _NUMBER,
    (_NUMBER, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The end of a file's name that tells its format, such as `.pth`, in lower case."""
    return pathlib.Path(path).suffix.lower()


def check_is_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, if a file is there.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: something else, or an empty file.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be an existing checkpoint, got {path}.")
    if not path.is_file():
        raise CheckpointError(f"`path` must be a file, got {path}, which is something else.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"`path` must be a checkpoint, got {path}, which is empty.")
    return path


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    # In large pieces: beside another thread, the interpreter is waited for after each.
    buffer = memoryview(bytearray(16 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def read_tensors(
    path: str | os.PathLike[str], *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], str | None]:
    """The tensors of a file by key, and the entry of a training checkpoint that they stood under.

    Damage shows wherever the file has checksums: in the zip files that `torch.save` writes, and in
    the safetensors files that this project writes. Other safetensors files, and those of torch
    before 1.6, have none for their data.

    Args:
        path: `.safetensors`, or a file that `torch.save` wrote.
        entry: which entry of a training checkpoint to take, by default the first of `ENTRIES`
            that it has.

    Raises:
        CheckpointError: the file is damaged, no checkpoint, or asks to run code.
        FileNotFoundError: it does not exist.
        ImportError: a PyTorch file, and torch is not installed.
    """
    path = check_is_file(path)
    if suffix_of(path) == SAFETENSORS:
        if entry is not None:
            raise CheckpointError(
                f"`entry` must be left out for a safetensors file, got {entry!r}."
            )
        with _open_safetensors(path) as file:
            tensors = {key: _tensor(file, key, path) for key in file.offset_keys()}
            metadata = dict(file.metadata() or {})
        _check_tensors(path, tensors, metadata)
    else:
        content = _load_torch(path)
        state_dict, entry = _unwrap(content, entry, path)
        tensors = {str(key): _to_numpy(key, state_dict[key], path) for key in list(state_dict)}
    return _without_prefix(tensors), entry


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a safetensors file says beside the tensors; nothing for other files.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = check_is_file(path)
    if suffix_of(path) != SAFETENSORS:
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a `.safetensors` or, by any other suffix, a PyTorch file of these tensors.

    Args:
        path: the file; what is there is replaced.
        tensors: float32, float16 or bfloat16 arrays by key.
        metadata: kept in a safetensors file's header, beside the tensors' checksum; a PyTorch file
            holds the tensors alone.

    Raises:
        OSError: it could not be written.
    """
    path = pathlib.Path(path)
    if suffix_of(path) == SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        # The writer takes the memory as it stands, whatever the strides are.
        contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        checksum = crc32c_of_tensors(contiguous, metadata)
        # The writer replaces the file by a new one that only its owner may read.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        with _as_os_error(path, SafetensorError):
            save_file(contiguous, path, metadata={**metadata, _CHECKSUM_KEY: checksum})
        path.chmod(mode)
    else:
        torch = import_torch()
        with _as_os_error(path, RuntimeError):
            torch.save({key: _to_torch(tensor) for key, tensor in tensors.items()}, path)


@contextlib.contextmanager
def _as_os_error(path: pathlib.Path, kind: type[Exception]) -> Iterator[None]:
    # Each library has its own exception for a full disk.
    try:
        yield
    except kind as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"{path} could not be written completely: {reason}. Make room, or choose another place."
        ) from error


def import_torch() -> Any:
    """The torch module.

    Raises:
        ImportError: torch is not installed; the message says how to get it.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch files need torch, which is not installed: install metaformer-jax[torch]. "
            "A .safetensors file or a converted folder works without it."
        ) from error
    return torch


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"`path` must be a whole safetensors file, got {path} of {size} bytes, whose header "
            f"would take {header_bytes}. It is truncated or of another format: fetch it again."
        )
    try:
        # Reading, not mapping: a mapped file counts as memory until it is closed.
        with safe_open(path, framework="np", backend="pread") as file:
            yield file
    except CheckpointError:
        raise
    except (SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"`path` must be a whole safetensors file, got {path}: {error}. Fetch it again."
        ) from error


def _tensor(file: Any, key: str, path: pathlib.Path) -> np.ndarray:
    try:
        return file.get_tensor(key)
    # safetensors looks up a dtype that NumPy does not have.
    except AttributeError as error:
        raise CheckpointError(
            f"`{key}` must have a dtype that NumPy knows, got {file.get_slice(key).get_dtype()} in "
            f"{path}. Save it as float32 or bfloat16."
        ) from error


def _check_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    if not any(key.startswith(OWN_KEY) for key in metadata):
        return
    expected = metadata.pop(_CHECKSUM_KEY, "none")
    if (checksum := crc32c_of_tensors(tensors, metadata)) != expected:
        raise CheckpointError(
            f"The tensors of {path} must have the CRC-32C that stands in its header, {expected}, "
            f"got {checksum}. It is damaged, or of an earlier version: delete it, and fetch or "
            "convert it again."
        )


def _load_torch(path: pathlib.Path) -> Any:
    torch = import_torch()
    _check_zip(path)
    try:
        # Training scripts keep arguments and figures beside the weights; these run nothing.
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    # The loader meets bytes of any kind, and answers with errors of any kind.
    except Exception as error:
        message = str(error)
        if unsafe := re.search(r"GLOBAL (\w\S*)", message):
            raise CheckpointError(
                f"`path` must hold tensors and plain values, got {path}, which wants to run "
                f"{unsafe[1]}. It was not run. If you trust the file's source, save its state "
                "dict alone: torch.save(model.state_dict(), ...)."
            ) from error
        # Not torch's own words on pickles: they advise to load the file without care.
        is_pickle = isinstance(error, pickle.UnpicklingError)
        reason = "" if is_pickle else f": {message}".splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"`path` must be a whole file as torch.save writes it, got {path}{reason}. It is "
            "truncated or no checkpoint: fetch it again."
        ) from error


def _check_zip(path: pathlib.Path) -> None:
    # torch compares none of the checksums that it writes, and would unpack what is compressed.
    with open(path, "rb") as start:
        if start.read(4) != _ZIP_MAGIC:
            return
    try:
        with zipfile.ZipFile(path) as file:
            reason = _foreign_member(file, path.stat().st_size)
            # Each by its entry, for damage can give two of them one name.
            for member in file.infolist() if not reason else ():
                with file.open(member) as content:
                    while content.read(_PIECE_BYTES):
                        pass
    # Whatever the damage meets, each of zipfile's layers has errors of its own.
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
        reason = str(error) or type(error).__name__
    if reason:
        raise CheckpointError(
            f"`path` must be a whole file as torch.save writes it, got {path}: {reason}. It is "
            "truncated, damaged or made by another program: fetch it again."
        )


def _foreign_member(file: zipfile.ZipFile, num_bytes: int) -> str:
    """What torch.save would not have written, by the list of members alone."""
    if len(set(file.namelist())) < len(file.namelist()):
        return "several members have one name"
    for member in file.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            return f"{member.filename!r} is compressed"
        # A folder has no content: torch would leave the tensor's memory as it was.
        if member.filename.endswith("/") or member.external_attr & _FOLDER_ATTRIBUTE:
            return f"{member.filename!r} is marked as a folder"
        place = pathlib.PurePosixPath(member.filename)
        if place.is_absolute() or ".." in place.parts:
            return f"{member.filename!r} names another place"
    if sum(member.file_size for member in file.infolist()) > num_bytes:
        return "its members overlap"
    return ""


def _unwrap(
    content: Any, entry: str | None, path: pathlib.Path
) -> tuple[Mapping[str, Any], str | None]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"`path` must hold a state dict, got {path} with a {type(content).__name__}."
        )
    if entry is None:
        there_are = [e for e in ENTRIES if isinstance(content.get(e), Mapping) and content[e]]
        entry = next(iter(there_are), None)
    elif not isinstance(content.get(entry), Mapping):
        raise CheckpointError(
            f"`entry` must be a state dict in {path}, got {entry!r}. The file has "
            f"{', '.join(map(str, list(content)[:10]))}."
        )
    return (content if entry is None else content[entry]), entry


def _to_numpy(key: str, value: Any, path: pathlib.Path) -> np.ndarray:
    torch = import_torch()
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"`path` must hold a state dict of tensors, got {path} with a {type(value).__name__} "
            f"under {key!r}. Weights are looked for at the top and under {', '.join(ENTRIES)}."
        )
    value = value.detach()
    try:
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"`path` must hold dense floating-point tensors, got {path} with {value.dtype}, "
            f"{value.layout}, on {value.device} under {key!r}."
        ) from error


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    averaged = {key: tensor for key, tensor in tensors.items() if key != _NUM_AVERAGED}
    if averaged and all(key.startswith("module.") for key in averaged):
        tensors = averaged
    for prefix in _PREFIXES * 2:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _to_torch(array: np.ndarray) -> Any:
    torch = import_torch()
    # torch warns of memory that it must not write to, such as a JAX array's.
    array = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
