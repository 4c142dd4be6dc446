"""StarReLU, and its product with a matrix, with backward passes that keep only its input.

On GPUs they keep its positive part, and possibly its squares as well.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.matmul import matmul, sum_of_outer_products
from metaformer_jax.models.lowering.promotion import promoted
from metaformer_jax.models.lowering.recomputation import run_after


def squared_relu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`relu(x) ** 2` (https://arxiv.org/abs/2109.08668)."""
    # Not a maximum, for which XLA for CPUs would fill an array with zeros to compare with.
    return jnp.where(x <= 0, 0, jnp.square(x))


def _activate(squares: Array, scale: Array, bias: Array) -> Array:
    scale, wide, bias = promoted(scale, squares, bias)
    return (scale * wide + bias).astype(squares.dtype)


@jax.custom_vjp
def star_relu(
    x: Float[Array, "*b c"], scale: Float[Array, " 1"], bias: Float[Array, " 1"]
) -> Float[Array, "*b c"]:
    """`scale * relu(x) ** 2 + bias`."""
    return _activate(squared_relu(x), scale, bias)


def _activation_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    return star_relu(x, scale, bias), (x, scale, bias)


def _activation_backward(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    x, scale, bias = residuals
    positive, wide = positive_part(x, cotangent), cotangent.astype(scale.dtype)
    scale_gradient = sum_for(scale, jnp.sum(wide * jnp.square(positive)))
    bias_gradient = sum_for(bias, jnp.sum(wide))
    return input_gradient(positive, scale, cotangent), scale_gradient, bias_gradient


star_relu.defvjp(_activation_forward, _activation_backward)


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
    x_gradient, of_squares = lax.platform_dependent(
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
    kernel_gradient = (factor * of_squares + bias * of_ones).astype(kernel.dtype)
    wide = kernel.astype(factor.dtype)
    scale_gradient = sum_for(scale, jnp.sum(wide * of_squares))
    bias_gradient = sum_for(bias, jnp.dot(wide.sum(0), of_ones))
    return x_gradient, scale_gradient, bias_gradient, kernel_gradient


star_relu_matmul.defvjp(_matmul_forward, _matmul_backward)


def _multiply_activated(x: Array, scale: Array, bias: Array, kernel: Array) -> tuple[Array, Array]:
    """The product, and what the backward pass needs of `x`."""
    return matmul(star_relu(x, scale, bias), kernel), x


def _gradients_of_activated(
    x: Array, scale: Array, kernel: Array, cotangent: Array
) -> tuple[Array, Array]:
    positive = positive_part(x, cotangent)
    of_squares = sum_of_outer_products(jnp.square(positive), cotangent)
    return input_gradient(positive, scale, cotangent @ kernel.T), of_squares


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
    x_gradient = (given @ scaled.T) * flat
    return x_gradient.reshape(positive.shape), sum_of_outer_products(jnp.square(flat), given)


def _by_token(x: Float[Array, "*b c"]) -> Float[Array, "n c"]:
    return x.reshape(-1, x.shape[-1])


def positive_part(x: Array, cotangent: Array) -> Array:
    """`relu(x)` in a backward pass, computed when it has reached `cotangent`."""
    # Not written as in `squared_relu`: if both passes had the same term, XLA for CPUs would compute
    # it once and keep it.
    return jnp.where((kept := run_after(x, cotangent)) <= 0, 0, kept)


def input_gradient(positive: Array, scale: Array, activated_gradient: Array) -> Array:
    """The gradient of a StarReLU's input, from its positive part and that of the activation."""
    activated_gradient, scale, wide = promoted(activated_gradient, scale, positive)
    return (activated_gradient * (2 * scale) * wide).astype(positive.dtype)


def sum_for(parameter: Array, gradient: Array) -> Array:
    """Reshapes and casts a sum to the gradient of this parameter, than which `x` may be wider."""
    return gradient.reshape(parameter.shape).astype(parameter.dtype)
