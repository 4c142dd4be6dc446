"""Depthwise convolution as kernels for NVIDIA GPUs.

cuDNN is not reliable here: depending on the algorithm that XLA chooses, a layer takes 0.4 or 5 ms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.platform import differentiated_as
from metaformer_jax.models.lowering.triton import (
    THREADS,
    call,
    has_kernels,
    load,
    power_of_two,
    store,
    triton,
)

# Neighbouring pixels of a row that a thread computes together, reading the inputs they share once.
_LONGEST_STRIP = 8
# Rows that it computes together, likewise.
_ROWS = 2
# Rows over which a thread block sums its part of a kernel's gradient.
_ROWS_OF_GRADIENT = 14
# Channels of a thread: with more, its sums no longer fit the registers.
_PER_THREAD = 4
_PER_THREAD_OF_GRADIENT = 2
# Of a kernel: each tap has a sum in registers, and its own lines in the program.
_MOST_TAPS = 49
# Converts two 16-bit numbers in one register to two 32-bit numbers, optionally squared before.
_UNPACK = "shl.b32 $0, {0}, 16; and.b32 $1, {0}, 0xffff0000;"
_SQUARE_AND_UNPACK = (
    "{ .reg .b32 squares, zeros; mov.b32 zeros, 0x80008000; "
    f"fma.rn.bf16x2 squares, $2, $2, zeros; {_UNPACK.format('squares')} }}"
)


def takes(x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]) -> bool:
    """Whether this GPU runs this convolution, and its gradients, with the kernels here."""
    return kernel.shape[0] * kernel.shape[1] <= _MOST_TAPS and has_kernels(x, kernel)


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c"],
    *,
    squares: bool = False,
    offset: Float[Array, "h w c"] | None = None,
    factor: Float[Array, "b h w c"] | None = None,
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """`(convolution of x + offset) * factor`, summed in float32.

    Args:
        x: the input.
        kernel: one filter per channel, of odd height and width.
        squares: whether the squares of `x` are convolved.
        offset: added to the convolution of every image.
        factor: multiplies the sum.
        interpret: interprets the kernel, slowly, on any device.
    """
    has_offset, has_factor = offset is not None, factor is not None

    def plain(x: Array, kernel: Array, *others: Array) -> Array:
        offset, factor = _named(others, has_offset, has_factor)
        wide = jnp.square(x.astype(kernel.dtype)) if squares else x.astype(kernel.dtype)
        out = lax.conv_general_dilated(
            wide,
            kernel[:, :, None, :],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
        out = out + offset if has_offset else out
        return (out * factor if has_factor else out).astype(x.dtype)

    def kernel_of_ours(x: Array, kernel: Array, *others: Array) -> Array:
        b, h, w, c = x.shape
        strip, strips = _strips(w)
        channels = _channels(c, strips, _PER_THREAD)
        body = functools.partial(
            _convolve_kernel,
            strip=strip,
            strips=strips,
            channels=channels,
            has_offset=has_offset,
            has_factor=has_factor,
            read=_reader(x, strips * channels, squares=squares, interpret=interpret),
            multiply_add=_multiply_add(interpret=interpret),
        )
        grid = (pl.cdiv(c, channels), pl.cdiv(h, _ROWS), b)
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return call(body, grid, out, x, kernel, *others, interpret=interpret)

    others = [array for array in (offset, factor) if array is not None]
    return differentiated_as(plain, kernel_of_ours)(x, kernel.astype(jnp.float32), *others)


def kernel_gradient(
    x: Float[Array, "b h w c"],
    cotangent: Float[Array, "b h w c"],
    size: tuple[int, ...],
    *,
    squares: bool = False,
    interpret: bool = False,
) -> Float[Array, "kh kw c"]:
    """The gradient for a kernel of this size, in float32; other arguments as of `convolve`."""

    def plain(x: Array, cotangent: Array) -> Array:
        (kh, kw), (h, w) = size, x.shape[1:3]
        wide, given = x.astype(jnp.float32), cotangent.astype(jnp.float32)
        padding = ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))
        padded = jnp.pad(jnp.square(wide) if squares else wide, padding)
        taps = [
            jnp.sum(padded[:, i : i + h, j : j + w] * given, (0, 1, 2))
            for i in range(kh)
            for j in range(kw)
        ]
        return jnp.stack(taps).reshape(*size, -1)

    def kernel_of_ours(x: Array, cotangent: Array) -> Array:
        b, h, w, c = x.shape
        strip, strips = _strips(w)
        channels = _channels(c, strips, _PER_THREAD_OF_GRADIENT)
        rows = min(h, _ROWS_OF_GRADIENT)
        read = functools.partial(_reader, x, strips * channels, interpret=interpret)
        body = functools.partial(
            _kernel_gradient_kernel,
            size=size,
            strip=strip,
            strips=strips,
            channels=channels,
            rows=rows,
            read=read(squares=squares),
            read_given=read(squares=False),
            multiply_add=_multiply_add(interpret=interpret),
        )
        grid = (pl.cdiv(c, channels), pl.cdiv(h, rows), b)
        parts = jax.ShapeDtypeStruct((*grid[1:], size[0] * size[1], c), jnp.float32)
        total = call(body, grid, parts, x, cotangent, interpret=interpret).sum((0, 1))
        return total.reshape(*size, c)

    return differentiated_as(plain, kernel_of_ours)(x, cotangent)


def _named(others: Any, has_offset: bool, has_factor: bool) -> tuple[Any, Any]:
    rest = list(others)
    offset = rest.pop(0) if has_offset else None
    return offset, rest.pop(0) if has_factor else None


def _convolve_kernel(
    x: Any,
    kernel: Any,
    *others: Any,
    strip: int,
    strips: int,
    channels: int,
    has_offset: bool,
    has_factor: bool,
    read: Any,
    multiply_add: Any,
) -> None:
    *rest, out = others
    offset, factor = _named(rest, has_offset, has_factor)
    (_, h, w, c), (kh, kw, _) = x.shape, kernel.shape
    channel = pl.program_id(0) * channels + jnp.arange(channels)[None, :]
    row, image = pl.program_id(1) * _ROWS, pl.program_id(2)
    left = jnp.arange(strips)[:, None] * strip
    everywhere = 0 * left + channel

    def pixels_under(i: Any) -> list[Array]:
        under, pixels = row + i - kh // 2, []
        for j in range(strip + kw - 1):
            column = left + (j - kw // 2)
            is_inside = (under >= 0) & (under < h) & (column >= 0) & (column < w)
            pixels.append(read(x.at[image, under, column, channel], is_inside & (channel < c)))
        return pixels

    def added(sums: list[Array], pixels: list[Array], i: Any) -> list[Array]:
        for j in range(kw):
            weight = load(kernel.at[i, j, everywhere], everywhere < c)
            sums = [multiply_add(pixels[n + j], weight, sums[n]) for n in range(strip)]
        return sums

    def add_pixels(i: Any, sums: list[list[Array]], rows: range) -> list[list[Array]]:
        pixels = pixels_under(i)
        return [added(sums[r], pixels, i - r) if r in rows else sums[r] for r in range(_ROWS)]

    sums = [[jnp.zeros((strips, channels), jnp.float32)] * strip] * _ROWS
    # Not all rows have the first and the last of these under their kernels.
    for i in range(_ROWS - 1):
        sums = add_pixels(i, sums, range(i + 1))
    add_all = functools.partial(add_pixels, rows=range(_ROWS))
    sums = lax.fori_loop(_ROWS - 1, kh, add_all, sums)
    for i in range(kh, kh + _ROWS - 1):
        sums = add_pixels(i, sums, range(i - kh + 1, _ROWS))
    for r in range(_ROWS):
        for n in range(strip):
            column = left + n
            is_inside = (row + r < h) & (column < w) & (channel < c)
            result = sums[r][n]
            if has_offset:
                result = result + load(offset.at[row + r, column, channel], is_inside)
            if has_factor:
                result = result * load(factor.at[image, row + r, column, channel], is_inside)
            store(out.at[image, row + r, column, channel], result, is_inside)


def _kernel_gradient_kernel(
    x: Any,
    cotangent: Any,
    out: Any,
    *,
    size: tuple[int, ...],
    strip: int,
    strips: int,
    channels: int,
    rows: int,
    read: Any,
    read_given: Any,
    multiply_add: Any,
) -> None:
    (_, h, w, c), (kh, kw) = x.shape, size
    first = pl.program_id(0) * channels
    channel = first + jnp.arange(channels)[None, :]
    part, image = pl.program_id(1), pl.program_id(2)
    left = jnp.arange(strips)[:, None] * strip

    def add_row(number: Any, sums: list[Array]) -> list[Array]:
        sums, row, given = list(sums), part * rows + number, []
        for n in range(strip):
            column = left + n
            is_inside = (row < h) & (column < w) & (channel < c)
            given.append(read_given(cotangent.at[image, row, column, channel], is_inside))
        for i in range(kh):
            under, pixels = row + i - kh // 2, []
            for j in range(strip + kw - 1):
                column = left + (j - kw // 2)
                is_inside = (under >= 0) & (under < h) & (column >= 0) & (column < w)
                pixels.append(read(x.at[image, under, column, channel], is_inside & (channel < c)))
            for j in range(kw):
                for n in range(strip):
                    tap = i * kw + j
                    sums[tap] = multiply_add(pixels[n + j], given[n], sums[tap])
        return sums

    zeros = [jnp.zeros((strips, channels), jnp.float32)] * (kh * kw)
    flat = first + jnp.arange(channels)
    for tap, total in enumerate(lax.fori_loop(0, rows, add_row, zeros)):
        store(out.at[part, image, tap, flat], total.sum(0), flat < c)


def _reader(x: Array, block_size: int, *, squares: bool, interpret: bool) -> Any:
    """Loads values of a block as float32, optionally squared."""
    if x.dtype != jnp.bfloat16 or interpret or block_size < 2 * THREADS:

        def read(part: Any, is_inside: Array) -> Array:
            values = load(part, is_inside)
            return values * values if squares else values

        return read

    def read_pairs(part: Any, is_inside: Array) -> Array:
        values = triton.load(part, mask=is_inside, other=0)
        (wide,) = triton.elementwise_inline_asm(
            _SQUARE_AND_UNPACK if squares else _UNPACK.format("$2"),
            args=[values],
            constraints="=f,=f,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.float32)],
        )
        return wide

    return read_pairs


def _multiply_add(*, interpret: bool) -> Any:
    """`a * b + c` as one operation; Triton would leave two."""
    if interpret:
        return lambda a, b, c: a * b + c

    def multiply_add(a: Array, b: Array, c: Array) -> Array:
        (result,) = triton.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[a, b, c],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
        )
        return result

    return multiply_add


def _strips(w: int) -> tuple[int, int]:
    """The length of a row's strips and their number, a power of two, for the fewest reads."""

    def cost(length: int) -> float:
        return (length + 6) * power_of_two(-(-w // length))

    length = min(range(1, _LONGEST_STRIP + 1), key=cost)
    return length, power_of_two(-(-w // length))


def _channels(c: int, strips: int, per_thread: int) -> int:
    """The channels of a block: few enough for the registers, with the fewest idle threads."""
    most = min(max(16, THREADS * per_thread // strips), power_of_two(c))
    sizes = [size for size in (most, most // 2, most // 4) if size]
    return min(sizes, key=lambda size: -(-c // size) * size)
