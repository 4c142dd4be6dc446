"""Layouts of images in a TPU's vector unit."""

from typing import Any

from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

LANES = 128


def fill_lanes(batch_size: Any) -> bool:
    """Whether a batch of this size fills all lanes of a TPU's vector unit."""
    return batch_size % LANES == 0


def images_along_lanes(
    x: Float[Array, "b *c"], *, major_to_minor: tuple[int, ...]
) -> Float[Array, "b *c"]:
    """`x` with its axes laid out in this order on TPUs, if the images fill the lanes.

    The compiler chooses good layouts for single operations, but between some of them it then moves
    arrays to other lanes, which takes longer than the operations. In an exported program for TPUs
    this is a call of `LayoutConstraint`, which `jax.export` must be told to allow
    (`disabled_checks`).

    Args:
        x: the array.
        major_to_minor: the order of its axes, with that of the images last.
    """
    if not fill_lanes(x.shape[0]):
        return x
    layout = Layout(major_to_minor=major_to_minor)
    return lax.platform_dependent(
        x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
