"""Layer normalisation that keeps little for its backward pass: its input, mean and variance.

The kernels for GPUs keep the input alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import normalization_triton
from metaformer_jax.models.lowering.platform import differentiated_as
from metaformer_jax.models.lowering.promotion import wide_dtype
from metaformer_jax.models.lowering.recomputation import STATISTICS, run_after

# An image's values are shifted by the mean of a part of them: one in so many.
_VALUES_PER_SAMPLE = 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize(
    x: Float[Array, "b *c"], scale: Float[Array, " c"], axes: tuple[int, ...], epsilon: float
) -> Float[Array, "b *c"]:
    """`scale * (x - mean) / sqrt(variance + epsilon)` over these axes, in float32 or wider."""
    return _forward(x, scale, axes, epsilon)[0]


def _forward(
    x: Array, scale: Array, axes: tuple[int, ...], epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(wide_dtype(x.dtype))
    mean, variance = moments(x, axes)
    mean = checkpoint_name(mean, STATISTICS)
    inverse = checkpoint_name(_unfused(lax.rsqrt(variance + epsilon)), STATISTICS)
    return (wide - mean) * (inverse * scale), (x, scale, mean, inverse)


def moments(x: Float[Array, "b *c"], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and variance over these axes, which are kept, in float32 or wider."""
    in_two_passes = functools.partial(_moments_in_two_passes, axes=axes)
    if len(axes) == 1:
        return in_two_passes(x)
    # The values of whole images do not stay on a TPU's chip from one pass to the next.
    in_one_pass = functools.partial(_moments_in_one_pass, axes=axes)
    return lax.platform_dependent(x, tpu=in_one_pass, default=in_two_passes)


def _moments_in_two_passes(x: Array, *, axes: tuple[int, ...]) -> tuple[Array, Array]:
    wide = x.astype(wide_dtype(x.dtype))
    mean = _unfused(jnp.mean(wide, axes, keepdims=True))
    return mean, jnp.mean(jnp.square(wide - mean), axes, keepdims=True)


def _moments_in_one_pass(x: Array, *, axes: tuple[int, ...]) -> tuple[Array, Array]:
    # The variance as a difference loses the precision by which the mean, squared, exceeds it. The
    # mean after a shift by that of a fraction `f` of the values does so by (1 - f) / f at most.
    size, dtype = x.shape[axes[0]], wide_dtype(x.dtype)
    # Taken before the conversion, which is then not written to memory.
    some = lax.slice_in_dim(x, 0, -(-size // _VALUES_PER_SAMPLE), axis=axes[0]).astype(dtype)
    shift = lax.stop_gradient(jnp.mean(some, axes, keepdims=True))
    shifted = x.astype(dtype) - shift
    mean = jnp.mean(shifted, axes, keepdims=True)
    variance = jnp.mean(jnp.square(shifted), axes, keepdims=True) - jnp.square(mean)
    return shift + mean, jnp.maximum(variance, 0)


def _backward(
    axes: tuple[int, ...], epsilon: float, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array]:
    del epsilon
    x, scale, mean, inverse = residuals
    # Not written as in the forward pass: XLA for CPUs would keep the result from there.
    normalized = (mean - run_after(x, cotangent).astype(mean.dtype)) * -inverse
    gradient = cotangent * scale
    # A shift or a scaling of all values does not change the output.
    moved = jnp.mean(gradient, axes, keepdims=True)
    stretched = jnp.mean(gradient * normalized, axes, keepdims=True)
    moved, stretched = _unfused((moved, stretched))
    x_gradient = inverse * (gradient - moved - normalized * stretched)
    scale_gradient = jnp.sum(cotangent * normalized, tuple(range(x.ndim - 1)))
    return x_gradient.astype(x.dtype), scale_gradient.astype(scale.dtype)


normalize.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize_beside(
    x: Float[Array, "b *c"], scale: Float[Array, " c"], epsilon: float, dtype: Any
) -> tuple[Float[Array, "b *c"], Float[Array, "b *c"]]:
    """`x`, and `x` normalised over the last axis in this dtype, by the kernels for GPUs."""
    return _forward_beside(x, scale, epsilon, dtype)[0]


def _forward_beside(
    x: Array, scale: Array, epsilon: float, dtype: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    plain = functools.partial(_normalize_over_last, epsilon=epsilon, dtype=dtype)
    kernel = functools.partial(normalization_triton.normalize, epsilon=epsilon, dtype=dtype)
    normalized = lax.platform_dependent(
        x, scale, cuda=differentiated_as(plain, kernel), default=plain
    )
    return (x, normalized), (x, scale)


def _backward_beside(
    epsilon: float, dtype: Any, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    def plain(x: Array, scale: Array, cotangent: Array, beside: Array) -> tuple[Array, Array]:
        plain_normalize = functools.partial(_normalize_over_last, epsilon=epsilon, dtype=dtype)
        x_gradient, scale_gradient = jax.vjp(plain_normalize, x, scale)[1](cotangent)
        return x_gradient + beside, scale_gradient

    kernel = functools.partial(normalization_triton.gradients, epsilon=epsilon)
    beside, cotangent = cotangents
    return lax.platform_dependent(
        *residuals, cotangent, beside, cuda=differentiated_as(plain, kernel), default=plain
    )


normalize_beside.defvjp(_forward_beside, _backward_beside)


def _normalize_over_last(x: Array, scale: Array, *, epsilon: float, dtype: Any) -> Array:
    return normalize(x, scale, (x.ndim - 1,), epsilon).astype(dtype)


def _unfused(means: Any) -> Any:
    # XLA for CPUs would fuse the means with their use, and write them out for every value.
    return lax.platform_dependent(means, cpu=lax.optimization_barrier, default=lambda means: means)
