"""StarReLU, and what follows it, with backward passes that keep the activation's input alone."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.depthwise import depthwise_conv2d
from metaformer_jax.models.lanes import images_along_lanes
from metaformer_jax.models.matmul import kernel_gradient, matmul
from metaformer_jax.models.schedule import run_after


class StarReLU(nnx.Module):
    """`s * relu(x) ** 2 + b` with one learned `s` and `b` (the publication's own activation)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (1,)))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (1,)))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return _star_relu(x, self.scale[...], self.bias[...])


class AfterStarReLU(Protocol):
    """A layer that knows how to follow a StarReLU."""

    def __call__(self, x: Array) -> Array: ...

    def after_star_relu(self, x: Array, scale: Array, bias: Array) -> Array:
        """What the layer makes of the StarReLU of `x`, which has this scale and bias."""


def activate_and_apply(activation: Any, layer: Any, x: Float[Array, "*b c"]) -> Array:
    """`layer(activation(x))`.

    Of a StarReLU before a layer that knows it (`AfterStarReLU`) the backward pass keeps `x` alone
    and makes the activation anew. What autodiff would keep, the squares and the activation, is
    twice as much memory again, which takes longer to fill than the activation to compute.
    """
    if type(activation) is StarReLU and hasattr(layer, "after_star_relu"):
        return layer.after_star_relu(x, activation.scale[...], activation.bias[...])
    return layer(activation(x))


def squared_relu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`relu(x) ** 2` (https://arxiv.org/abs/2109.08668)."""
    # Written as a maximum, XLA for CPUs fills an array with zeros to compare with.
    return jnp.where(x <= 0, 0, jnp.square(x))


def _activate(squares: Array, scale: Array, bias: Array) -> Array:
    return (scale * squares + bias).astype(squares.dtype)


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
    by_scale = jnp.sum(wide * jnp.square(positive)).reshape(scale.shape)
    by_bias = jnp.sum(wide).reshape(bias.shape)
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
    return matmul(_star_relu(x, scale, bias), kernel)


def _matmul_forward(
    x: Array, scale: Array, bias: Array, kernel: Array
) -> tuple[Array, tuple[Array, ...]]:
    return star_relu_matmul(x, scale, bias, kernel), (x, scale, bias, kernel)


def _matmul_backward(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    x, scale, bias, kernel = residuals
    positive = _positive(x, cotangent)
    # The product is linear in the squares and in the bias: what is known of it for each of them
    # makes the sums over all activations, for scale and bias, sums over the kernel.
    of_squares = kernel_gradient(jnp.square(positive), cotangent)
    of_ones = jnp.sum(cotangent, tuple(range(cotangent.ndim - 1)), dtype=scale.dtype)
    by_kernel = (scale * of_squares + bias * of_ones).astype(kernel.dtype)
    wide = kernel.astype(scale.dtype)
    by_scale = jnp.sum(wide * of_squares).reshape(scale.shape)
    by_bias = jnp.dot(wide.sum(0), of_ones).reshape(bias.shape)
    by_x = _input_gradient(positive, scale, cotangent @ kernel.T)
    return by_x, by_scale, by_bias, by_kernel


star_relu_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def star_relu_depthwise_conv2d(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " 1"],
    bias: Float[Array, " 1"],
    kernel: Float[Array, "kh kw c"],
) -> Float[Array, "b h w c"]:
    """The `depthwise_conv2d` of the StarReLU of `x`."""
    return depthwise_conv2d(_star_relu(x, scale, bias), kernel)


def _depthwise_forward(
    x: Array, scale: Array, bias: Array, kernel: Array
) -> tuple[Array, tuple[Array, ...]]:
    return star_relu_depthwise_conv2d(x, scale, bias, kernel), (x, scale, bias, kernel)


def _depthwise_backward(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    x, scale, bias, kernel = residuals
    cotangent = images_along_lanes(cotangent, major_to_minor=(1, 3, 2, 0))
    positive = _positive(x, cotangent)
    by_activated, of_squares = jax.vjp(depthwise_conv2d, jnp.square(positive), kernel)[1](cotangent)
    # As in a matrix product; of ones, each tap sums what it reaches inside the image.
    (kh, kw, _), (h, w) = kernel.shape, x.shape[1:3]
    of_ones = jnp.einsum(
        "ih,hwc,jw->ijc",
        _reached(kh, h),
        _sum_over_batch(cotangent, scale.dtype),
        _reached(kw, w),
        precision=lax.Precision.HIGHEST,
    )
    wide = kernel.astype(scale.dtype)
    by_kernel = (scale * of_squares + bias * of_ones).astype(kernel.dtype)
    by_scale = jnp.sum(wide * of_squares).reshape(scale.shape)
    by_bias = jnp.sum(wide * of_ones).reshape(bias.shape)
    return _input_gradient(positive, scale, by_activated), by_scale, by_bias, by_kernel


star_relu_depthwise_conv2d.defvjp(_depthwise_forward, _depthwise_backward)


def _reached(kernel_size: int, size: int) -> Float[np.ndarray, "kernel_size size"]:
    """One where a tap of a centred kernel, for this output along an axis, is inside the image."""
    inputs = np.arange(kernel_size)[:, None] - kernel_size // 2 + np.arange(size)
    return ((inputs >= 0) & (inputs < size)).astype(np.float32)


def _sum_over_batch(x: Float[Array, "b *c"], dtype: Any) -> Float[Array, "*c"]:
    return lax.platform_dependent(
        x,
        # Its sums over the first axis alone take XLA for CPUs twenty times as long.
        cpu=lambda x: jnp.tensordot(jnp.ones(len(x), x.dtype), x, 1, preferred_element_type=dtype),
        default=lambda x: jnp.sum(x, 0, dtype=dtype),
    )


def _positive(x: Array, cotangent: Array) -> Array:
    # Its square is that of `squared_relu` written in another way: the same term in both passes XLA
    # for CPUs would compute once and keep.
    return jnp.where((kept := run_after(x, cotangent)) <= 0, 0, kept)


def _input_gradient(positive: Array, scale: Array, by_activated: Array) -> Array:
    return (by_activated * (2 * scale) * positive).astype(positive.dtype)
