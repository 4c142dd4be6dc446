"""Average pooling at stride 1, lowered the way each platform runs it best."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """The mean of the pixels in a `size` x `size` window that lie inside the image.

    XLA for CPUs adds a window's pixels one at a time; sums of shifted images become one loop over
    whole vectors. Reverse mode works to any order.

    Args:
        x: the images.
        size: of the window, in pixels. An even window has one pixel more below and to the right, as
            with "SAME" padding.
    """
    return _sums(x, *_reach(size)) / _counts(x, size)


def _forward(x: Array, size: int) -> tuple[Array, None]:
    return average_pool(x, size), None


def _backward(size: int, residuals: None, cotangent: Array) -> tuple[Array]:
    del residuals
    before, after = _reach(size)
    # A pixel lies in the windows of those pixels that its own window, mirrored, contains.
    return (_sums(cotangent / _counts(cotangent, size), after, before),)


average_pool.defvjp(_forward, _backward)


def _reach(size: int) -> tuple[int, int]:
    return (size - 1) // 2, size // 2


def _counts(x: Array, size: int) -> Float[np.ndarray, "h w 1"]:
    """How many pixels of each window lie inside the image."""
    before, after = _reach(size)
    rows, columns = (
        np.minimum(np.arange(n) + after, n - 1) - np.maximum(np.arange(n) - before, 0) + 1
        for n in x.shape[1:3]
    )
    return np.asarray(rows[:, None, None] * columns[None, :, None], x.dtype)


def _sums(x: Array, before: int, after: int) -> Array:
    """Sums of windows that reach `before` pixels up and left, and `after` down and right."""
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
