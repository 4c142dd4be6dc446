"""The second half of a block, from its norm to the sum with the shortcut, as one function.

Kernels for TPUs compute it; see `mlp_mosaic`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import mlp_mosaic
from metaformer_jax.models.lowering.mlp_forms import Form, Norm
from metaformer_jax.models.lowering.platform import differentiated_as


def residual_mlp(
    form: Form,
    x: Float[Array, "b h w c"],
    keep: Float[Array, " b"],
    shortcut: Float[Array, " c"] | None,
    up: Float[Array, "c d"],
    down: Float[Array, "d c"],
    offset: Float[Array, " c"],
    *,
    norm: Norm,
) -> Float[Array, "b h w c"]:
    """`shortcut * x + keep * (relu(norm(x) @ up) ** 2 @ down + offset)`.

    The norm has neither scale nor bias: a scale belongs into `up`, the scale and bias of a StarReLU
    into `down` and `offset`. Norm and sums are float32, what is multiplied by `up` and `down` has
    the dtype of `x`. Only the arguments are kept for the backward pass.

    Args:
        form: in which the kernels take `x`.
        x: the input of the block's second half.
        keep: a factor for each image, which is taken as a constant: its gradient is zero.
        shortcut: float32; None for ones.
        up: from the channels to those of the hidden layer, float32.
        down: back from these, float32.
        offset: float32.
        norm: of the input.
    """
    arrays = form.enter(x), keep, shortcut, up, down, offset
    return form.leave(_residual_mlp(form, norm, *arrays)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _residual_mlp(form: Form, norm: Norm, *arrays: Any) -> Array:
    plain = functools.partial(_plain, form, norm=norm)
    kernel = functools.partial(mlp_mosaic.transform, form, norm=norm)
    return lax.platform_dependent(*arrays, tpu=differentiated_as(plain, kernel), default=plain)


def _forward(form: Form, norm: Norm, *arrays: Any) -> tuple[Array, tuple[Any, ...]]:
    return _residual_mlp(form, norm, *arrays), arrays


def _backward(form: Form, norm: Norm, arrays: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    def plain(*arrays: Any) -> tuple[Any, ...]:
        *inputs, cotangent = arrays
        return jax.vjp(functools.partial(_plain, form, norm=norm), *inputs)[1](cotangent)

    kernel = functools.partial(mlp_mosaic.gradients, form, norm=norm)
    return lax.platform_dependent(
        *arrays, cotangent, tpu=differentiated_as(plain, kernel), default=plain
    )


_residual_mlp.defvjp(_forward, _backward)


def _plain(
    form: Form,
    x: Array,
    keep: Array,
    shortcut: Array | None,
    up: Array,
    down: Array,
    offset: Array,
    *,
    norm: Norm,
) -> Array:
    def multiply(x: Array, weights: Array, dtype: Any) -> Array:
        return jnp.matmul(
            x.astype(dtype), weights.astype(dtype), preferred_element_type=weights.dtype
        )

    wide = form.leave(x).astype(up.dtype)
    axes = (1, 2) if norm.is_over_images else -1
    centred = wide - wide.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    normalized = centred * lax.rsqrt(variance + norm.epsilon)
    squares = jnp.square(jnp.maximum(multiply(normalized, up, x.dtype), 0))
    branch = multiply(squares, down, x.dtype) + offset
    scaled = wide if shortcut is None else wide * shortcut
    result = (scaled + lax.stop_gradient(keep)[:, None, None] * branch).astype(x.dtype)
    return form.enter(result[:, None])
