"""Average pooling at stride 1, lowered the way each platform runs it best."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """The mean of each square of `size` pixels a side, of those that lie in the image.

    XLA for CPUs adds a window's pixels one at a time; written as sums of shifted images they are
    one loop over whole vectors. Reverse mode works to any order.

    Args:
        x: the images.
        size: pixels; of an even number one more lies below and to the right, as with "SAME".
    """
    return _sums(x, *_reach(size)) / _counts(x, size)


def _forward(x: Array, size: int) -> tuple[Array, None]:
    return average_pool(x, size), None


def _backward(size: int, residuals: None, cotangent: Array) -> tuple[Array]:
    del residuals
    before, after = _reach(size)
    # A pixel is in the windows of those that it has in its own, mirrored.
    return (_sums(cotangent / _counts(cotangent, size), after, before),)


average_pool.defvjp(_forward, _backward)


def _reach(size: int) -> tuple[int, int]:
    return (size - 1) // 2, size // 2


def _counts(x: Array, size: int) -> Float[np.ndarray, "h w 1"]:
    """So many pixels of each window lie in the image."""
    before, after = _reach(size)
    rows, columns = (
        np.minimum(np.arange(n) + after, n - 1) - np.maximum(np.arange(n) - before, 0) + 1
        for n in x.shape[1:3]
    )
    return np.asarray(rows[:, None, None] * columns[None, :, None], x.dtype)


def _sums(x: Array, before: int, after: int) -> Array:
    """The sum of each window that reaches so many pixels up and left, and down and right."""
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_shifted, before=before, after=after),
        default=functools.partial(_windowed, before=before, after=after),
    )


def _windowed(x: Array, *, before: int, after: int) -> Array:
    side = before + after + 1
    padding = ((0, 0), (before, after), (before, after), (0, 0))
    return lax.reduce_window(
        x, np.zeros((), x.dtype), lax.add, (1, side, side, 1), (1,) * 4, padding
    )


def _shifted(x: Array, *, before: int, after: int) -> Array:
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    side = range(before + after + 1)
    return functools.reduce(jnp.add, (padded[:, i : i + h, j : j + w] for i in side for j in side))
