"""Resizing to a square as Pillow does, to the bit, by the processor's vector unit.

Pillow works off one pixel after the other. Here numba, the extra `fast`, compiles the same sums of
whole numbers so that many are done at once. Where it is not installed, or where the installed
Pillow gives other pixels, everything is left to Pillow.
"""

import functools
import importlib
import importlib.util
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_IS_CUBIC = {Image.Resampling.BILINEAR: False, Image.Resampling.BICUBIC: True}

_check_lock = threading.Lock()

Box = tuple[int, int, int, int]


def can_resize(interpolation: Image.Resampling) -> bool:
    """Whether `resize` may be called, for this filter: numba is there, and gives Pillow's pixels.

    The first call in a process only begins to find out, in a thread of its own: to load the
    compiled functions takes half a second, to compile them, once and for all, some seconds. No
    image waits for that: the answer is no until then.
    """
    return interpolation in _IS_CUBIC and (check := _check()).done() and check.result()


def resize(
    pixels: UInt8[np.ndarray, "h w 3"], box: Box, size: int, interpolation: Image.Resampling
) -> UInt8[np.ndarray, "size size 3"]:
    """A part of an image, resized to a square.

    Args:
        pixels: the whole image, its rows one after the other in memory.
        box: (left, top, right, bottom) of the part; nothing outside it shows.
        size: pixels per side of the result.
        interpolation: bilinear or bicubic.
    """
    kernels, (left, top, right, bottom) = _kernels(), box
    width, height, is_cubic = right - left, bottom - top, _IS_CUBIC[interpolation]
    rows = pixels.reshape(len(pixels), -1)
    across = kernels.weights(width, size, is_cubic)
    down = kernels.weights(height, size, is_cubic)
    if _is_tall(width, height, size) and _takes_tall_images_from_above():
        rows = kernels.down(rows, left, top, width, *down, size)
        result = kernels.across(rows, 0, 0, size, *across, size)
    else:
        # Pillow leaves out rows that no pixel of the result is made of: there are none here.
        rows = kernels.across(rows, left, top, height, *across, size)
        result = kernels.down(rows, 0, 0, size, *down, size)
    return result.reshape(size, size, 3)


def _is_tall(width: int, height: int, size: int) -> bool:
    return height - size > max(0, 2 * (width - size))


@functools.cache
def _takes_tall_images_from_above() -> bool:
    """Whether Pillow begins with the columns of tall images, as it does from release 13 on."""
    pixels = np.random.default_rng(0).integers(0, 256, (41, 9, 3), dtype=np.uint8)
    image, cubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    rows_first = image.resize((8, 41), cubic).resize((8, 8), cubic)
    return rows_first.tobytes() != image.resize((8, 8), cubic).tobytes()


def _check() -> Future[bool]:
    with _check_lock:
        return _checked()


@functools.cache
def _checked() -> Future[bool]:
    thread = ThreadPoolExecutor(1, "resampling")
    check = thread.submit(_is_exact)
    thread.shutdown(wait=False)
    return check


def _is_exact() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        is_exact = _resizes_as_pillow()
    # An older numba than numpy, no folder or no room to keep what was compiled, a damaged file
    # there: it fails in many ways.
    except Exception as error:
        _warn(f"numba cannot be used: {type(error).__name__}: {error}".rstrip(": "))
        return False
    if not is_exact:
        _warn(f"Pillow {Image.__version__} resizes otherwise than is known here")
    return is_exact


def _resizes_as_pillow() -> bool:
    rng = np.random.default_rng(0)
    for width, height in ((9, 41), (41, 9), (60, 50), (12, 12), (5, 90), (7, 6)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for interpolation in _IS_CUBIC:
            expected = Image.fromarray(pixels).resize((12, 12), interpolation)
            actual = resize(pixels, (0, 0, width, height), 12, interpolation)
            if actual.tobytes() != expected.tobytes():
                return False
    return True


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}. Images are resized by Pillow, to the same pixels in more time.", stacklevel=2
    )


@functools.cache
def _kernels() -> Any:
    # Importing numba takes half a second.
    return importlib.import_module("metaformer_jax.data.resampling_kernels")
