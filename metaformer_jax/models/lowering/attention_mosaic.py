"""Self-attention for TPUs as two kernels, forward and backward, written in Pallas for Mosaic.

The compiler for TPUs writes the weights of all pairs of tokens to memory and reads them again: a
third of CAFormer's training step. Here a kernel takes one image after the other, and its weights
never leave the chip's vector memory. Within a kernel tokens lie along the lanes and channels along
the sublanes: there a head of 32 channels fills whole tiles, the sums over the keys add whole
vectors, and no matrix of weights has to be transposed for a product.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.lanes import LANES
from metaformer_jax.models.lowering.mosaic import SUBLANES, block_spec, fits, product, takes

# With fewer tokens XLA's own operations are estimated to be as fast; more were not tried.
_FEWEST_TOKENS, _MOST_TOKENS = 128, 784
# For a few tokens the scores of so many heads are computed before the first one's are needed,
# because a product's result takes long to arrive, and the compiler keeps the order in which it is
# asked for them. For more tokens the products take longer than that.
_FEW_TOKENS = 256
_AHEAD_FOR_FEW, _AHEAD_FOR_MORE = 3, 1


class _Cycles(NamedTuple):
    """Cycles for one image, and for each of its heads by its tokens in 128 lanes.

    From 5 % less to 16 % more than in the kernels' schedules for v5e with 10 to 24 heads of 32
    channels and 196 to 784 tokens. The compiler, which estimates its own operations, leaves kernels
    out.
    """

    of_image: int
    of_head_for_few: float
    of_head_for_more: float


_FORWARD_CYCLES, _BACKWARD_CYCLES = _Cycles(1300, 0.425, 0.49), _Cycles(1900, 0.875, 1.03)


def has_kernels(packed: Float[Array, "b *n 3c"], num_heads: int) -> bool:
    """Whether there are kernels for such an array, in a program that is meant for TPUs."""
    if not takes(packed):
        return False
    _, *sizes, packed_channels = packed.shape
    num_tokens, num_channels = math.prod(sizes), packed_channels // 3
    # Those of a head.
    fills_tiles = num_channels // num_heads % SUBLANES == 0
    is_sized = _FEWEST_TOKENS <= num_tokens <= _MOST_TOKENS
    return is_sized and fills_tiles and fits(_num_bytes(num_tokens, num_channels))


def _num_bytes(num_tokens: int, num_channels: int) -> int:
    """The vector memory for the kernels: what the backward pass, the larger one, needs at most."""
    # Packed, output and the gradients of both, of two images, and transposed.
    arrays = 3 * 2 * num_tokens * 8 * num_channels
    # Numbers for pairs of tokens.
    pairs = 12 * 4 * num_tokens * math.ceil(num_tokens / LANES) * LANES
    return (arrays + pairs) * 5 // 4 + 2 * 2**20


def attend(
    packed: Float[Array, "b t 3c"], num_heads: int, *, interpret: bool = False
) -> Float[Array, "b t c"]:
    """`softmax(q k^T / sqrt(d)) v` for each head.

    Args:
        packed: queries, keys and values, one after the other along the channels.
        num_heads: by which the channels of each are divided.
        interpret: interprets the kernel, slowly, on any device.
    """
    num_channels = packed.shape[-1] // 3
    return _call(
        _attend,
        num_channels,
        num_heads,
        packed,
        num_products=2,
        cycles=_FORWARD_CYCLES,
        interpret=interpret,
    )


def gradients(
    packed: Float[Array, "b t 3c"],
    mixed: Float[Array, "b t c"],
    cotangent: Float[Array, "b t c"],
    num_heads: int,
    *,
    interpret: bool = False,
) -> Float[Array, "b t 3c"]:
    """The gradients of queries, keys and values for the `cotangent` of `mixed = attend(packed)`."""
    arrays = packed, mixed, cotangent
    num_channels = packed.shape[-1]
    return _call(
        _gradients,
        num_channels,
        num_heads,
        *arrays,
        num_products=5,
        cycles=_BACKWARD_CYCLES,
        interpret=interpret,
    )


def _call(
    body: Callable[..., None],
    num_channels: int,
    num_heads: int,
    *arrays: Array,
    num_products: int,
    cycles: _Cycles,
    interpret: bool,
) -> Array:
    # Programs for other platforms do not wait for this import.
    from jax.experimental.pallas import tpu as mosaic

    b, t, _ = arrays[0].shape
    dtype = arrays[0].dtype
    out = jax.ShapeDtypeStruct((b, t, num_channels), dtype)

    def image(array: Any) -> pl.BlockSpec:
        return block_spec((1, t, array.shape[-1]), lambda i: (i, 0, 0))

    of_head = cycles.of_head_for_few if t <= _FEW_TOKENS else cycles.of_head_for_more
    cycles_of_image = cycles.of_image + of_head * num_heads * t * math.ceil(t / LANES)

    return pl.pallas_call(
        functools.partial(_transposed, body, num_heads),
        grid=(b,),
        in_specs=[image(array) for array in arrays],
        out_specs=image(out),
        out_shape=out,
        scratch_shapes=[mosaic.VMEM((array.shape[-1], t), dtype) for array in (*arrays, out)],
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=(mosaic.PARALLEL,),
            vmem_limit_bytes=_num_bytes(t, arrays[0].shape[-1] // 3),
        ),
        interpret=interpret,
        name=f"attention{body.__name__}",
        cost_estimate=pl.CostEstimate(
            flops=2 * num_products * arrays[0].size // 3 * t,
            transcendentals=b * num_heads * t * t,
            bytes_accessed=out.size * out.dtype.itemsize + sum(array.nbytes for array in arrays),
        ),
        metadata={"kernel_cycles": str(round(b * cycles_of_image))},
    )(*arrays)


def _transposed(body: Callable[..., None], num_heads: int, *refs: Any) -> None:
    """`body` of references `[c, t]`, for the blocks `[1, t, c]` of an image."""
    blocks, transposed = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    for block, scratch in zip(blocks[:-1], transposed[:-1], strict=True):
        for part in _parts(block.shape[-1], LANES):
            scratch[part, :] = block[0, :, part].T
    body(*transposed, num_heads)
    for part in _parts(blocks[-1].shape[-1], LANES):
        blocks[-1][0, :, part] = transposed[-1][part, :].T


def _parts(size: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]


def _attend(packed: Any, mixed: Any, num_heads: int) -> None:
    query, key, value = _heads(packed, 3, num_heads)
    (out,) = _heads(mixed, 1, num_heads)
    scale = _scale(packed, num_heads)

    def score(head: int, _: None) -> Array:
        return product(packed[key[head], :], packed[query[head], :], (0, 0))

    def weigh(head: int, scores: Array) -> tuple[Array, Array]:
        exponentials, totals = _exponentials(scores, scale)
        return product(packed[value[head], :], exponentials.astype(packed.dtype), (1, 0)), totals

    def divide(head: int, sums: tuple[Array, Array]) -> None:
        weighted, totals = sums
        mixed[out[head], :] = (weighted / totals).astype(mixed.dtype)

    _run_ahead(num_heads, _ahead(packed), score, weigh, divide)


def _gradients(packed: Any, mixed: Any, cotangent: Any, gradient: Any, num_heads: int) -> None:
    query, key, value = _heads(packed, 3, num_heads)
    (out,) = _heads(mixed, 1, num_heads)
    scale = _scale(packed, num_heads)
    dtype = packed.dtype

    def score(head: int, _: None) -> tuple[Array, Array]:
        scores = product(packed[key[head], :], packed[query[head], :], (0, 0))
        weight_gradient = product(packed[value[head], :], cotangent[out[head], :], (0, 0))
        return scores, weight_gradient

    def multiply(head: int, products: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        scores, weight_gradient = products
        exponentials, totals = _exponentials(scores, scale)
        weights = exponentials / totals
        shares = cotangent[out[head], :]
        # The softmax subtracts from each gradient its weighted mean, which is that of the output.
        means = shares.astype(jnp.float32) * mixed[out[head], :].astype(jnp.float32)
        score_gradient = weights * (weight_gradient - means.sum(0, keepdims=True)) * scale
        score_gradient = score_gradient.astype(dtype)
        return (
            product(packed[key[head], :], score_gradient, (1, 0)),
            product(packed[query[head], :], score_gradient, (1, 1)),
            product(shares, weights.astype(dtype), (1, 1)),
        )

    def write(head: int, sums: tuple[Array, Array, Array]) -> None:
        for place, total in zip((query[head], key[head], value[head]), sums, strict=True):
            gradient[place, :] = total.astype(dtype)

    _run_ahead(num_heads, _ahead(packed), score, multiply, write)


def _heads(array: Any, num_parts: int, num_heads: int) -> list[list[slice]]:
    """For each of the parts of an array `[c, t]`, the channels of each head."""
    heads = _parts(array.shape[0], array.shape[0] // num_parts // num_heads)
    return [heads[start : start + num_heads] for start in range(0, len(heads), num_heads)]


def _scale(packed: Any, num_heads: int) -> float:
    return (packed.shape[0] // 3 // num_heads) ** -0.5


def _ahead(packed: Any) -> int:
    return _AHEAD_FOR_FEW if packed.shape[1] <= _FEW_TOKENS else _AHEAD_FOR_MORE


def _exponentials(
    scores: Float[Array, "s t"], scale: float
) -> tuple[Float[Array, "s t"], Float[Array, "1 t"]]:
    exponentials = jnp.exp((scores - scores.max(0, keepdims=True)) * scale)
    return exponentials, exponentials.sum(0, keepdims=True)


def _run_ahead(num_heads: int, ahead: int, first: Any, *others: Any) -> None:
    """Runs all stages for each head, the first one some heads before the others.

    A stage gets the number of the head and the previous stage's result for it.
    """
    waits = [lambda _, result: result] * (ahead - 1)
    stages = [first, *waits, *others]
    results: dict[int, Any] = {}
    for turn in range(num_heads + len(stages) - 1):
        for number, stage in enumerate(stages):
            head = turn - number
            if 0 <= head < num_heads:
                results[head] = stage(head, results.get(head))
