"""Depthwise convolution, lowered the way each platform runs it best."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import depthwise_banded, depthwise_triton
from metaformer_jax.models.lowering.promotion import wide_dtype

# A cache line of a CPU, in float32 numbers.
_CACHE_LINE = 16
# Pixels and channels that fit into its first-level cache, with the pixels under the kernel.
_BLOCK = 32
_CHANNELS = 128


def depthwise_conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
    """Convolves every channel with a kernel of its own; stride 1, zero padding, same size.

    As everywhere in deep learning this is a cross-correlation: the kernel is not flipped.

    XLA for CPUs runs a grouped convolution more than ten times slower than the same arithmetic
    written as shifted multiply-adds, which it fuses into one loop. NVIDIA GPUs use custom kernels.
    For TPUs, the compiler assigns a grouped convolution to the vector unit. Where images or their
    rows fill the vector unit's lanes, the convolution is written as products of whole rows with
    banded matrices instead: by the compiler's estimate the matrix units take fewer cycles for
    these, though most of what they multiply is zero. All forms compute the same values.

    The gradients are custom rules: reverse mode works to any order, forward mode (`jax.jvp`) is not
    supported.

    Args:
        x: the input.
        kernel: one filter per channel, of odd height and width.

    Raises:
        ValueError: the kernel has an even side or another number of channels than `x`.
    """
    _check_shapes(x, kernel)
    return _depthwise_conv2d(depthwise_triton.takes(x, kernel), x, kernel)


def depthwise_conv2d_by_xla(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
    """`depthwise_conv2d`, and its gradients, without custom kernels."""
    return _depthwise_conv2d(False, x, kernel)


# Whether there are kernels is asked once: a gradient may be traced where they are not forbidden.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise_conv2d(by_triton: bool, x: Array, kernel: Array) -> Array:
    return _forward(by_triton, x, kernel)[0]


def _forward(by_triton: bool, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(by_triton, x, kernel), (x, kernel)


def _backward(
    by_triton: bool, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    x_gradient = _convolve(by_triton, cotangent, kernel[::-1, ::-1])
    kernel_gradient = lax.platform_dependent(
        x,
        cotangent,
        kernel,
        cpu=_kernel_gradient_by_blocks,
        cuda=_kernel_gradient_by_triton if by_triton else _kernel_gradient_of_grouped,
        tpu=_kernel_gradient_of_rows
        if depthwise_banded.takes_rows(x.shape, kernel.shape)
        else _kernel_gradient_of_grouped,
        default=_kernel_gradient_of_grouped,
    )
    return x_gradient, kernel_gradient


_depthwise_conv2d.defvjp(_forward, _backward)


def _check_shapes(x: Array, kernel: Array) -> None:
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"`kernel` must have an odd height and width, got {kernel.shape[:2]}. "
            "Only odd sizes keep the image's size with symmetric padding."
        )
    if x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"`kernel` must have the {x.shape[-1]} channels of `x`, got {kernel.shape[-1]}."
        )


@functools.partial(jax.jit, static_argnums=0)
def _convolve(by_triton: bool, x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=_shifted,
        tpu=_banded,
        cuda=depthwise_triton.convolve if by_triton else _grouped,
        default=_grouped,
    )


def _grouped(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _banded(x: Array, kernel: Array) -> Array:
    if depthwise_banded.takes_images(x.shape):
        return depthwise_banded.convolve_images(x, kernel)
    if depthwise_banded.takes_rows(x.shape, kernel.shape):
        rows = depthwise_banded.fold(x)
        return depthwise_banded.convolve_rows(rows, kernel, width=x.shape[2]).reshape(x.shape)
    return _grouped(x, kernel)


def _padded(x: Array, kernel: Array) -> Array:
    """The input with "same" zero padding, and with one cache line of channels more.

    If the number of channels is a power of two, all pixels under the kernel are a power of two of
    bytes apart: they would fall into the same few sets of a CPU's cache and evict each other.
    """
    kh, kw, _ = kernel.shape
    return jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, _CACHE_LINE)))


def _spaced(x: Array) -> Array:
    """`x` with the additional channels alone; the barrier keeps XLA from removing them again."""
    padding = ((0, 0),) * (x.ndim - 1) + ((0, _CACHE_LINE),)
    return lax.optimization_barrier(jnp.pad(x, padding))


def _shifted(x: Array, kernel: Array) -> Array:
    (kh, kw, c), (h, w) = kernel.shape, x.shape[1:3]
    accumulator = wide_dtype(x.dtype)
    padded, spaced = _padded(x, kernel), _spaced(kernel.astype(accumulator))
    taps = (
        padded[:, i : i + h, j : j + w, :c].astype(accumulator) * spaced[i, j, :c]
        for i in range(kh)
        for j in range(kw)
    )
    # Without the barrier XLA for CPUs moves the last taps into the matrix product that follows.
    return lax.optimization_barrier(functools.reduce(jnp.add, taps).astype(x.dtype))


def _kernel_gradient_of_grouped(x: Array, cotangent: Array, kernel: Array) -> Array:
    _, transpose = jax.vjp(functools.partial(_grouped, x), kernel)
    return transpose(cotangent)[0]


def _kernel_gradient_of_rows(x: Array, cotangent: Array, kernel: Array) -> Array:
    fold = depthwise_banded.fold
    return depthwise_banded.kernel_gradient_of_rows(
        fold(x), fold(cotangent), kernel, width=x.shape[2]
    )


def _kernel_gradient_by_triton(x: Array, cotangent: Array, kernel: Array) -> Array:
    gradient = depthwise_triton.kernel_gradient(x, cotangent, kernel.shape[:2])
    return gradient.astype(kernel.dtype)


# Compiled once also where nothing around it is: its loops are of functions made at each call.
@jax.jit
def _kernel_gradient_by_blocks(x: Array, cotangent: Array, kernel: Array) -> Array:
    # Some channels of a block of pixels, and of the pixels under the kernel there, stay in the
    # first-level cache; whole rows do not. Each image has its own sum: cores share the images.
    (kh, kw, c), (b, h, w) = kernel.shape, x.shape[:3]
    accumulator = wide_dtype(x.dtype)
    padded = jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    r, s = _block(h, w)
    channels = _channels_together(c)

    def gradient_of_channels(first: Array) -> Array:
        def add_block(gradient: Array, number: Array) -> tuple[Array, None]:
            top, left = number // (w // s) * r, number % (w // s) * s
            start = (0, top, left, first)
            under = lax.dynamic_slice(padded, start, (b, r + kh - 1, s + kw - 1, channels))
            block = lax.dynamic_slice(cotangent, start, (b, r, s, channels))
            taps = (
                under[:, i : i + kh, j : j + kw].astype(accumulator)
                * block[:, i : i + 1, j : j + 1].astype(accumulator)
                for i in range(r)
                for j in range(s)
            )
            return functools.reduce(jnp.add, taps, gradient), None

        start = jnp.zeros((b, kh, kw, channels), accumulator)
        return lax.scan(add_block, start, jnp.arange(h * w // (r * s)))[0]

    by_image = lax.map(gradient_of_channels, jnp.arange(0, c, channels))
    return by_image.sum(1).transpose(1, 2, 0, 3).reshape(kernel.shape).astype(kernel.dtype)


def _block(h: int, w: int) -> tuple[int, int]:
    """Sides of a block of about `_BLOCK` pixels that divide the image's; preferably a square."""
    return min(
        itertools.product(_divisors(h), _divisors(w)),
        key=lambda sides: (abs(math.log(sides[0] * sides[1] / _BLOCK)), sum(sides), sides[1]),
    )


def _channels_together(c: int) -> int:
    """The largest divisor of `c` up to `_CHANNELS`; `c` itself if that is far too small."""
    most = max(divisor for divisor in _divisors(c) if divisor <= _CHANNELS)
    return most if 2 * most > _CHANNELS else c


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
