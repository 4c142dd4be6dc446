"""Attention that keeps, for its backward pass, at most one number per pair of tokens and head."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import attention_mosaic
from metaformer_jax.models.lowering.lanes import images_along_lanes
from metaformer_jax.models.lowering.platform import differentiated_as
from metaformer_jax.models.lowering.promotion import wide_dtype
from metaformer_jax.models.lowering.recomputation import PRODUCT, run_after
from metaformer_jax.models.lowering.triton import has_kernels

# From this number of pairs of tokens, over all heads and images, CPUs work on parts of a batch.
_MANY_PAIRS = 2**20
_MOST_PARTS = 4


def dot_product_attention(
    query: Float[Array, "b t k d"], key: Float[Array, "b s k d"], value: Float[Array, "b s k d"]
) -> Float[Array, "b t k d"]:
    """`softmax(q k^T / sqrt(d)) v` for each head (equation 1 of https://arxiv.org/abs/1706.03762).

    The softmax, its sums and all accumulation are float32. Autodiff would keep float32 arrays for
    the backward pass and read them several times. Here only the exponentials are kept, in the dtype
    of the inputs, and on CPUs, or on GPUs with cuDNN's attention, not even these. The sums of the
    exponentials divide the `d` outputs of a token, not its `s` weights. Reverse mode works to any
    order; forward mode (`jax.jvp`) is not supported.
    """
    return _dot_product_attention(_is_for_cudnn(query), query, key, value)


def self_attention(packed: Float[Array, "b h w 3c"], num_heads: int) -> Float[Array, "b h w c"]:
    """`dot_product_attention` among all tokens, of queries, keys and values in one array.

    On TPUs a kernel computes it, for the shapes and dtypes that it is made for.

    Args:
        packed: queries, keys and values, one after the other along the channels.
        num_heads: by which the channels of each are divided.
    """
    if not attention_mosaic.has_kernels(packed, num_heads):
        return _self_attention_by_parts(packed, num_heads)
    b, h, w, channels = packed.shape
    mixed = _self_attention(num_heads, packed.reshape(b, h * w, channels))
    return mixed.reshape(b, h, w, channels // 3)


def split_heads(packed: Float[Array, "b *n 3c"], num_heads: int) -> list[Float[Array, "b t k d"]]:
    """Queries, keys and values of all heads."""
    b, *sizes, channels = packed.shape
    # The last axis in thirds: with an axis of three, arrays would be transposed in memory.
    return [
        third.reshape(b, math.prod(sizes), num_heads, channels // 3 // num_heads)
        for third in jnp.split(packed, 3, axis=-1)
    ]


def _self_attention_by_parts(
    packed: Float[Array, "b *n 3c"], num_heads: int
) -> Float[Array, "b *n c"]:
    mixed = dot_product_attention(*split_heads(packed, num_heads))
    return mixed.reshape(*packed.shape[:-1], packed.shape[-1] // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _self_attention(num_heads: int, packed: Array) -> Array:
    plain = functools.partial(_self_attention_by_parts, num_heads=num_heads)
    kernel = functools.partial(attention_mosaic.attend, num_heads=num_heads)
    return lax.platform_dependent(packed, tpu=differentiated_as(plain, kernel), default=plain)


def _self_attention_forward(num_heads: int, packed: Array) -> tuple[Array, tuple[Array, Array]]:
    mixed = checkpoint_name(_self_attention(num_heads, packed), PRODUCT)
    return mixed, (packed, mixed)


def _self_attention_backward(
    num_heads: int, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array]:
    def plain(packed: Array, mixed: Array, cotangent: Array) -> Array:
        del mixed
        attend = functools.partial(_self_attention_by_parts, num_heads=num_heads)
        return jax.vjp(attend, packed)[1](cotangent)[0]

    kernel = functools.partial(attention_mosaic.gradients, num_heads=num_heads)
    return (
        lax.platform_dependent(
            *residuals, cotangent, tpu=differentiated_as(plain, kernel), default=plain
        ),
    )


_self_attention.defvjp(_self_attention_forward, _self_attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot_product_attention(by_cudnn: bool, query: Array, key: Array, value: Array) -> Array:
    # If nothing is kept, XLA for CPUs makes a single operation of this, which all cores share.
    return _attend_here(_attend_by_head, by_cudnn, query, key, value)[2]


def _forward(
    by_cudnn: bool, query: Array, key: Array, value: Array
) -> tuple[Array, tuple[Array, ...]]:
    by_head = _in_parts(_attend_by_head)
    kept, totals, mixed = _attend_here(by_head, by_cudnn, query, key, value)
    mixed = checkpoint_name(mixed, PRODUCT)
    return mixed, (query, key, value, kept, totals, mixed)


def _attend_here(
    by_head: Callable[..., tuple[Array, ...]],
    by_cudnn: bool,
    query: Array,
    key: Array,
    value: Array,
) -> tuple[Array, ...]:
    return lax.platform_dependent(
        query,
        key,
        value,
        cpu=by_head,
        cuda=_attend_by_cudnn if by_cudnn else _attend,
        default=_attend,
    )


def _backward(
    by_cudnn: bool, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=_in_parts(_gradients_by_head),
        cuda=_gradients_by_cudnn if by_cudnn else _gradients,
        default=_gradients,
    )


_dot_product_attention.defvjp(_forward, _backward)


def _attend(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """The exponentials `[b, k, t, s]`, their sums `[b, k, t, 1]` and the attention's output."""
    wide = wide_dtype(query.dtype)
    scores = jnp.einsum("btkd,bskd->bkts", query, key, preferred_element_type=wide)
    exponentials, totals = _exponentials(scores * query.shape[-1] ** -0.5)
    kept = exponentials.astype(value.dtype)
    mixed = jnp.einsum("bkts,bskd->btkd", kept, value, preferred_element_type=wide)
    mixed = mixed / _swapped(totals)
    mixed = images_along_lanes(mixed.astype(value.dtype), major_to_minor=(1, 2, 3, 0))
    return kept, totals, mixed


def _gradients(
    query: Array,
    key: Array,
    value: Array,
    exponentials: Array,
    totals: Array,
    mixed: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    wide = wide_dtype(query.dtype)
    shares = cotangent.astype(wide) / _swapped(totals)
    value_gradient = jnp.einsum("bkts,btkd->bskd", exponentials, shares.astype(value.dtype))
    # The softmax subtracts from each gradient its weighted mean, which is that of the output.
    mean = jnp.sum(shares * mixed.astype(wide), axis=-1, keepdims=True)
    # Not with `shares`: the compiler for TPUs would need twice as many cycles.
    weight_gradient = jnp.einsum("btkd,bskd->bkts", cotangent, value, preferred_element_type=wide)
    score_gradient = exponentials.astype(wide) * (weight_gradient / totals - _swapped(mean))
    score_gradient = (score_gradient * query.shape[-1] ** -0.5).astype(query.dtype)
    query_gradient = jnp.einsum("bkts,bskd->btkd", score_gradient, key)
    key_gradient = jnp.einsum("bkts,btkd->bskd", score_gradient, query)
    return query_gradient, key_gradient, value_gradient


def _is_for_cudnn(query: Float[Array, "b t k d"]) -> bool:
    """Whether cuDNN's attention, which writes no weights to memory, has gradients for it."""
    _, t, _, d = query.shape
    is_shaped = t % 2 == 0 and d % 8 == 0 and d <= 128
    return is_shaped and query.dtype != jnp.float32 and has_kernels(query)


def _cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _attend_by_cudnn(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """`_attend` by cuDNN; in place of the exponentials it returns zeros that nobody reads."""

    def kernel(query: Array, key: Array, value: Array) -> Array:
        # Called as for gradients: the compiler merges this with the same call in the backward pass.
        return jax.vjp(_cudnn_attention, query, key, value)[0]

    mixed = differentiated_as(lambda *arrays: _attend(*arrays)[2], kernel)(query, key, value)
    b, t, k, _ = query.shape
    totals = jnp.zeros((b, k, t, 1), wide_dtype(query.dtype))
    return jnp.zeros((b, k, t, key.shape[1]), value.dtype), totals, mixed


def _gradients_by_cudnn(
    query: Array,
    key: Array,
    value: Array,
    nothing: Array,
    totals: Array,
    mixed: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    del nothing, totals, mixed

    def plain(query: Array, key: Array, value: Array, cotangent: Array) -> Any:
        return _gradients(query, key, value, *_attend(query, key, value), cotangent)

    def kernel(query: Array, key: Array, value: Array, cotangent: Array) -> Any:
        return jax.vjp(_cudnn_attention, query, key, value)[1](cotangent)

    return differentiated_as(plain, kernel)(query, key, value, cotangent)


def _in_parts(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """`function` applied to the parts of a large batch, with the results concatenated.

    XLA for CPUs runs the small matrix products of all heads on one core. The parts do not depend on
    each other, so other cores can work on them.
    """

    def run(query: Array, key: Array, *others: Array) -> tuple[Array, ...]:
        (b, t, k, _), s = query.shape, key.shape[1]
        # Of an exported program any of these may be unknown.
        is_known = all(isinstance(size, int) for size in (b, t, k, s))
        if not is_known or b * k * t * s < _MANY_PAIRS:
            return function(query, key, *others)
        num_parts = math.gcd(b, _MOST_PARTS)
        parts = zip(*(jnp.split(x, num_parts) for x in (query, key, *others)), strict=True)
        results = zip(*(function(*part) for part in parts), strict=True)
        return tuple(jnp.concatenate(parts_of_one) for parts_of_one in results)

    return run


def _attend_by_head(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """`_attend` for CPUs, as products of matrices that are contiguous in memory.

    XLA for CPUs takes two to five times as long for products that have the heads between the axes
    of a matrix; the barriers keep it from transforming these into such. The exponentials are not
    kept, and zeros that nobody reads are returned in their place: filling so much memory takes
    longer than multiplying again.
    """
    exponentials, totals = _exponentials_by_head(query, key)
    value = lax.optimization_barrier(_swapped(value))
    mixed = jnp.matmul(exponentials.astype(value.dtype), value, preferred_element_type=totals.dtype)
    mixed = _swapped((mixed / totals).astype(value.dtype))
    return jnp.zeros(exponentials.shape, value.dtype), totals, mixed


def _exponentials_by_head(query: Array, key: Array) -> tuple[Array, Array]:
    # The scale is applied to the `d` numbers of a token, not to its `s` scores.
    scaled = (query.astype(wide_dtype(query.dtype)) * query.shape[-1] ** -0.5).astype(query.dtype)
    query, key = lax.optimization_barrier((_swapped(scaled), _transposed(key)))
    return _exponentials(jnp.matmul(query, key, preferred_element_type=wide_dtype(query.dtype)))


def _gradients_by_head(
    query: Array,
    key: Array,
    value: Array,
    nothing: Array,
    totals: Array,
    mixed: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    """`_gradients` for CPUs: only matrices with `d` columns are transposed, never the weights."""
    del nothing
    query, key, value, mixed = (run_after(x, cotangent) for x in (query, key, value, mixed))
    exponentials, _ = _exponentials_by_head(query, key)
    exponentials = exponentials.astype(value.dtype)
    # Sums and scale are applied to tokens, not to every pair of them.
    shares = cotangent.astype(totals.dtype) / _swapped(totals)
    scaled = shares * query.shape[-1] ** -0.5
    mean = jnp.sum(scaled * mixed.astype(totals.dtype), axis=-1, keepdims=True)
    query, key, value, shares, scaled, mean = lax.optimization_barrier(
        (
            _transposed(query),
            _swapped(key),
            _transposed(value),
            _transposed(shares.astype(value.dtype)),
            _swapped(scaled.astype(value.dtype)),
            _swapped(mean),
        )
    )
    value_gradient = jnp.matmul(shares, exponentials)
    score_gradient = jnp.matmul(scaled, value, preferred_element_type=mean.dtype)
    score_gradient = (exponentials.astype(mean.dtype) * (score_gradient - mean)).astype(query.dtype)
    query_gradient = jnp.matmul(score_gradient, key)
    key_gradient = jnp.matmul(query, score_gradient)
    return (
        _swapped(query_gradient),
        key_gradient.transpose(0, 3, 1, 2),
        value_gradient.transpose(0, 3, 1, 2),
    )


def _exponentials(
    scores: Float[Array, "b k t s"],
) -> tuple[Float[Array, "b k t s"], Float[Array, "b k t 1"]]:
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    return exponentials, exponentials.sum(-1, keepdims=True)


def _swapped(array: Float[Array, "b t k d"]) -> Float[Array, "b k t d"]:
    return array.transpose(0, 2, 1, 3)


def _transposed(array: Float[Array, "b t k d"]) -> Float[Array, "b k d t"]:
    return array.transpose(0, 2, 3, 1)
