"""Where images lie in a TPU's vector unit."""

from typing import Any

from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

_LANES = 128


def fill_lanes(batch_size: Any) -> bool:
    """Whether so many images fill the lanes of a TPU's vector unit, and leave none empty."""
    return batch_size % _LANES == 0


def images_along_lanes(
    x: Float[Array, "b *c"], *, major_to_minor: tuple[int, ...]
) -> Float[Array, "b *c"]:
    """`x`, laid by the compiler for TPUs with its axes in this order, where images fill the lanes.

    The compiler chooses well for single operations; between some of them it then moves arrays to
    other lanes, which takes longer than either. An exported program for TPUs has a call of
    `LayoutConstraint` for this, of which `jax.export` has to be told (`disabled_checks`).

    Args:
        x: the array.
        major_to_minor: its axes, that of the images last.
    """
    if not fill_lanes(x.shape[0]):
        return x
    layout = Layout(major_to_minor=major_to_minor)
    return lax.platform_dependent(
        x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
