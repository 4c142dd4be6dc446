"""StarReLU and the layer after it, with backward passes that keep only the activation's input.

On GPUs they keep its positive part, and before a linear layer possibly its squares as well.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models import depthwise_banded, depthwise_triton
from metaformer_jax.models.depthwise import depthwise_conv2d_by_xla
from metaformer_jax.models.lanes import images_along_lanes
from metaformer_jax.models.matmul import kernel_gradient, matmul
from metaformer_jax.models.promotion import promoted
from metaformer_jax.models.schedule import run_after


class StarReLU(nnx.Module):
    """`s * relu(x) ** 2 + b` with one learned `s` and `b` (the publication's own activation)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (1,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (1,), jnp.float32))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return _star_relu(x, self.scale[...], self.bias[...])


class AfterStarReLU(Protocol):
    """A layer that can be applied together with a StarReLU before it."""

    def __call__(self, x: Array) -> Array: ...

    def after_star_relu(self, x: Array, scale: Array, bias: Array) -> Array:
        """The layer applied to the StarReLU, with this scale and bias, of `x`."""


def activate_and_apply(activation: Any, layer: Any, x: Float[Array, "*b c"]) -> Array:
    """`layer(activation(x))`.

    For a StarReLU before a layer that supports it (`AfterStarReLU`), the backward pass keeps only
    `x` and recomputes the activation. Autodiff would also keep the squares and the activation,
    which is two more arrays; filling them takes longer than computing the activation again.
    """
    if type(activation) is StarReLU and _is_applied_with_it(layer):
        return layer.after_star_relu(x, activation.scale[...], activation.bias[...])
    return layer(activation(x))


def _is_applied_with_it(layer: Any) -> bool:
    # A subclass that changes the call alone computes something else than the inherited method.
    for owner in type(layer).__mro__:
        if "after_star_relu" in vars(owner):
            return True
        if "__call__" in vars(owner):
            return False
    return False


def squared_relu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`relu(x) ** 2` (https://arxiv.org/abs/2109.08668)."""
    # Not a maximum, for which XLA for CPUs would fill an array with zeros to compare with.
    return jnp.where(x <= 0, 0, jnp.square(x))


def _activate(squares: Array, scale: Array, bias: Array) -> Array:
    scale, wide, bias = promoted(scale, squares, bias)
    return (scale * wide + bias).astype(squares.dtype)


@jax.custom_vjp
def _star_relu(x: Array, scale: Array, bias: Array) -> Array:
    return _activate(squared_relu(x), scale, bias)


def _star_relu_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    return _star_relu(x, scale, bias), (x, scale, bias)


def _star_relu_backward(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    x, scale, bias = residuals
    positive, wide = _positive(x, cotangent), cotangent.astype(scale.dtype)
    by_scale = _like(scale, jnp.sum(wide * jnp.square(positive)))
    by_bias = _like(bias, jnp.sum(wide))
    return _input_gradient(positive, scale, cotangent), by_scale, by_bias


_star_relu.defvjp(_star_relu_forward, _star_relu_backward)


@jax.custom_vjp
def star_relu_matmul(
    x: Float[Array, "*b c"],
    scale: Float[Array, " 1"],
    bias: Float[Array, " 1"],
    kernel: Float[Array, "c d"],
) -> Float[Array, "*b d"]:
    """The StarReLU of `x` times `kernel`."""
    return _matmul_forward(x, scale, bias, kernel)[0]


def _matmul_forward(
    x: Array, scale: Array, bias: Array, kernel: Array
) -> tuple[Array, tuple[Array, ...]]:
    product, kept = lax.platform_dependent(
        x, scale, bias, kernel, cuda=_multiply_squares, default=_multiply_activated
    )
    return product, (kept, scale, bias, kernel)


def _matmul_backward(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    kept, scale, bias, kernel = residuals
    by_x, of_squares = lax.platform_dependent(
        kept,
        scale,
        kernel,
        cotangent,
        cuda=_gradients_of_squares,
        default=_gradients_of_activated,
    )
    # The product is linear in the squares and in the bias, so the gradients of scale and bias are
    # sums over the kernel instead of sums over all activations.
    of_ones = jnp.sum(cotangent, tuple(range(cotangent.ndim - 1)), dtype=scale.dtype)
    factor, of_squares = promoted(scale, of_squares)
    by_kernel = (factor * of_squares + bias * of_ones).astype(kernel.dtype)
    wide = kernel.astype(factor.dtype)
    by_scale = _like(scale, jnp.sum(wide * of_squares))
    by_bias = _like(bias, jnp.dot(wide.sum(0), of_ones))
    return by_x, by_scale, by_bias, by_kernel


star_relu_matmul.defvjp(_matmul_forward, _matmul_backward)


def _multiply_activated(x: Array, scale: Array, bias: Array, kernel: Array) -> tuple[Array, Array]:
    """The product, and what the backward pass needs of `x`."""
    return matmul(_star_relu(x, scale, bias), kernel), x


def _gradients_of_activated(
    x: Array, scale: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array]:
    positive = _positive(x, cotangent)
    of_squares = kernel_gradient(jnp.square(positive), cotangent)
    return _input_gradient(positive, scale, cotangent @ kernel.T), of_squares


def _multiply_squares(x: Array, scale: Array, bias: Array, kernel: Array) -> tuple[Array, Array]:
    """`_multiply_activated` for GPUs: scale and bias are applied to the kernel.

    The maximum, which is left of the activation, is fused into the product before it, and the
    backward pass can use the squares again.
    """
    positive, wide = jnp.maximum(_by_token(x), 0), kernel.astype(scale.dtype)
    product = jnp.square(positive) @ (scale * wide).astype(kernel.dtype)
    product = product + (bias * wide.sum(0)).astype(product.dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1]), positive.reshape(x.shape)


def _gradients_of_squares(
    positive: Array, scale: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array]:
    flat, given = _by_token(positive), _by_token(cotangent)
    scaled = (2 * scale * kernel.astype(scale.dtype)).astype(kernel.dtype)
    by_x = (given @ scaled.T) * flat
    return by_x.reshape(positive.shape), kernel_gradient(jnp.square(flat), given)


def _by_token(x: Float[Array, "*b c"]) -> Float[Array, "n c"]:
    return x.reshape(-1, x.shape[-1])


def star_relu_depthwise_conv2d(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " 1"],
    bias: Float[Array, " 1"],
    kernel: Float[Array, "kh kw c"],
) -> Float[Array, "b h w c"]:
    """The `depthwise_conv2d` of the StarReLU of `x`."""
    return _star_relu_depthwise(depthwise_triton.has_kernel(x, kernel), x, scale, bias, kernel)


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
    return depthwise_conv2d_by_xla(_star_relu(x, scale, bias), kernel), x


def _gradients_of_convolved(
    x: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    positive = _positive(x, cotangent)
    _, transpose = jax.vjp(depthwise_conv2d_by_xla, jnp.square(positive), kernel)
    by_activated, of_squares = transpose(cotangent)
    by_x = _input_gradient(positive, scale, by_activated)
    return by_x, *_parameter_gradients(of_squares, scale, bias, kernel, cotangent)


def _parameter_gradients(
    of_squares: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array]:
    """Those of scale, bias and kernel, from that of a kernel over the squares."""
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
    by_kernel = (factor * of_squares + bias * of_ones).astype(kernel.dtype)
    by_scale = _like(scale, jnp.sum(wide * of_squares))
    by_bias = _like(bias, jnp.sum(wide * of_ones))
    return by_scale, by_bias, by_kernel


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
    activated = _star_relu(rows, scale, bias)
    convolved = depthwise_banded.convolve_rows(activated, kernel, width=x.shape[2])
    return convolved.reshape(x.shape), rows.reshape(x.shape)


def _gradients_of_convolved_rows(
    x: Array, scale: Array, bias: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    """`_gradients_of_convolved` for TPUs, with rows along the lanes."""
    width, rows = x.shape[2], depthwise_banded.fold(x)
    cotangent = depthwise_banded.rows_along_lanes(depthwise_banded.fold(cotangent))
    by_activated = depthwise_banded.convolve_rows(cotangent, kernel[::-1, ::-1], width=width)
    by_kernel = depthwise_banded.kernel_gradient_of_rows(
        _star_relu(rows, scale, bias), cotangent, kernel, width=width
    )
    # The sums over all activations are taken as the convolution is written.
    positive, wide = jnp.maximum(rows, 0), by_activated.astype(scale.dtype)
    by_scale = _like(scale, jnp.sum(wide * jnp.square(positive)))
    by_bias = _like(bias, jnp.sum(wide))
    by_x = depthwise_banded.rows_along_lanes(_input_gradient(positive, scale, by_activated))
    return by_x.reshape(x.shape), by_scale, by_bias, by_kernel


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
    by_x = depthwise_triton.convolve(cotangent, flipped, factor=positive, interpret=interpret)
    of_squares = depthwise_triton.kernel_gradient(
        positive, cotangent, kernel.shape[:2], squares=True, interpret=interpret
    )
    of_squares = of_squares.astype(kernel.dtype)
    return by_x, *_parameter_gradients(of_squares, scale, bias, kernel, cotangent)


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


def _positive(x: Array, cotangent: Array) -> Array:
    # Not written as in `squared_relu`: if both passes had the same term, XLA for CPUs would compute
    # it once and keep it.
    return jnp.where((kept := run_after(x, cotangent)) <= 0, 0, kept)


def _input_gradient(positive: Array, scale: Array, by_activated: Array) -> Array:
    by_activated, scale, wide = promoted(by_activated, scale, positive)
    return (by_activated * (2 * scale) * wide).astype(positive.dtype)


def _like(parameter: Array, gradient: Array) -> Array:
    """A sum as the gradient of this parameter, than which `x` may be wider."""
    return gradient.reshape(parameter.shape).astype(parameter.dtype)
