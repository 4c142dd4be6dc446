"""The loops of `resampling`, compiled by numba and kept on disk."""

import math

import numpy as np
from jaxtyping import Int32, UInt8
from numba import njit

# Weights are whole numbers of so many bits after the point, as Pillow's are.
_BITS = 22
# Rows that are turned into columns together: so many fit the cache.
_ROWS = 64

Weights = tuple[Int32[np.ndarray, " size"], Int32[np.ndarray, " size"], Int32[np.ndarray, "size n"]]


@njit(cache=True, nogil=True)
def _filter(x, is_cubic):
    x = abs(x)
    if not is_cubic:
        return 1.0 - x if x < 1.0 else 0.0
    # Keys' cubic with a = -0.5, as Pillow writes it: another order of the sums would round
    # otherwise.
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@njit(cache=True, nogil=True)
def weights(length: int, size: int, is_cubic: bool) -> Weights:
    """What each of `size` pixels takes of `length`: the first, how many, and how much of each."""
    scale = length / size
    stretch = max(scale, 1.0)
    reach = (2.0 if is_cubic else 1.0) * stretch
    first = np.empty(size, np.int32)
    count = np.empty(size, np.int32)
    fixed = np.zeros((size, math.ceil(reach) * 2 + 1), np.int32)
    real = np.empty(fixed.shape[1], np.float64)
    for i in range(size):
        centre = (i + 0.5) * scale
        start = max(int(centre - reach + 0.5), 0)
        n = min(int(centre + reach + 0.5), length) - start
        total = 0.0
        for j in range(n):
            real[j] = _filter((j + start - centre + 0.5) * (1.0 / stretch), is_cubic)
            total += real[j]
        for j in range(n):
            share = real[j] / total if total != 0.0 else real[j]
            fixed[i, j] = int(share * (1 << _BITS) + (-0.5 if share < 0 else 0.5))
        first[i] = start
        count[i] = n
    return first, count, fixed


@njit(cache=True, nogil=True)
def _weigh(rows, offset, length, first, count, fixed, sums, out):
    """`out[i]` is the sum of rows of `length` bytes, from `offset` on, by the weights of `i`."""
    half = np.int32(1 << (_BITS - 1))
    for i in range(len(out)):
        for k in range(length):
            sums[k] = half
        for j in range(count[i]):
            weight = fixed[i, j]
            row = rows[first[i] + j, offset : offset + length]
            for k in range(length):
                sums[k] = np.int32(sums[k] + np.int32(np.int32(row[k]) * weight))
        target = out[i]
        for k in range(length):
            target[k] = np.uint8(min(max(sums[k] >> _BITS, 0), 255))


@njit(cache=True, nogil=True)
def down(
    rows: UInt8[np.ndarray, "H W*3"],
    left: int,
    top: int,
    width: int,
    first: Int32[np.ndarray, " size"],
    count: Int32[np.ndarray, " size"],
    fixed: Int32[np.ndarray, "size n"],
    size: int,
) -> UInt8[np.ndarray, "size width*3"]:
    """Resizes the columns of a part of an image."""
    out = np.empty((size, 3 * width), np.uint8)
    sums = np.empty(3 * width, np.int32)
    _weigh(rows, 3 * left, 3 * width, first + np.int32(top), count, fixed, sums, out)
    return out


@njit(cache=True, nogil=True)
def across(
    rows: UInt8[np.ndarray, "H W*3"],
    left: int,
    top: int,
    height: int,
    first: Int32[np.ndarray, " size"],
    count: Int32[np.ndarray, " size"],
    fixed: Int32[np.ndarray, "size n"],
    size: int,
) -> UInt8[np.ndarray, "height size*3"]:
    """Resizes the rows of a part of an image: some together, with their pixels below each other."""
    width = first[size - 1] + count[size - 1]
    out = np.empty((height, 3 * size), np.uint8)
    turned = np.empty((width, 3 * _ROWS), np.uint8)
    resized = np.empty((size, 3 * _ROWS), np.uint8)
    sums = np.empty(3 * _ROWS, np.int32)
    for start in range(0, height, _ROWS):
        n = min(_ROWS, height - start)
        for i in range(n):
            row = rows[top + start + i]
            for j in range(width):
                for band in range(3):
                    turned[j, 3 * i + band] = row[3 * (left + j) + band]
        _weigh(turned, 0, 3 * n, first, count, fixed, sums, resized)
        for i in range(n):
            row = out[start + i]
            for j in range(size):
                for band in range(3):
                    row[3 * j + band] = resized[j, 3 * i + band]
    return out
