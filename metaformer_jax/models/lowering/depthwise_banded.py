"""Depthwise convolution for TPUs: rows of an image times banded matrices that hold the kernel.

Each channel has its own matrices. They map all pixels of some rows, side by side, to all outputs of
as many rows, and hold the kernel along their diagonals. Most of what the matrix units multiply is
zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.lanes import LANES, fill_lanes, images_along_lanes

# Pixels that are processed together where images lie along the lanes: of several rows if need be.
_SIDE = 64
# Images along the sublanes of a vector unit.
_SUBLANES = 8


def takes_images(x_shape: tuple[int, ...]) -> bool:
    """Whether `convolve_images` should be used for this shape."""
    b, _, w, _ = x_shape
    return fill_lanes(b) and w <= LANES


def convolve_images(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
    """`depthwise_conv2d`, for images that lie along the lanes."""
    b, h, w, c = x.shape
    r = _rows_together(h, w, _SIDE)
    reach = _reach(kernel.shape[0], r)
    bands = _bands(kernel, r, w).transpose(0, 2, 1, 3).reshape(-1, r * w, c * r * w)
    blocks = x.reshape(b, h // r, r * w, c).transpose(0, 1, 3, 2).reshape(b, h // r, c * r * w)
    out = lax.conv_general_dilated(
        blocks,
        bands,
        window_strides=(1,),
        padding=[(reach, reach)],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=c,
    )
    out = out.reshape(b, h // r, c, r * w).transpose(0, 1, 3, 2).reshape(x.shape)
    # The layout for the linear layer that follows, and that of the product of whole rows anyway.
    return images_along_lanes(out, major_to_minor=(1, 2, 3, 0))


def takes_rows(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Whether `convolve_rows` should be used for this shape.

    It is where it was estimated to take fewer cycles: if rows fill three quarters of the lanes, if
    there are more blocks of rows than a kernel reaches, and enough of them for matrices this large.
    """
    b, h, w, _ = x_shape
    # In an exported program any of these may be unknown.
    is_known = all(isinstance(size, int) for size in x_shape)
    if takes_images(x_shape) or not is_known or b % _SUBLANES or w > LANES:
        return False
    r = _rows_together(h, w, LANES)
    num_blocks, in_reach = h // r, 2 * _reach(kernel_shape[0], r) + 1
    is_filled, is_many = 4 * r * w >= 3 * LANES, 3 * b * num_blocks >= in_reach * r * w
    return is_filled and is_many and num_blocks >= in_reach


def fold(x: Float[Array, "b h w c"]) -> Float[Array, "b g rw c"]:
    """Puts as many rows side by side as fit the lanes: each block of rows becomes one row."""
    b, h, w, c = x.shape
    r = _rows_together(h, w, LANES)
    return x.reshape(b, h // r, r * w, c)


def rows_along_lanes(rows: Float[Array, "b g rw c"]) -> Float[Array, "b g rw c"]:
    """The same array; on TPUs with a layout that has pixels along the lanes."""
    return _laid(rows, (1, 3, 0, 2))


def _laid(array: Array, major_to_minor: tuple[int, ...]) -> Array:
    layout = Layout(major_to_minor=major_to_minor)
    return lax.platform_dependent(
        array, tpu=lambda array: with_layout_constraint(array, layout), default=lambda array: array
    )


def convolve_rows(
    rows: Float[Array, "b g rw c"], kernel: Float[Array, "kh kw c"], *, width: int
) -> Float[Array, "b g rw c"]:
    """`depthwise_conv2d` of the images whose folded rows these are.

    Args:
        rows: see `fold`.
        kernel: as of `depthwise_conv2d`.
        width: pixels in a row of an image.
    """
    r = rows.shape[2] // width
    reach = _reach(kernel.shape[0], r)

    def convolve_channel(blocks: Array, bands: Array) -> Array:
        return lax.conv_general_dilated(
            blocks, bands, (1,), [(reach, reach)], dimension_numbers=("HNC", "HIO", "HNC")
        )

    blocks = rows_along_lanes(rows).transpose(1, 3, 0, 2)
    convolve = jax.vmap(convolve_channel, in_axes=1, out_axes=1)
    bands = _laid(_bands(kernel, r, width), (0, 1, 2, 3))
    out = convolve(blocks, bands)
    return rows_along_lanes(out.transpose(2, 0, 3, 1))


def kernel_gradient_of_rows(
    rows: Float[Array, "b g rw c"],
    cotangent: Float[Array, "b g rw c"],
    kernel: Float[Array, "kh kw c"],
    *,
    width: int,
) -> Float[Array, "kh kw c"]:
    """The gradient of `convolve_rows`."""
    _, transpose = jax.vjp(functools.partial(convolve_rows, rows, width=width), kernel)
    return transpose(cotangent)[0]


def _bands(kernel: Float[Array, "kh kw c"], r: int, w: int) -> Float[Array, "blocks c rw rw"]:
    """For each block of rows in reach, and each channel: the matrix from its pixels to outputs."""
    kh, kw, c = kernel.shape
    reach = _reach(kh, r)
    offsets = np.arange(-reach, reach + 1)[:, None, None] * r
    rows = offsets + np.arange(r)[:, None] - np.arange(r) + kh // 2
    columns = np.arange(w)[:, None] - np.arange(w) + kw // 2
    in_row = rows == np.arange(kh)[:, None, None, None]
    in_column = columns == np.arange(kw)[:, None, None]
    # [row of the kernel, column of it, block, row in, column in, row out, column out]
    taps = in_row[:, None, :, :, None, :, None] & in_column[None, :, None, None, :, None, :]
    taps = taps.reshape(kh * kw, 2 * reach + 1, r * w, r * w)
    # A product with zeros and ones: the matrix units place the numbers in fewer cycles.
    return jnp.einsum("tc,tdio->dcio", kernel.reshape(kh * kw, c), taps.astype(kernel.dtype))


def _reach(kernel_height: int, r: int) -> int:
    """How many blocks of `r` rows above (and below) a block are under the kernel."""
    return -(-(kernel_height // 2) // r)


def _rows_together(h: int, w: int, most: int) -> int:
    """The largest divisor of `h` rows with at most `most` pixels; at least one row."""
    return max(r for r in range(1, h + 1) if h % r == 0 and (r == 1 or r * w <= most))
