"""Checks of the arguments of models, which return them as plain Python numbers."""

import math
import numbers
import operator
from typing import Any

import jax.numpy as jnp
from flax import nnx


def as_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels, from a single number or a pair.

    Raises:
        ValueError: it is neither.
    """
    pair = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    sides = [side for side in map(whole, pair) if side is not None and side > 0]
    if len(pair) != 2 or len(sides) != 2:
        raise ValueError(
            "`image_size` must be a positive whole number of pixels or a pair (height, width) of "
            f"them, got {image_size!r}."
        )
    return sides[0], sides[1]


def check_rate(name: str, rate: float) -> float:
    """A rate of dropout or stochastic depth, as a number of Python's.

    Raises:
        ValueError: it is not in [0, 1).
    """
    try:
        is_rate = bool(0 <= rate < 1)
    except TypeError:
        is_rate = False
    if not is_rate:
        raise ValueError(f"`{name}` must be in [0, 1), got {rate!r}.")
    return float(rate)


def check_rngs(rngs: nnx.Rngs, *, has_dropout: bool = False) -> None:
    """Checks that these are `nnx.Rngs`, and not a seed or a key, with the streams that are drawn.

    Args:
        rngs: with a stream `params`, and `dropout` if there is dropout; or a default for both.
        has_dropout: whether a rate of dropout or stochastic depth is positive.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"`rngs` must be nnx.Rngs, got {type(rngs).__name__}. Give nnx.Rngs(seed)."
        )
    needed = ("params", "dropout") if has_dropout else ("params",)
    if "default" not in rngs and (missing := [name for name in needed if name not in rngs]):
        raise ValueError(
            f"`rngs` must have the streams {' and '.join(needed)}, got none called "
            f"{' or '.join(missing)}. Give nnx.Rngs(seed), which has all, or name them."
        )


def at_least(least: int, **value: Any) -> int:
    """The value of the one keyword argument, as a Python int.

    Raises:
        ValueError: it is not a whole number, or below `least`; the message names the argument.
    """
    ((name, given),) = value.items()
    number = whole(given)
    if number is None or number < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {given!r}.")
    return number


def hidden_channels(dim: int, **ratio: Any) -> int:
    """`dim` times the one ratio given, rounded down to a whole number of channels.

    Raises:
        ValueError: the ratio is not a number, or leaves no channel; the message names it.
    """
    ((name, given),) = ratio.items()
    try:
        return at_least(1, channels=math.floor(dim * given))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"`{name}` must be a number that leaves at least one hidden channel for {dim} "
            f"channels, got {given!r}."
        ) from error


def whole(value: Any) -> int | None:
    """A whole number (Python's, NumPy's or JAX's) as a Python int; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_finite(value: Any) -> bool:
    """Whether this is a real number (Python's or NumPy's), neither infinite nor NaN."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def is_floating(dtype: Any) -> bool:
    """Whether this is a floating-point dtype; False for whatever is no dtype at all."""
    try:
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        return False
