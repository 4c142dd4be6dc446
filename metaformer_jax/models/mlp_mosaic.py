"""A block's norm, MLP and shortcut for TPUs as two kernels, written in Pallas for Mosaic.

The hidden layer has four times as many channels as the block. The compiler for TPUs writes it to
memory and reads it again, in the backward pass several times. A kernel takes some tokens after the
other from the norm to the sum with the shortcut, and their hidden layer never leaves the chip's
vector memory. The backward pass computes it again, and keeps the sums over all tokens there, too.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.kernels import are_allowed
from metaformer_jax.models.lanes import LANES, is_for_tpus

# Rows of a tile of 16-bit numbers.
_SUBLANES = 16
# With fewer tokens of an image XLA's own operations are estimated to be faster.
_FEWEST_TOKENS = 128
# Tokens of one product of matrices, and of one step of the kernel, while which the arrays of the
# next one are read.
_FEWEST_AT_ONCE, _MOST_AT_ONCE, _MOST_OF_STEP = 48, 208, 784
# Cycles of a step of the kernels, beside those that the matrix units take, and how many times as
# many it is of these: from 10 % less to 6 % more than in the kernels' schedules for v5e. The
# compiler, which estimates its own operations, leaves kernels out.
_FORWARD_CYCLES, _BACKWARD_CYCLES = (600, 2 * 1.05), (700, 5 * 1.15)
# Of a chip that is not known.
_LEAST_VECTOR_MEMORY = 16 * 2**20


def has_kernels(x: Float[Array, "b h w c"], num_hidden: int) -> bool:
    """Whether there are kernels for such an array, in a program that is meant for TPUs."""
    if not (are_allowed() and is_for_tpus() and x.dtype == jnp.bfloat16):
        return False
    # In exported programs a size may be unknown.
    if not all(isinstance(size, int) for size in x.shape):
        return False
    b, rows, across, c = in_rows(x.shape)
    if b == 0 or rows * across < _FEWEST_TOKENS or not _at_once(across):
        return False
    # The compiler needs some of the memory for itself.
    fits = _num_bytes((rows, across), c, num_hidden) <= 0.75 * _vector_memory()
    return fits and c % LANES == num_hidden % LANES == 0


def in_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which the kernels take images: with rows that fill tiles, or one long row."""
    b, h, w, c = shape
    return (b, h, w, c) if w % _SUBLANES == 0 and _at_once(w) else (b, 1, h * w, c)


def transform(
    x: Float[Array, "b h w c"],
    keep: Float[Array, " b"],
    shortcut: Float[Array, " c"] | None,
    up: Float[Array, "c d"],
    down: Float[Array, "d c"],
    offset: Float[Array, " c"],
    *,
    epsilon: float,
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """`residual_mlp.residual_mlp` for a shape that is its own `in_rows`.

    Args:
        x: the input.
        keep: a factor for each image.
        shortcut: a factor for each channel of `x`; None for ones.
        up: from the channels to those of the hidden layer.
        down: back from these.
        offset: for each channel.
        epsilon: of the norm.
        interpret: interprets the kernel, slowly, on any device.
    """
    from jax.experimental.pallas import tpu as mosaic

    rows = [row[None] for row in (offset, shortcut) if row is not None]
    step, num_steps = _steps(x.shape)
    tokens = pl.BlockSpec((1, *step, x.shape[-1]), lambda *place: (*place, 0))
    return pl.pallas_call(
        functools.partial(_transform, epsilon=epsilon),
        grid=(x.shape[0], *num_steps),
        in_specs=[
            pl.BlockSpec(memory_space=mosaic.SMEM),
            tokens,
            *map(_whole, (up, down, *rows)),
        ],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=_num_bytes(step, *up.shape)
        ),
        interpret=interpret,
        name="mlp_transform",
        cost_estimate=_cost(x, up, products=2, arrays=2),
        metadata=_cycles(x.shape, up.shape, _FORWARD_CYCLES),
    )(keep, x, up.astype(x.dtype), down.astype(x.dtype), *rows)


