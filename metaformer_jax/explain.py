"""Explains predictions: Grad-CAM for any stage, attention maps for stages with attention."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from metaformer_jax.models import Attention, MetaFormer
from metaformer_jax.models.stages import drops


def grad_cam(
    model: MetaFormer,
    images: Float[Array, "b h w c"],
    classes: Int[Array, " b"] | None = None,
    stage: int = -1,
) -> Float[Array, "b h2 w2"]:
    """Where a stage's output supports a class (Grad-CAM, https://arxiv.org/abs/1610.02391).

    The channels of the stage's output are summed, each weighted by the gradient of the class's
    logit averaged over all positions; negative values, which speak against the class, become 0.
    Works under `jax.jit` and `nnx.jit`, with `stage` static.

    Args:
        model: the model, in evaluation mode (`model.eval()`), with a head.
        images: normalised, as the model takes them.
        classes: a class for each image; by default the predicted one.
        stage: counted from 0 for the first, or from -1 for the last.

    Returns:
        For each image a map with the stage's height and width, float32, not negative.

    Raises:
        ValueError: there is no such stage; the model has no head, or active dropout in training
            mode, or does not take the images; there is not one class per image, or (outside
            `jax.jit`) one is out of range.
    """
    _check_can_be_explained(model)
    model.check_images(images)
    stage = _checked_stage(model, stage)
    if model.head is None:
        raise ValueError(
            "`model` must have a head, got one with num_classes=0, which has no class to explain."
        )
    if classes is not None and jnp.shape(classes) != (len(images),):
        raise ValueError(
            f"`classes` must have shape ({len(images)},), one for each image, got "
            f"{jnp.shape(classes)}."
        )
    if classes is not None and not isinstance(classes, jax.core.Tracer):
        given = np.asarray(classes)
        is_class = (given >= 0) & (given < model.num_classes)
        if given.dtype.kind not in "iu" or not is_class.all():
            raise ValueError(
                f"`classes` must be whole numbers in [0, {model.num_classes}), got "
                f"{given[~is_class].tolist() or given.dtype}."
            )
    features = model.features(images)[stage]
    chosen = jnp.argmax(_logits(model, features, stage), axis=-1) if classes is None else classes

    def total_of_chosen(features: Array) -> Array:
        # The images are independent, so the gradient of the sum is that of each image.
        logits = _logits(model, features, stage)
        return jnp.sum(jnp.take_along_axis(logits, jnp.asarray(chosen)[:, None], axis=-1))

    slopes = jax.grad(total_of_chosen)(features).astype(jnp.float32)
    weights = jnp.mean(slopes, axis=(1, 2))
    return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", features.astype(jnp.float32), weights))


def attention_maps(
    model: MetaFormer, images: Float[Array, "b h w c"], stage: int = -1
) -> Float[Array, "b blocks heads tokens tokens"]:
    """The attention weights of every block of a stage.

    Args:
        model: the model, in evaluation mode.
        images: normalised, as the model takes them.
        stage: counted from 0 for the first, or from -1 for the last.

    Returns:
        `maps[image, block, head, i, j]` is the attention of token `i` to token `j`; over `j` it
        sums to one. Tokens are numbered row by row over the stage's height and width.

    Raises:
        ValueError: there is no such stage, its blocks have no attention, or the model has active
            dropout in training mode.
    """
    _check_can_be_explained(model)
    model.check_images(images)
    stage = _checked_stage(model, stage)
    if not has_attention(model, stage):
        with_attention = [
            index for index in range(len(model.stages)) if has_attention(model, index)
        ]
        raise ValueError(
            f"`stage` must be one with attention, got {stage}. This model has attention in "
            f"{', '.join(map(str, with_attention)) or 'none of its stages'}."
        )
    before = model.features(images)[stage - 1] if stage else jnp.asarray(images, model.dtype)
    x = model.downsample_layers[stage](before)
    maps = []
    for block in model.stages[stage]:
        mixer = cast(Attention, block.token_mixer)
        maps.append(mixer.weights(block.norm1(x)))
        x = block(x)
    return jnp.stack(maps, axis=1)


def received_attention(
    model: MetaFormer, images: Float[Array, "b h w c"], stage: int = -1
) -> Float[Array, "b h2 w2"]:
    """How much attention each token receives in the stage's last block, averaged over all tokens.

    It is averaged over the heads, too. There is no class token whose attention alone would matter,
    because the classifier averages over all tokens. An image's map sums to one.

    Raises:
        ValueError: there is no such stage, or its blocks have no attention.
    """
    maps = attention_maps(model, images, stage)[:, -1]
    stage = _checked_stage(model, stage)
    height, width = model.spec.stage_resolutions((images.shape[1], images.shape[2]))[stage]
    return jnp.mean(maps, axis=(1, 2)).reshape(len(images), height, width)


def has_attention(model: MetaFormer, stage: int = -1) -> bool:
    """Whether `attention_maps` works for a stage."""
    blocks = model.stages[_checked_stage(model, stage)]
    return bool(blocks) and all(isinstance(block.token_mixer, Attention) for block in blocks)


def _check_can_be_explained(model: MetaFormer) -> None:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model))):
        raise ValueError(
            "`model` must have values to be explained, got one made under nnx.eval_shape. Load its "
            "weights first."
        )
    if drops(model):
        raise ValueError(
            "`model` must be in evaluation mode to be explained, got one that drops paths or "
            "features at random. Call model.eval() first."
        )


def _checked_stage(model: MetaFormer, stage: int) -> int:
    num_stages = len(model.stages)
    if not isinstance(stage, int | np.integer) or not -num_stages <= stage < num_stages:
        raise ValueError(
            f"`stage` must be in [0, {num_stages}), or count from -1 for the last, got {stage!r}."
        )
    return stage % num_stages


def _logits(
    model: MetaFormer, features: Float[Array, "b h w c"], stage: int
) -> Float[Array, "b classes"]:
    x = features
    later = slice(stage + 1, None)
    for downsample, blocks in zip(model.downsample_layers[later], model.stages[later], strict=True):
        x = downsample(x)
        for block in blocks:
            x = block(x)
    assert model.head is not None
    return model.head(model.pool(x))
