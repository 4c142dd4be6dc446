"""Mixup and CutMix on the device, group by group, and the targets that go with them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: blended or cut.
        labels: of the images themselves.
        partner_labels: of what is mixed into each.
        weights: the share that an image has of itself; the rest is its partner's.
    """

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"]
    partner_labels: Int[Array, " b"]
    weights: Float[Array, " b"]


def mix(
    images: UInt8[Array, "b h w c"],
    labels: Int[Array, " b"],
    *,
    keys: Key[Array, " groups"],
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
    probability: float = 1.0,
) -> Mixed:
    """Mixup (https://arxiv.org/abs/1710.09412) or CutMix (https://arxiv.org/abs/1905.04899).

    The batch is as many groups as there are keys. All images of a group share one draw, and the
    partner of the group's first image is its last.

    Args:
        images: the batch; mixup's blends are rounded to whole numbers, as in the published recipe.
        labels: its classes.
        keys: the randomness of each group; their number divides the batch.
        mixup_alpha: mixup's weight is drawn from Beta(alpha, alpha); 0 leaves mixup out.
        cutmix_alpha: likewise the part of the area that CutMix leaves; 0 leaves CutMix out.
        switch_probability: of CutMix, where both are there.
        probability: that a group is mixed at all.
    """
    if max(mixup_alpha, cutmix_alpha) <= 0 or probability <= 0:
        return Mixed(images, labels, labels, jnp.ones(labels.shape))
    groups, partners = _in_pairs(images, len(keys))

    def mix_group(
        key: Array, group: UInt8[Array, "g h w c"], partner: UInt8[Array, "g h w c"]
    ) -> tuple[UInt8[Array, "g h w c"], Float[Array, ""]]:
        _, height, width, _ = group.shape
        uniform_key, gamma_key = jax.random.split(key)
        # Few draws of many numbers: each draw is compiled anew, and takes long to compile.
        uniform = jax.random.uniform(uniform_key, (4,))
        is_mixed = uniform[0] < probability
        is_cut = uniform[1] < switch_probability
        is_cut = (is_cut | (mixup_alpha <= 0)) & (cutmix_alpha > 0)
        # Beta(a, a) is the part that one of two draws of Gamma(a) has of their sum.
        alphas = jnp.array([mixup_alpha or 1.0, cutmix_alpha or 1.0], jnp.float32)
        first, second = jax.random.loggamma(gamma_key, alphas, (2, 2))
        blend_weight, kept_part = jax.nn.sigmoid(first - second)
        inside, cut_weight = _box(uniform[2:], kept_part, height, width)
        weight = jnp.where(is_mixed, jnp.where(is_cut, cut_weight, blend_weight), 1.0)
        blend = jnp.rint(weight * group + (1 - weight) * partner).astype(group.dtype)
        cut = jnp.where(inside[None, :, :, None] & is_mixed, partner, group)
        return jnp.where(is_cut, cut, blend), weight

    mixed, weights = jax.vmap(mix_group)(keys, groups, partners)
    _, partner_labels = _in_pairs(labels, len(keys))
    return Mixed(
        mixed.reshape(images.shape),
        labels,
        partner_labels.reshape(labels.shape),
        jnp.repeat(weights, len(images) // len(keys)),
    )


def soft_targets(
    labels: Int[Array, " b"],
    partner_labels: Int[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
) -> Float[Array, "b classes"]:
    """The class probabilities to learn: smoothed one-hot rows, mixed as the images are.

    Of each row `label_smoothing` goes to all classes alike (https://arxiv.org/abs/1512.00567).
    """

    def smoothed(labels: Int[Array, " b"]) -> Float[Array, "b classes"]:
        one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        return (1 - label_smoothing) * one_hot + label_smoothing / num_classes

    if partner_labels is None or weights is None:
        return smoothed(labels)
    weights = weights[:, None]
    return weights * smoothed(labels) + (1 - weights) * smoothed(partner_labels)


def _in_pairs(x: Array, num_groups: int) -> tuple[Array, Array]:
    groups = x.reshape(num_groups, -1, *x.shape[1:])
    return groups, groups[:, ::-1]


def _box(
    place: Float[Array, "2"], kept_part: Float[Array, ""], height: int, width: int
) -> tuple[Bool[Array, "h w"], Float[Array, ""]]:
    """A box around any pixel, cut at the image's border, and the part of the area outside it.

    Its sides are even, as in the timm of the publication (0.6.11); later releases end odd ones one
    pixel further. `place` are two draws from [0, 1).
    """
    inside = []
    for axis, length in enumerate((height, width)):
        half = jnp.trunc(length * jnp.sqrt(1 - kept_part)) // 2
        middle = jnp.floor(length * place[axis])
        position = jnp.arange(length, dtype=jnp.float32)
        inside.append(
            jnp.expand_dims((position >= middle - half) & (position < middle + half), 1 - axis)
        )
    rows, columns = inside
    area = rows.sum() * columns.sum()
    return rows & columns, 1 - area / (height * width)