def gradients(
    x: Float[Array, "b h w c"],
    keep: Float[Array, " b"],
    shortcut: Float[Array, " c"] | None,
    up: Float[Array, "c d"],
    down: Float[Array, "d c"],
    cotangent: Float[Array, "b h w c"],
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array, Array, Array]:
    """The gradients of `x`, `shortcut`, `up`, `down` and `offset` of `transform`."""
    from jax.experimental.pallas import tpu as mosaic

    rows = [] if shortcut is None else [shortcut[None]]
    step, num_steps = _steps(x.shape)
    b, c = x.shape[0], x.shape[-1]
    # Each core of a chip sums over its own images.
    cores = math.gcd(b, _num_cores())

    def tokens_of(core: Any, image: Any, *place: Any) -> tuple[Any, ...]:
        return core * (b // cores) + image, *place, 0

    tokens = pl.BlockSpec((1, *step, c), tokens_of)
    sums = [
        jax.ShapeDtypeStruct((cores, *shape), jnp.float32)
        for shape in (up.shape, up.shape, (1, c), *(row.shape for row in rows))
    ]
    by_x, *totals = pl.pallas_call(
        functools.partial(_gradients, epsilon=epsilon),
        grid=(cores, b // cores, *num_steps),
        in_specs=[
            pl.BlockSpec(memory_space=mosaic.SMEM),
            tokens,
            tokens,
            *map(_whole, (up, down, *rows)),
        ],
        out_specs=[tokens, *map(_of_core, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=("parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=_num_bytes(step, *up.shape),
        ),
        interpret=interpret,
        name="mlp_gradients",
        cost_estimate=_cost(x, up, products=5, arrays=3),
        metadata=_cycles(x.shape, up.shape, _BACKWARD_CYCLES),
        # The derivative of the squares has a factor of two.
    )(keep, x, cotangent, up.astype(x.dtype), (2 * down).astype(x.dtype), *rows)
    by_up, by_down, by_offset, *by_rows = (total.sum(0) for total in totals)
    by_shortcut = by_rows[0][0] if by_rows else None
    return by_x, by_shortcut, by_up, by_down.T, by_offset[0]


def _transform(
    keep: Any, x: Any, up: Any, down: Any, offset: Any, *others: Any, epsilon: float
) -> None:
    *shortcut, out = others
    factor = keep[pl.program_id(0)]
    for part in _parts(x.shape):
        wide = x[part].astype(jnp.float32)
        normalized, _ = _normalize(wide, epsilon)
        positive = jnp.maximum(_product(normalized.astype(up.dtype), up[...], (1, 0)), 0)
        branch = _product(jnp.square(positive).astype(down.dtype), down[...], (1, 0)) + offset[...]
        kept = wide * shortcut[0][...] if shortcut else wide
        out[part] = (kept + factor * branch).astype(out.dtype)


def _gradients(
    keep: Any, x: Any, cotangent: Any, up: Any, twice_down: Any, *others: Any, epsilon: float
) -> None:
    # By the shortcut there is one more sum.
    has_shortcut = len(others) == 6
    *shortcut, by_x, by_up, by_down, by_offset = others[: 4 + has_shortcut]
    totals = others[has_shortcut + 1 :]
    places = [pl.program_id(axis) for axis in range(4)]

    @pl.when(functools.reduce(jnp.logical_and, (place == 0 for place in places[1:])))
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    factor = keep[places[0] * pl.num_programs(1) + places[1]]
    for part in _parts(x.shape):
        wide, given = x[part].astype(jnp.float32), cotangent[part].astype(jnp.float32)
        by_branch = factor * given
        normalized, inverse = _normalize(wide, epsilon)
        narrow, shares = normalized.astype(up.dtype), by_branch.astype(up.dtype)
        positive = jnp.maximum(_product(narrow, up[...], (1, 0)), 0)
        by_hidden = (_product(shares, twice_down[...], (1, 1)) * positive).astype(up.dtype)
        by_normalized = _product(by_hidden, up[...], (1, 1))
        by_up[0] += _product(narrow, by_hidden, (0, 0))
        # Transposed: of the two matrices, the one with fewer channels is turned for the product.
        by_down[0] += _product(shares, jnp.square(positive).astype(up.dtype), (0, 0))
        by_offset[0] += by_branch.sum(0, keepdims=True)
        # A shift or a scaling of all channels does not change what the norm returns.
        moved = by_normalized.mean(-1, keepdims=True)
        stretched = (by_normalized * normalized).mean(-1, keepdims=True)
        by_input = inverse * (by_normalized - moved - normalized * stretched)
        if has_shortcut:
            others[-1][0] += (given * wide).sum(0, keepdims=True)
            given = given * shortcut[0][...]
        by_x[part] = (by_input + given).astype(by_x.dtype)


def _normalize(x: Array, epsilon: float) -> tuple[Array, Array]:
    """`x` with a mean of zero and a variance of one, and the factor that this took."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "m n"]:
    """The product of two matrices, summed in float32 over one axis of each."""
    first, second = axes
    summed = (((first,), (second,)), ((), ()))
    return lax.dot_general(a, b, summed, preferred_element_type=jnp.float32)


def _whole(array: Any) -> pl.BlockSpec:
    """A block that stays the same: held once, not twice to read the next one ahead."""
    return pl.BlockSpec(array.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1))


def _of_core(array: Any) -> pl.BlockSpec:
    shape = (1, *array.shape[1:])
    return pl.BlockSpec(shape, lambda core, *_: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _at_once(across: int) -> int:
    """How many tokens of a row the matrices of a product have; 0 if no number is good."""
    if across <= _MOST_AT_ONCE:
        return across if across >= _FEWEST_AT_ONCE else 0
    return _largest_divisor(across, _SUBLANES, _FEWEST_AT_ONCE, _MOST_AT_ONCE)


def _steps(shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and the tokens of each that the kernel takes in a step, and how often."""
    _, rows, across, _ = shape
    size = _at_once(across)
    tokens = _largest_divisor(across, size, size, _MOST_OF_STEP)
    num_rows = _largest_divisor(rows, 1, 1, _MOST_OF_STEP // tokens) if tokens == across else 1
    return (num_rows, tokens), (rows // num_rows, across // tokens)


def _largest_divisor(number: int, multiple_of: int, least: int, most: int) -> int:
    sizes = range(least, most + 1, multiple_of)
    return max((size for size in sizes if number % size == 0), default=0)


def _parts(shape: Sequence[int]) -> list[tuple[int, int, slice]]:
    """The tokens of each product in a step."""
    _, rows, across, _ = shape
    size = _at_once(across)
    return [
        (0, row, slice(start, start + size))
        for row in range(rows)
        for start in range(0, across, size)
    ]


def _num_bytes(sizes: tuple[int, int], c: int, d: int) -> int:
    """The vector memory of the kernels: of the backward pass, which takes more."""
    step, _ = _steps((1, *sizes, c))
    arrays = 3 * 2 * 2 * math.prod(step) * c
    weights = 2 * c * d * (2 + 4)
    hidden = 2 * _at_once(sizes[1]) * d * 12
    return arrays + weights + hidden + 2 * 2**20


def _cost(x: Array, up: Array, *, products: int, arrays: int) -> pl.CostEstimate:
    """The arithmetic and traffic of a kernel, for the compiler."""
    return pl.CostEstimate(
        flops=2 * products * x.size * up.shape[1],
        transcendentals=x.size // x.shape[-1],
        bytes_accessed=arrays * x.nbytes + 4 * products * up.size,
    )


def _cycles(
    shape: Sequence[int], weights: Sequence[int], cycles: tuple[int, float]
) -> dict[str, str]:
    """What a kernel says of itself, for `training.hlo`."""
    (rows, tokens), num_steps = _steps(shape)
    filled = rows * math.ceil(tokens / _SUBLANES) * _SUBLANES
    of_product = filled * math.prod(weights) / (4 * LANES**2)
    of_step = cycles[0] + cycles[1] * of_product
    return {"kernel_cycles": str(round(shape[0] * math.prod(num_steps) * of_step))}


def _vector_memory() -> int:
    from jax.experimental.pallas import tpu as mosaic

    try:
        return mosaic.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return _LEAST_VECTOR_MEMORY


def _num_cores() -> int:
    from jax.experimental.pallas import tpu as mosaic

    try:
        return mosaic.get_tpu_info().num_cores
    except ValueError:
        return 1
