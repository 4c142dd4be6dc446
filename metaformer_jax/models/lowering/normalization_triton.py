"""Layer normalisation over the last axis as kernels for NVIDIA GPUs that read everything once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.triton import (
    THREADS,
    call,
    load,
    power_of_two,
    store,
)

# The threads of one block hold a whole row.
MOST_CHANNELS = 1024
# Channels that are loaded together: few enough for the threads of one warp.
_MOST_TOGETHER = 128
# Values of each array that a thread holds, unless that is too many rows.
_PER_THREAD = 16
_MOST_ROWS = 16
# Thread blocks of a backward pass, each of which sums its own part of the scale's gradient.
_MOST_BLOCKS = 1024


def normalize(
    x: Float[Array, "*b c"],
    scale: Float[Array, " c"],
    *,
    epsilon: float,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, "*b c"]:
    """`scale * (x - mean) / sqrt(variance + epsilon)`, computed in float32.

    Args:
        x: the input.
        scale: one number per channel.
        epsilon: as above.
        dtype: of the result.
        interpret: interprets the kernel, slowly, on any device.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, channels = _block(flat.shape[1])
    body = functools.partial(_normalize_kernel, rows=rows, channels=channels, epsilon=epsilon)
    out, grid = jax.ShapeDtypeStruct(flat.shape, dtype), (pl.cdiv(len(flat), rows),)
    return call(body, grid, out, flat, scale, interpret=interpret).reshape(x.shape)


def gradients(
    x: Float[Array, "*b c"],
    scale: Float[Array, " c"],
    cotangent: Float[Array, "*b c"],
    beside: Float[Array, "*b c"],
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "*b c"], Float[Array, " c"]]:
    """The gradients for `x`, with `beside` added, and for `scale`; arguments as above."""
    flat, c = x.reshape(-1, x.shape[-1]), x.shape[-1]
    rows, channels = _block(c)
    parts = pl.cdiv(pl.cdiv(len(flat), rows), _MOST_BLOCKS)
    blocks = pl.cdiv(len(flat), rows * parts)
    body = functools.partial(
        _normalization_gradient_kernel,
        rows=rows,
        channels=channels,
        epsilon=epsilon,
        parts=parts,
    )
    out = (
        jax.ShapeDtypeStruct(flat.shape, x.dtype),
        jax.ShapeDtypeStruct((blocks, c), jnp.float32),
    )
    given = (cotangent.reshape(flat.shape), beside.reshape(flat.shape))
    x_gradient, scale_gradient = call(
        body, (blocks,), out, flat, scale, *given, interpret=interpret
    )
    return x_gradient.reshape(x.shape), scale_gradient.sum(0).astype(scale.dtype)


def _block(c: int) -> tuple[int, int]:
    """Rows of a block of threads, and channels that are loaded together."""
    channels = min(c & -c, _MOST_TOGETHER)
    # If that is too few, as for an odd number, one load takes all channels and idles some threads.
    channels = channels if channels >= 16 else power_of_two(c)
    rows = power_of_two(-(-THREADS * _PER_THREAD // max(c, channels)))
    return min(rows, _MOST_ROWS), channels


def _load_row(array: Any, row: Array, channels: int) -> list[Array]:
    n, c = array.shape
    return [
        load(array.at[row, channel], (row < n) & (channel < c)) for channel in _parts(c, channels)
    ]


def _load_scale(array: Any, row: Array, channels: int) -> list[Array]:
    (c,) = array.shape
    return [
        load(array.at[0 * row + channel], 0 * row + channel < c) for channel in _parts(c, channels)
    ]


def _store_row(array: Any, row: Array, channels: int, values: list[Array]) -> None:
    n, c = array.shape
    for channel, part in zip(_parts(c, channels), values, strict=True):
        store(array.at[row, channel], part, (row < n) & (channel < c))


def _parts(c: int, channels: int) -> list[Array]:
    return [first + jnp.arange(channels)[None, :] for first in range(0, c, channels)]


def _mean(values: list[Array], c: int) -> Array:
    return jnp.sum(functools.reduce(jnp.add, values), 1, keepdims=True) / c


def _centred(values: list[Array], c: int, epsilon: float) -> tuple[list[Array], Array]:
    mean, channels = _mean(values, c), values[0].shape[1]
    centred = [
        jnp.where(channel < c, part - mean, 0) if c % channels else part - mean
        for channel, part in zip(_parts(c, channels), values, strict=True)
    ]
    return centred, lax.rsqrt(_mean([part * part for part in centred], c) + epsilon)


def _normalize_kernel(
    x: Any, scale: Any, out: Any, *, rows: int, channels: int, epsilon: float
) -> None:
    row = pl.program_id(0) * rows + jnp.arange(rows)[:, None]
    centred, inverse = _centred(_load_row(x, row, channels), x.shape[1], epsilon)
    weights = _load_scale(scale, row, channels)
    normalized = [part * (inverse * weight) for part, weight in zip(centred, weights, strict=True)]
    _store_row(out, row, channels, normalized)


def _normalization_gradient_kernel(
    x: Any,
    scale: Any,
    cotangent: Any,
    beside: Any,
    x_gradient: Any,
    scale_gradient: Any,
    *,
    rows: int,
    channels: int,
    epsilon: float,
    parts: int,
) -> None:
    c, block = x.shape[1], pl.program_id(0)
    first = block * parts * rows + jnp.arange(rows)[:, None]
    weights = _load_scale(scale, first, channels)

    def add_rows(part: Any, totals: list[Array]) -> list[Array]:
        row = first + part * rows
        centred, inverse = _centred(_load_row(x, row, channels), c, epsilon)
        normalized = [part * inverse for part in centred]
        given = _load_row(cotangent, row, channels)
        gradients = [part * weight for part, weight in zip(given, weights, strict=True)]
        # A shift or a scaling of all values does not change the output.
        moved = _mean(gradients, c)
        products = [a * b for a, b in zip(gradients, normalized, strict=True)]
        stretched = _mean(products, c)
        results = [
            inverse * (gradient - moved - part * stretched) + other
            for gradient, part, other in zip(
                gradients, normalized, _load_row(beside, row, channels), strict=True
            )
        ]
        _store_row(x_gradient, row, channels, results)
        return [a + b * d for a, b, d in zip(totals, given, normalized, strict=True)]

    zeros = [jnp.zeros((rows, channels), jnp.float32)] * len(weights)
    totals = lax.fori_loop(0, parts, add_rows, zeros)
    for start, total in zip(range(0, c, channels), totals, strict=True):
        channel = start + jnp.arange(channels)
        store(scale_gradient.at[block, channel], total.sum(0), channel < c)
