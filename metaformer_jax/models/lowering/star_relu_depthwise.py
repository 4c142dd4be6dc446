"""The depthwise convolution of a StarReLU, with a backward pass that keeps only the latter's input.

On GPUs it keeps its positive part.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import depthwise_banded, depthwise_triton
from metaformer_jax.models.lowering.depthwise import depthwise_conv2d_by_xla
from metaformer_jax.models.lowering.lanes import images_along_lanes
from metaformer_jax.models.lowering.promotion import promoted
from metaformer_jax.models.lowering.star_relu import (
    input_gradient,
    positive_part,
    star_relu,
    sum_for,
)


def star_relu_depthwise_conv2d(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " 1"],
    bias: Float[Array, " 1"],
    kernel: Float[Array, "kh kw c"],
) -> Float[Array, "b h w c"]:
    """The `depthwise_conv2d` of the StarReLU of `x`."""
    return _star_relu_depthwise(depthwise_triton.takes(x, kernel), x, scale, bias, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _star_relu_depthwise(
    by_triton: bool, x: Array, scale: Array, bias: Array, kernel: Array
) -> Array:
    return _depthwise_forward(by_triton, x, scale, bias, kernel)[0]


def _depthwise_forward(
    by_triton: bool, x: Array, scale: Array, bias: Array, kernel: Array
) -> tuple[Array, tuple[Array, ...]]:
    in_rows = depthwise_banded.takes_rows(x.shape, kernel.shape)
    convolved, kept = lax.platform_dependent(
        x,
        scale,
        bias,
        kernel,
        cuda=_convolve_squares if by_triton else _convolve_activated,
        tpu=_convolve_activated_rows if in_rows else _convolve_activated,
        default=_convolve_activated,
    )
    return convolved, (kept, scale, bias, kernel)


def _depthwise_backward(
    by_triton: bool, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    kept, _, _, kernel = residuals
    in_rows = depthwise_banded.takes_rows(kept.shape, kernel.shape)
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cuda=_gradients_of_convolved_squares if by_triton else _gradients_of_convolved,
        tpu=_gradients_of_convolved_rows if in_rows else _gradients_of_convolved_images,
        default=_gradients_of_convolved,
    )


_star_relu_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _convolve_activated(x: Array, scale: Array, bias: Array, kernel: Array) -> tuple[Array, Array]:
    """The convolution, and what the backward pass needs of `x`."""
    return depthwise_conv2d_by_xla(star_relu(x, scale, bias), kernel), x


def _gradients_of_convolved(
    x: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    positive = positive_part(x, cotangent)
    _, transpose = jax.vjp(depthwise_conv2d_by_xla, jnp.square(positive), kernel)
    activated_gradient, of_squares = transpose(cotangent)
    x_gradient = input_gradient(positive, scale, activated_gradient)
    return x_gradient, *_parameter_gradients(of_squares, scale, bias, kernel, cotangent)


def _parameter_gradients(
    of_squares: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array]:
    """Gradients of scale, bias and kernel, from that of the kernel applied to the squares."""
    # As in a matrix product; for ones as input, each tap sums what it reaches inside the image.
    (kh, kw, _), (h, w) = kernel.shape, cotangent.shape[1:3]
    of_ones = jnp.einsum(
        "ih,hwc,jw->ijc",
        _reached(kh, h),
        _sum_over_batch(cotangent, scale.dtype),
        _reached(kw, w),
        precision=lax.Precision.HIGHEST,
    )
    wide = kernel.astype(scale.dtype)
    factor, of_squares = promoted(scale, of_squares)
    kernel_gradient = (factor * of_squares + bias * of_ones).astype(kernel.dtype)
    scale_gradient = sum_for(scale, jnp.sum(wide * of_squares))
    bias_gradient = sum_for(bias, jnp.sum(wide * of_ones))
    return scale_gradient, bias_gradient, kernel_gradient


def _gradients_of_convolved_images(
    x: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    """`_gradients_of_convolved` for TPUs."""
    cotangent = images_along_lanes(cotangent, major_to_minor=(1, 3, 2, 0))
    return _gradients_of_convolved(x, scale, bias, kernel, cotangent)


def _convolve_activated_rows(
    x: Array, scale: Array, bias: Array, kernel: Array
) -> tuple[Array, Array]:
    """`_convolve_activated` for TPUs, with rows along the lanes from the first to the last."""
    rows = depthwise_banded.rows_along_lanes(depthwise_banded.fold(x))
    activated = star_relu(rows, scale, bias)
    convolved = depthwise_banded.convolve_rows(activated, kernel, width=x.shape[2])
    return convolved.reshape(x.shape), rows.reshape(x.shape)


def _gradients_of_convolved_rows(
    x: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    """`_gradients_of_convolved` for TPUs, with rows along the lanes."""
    width, rows = x.shape[2], depthwise_banded.fold(x)
    cotangent = depthwise_banded.rows_along_lanes(depthwise_banded.fold(cotangent))
    activated_gradient = depthwise_banded.convolve_rows(cotangent, kernel[::-1, ::-1], width=width)
    kernel_gradient = depthwise_banded.kernel_gradient_of_rows(
        star_relu(rows, scale, bias), cotangent, kernel, width=width
    )
    # The sums over all activations are taken as the convolution is written.
    positive, wide = jnp.maximum(rows, 0), activated_gradient.astype(scale.dtype)
    scale_gradient = sum_for(scale, jnp.sum(wide * jnp.square(positive)))
    bias_gradient = sum_for(bias, jnp.sum(wide))
    x_gradient = depthwise_banded.rows_along_lanes(
        input_gradient(positive, scale, activated_gradient)
    )
    return x_gradient.reshape(x.shape), scale_gradient, bias_gradient, kernel_gradient


def _convolve_squares(
    x: Array, scale: Array, bias: Array, kernel: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    """`_convolve_activated` for GPUs: scale and bias are applied to the kernel."""
    positive, wide = jnp.maximum(x, 0), kernel.astype(scale.dtype)
    (kh, kw, _), (h, w) = kernel.shape, x.shape[1:3]
    of_ones = jnp.einsum(
        "ih,ijc,jw->hwc",
        _reached(kh, h),
        wide,
        _reached(kw, w),
        precision=lax.Precision.HIGHEST,
    )
    convolved = depthwise_triton.convolve(
        positive, scale * wide, squares=True, offset=bias * of_ones, interpret=interpret
    )
    return convolved, positive


def _gradients_of_convolved_squares(
    positive: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    cotangent: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    flipped = 2 * scale * kernel.astype(scale.dtype)[::-1, ::-1]
    x_gradient = depthwise_triton.convolve(cotangent, flipped, factor=positive, interpret=interpret)
    of_squares = depthwise_triton.kernel_gradient(
        positive, cotangent, kernel.shape[:2], squares=True, interpret=interpret
    )
    of_squares = of_squares.astype(kernel.dtype)
    return x_gradient, *_parameter_gradients(of_squares, scale, bias, kernel, cotangent)


def _reached(kernel_size: int, size: int) -> Float[np.ndarray, "kernel_size size"]:
    """One where a tap of a centred kernel, for an output along an axis, is inside the image."""
    inputs = np.arange(kernel_size)[:, None] - kernel_size // 2 + np.arange(size)
    return ((inputs >= 0) & (inputs < size)).astype(np.float32)


def _sum_over_batch(x: Float[Array, "b *c"], dtype: Any) -> Float[Array, "*c"]:
    return lax.platform_dependent(
        x,
        # XLA for CPUs takes twenty times as long for a plain sum over the first axis.
        cpu=lambda x: jnp.tensordot(
            jnp.ones(x.shape[0], x.dtype), x, 1, preferred_element_type=dtype
        ),
        default=lambda x: jnp.sum(x, 0, dtype=dtype),
    )
