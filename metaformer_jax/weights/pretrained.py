"""Models with weights: by published name, from a folder, from a checkpoint file."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metaformer_jax import models
from metaformer_jax.models import MetaFormer
from metaformer_jax.models.arguments import at_least, check_rngs
from metaformer_jax.weights.convert import (
    Variables,
    check_has_values,
    check_name,
    to_variables,
    variables_of,
)
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.layouts import without_head
from metaformer_jax.weights.read import Checkpoint, read_checkpoint
from metaformer_jax.weights.recognition import published_architecture, recognise
from metaformer_jax.weights.surgery import (
    NUM_IMAGENET_1K,
    NUM_IMAGENET_21K,
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
    in_channels: int | None = None,
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
            training run's workdir or a checkpoint in it, a `.safetensors` or a `.pth` file.
        num_classes: classes of the head, by default as published; 0 for no head. With weights, a
            number other than the checkpoint's requests a fresh head: all but the head is loaded,
            and the head is random.
        in_channels: channels of the images, by default as published, 3. With weights, a number
            other than the checkpoint's changes the stem as `weights.change_in_channels` does.
        image_size: pixels per side, or (height, width), by default as published. Only RandFormer
            depends on it, and its weights load at their own size only: see
            `weights.set_image_size`.
        drop_path_rate: stochastic depth of the last block.
        head_dropout: dropout rate in the head.
        dtype: compute dtype; parameters are always float32.
        remat: trades time for memory in the backward pass, see `MetaFormer`.
        scan: trades time for a shorter compilation, see `MetaFormer`.
        rngs: random keys for the initial values and the masks, see `MetaFormer`.

    Raises:
        ValueError: the name is unknown, a number is out of range, or the weights do not fit
            (`weights.CheckpointError`).
        FileNotFoundError: nothing is at the path.
        weights.DownloadError: the published weights could not be fetched.
        OSError: the cache of published weights cannot be written to.
        ImportError: PyTorch is not installed, which `.pth` files take: also the published ones of
            RandFormer and IdentityFormer.
    """
    if not isinstance(pretrained, bool | str | os.PathLike):
        raise ValueError(f"`pretrained` must be True, False or a path, got {pretrained!r}.")
    check_rngs(rngs, has_dropout=bool(drop_path_rate or head_dropout))
    if in_channels is not None:
        in_channels = at_least(1, in_channels=in_channels)
    settings: dict[str, Any] = {"image_size": image_size, "drop_path_rate": drop_path_rate}
    settings |= {"head_dropout": head_dropout, "dtype": dtype, "remat": remat, "scan": scan}
    if pretrained is False:
        return models.create_model(
            name, num_classes=num_classes, in_channels=in_channels or 3, rngs=rngs, **settings
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
    if in_channels not in (None, model.in_channels):
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
    """Loads weights into a model in place; arrays keep the dtypes and shardings of the model's.

    Every array must fit, except for what the last three arguments allow.

    Args:
        model: the model. It may be abstract (`nnx.eval_shape`) if the weights give all its values:
            if it has no dropout or stochastic depth and does not keep its head.
        path: a converted folder, a run's workdir or a checkpoint in it, a `.safetensors` or a
            `.pth` file, in any layout.
        name: a published name, which must agree with the model and the checkpoint.
        entry: which entry of a training checkpoint to use, see `files.read_tensors`.
        keep_head: keeps the model's own head and ignores that of the checkpoint, to fine-tune for
            other classes.
        class_map: maps an ImageNet-21K head to the model's 1000 classes, see
            `map_head_to_imagenet_1k`.
        fit_channels: changes the checkpoint's stem to the model's channels, see
            `change_in_channels`.

    Raises:
        CheckpointError: the weights do not fit; the model is unchanged.
        FileNotFoundError: nothing is at the path.
        ValueError: the class map is invalid, or the model does not have 1000 classes; the name is
            unknown or belongs to another model; parts of the model would stay abstract.
        ImportError: it is a `.pth` file, and PyTorch is not installed.
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
    """The values that `load_weights` would put into the model, which is not changed.

    Arguments and errors are those of `load_weights`, but for parts that would stay abstract.
    """
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
    called = name or published_architecture(model.spec)
    tensors = read_checkpoint(path, name=called, entry=entry).tensors
    info = recognise(tensors)
    if class_map and info.num_classes != NUM_IMAGENET_21K:
        raise CheckpointError(
            f"`class_map` must be left out unless the checkpoint has the {NUM_IMAGENET_21K} "
            f"classes of ImageNet-21K, got {path} with {info.num_classes}."
        )
    # If the checkpoint's head or stem differs, its tensors must still all be there.
    num_classes = NUM_IMAGENET_21K if class_map else model.num_classes
    if keep_head:
        tensors, num_classes = without_head(tensors, info.layout), 0
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
    in_channels: int | None = None,
    entry: str | None = None,
    with_hash: bool = False,
    **settings: Any,
) -> tuple[MetaFormer, Variables, Checkpoint]:
    """The abstract model that fits a checkpoint, its values, and the checkpoint.

    The numbers of classes and channels are those published for the name if they are None, and else
    the checkpoint's: to the numbers given the caller changes the model afterwards.

    Raises:
        CheckpointError: the checkpoint does not fit.
        FileNotFoundError: nothing is at the path.
    """
    checkpoint = read_checkpoint(path, name=name, entry=entry, with_hash=with_hash)
    info = recognise(checkpoint.tensors)
    model = build_abstract(
        name,
        num_classes=None if num_classes is None else info.num_classes,
        in_channels=3 if in_channels is None else info.in_channels or in_channels,
        **settings,
    )
    return model, to_variables(checkpoint.tensors, model), checkpoint


def build_abstract(name: str, **settings: Any) -> MetaFormer:
    """The model with shapes instead of arrays, which takes a fraction of the time to build."""
    return nnx.eval_shape(lambda: models.create_model(name, rngs=nnx.Rngs(0), **settings))


def fill(model: MetaFormer, variables: Variables) -> None:
    """Puts values into a model, each with dtype and sharding of the array that it replaces."""
    targets = variables_of(model)
    old = {path: targets[path].get_value() for path in variables}
    variables = {
        path: values.astype(old[path].dtype, copy=False) for path, values in variables.items()
    }
    placed = {
        path: jax.make_array_from_callback(values.shape, old[path].sharding, values.__getitem__)
        for path, values in variables.items()
        if isinstance(old[path], jax.Array)
    }
    rest = {path: values for path, values in variables.items() if path not in placed}
    # The values are not written to any more, so a device that reads host memory may use theirs.
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
