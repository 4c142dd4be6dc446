"""Reading weights wherever they stand: a converted folder, a training run, a file."""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
from typing import Any

import numpy as np

from metaformer_jax.models import model_info
from metaformer_jax.paths import local_path
from metaformer_jax.weights import converted, workdir
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.files import (
    check_is_file,
    read_tensors,
    sha256,
)
from metaformer_jax.weights.recognition import published_architecture, recognise


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors as they were read, and where from, as fields of `converted.Record`."""

    tensors: dict[str, np.ndarray]
    source: dict[str, Any]


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    entry: str | None = None,
    with_hash: bool = False,
) -> Checkpoint:
    """Reads a converted folder, a run's workdir or checkpoint, a `.safetensors` or a `.pth` file.

    Args:
        path: the folder or file.
        name: the published model that it should be; where keys and shapes cannot tell, what the
            file or its record calls itself must not contradict it.
        entry: which entry of a training checkpoint to take, "params" or "ema" of a workdir.
        with_hash: also compute the SHA-256 of a file.

    Raises:
        CheckpointError: damaged, no checkpoint, or of another model.
        FileNotFoundError: nothing is at the path.
    """
    path = local_path(path)
    source: dict[str, Any] = {}
    if path.is_dir():
        if (folder := workdir.workdir_of(path)) is not None:
            tensors, entry = workdir.read_workdir(path, entry=entry)
            spec = workdir.read_spec(folder)
            called = (spec and published_architecture(spec)) or ""
            source = {"source_entry": entry}
        elif entry is not None:
            raise CheckpointError(
                f"`entry` must be left out for a converted folder, got {entry!r}."
            )
        else:
            tensors, record = converted.read_folder(path)
            called = record.model
    else:
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
            hashing = executor.submit(sha256, check_is_file(path)) if with_hash else None
            tensors, entry = read_tensors(path, entry=entry)
            digest = hashing.result() if hashing else None
        called = _own_name(path) or path.name
        source = {"source_file": path.name, "source_sha256": digest, "source_entry": entry}
        source["source_layout"] = recognise(tensors).layout
    if name is not None:
        _check_called(called, name, tensors, is_file_name=called == path.name)
    return Checkpoint(tensors, source)


def _own_name(path: pathlib.Path) -> str | None:
    """What a portable file's record calls it; None for other files."""
    return converted.read_record(path).model if converted.is_portable_file(path) else None


def _check_called(
    called: str, name: str, tensors: dict[str, np.ndarray], *, is_file_name: bool
) -> None:
    candidates = recognise(tensors).architectures
    wanted = model_info(name).architecture
    if len(candidates) < 2 or wanted not in candidates:
        return
    others = (candidate for candidate in candidates if candidate != wanted)
    other = next((o for o in others if re.match(rf"{o}(?![a-z0-9])", called)), None)
    if other is not None:
        remedy = "Take that model, or rename the file." if is_file_name else "Take that model."
        raise CheckpointError(
            f"The checkpoint must be one of {wanted}, got one called {called}: this looks like "
            f"{other}, which has the same keys and shapes. {remedy}"
        )
