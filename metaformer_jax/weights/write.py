"""Writing weights: a converted folder, one portable file, a PyTorch checkpoint in either layout."""

import os
import re
from typing import Any

import numpy as np

from metaformer_jax.models import MetaFormer, model_info
from metaformer_jax.weights import converted
from metaformer_jax.weights.convert import (
    Variables,
    check_dtypes,
    check_has_values,
    check_layout_has,
    check_name,
    to_tensors,
    variables_of,
)
from metaformer_jax.weights.files import SAFETENSORS, TORCH_SUFFIXES, suffix_of, write_tensors
from metaformer_jax.weights.outputs import check_output, whole_output

_FILE_SUFFIXES = (SAFETENSORS, *TORCH_SUFFIXES)
# A folder may be called s18_lr0.1 or s18.2: these are no formats.
_FORMAT = re.compile(r"\.[a-z]\w*")


def save_weights(
    model: MetaFormer,
    path: str | os.PathLike[str],
    *,
    name: str,
    layout: str | None = None,
    force: bool = False,
    **source: Any,
) -> converted.Record:
    """Writes a model's weights: a converted folder or, depending on the suffix, a single file.

    Variables that are neither `nnx.Param` nor `Frozen` are left out, such as averages of a norm
    over batches.

    Args:
        model: the model, with all its arrays on this host's devices.
        path: a folder; `.safetensors`, by default in this project's own layout; or `.pth` and
            the like, by default in the sail layout, which needs torch.
        name: the published name that the model was built by.
        layout: of a file: `"sail"`, `"timm"` or `"flax"`.
        force: replaces an earlier output.
        **source: the fields of `converted.Record` that describe where the weights come from.

    Returns:
        The record that is written with the weights.

    Raises:
        FileExistsError: something is at the path.
        ValueError: the name is unknown or belongs to another model, the path has the suffix of
            another format, the layout cannot hold the model, the model is abstract, or a parameter
            is not float32, float16 or bfloat16.
    """
    check_has_values(model)
    variables = {key: np.asarray(value[...]) for key, value in variables_of(model).items()}
    return write_variables(
        variables, path, name=name, model=model, layout=layout, force=force, **source
    )


def write_variables(
    variables: Variables,
    path: str | os.PathLike[str],
    *,
    name: str,
    model: MetaFormer,
    layout: str | None = None,
    force: bool = False,
    **source: Any,
) -> converted.Record:
    """`save_weights` of values that are given apart from the model, which may be abstract."""
    check_name(name, model)
    check_dtypes(variables)
    layout = check_destination(path, name=name, layout=layout, force=force)
    record = converted.make_record(name, model, **source)
    if not is_file_name(path):
        record = converted.write_folder(path, variables, record, force=force)
    elif suffix_of(path) == SAFETENSORS and layout == "flax":
        converted.write_portable_file(path, variables, record, force=force)
    else:
        with whole_output(path, force=force, is_folder=False) as partial:
            write_tensors(partial, to_tensors(variables, layout), {"format": "pt"})
    return record


def check_destination(
    path: str | os.PathLike[str], *, name: str, layout: str | None, force: bool
) -> str:
    """The layout that will be written, if the output is free and can hold the model.

    Raises:
        FileExistsError: something is there.
        ValueError: an unknown name, the suffix of a format that is not written, or the layout
            cannot hold the model.
    """
    model_info(name)
    suffix = suffix_of(path)
    if not is_file_name(path) and _FORMAT.fullmatch(suffix):
        raise ValueError(
            f"`output` must end in {', '.join(_FILE_SUFFIXES)}, or for a folder in no suffix, got "
            f"{os.fspath(path)!r}. Choose another name."
        )
    check_output(path, force=force, is_folder=not is_file_name(path))
    if not is_file_name(path):
        if layout not in (None, "flax"):
            raise ValueError(f"`layout` must be left out for a folder, got {layout!r}.")
        return "flax"
    if layout is None:
        layout = "flax" if suffix == SAFETENSORS else "sail"
    if suffix != SAFETENSORS and layout == "flax":
        raise ValueError(
            f"`layout` must be sail or timm for a PyTorch file, got 'flax'. A {SAFETENSORS} file "
            "can hold this project's own layout."
        )
    check_layout_has(layout, name)
    return layout


def is_file_name(path: str | os.PathLike[str]) -> bool:
    """Whether an output of this name is a file; anything else is a folder."""
    return suffix_of(path) in _FILE_SUFFIXES
