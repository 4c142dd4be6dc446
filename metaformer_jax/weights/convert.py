"""Checkpoints to variables and back, exactly or not at all."""

import concurrent.futures
from collections.abc import Container, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from metaformer_jax.models import Frozen, MetaFormer, list_models, model_info
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.layouts import Path, Transform, dotted, key_table
from metaformer_jax.weights.recognition import (
    TIMM_FAMILIES,
    CheckpointInfo,
    published_architecture,
    recognise,
)

Variables = dict[Path, np.ndarray]

# What float32 holds exactly. Anything wider would have to be rounded.
_EXACT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def variables_of(model: MetaFormer) -> dict[Path, nnx.Variable[Any]]:
    """Everything that a checkpoint of the model holds: parameters and frozen matrices, by path."""
    flat: Any = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
    return dict(flat)


def check_has_values(model: nnx.Module, *, but: Container[Path] = ()) -> None:
    """Refuses a model that has shapes in place of arrays, as `nnx.eval_shape` makes them.

    Args:
        model: the model, or a part of it.
        but: paths at which a shape is enough.

    Raises:
        ValueError: a parameter, or the state of a random stream, has no value.
    """
    flat: Any = nnx.to_flat_state(nnx.state(model))
    shapes = [
        dotted(path)
        for path, variable in flat
        if path not in but and isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    ]
    if shapes:
        raise ValueError(
            f"`model` must have values, got {len(shapes)} shapes without any, such as {shapes[0]}. "
            "Build it without nnx.eval_shape, or with its weights by "
            "create_model(..., pretrained=path, rngs=rngs)."
        )


def to_variables(tensors: dict[str, np.ndarray], model: MetaFormer) -> Variables:
    """The variables that a checkpoint gives a model, float32, in this project's axis order.

    Args:
        tensors: the checkpoint in any layout, which shows from its keys. It is emptied on the
            way, so that checkpoint and variables never stand in memory whole at the same time.
        model: gives the paths and shapes; it may be abstract (`nnx.eval_shape`).

    Raises:
        CheckpointError: the checkpoint is of another architecture, or any tensor is missing,
            unexpected, of another shape or of a type that float32 cannot hold, or not finite. All
            that is wrong stands in the one message.
    """
    info = recognise(tensors)
    _check_architecture(info, model)
    shapes = {path: tuple(variable.shape) for path, variable in variables_of(model).items()}
    table = key_table(shapes, info.layout)
    _check_tensors(tensors, shapes, table, info, model)

    def convert(path: Path) -> np.ndarray:
        key, transform = table[path]
        return _contiguous(transform.from_torch(tensors.pop(key)))

    # Two threads, for transposing waits for memory.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as executor:
        return dict(zip(table, executor.map(convert, table), strict=True))


def to_tensors(variables: Mapping[Path, Any], layout: str) -> dict[str, np.ndarray]:
    """The checkpoint that holds these variables; the inverse of `to_variables`, bit by bit.

    Args:
        variables: all of one model's, see `variables_of`.
        layout: `"sail"`, `"timm"` or `"flax"`.
    """
    return {
        key: np.ascontiguousarray(transform.to_torch(np.asarray(variables[path][...])))
        for path, (key, transform) in key_table(variables, layout).items()
    }


def check_name(name: str, model: MetaFormer) -> None:
    """Refuses a published name of another architecture than the model's.

    A network of one's own that has no published architecture's blocks may go by any of them.

    Raises:
        ValueError: no published model has this name, or it is one of another architecture.
    """
    wanted = model_info(name).architecture
    if published := published_architecture(model.spec):
        fitting: tuple[str, ...] = (published,)
    else:
        shapes = {dotted(path): value.get_value() for path, value in variables_of(model).items()}
        fitting = recognise(shapes).architectures
    if fitting and wanted not in fitting:
        raise ValueError(
            f"`name` must be {' or '.join(fitting)}, or one of its other names, for this model, "
            f"got {name!r}. Give the name that the model was built by."
        )


