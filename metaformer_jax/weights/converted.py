"""Converted weights: a folder with an Orbax checkpoint and a small JSON, or one portable file."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from metaformer_jax.messages import first_line
from metaformer_jax.models import Frozen, MetaFormer
from metaformer_jax.paths import local_path
from metaformer_jax.weights.convert import Variables, variables_of
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.files import (
    OWN_KEY,
    SAFETENSORS,
    TORCH_SUFFIXES,
    read_metadata,
    suffix_of,
    write_tensors,
)
from metaformer_jax.weights.integrity import check_files, write_checksums
from metaformer_jax.weights.layouts import dotted
from metaformer_jax.weights.outputs import RECORD_NAME, VARIABLES_NAME, whole_output

FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The origin of converted weights, kept with them as JSON.

    Attributes:
        model: the published name to which they belong.
        num_classes: classes of the head.
        in_channels: channels of the images.
        image_size: height and width in pixels.
        params: trainable parameters.
        frozen_params: frozen ones.
        source_file: the checkpoint's file name; None for weights that were trained here.
        source_sha256: of that file.
        source_layout: of that file.
        source_entry: the entry of a training checkpoint that was used.
        date: of the conversion, in UTC.
        format: version of the folder's format.
    """

    model: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    params: int
    frozen_params: int
    source_file: str | None = None
    source_sha256: str | None = None
    source_layout: str | None = None
    source_entry: str | None = None
    date: str
    format: int = FORMAT

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def make_record(name: str, model: MetaFormer, **source: Any) -> Record:
    """The record of a model's weights as of now.

    Args:
        name: the published name.
        model: gives sizes and counts; it may be abstract.
        **source: the fields of `Record` that tell where they come from.
    """
    sizes = {True: 0, False: 0}
    for variable in variables_of(model).values():
        sizes[isinstance(variable, Frozen)] += math.prod(variable.shape)
    return Record(
        model=name,
        num_classes=model.num_classes,
        in_channels=model.in_channels,
        image_size=model.image_size,
        params=sizes[False],
        frozen_params=sizes[True],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **source,
    )


def write_folder(
    path: str | os.PathLike[str], variables: Variables, record: Record, *, force: bool = False
) -> Record:
    """Writes the folder, whole or not at all, and gives the record that stands in it.

    Raises:
        FileExistsError: something is there, and it is no earlier output or `force` is not given.
        ValueError: this is not the first process of a distributed program.
    """
    import jax
    import orbax.checkpoint as ocp

    if jax.process_index():
        raise ValueError(
            "A folder must be written by process 0, by which alone Orbax writes, got process "
            f"{jax.process_index()}. Write a .safetensors file, or let process 0 write."
        )
    with whole_output(path, force=force, is_folder=True) as partial:
        with ocp.Checkpointer(orbax_handler(), **_alone()) as checkpointer:
            checkpointer.save(
                partial / VARIABLES_NAME, args=ocp.args.PyTreeSave(_nested(variables))
            )
        (partial / RECORD_NAME).write_text(record.to_json())
        write_checksums(partial)
    return record


def write_portable_file(
    path: str | os.PathLike[str], variables: Variables, record: Record, *, force: bool = False
) -> None:
    """Writes one `.safetensors` file with this project's names and axes and the record.

    Raises:
        FileExistsError: something is there, and it is no file or `force` is not given.
    """
    tensors = {dotted(path): array for path, array in variables.items()}
    with whole_output(path, force=force, is_folder=False) as partial:
        write_tensors(partial, tensors, {OWN_KEY: record.to_json()})


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a complete folder of converted weights is there."""
    return (pathlib.Path(path) / RECORD_NAME).is_file()


def is_portable_file(path: str | os.PathLike[str]) -> bool:
    """Whether this is a `.safetensors` file that this project wrote in its own layout.

    Raises:
        CheckpointError: it is damaged, or no file.
        FileNotFoundError: nothing is there.
    """
    return OWN_KEY in read_metadata(path)


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record of converted weights: the JSON of a folder, or in a portable file's header.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    path = local_path(path)
    try:
        if path.is_file():
            text = read_metadata(path).get(OWN_KEY)
        else:
            text = (path / RECORD_NAME).read_text() if is_folder(path) else None
        if text is None:
            raise CheckpointError(
                f"`path` must be converted weights, got {path}, which has no {RECORD_NAME}. "
                f"{_remedy(path)}"
            )
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"The {RECORD_NAME} of {path} must be of format {FORMAT}, got "
                f"{fields['format']!r}. Update metaformer_jax, or convert the weights again."
            )
        height, width = fields["image_size"]
        record = Record(**{**fields, "image_size": (height, width)})
        if not isinstance(record.model, str):
            raise TypeError(f"`model` must be text, got {record.model!r}")
        return record
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The {RECORD_NAME} of {path} must be as the conversion wrote it, got {error!r}. "
            "Convert the weights again."
        ) from error


def _remedy(path: pathlib.Path) -> str:
    inside = sorted(path.iterdir()) if path.is_dir() else []
    checkpoints = [file for file in inside if suffix_of(file) in (SAFETENSORS, *TORCH_SUFFIXES)]
    if checkpoints:
        return f"Give the file that is meant, such as {checkpoints[0]}."
    return "`python -m metaformer_jax.convert` makes them."


def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Record]:
    """The tensors of a folder in the flax layout, and its record.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    import orbax.checkpoint as ocp

    record = read_record(path)
    check_files(path)
    folder = pathlib.Path(path).absolute() / VARIABLES_NAME
    try:
        with ocp.Checkpointer(orbax_handler(), **_alone()) as checkpointer:
            nested = checkpointer.restore(folder, args=ocp.args.PyTreeRestore())
    # Damage shows in any layer below: Orbax, TensorStore, JSON.
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{folder} must be a whole Orbax checkpoint, got: {reason}. Convert the weights again."
        ) from error
    return dict(flat_tensors(nested)), record


def orbax_handler() -> Any:
    """Reads and writes arrays as NumPy's, each process for itself."""
    import jax
    import orbax.checkpoint as ocp

    # Nobody else holds the arrays while they are written: copying them first would double the
    # memory. Trained weights hardly compress, and trying takes three times as long.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
        multiprocessing_options=_alone()["multiprocessing_options"],
    )


def _alone() -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    # Each process of a pod acts for itself; none waits for the others.
    index = jax.process_index()
    return {
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            primary_host=index,
            active_processes={index},
            barrier_sync_key_prefix=f"metaformer_weights_{index}",
        )
    }


def _nested(variables: Variables) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in variables.items():
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def flat_tensors(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of nested dicts by dotted name, as the flax layout names them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_tensors(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
