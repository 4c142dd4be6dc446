"""Attention whose backward pass keeps, per pair of tokens, one number in the compute dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def dot_product_attention(
    query: Float[Array, "b t n d"], key: Float[Array, "b s n d"], value: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """`softmax(q k^T / sqrt(d)) v` for each head (equation 1 of https://arxiv.org/abs/1706.03762).

    The softmax, its sums and all accumulation are float32. What autodiff would keep for the
    backward pass is float32 too, and read several times; here it is the exponentials alone, in the
    dtype of the inputs, and their sums divide the `d` outputs of a token, not its `s` weights.
    Reverse mode works to any order; plain forward mode (`jax.jvp`) does not.
    """
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = _accumulator(query)
    scores = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=wide)
    scores *= query.shape[-1] ** -0.5
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    totals = _by_token(exponentials.sum(-1))
    kept = exponentials.astype(value.dtype)
    mixed = jnp.einsum("bnts,bsnd->btnd", kept, value, preferred_element_type=wide) / totals
    mixed = mixed.astype(value.dtype)
    return mixed, (query, key, value, kept, totals, mixed)


def _backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    query, key, value, exponentials, totals, mixed = residuals
    wide = _accumulator(query)
    shares = cotangent.astype(wide) / totals
    value_gradient = jnp.einsum("bnts,btnd->bsnd", exponentials, shares.astype(value.dtype))
    # The softmax takes from each gradient its mean over the tokens, which is that of the output.
    mean = jnp.sum(shares * mixed.astype(wide), axis=-1)
    by_weight = jnp.einsum("btnd,bsnd->bnts", cotangent, value, preferred_element_type=wide)
    by_weight = by_weight / totals[..., 0].transpose(0, 2, 1)[..., None]
    by_score = exponentials.astype(wide) * (by_weight - mean.transpose(0, 2, 1)[..., None])
    by_score = (by_score * query.shape[-1] ** -0.5).astype(query.dtype)
    query_gradient = jnp.einsum("bnts,bsnd->btnd", by_score, key)
    key_gradient = jnp.einsum("bnts,btnd->bsnd", by_score, query)
    return query_gradient, key_gradient, value_gradient


dot_product_attention.defvjp(_forward, _backward)


def _accumulator(array: Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)


def _by_token(totals: Float[Array, "b n t"]) -> Float[Array, "b t n 1"]:
    return totals.transpose(0, 2, 1)[..., None]
