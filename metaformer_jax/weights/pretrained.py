"""Models with weights: by published name, from a folder, from a checkpoint file."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metaformer_jax import models
from metaformer_jax.models import MetaFormer
from metaformer_jax.models.arguments import check_rngs
from metaformer_jax.weights.convert import (
    Variables,
    check_has_values,
    check_name,
    to_variables,
    variables_of,
)
from metaformer_jax.weights.read import Checkpoint, read_checkpoint
from metaformer_jax.weights.recognition import recognise
from metaformer_jax.weights.surgery import (
    NUM_IMAGENET_1K,
    change_in_channels,
    map_head_to_imagenet_1k,
    replace_head,
)

PathLike = str | os.PathLike[str]


def create_model(
    name: str,
    *,
    pretrained: bool | PathLike = False,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.0,
    dtype: Any = jnp.float32,
    remat: str | bool = "none",
    scan: int = 0,
    rngs: nnx.Rngs,
) -> MetaFormer:
    """Builds a published model, with random weights or with trained ones.

    Args:
        name: one of `list_models()`.
        pretrained: False for random weights; True for the published ones, downloaded and
            converted once and then taken from the cache; or a path to a converted folder, a
            training run's workdir, a `.safetensors` or a `.pth` file.
        num_classes: classes of the head, by default as published. With weights, a number other
            than the checkpoint's is the request for a fresh head: all but the head is loaded, the
            head is random. 0 gives the pooled feature.
        in_channels: channels of the images. With weights, a number other than the checkpoint's
            and other than 3 changes the stem as `weights.change_in_channels` does.
        image_size: pixels per side, or (height, width), by default as published. Only RandFormer
            depends on it, and its weights load at their own size only: see
            `weights.set_image_size`.
        drop_path_rate: stochastic depth of the last block.
        head_dropout: dropout in the head.
        dtype: compute dtype; parameters are float32 always.
        remat: trade time for memory in the backward pass, see `MetaFormer`.
        scan: trade time for a shorter compilation, see `MetaFormer`.
        rngs: randomness of the initial values and of the two rates.

    Raises:
        ValueError: an unknown name, a number out of range, or weights that do not fit
            (`weights.CheckpointError`).
        FileNotFoundError: nothing is at the path.
        weights.DownloadError: the published weights could not be fetched.
    """
    if not isinstance(pretrained, bool | str | os.PathLike):
        raise ValueError(f"`pretrained` must be True, False or a path, got {pretrained!r}.")
    check_rngs(rngs)
    settings: dict[str, Any] = {"image_size": image_size, "drop_path_rate": drop_path_rate}
    settings |= {"head_dropout": head_dropout, "dtype": dtype, "remat": remat, "scan": scan}
    if pretrained is False:
        return models.create_model(
            name, num_classes=num_classes, in_channels=in_channels, rngs=rngs, **settings
        )
    if pretrained is True:
        from metaformer_jax.weights import hub

        pretrained = hub.converted_file(name)
    model, variables, _ = read_and_build(
        pretrained, name, num_classes=num_classes, in_channels=in_channels, **settings
    )
    _seed_dropout(model, rngs)
    fill(model, variables)
    if num_classes is not None and num_classes != model.num_classes:
        replace_head(model, num_classes, head_dropout=head_dropout, rngs=rngs)
    if in_channels != model.in_channels:
        change_in_channels(model, in_channels)
    return model


def load_weights(
    model: MetaFormer,
    path: PathLike,
    *,
    name: str | None = None,
    entry: str | None = None,
    keep_head: bool = False,
    class_map: PathLike | None = None,
    fit_channels: bool = False,
) -> None:
    """Loads weights into a model in place, each array placed as the one that it replaces.

    Without the last three everything has to fit.

    Args:
        model: the model, built eagerly; or abstractly (`nnx.eval_shape`), where it drops nothing
            and does not keep its head, for which the weights have no values.
        path: a converted folder, a run's workdir, a `.safetensors` or a `.pth` file, in any layout.
        name: the published name that neither model nor checkpoint must contradict.
        entry: which entry of a training checkpoint to take, see `files.read_tensors`.
        keep_head: keep the model's own head and ignore that of the checkpoint, as fine-tuning
            for other classes needs it.
        class_map: map an ImageNet-21K head to the model's 1000 classes, see
            `map_head_to_imagenet_1k`.
        fit_channels: change the checkpoint's stem to the model's channels, see
            `change_in_channels`.

    Raises:
        CheckpointError: the weights do not fit; the model is as it was.
        FileNotFoundError: nothing is at the path.
        ValueError: the class map is none, or the model has other classes; the name is unknown or
            another model's; parts of the model would stay abstract.
    """
    filled = {path for path in variables_of(model) if not (keep_head and path[0] == "head")}
    check_has_values(model, but=filled)
    variables = fitted_variables(
        model,
        path,
        name=name,
        entry=entry,
        keep_head=keep_head,
        class_map=class_map,
        fit_channels=fit_channels,
    )
    fill(model, variables)


def fitted_variables(
    model: MetaFormer,
    path: PathLike,
    *,
    name: str | None = None,
    entry: str | None = None,
    keep_head: bool = False,
    class_map: PathLike | None = None,
    fit_channels: bool = False,
) -> Variables:
    """The values that `load_weights` puts into a model, which stays as it is."""
    if keep_head and class_map:
        raise ValueError(
            f"`class_map` must be left out where the model keeps its own head, got {class_map!r}."
        )
    if class_map and model.num_classes != NUM_IMAGENET_1K:
        raise ValueError(
            f"`class_map` must be left out unless the model has {NUM_IMAGENET_1K} classes, got "
            f"{class_map!r} for {model.num_classes}. Give the model a fresh head instead."
        )
    if name is not None:
        check_name(name, model)
    tensors = read_checkpoint(path, name=name, entry=entry).tensors
    # Where the checkpoint's head or stem differs, it has to be whole as well.
    info = recognise(tensors)
    num_classes = info.num_classes if keep_head or class_map else model.num_classes
    in_channels = (info.in_channels if fit_channels else None) or model.in_channels
    twin = model
    if (num_classes, in_channels) != (model.num_classes, model.in_channels):
        twin = nnx.eval_shape(
            lambda: MetaFormer(
                model.spec,
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=model.image_size,
                rngs=nnx.Rngs(0),
            )
        )
    variables = to_variables(tensors, twin)
    if keep_head:
        variables = {path: array for path, array in variables.items() if path[0] != "head"}
    if class_map or in_channels != model.in_channels:
        fill(twin, variables)
        if class_map:
            map_head_to_imagenet_1k(twin, class_map)
        if in_channels != model.in_channels:
            change_in_channels(twin, model.in_channels)
        targets = variables_of(twin)
        variables = {path: np.asarray(targets[path][...]) for path in variables}
    return variables


def read_and_build(
    path: PathLike,
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    entry: str | None = None,
    with_hash: bool = False,
    **settings: Any,
) -> tuple[MetaFormer, Variables, Checkpoint]:
    """The abstract model that a checkpoint is of, its values, and where they come from.

    A number of classes or channels that is given, and is not the checkpoint's, is left to the
    caller to change afterwards: the model is built as the checkpoint is.

    Raises:
        CheckpointError: the checkpoint does not fit.
        FileNotFoundError: nothing is at the path.
    """
    checkpoint = read_checkpoint(path, name=name, entry=entry, with_hash=with_hash)
    info = recognise(checkpoint.tensors)
    model = build_abstract(
        name,
        num_classes=num_classes if num_classes is None else info.num_classes,
        in_channels=in_channels if in_channels == 3 else info.in_channels or in_channels,
        **settings,
    )
    return model, to_variables(checkpoint.tensors, model), checkpoint


def build_abstract(name: str, **settings: Any) -> MetaFormer:
    """The model with shapes in place of arrays, which takes a fraction of the time."""
    return nnx.eval_shape(lambda: models.create_model(name, rngs=nnx.Rngs(0), **settings))


def fill(model: MetaFormer, variables: Variables) -> None:
    """Puts values into a model, each placed as the array that it replaces."""
    targets = variables_of(model)
    old = {path: targets[path].get_value() for path in variables}
    placed = {
        path: jax.make_array_from_callback(values.shape, old[path].sharding, values.__getitem__)
        for path, values in variables.items()
        if isinstance(old[path], jax.Array)
    }
    rest = {path: values for path, values in variables.items() if path not in placed}
    # Nobody writes to the values any more: where the device reads host memory, it may use theirs.
    placed |= jax.device_put(rest, may_alias=True)
    for path, array in placed.items():
        targets[path].set_value(array)


def _seed_dropout(model: MetaFormer, rngs: nnx.Rngs) -> None:
    """Forks the streams that the model would have, had it been built with these `rngs`."""
    rngs.params()
    droppers = [
        dropper
        for blocks in model.stages
        for block in blocks
        for dropper in (block.drop_path1, block.drop_path2)
    ]
    droppers.append(getattr(model.head, "dropout", None))
    for dropper in droppers:
        if dropper is not None:
            dropper.rngs = rngs["dropout"].fork()
