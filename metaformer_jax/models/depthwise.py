"""Depthwise convolution, lowered the way each platform runs it best."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def depthwise_conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
    """Convolves every channel with a kernel of its own; stride 1, zero padding, same size.

    As everywhere in deep learning this is a cross-correlation: the kernel is not flipped.

    The XLA compiler for CPUs runs a grouped convolution more than ten times slower than the same
    arithmetic written as shifted multiply-adds, which it fuses into one loop; the compilers for
    accelerators prefer the grouped convolution. Both give the same values. Gradients have rules
    of their own, so reverse mode works to any order; plain forward mode (`jax.jvp`) does not.

    Args:
        x: the input.
        kernel: one filter per channel, of odd height and width.

    Raises:
        ValueError: the kernel has an even side or another number of channels than `x`.
    """
    _check_shapes(x, kernel)
    return _convolve(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    _check_shapes(x, kernel)
    return _convolve(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    x_gradient = _convolve(cotangent, kernel[::-1, ::-1])
    kernel_gradient = lax.platform_dependent(
        x,
        cotangent,
        kernel,
        cpu=_kernel_gradient_by_rows,
        default=_kernel_gradient_of_grouped,
    )
    return x_gradient, kernel_gradient


depthwise_conv2d.defvjp(_forward, _backward)


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


@jax.jit
def _convolve(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=_shifted, default=_grouped)


def _grouped(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _pad_to_keep_size(x: Array, kernel: Array) -> Array:
    kh, kw, _ = kernel.shape
    return jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))


def _shifted(x: Array, kernel: Array) -> Array:
    kh, kw, _ = kernel.shape
    h, w = x.shape[1:3]
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    padded = _pad_to_keep_size(x, kernel)
    taps = (
        padded[:, i : i + h, j : j + w].astype(accumulator) * kernel[i, j].astype(accumulator)
        for i in range(kh)
        for j in range(kw)
    )
    # Without the barrier XLA for CPUs moves the last taps into the matrix product that follows.
    return lax.optimization_barrier(functools.reduce(jnp.add, taps).astype(x.dtype))


def _kernel_gradient_of_grouped(x: Array, cotangent: Array, kernel: Array) -> Array:
    _, transpose = jax.vjp(functools.partial(_grouped, x), kernel)
    return transpose(cotangent)[0]


def _kernel_gradient_by_rows(x: Array, cotangent: Array, kernel: Array) -> Array:
    # A row of the image and the rows under the kernel fit the cache; whole images do not.
    kh, kw, _ = kernel.shape
    h, w = x.shape[1:3]
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def add_image(gradient: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        padded, out = image

        def add_row(gradient: Array, row: Array) -> tuple[Array, None]:
            window = lax.dynamic_slice_in_dim(padded, row, kh).astype(accumulator)
            out_row = lax.dynamic_index_in_dim(out, row, keepdims=False).astype(accumulator)
            taps = [jnp.sum(window[:, j : j + w] * out_row, axis=1) for j in range(kw)]
            return gradient + jnp.stack(taps, axis=1), None

        return lax.scan(add_row, gradient, jnp.arange(h))[0], None

    images = (_pad_to_keep_size(x, kernel), cotangent)
    start = jnp.zeros(kernel.shape, accumulator)
    return lax.scan(add_image, start, images)[0].astype(kernel.dtype)