def check_dtypes(variables: Mapping[Path, Any]) -> None:
    """Refuses to write what would not be read.

    Raises:
        ValueError: a value is not float32, float16 or bfloat16.
    """
    for path, array in variables.items():
        if array.dtype not in _EXACT_DTYPES:
            raise ValueError(
                f"`model` must have parameters in float32, float16 or bfloat16, got {array.dtype} "
                f"for {dotted(path)}. Cast it first."
            )


def check_layout_has(layout: str, name: str) -> None:
    """Refuses to write a model in a layout whose code cannot build it.

    Raises:
        ValueError: the layout is timm's, and the family is one that timm does not have.
    """
    family = model_info(name).family
    if layout == "timm" and family not in TIMM_FAMILIES:
        raise ValueError(
            f"`layout` must be sail or flax for {name}, got 'timm'. timm has no model of the "
            f"{family} family."
        )


def _contiguous(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array, dtype=np.float32)
    # A transposed matrix in strips of whole cache lines: twice as fast as in one go.
    copy = np.empty(array.shape, np.float32)
    for start in range(0, array.shape[1], 16):
        copy[:, start : start + 16] = array[:, start : start + 16]
    return copy


def _check_architecture(info: CheckpointInfo, model: MetaFormer) -> None:
    wanted = published_architecture(model.spec)
    if wanted is None or not info.architectures or wanted in info.architectures:
        return
    raise CheckpointError(
        f"The checkpoint must be one of {wanted}, got another architecture: this looks like "
        f"{' or '.join(info.architectures)} ({info.layout} layout). Name the model that it "
        "belongs to."
    )


def _check_tensors(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[Path, tuple[int, ...]],
    table: Mapping[Path, tuple[str, Transform]],
    info: CheckpointInfo,
    model: MetaFormer,
) -> None:
    expected = {
        key: transform.shape_in_torch(shapes[path]) for path, (key, transform) in table.items()
    }
    missing, mis_shaped, inexact, not_finite = [], [], [], []
    for key, shape in expected.items():
        if key not in tensors:
            missing.append(f"{key} {list(shape)}")
            continue
        tensor = tensors[key]
        if tensor.shape != shape:
            mis_shaped.append(f"{key} must be {list(shape)}, got {list(tensor.shape)}")
        elif tensor.dtype not in _EXACT_DTYPES:
            inexact.append(f"{key} must be float32, float16 or bfloat16, got {tensor.dtype}")
        elif not (finite := np.isfinite(tensor)).all():
            not_finite.append(f"{key}: {int(finite.size - finite.sum())} of {finite.size} values")
    unexpected = [f"{key} {list(t.shape)}" for key, t in tensors.items() if key not in expected]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "mis-shaped": mis_shaped,
        "of another type": inexact,
        "NaN or infinite": not_finite,
    }
    if not any(problems.values()):
        return
    counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in problems.items() if keys)
    lines = [f"  {kind}: {key}" for kind, keys in problems.items() for key in keys]
    name = published_architecture(model.spec) or "the model"
    raise CheckpointError(
        f"The checkpoint must hold each tensor of {name} as the {info.layout} layout names and "
        f"shapes it, and no other, got {counts}:\n"
        + "\n".join([*lines, *_remedies(info, model, mis_shaped)])
    )


def _remedies(info: CheckpointInfo, model: MetaFormer, mis_shaped: list[str]) -> list[str]:
    remedies = []
    if info.num_classes != model.num_classes:
        wanted = published_architecture(model.spec)
        names = [
            name
            for name in list_models()
            if model_info(name).architecture == wanted
            and model_info(name).num_classes == info.num_classes
        ]
        instead = f", or take a name that has them, such as {names[0]}" if names else ""
        remedies.append(
            f"The checkpoint's head has {info.num_classes} classes, the model's "
            f"{model.num_classes}: give num_classes to match{instead}."
        )
    if info.in_channels not in (None, model.in_channels):
        remedies.append(
            f"The checkpoint's images have {info.in_channels} channels, the model's "
            f"{model.in_channels}: give in_channels to match."
        )
    if any("random_matrix" in problem for problem in mis_shaped):
        remedies.append(
            "RandFormer's matrices belong to one image size: load them at their own, then "
            "resample them with metaformer_jax.weights.set_image_size(..., resample=True)."
        )
    return remedies
