"""Where images lie in a TPU's vector unit."""

import contextlib
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

LANES = 128

_platform = jax.make_user_context("")


def compiled_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """In this context (`with`) models are written as this platform runs their stages best.

    Needed only where they are compiled for other devices than this process has by default.
    """
    return _platform(platform)


def is_for_tpus() -> bool:
    """Whether what is traced now is to run on TPUs, as far as is known."""
    return (_platform.value or jax.default_backend()) == "tpu"


def fill_lanes(batch_size: Any) -> bool:
    """Whether so many images fill the lanes of a TPU's vector unit, and leave none empty."""
    return batch_size % LANES == 0


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
