"""What happens to an image on the host: decoding, crops, flips and colours, with Pillow.

Each random function draws from the generator it is given, and from nothing else.
"""

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from metaformer_jax.data import resampling
from metaformer_jax.data.sources import BadRecordError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC

_MODES = {1: "L", 3: "RGB"}
_CROP_TRIES = 10
# Above these Pillow has its say.
_MAX_PIXELS = 10**8

Crop = Callable[[int, int], tuple[int, int, int, int]]


class BadImageError(BadRecordError):
    """The bytes are not a whole image."""


def decode(data: bytes, *, channels: int, crop: Crop | None = None) -> Image.Image:
    """An image of mode RGB or L from the content of an image file.

    Whatever Pillow reads by itself, converted as it converts; but of 16 bits for a pixel the upper
    8, which Pillow would cut at 255. As in the published pipeline an orientation in EXIF is not
    applied.

    Args:
        data: the file's content.
        channels: 3 or 1.
        crop: from width and height to the (left, top, right, bottom) that is wanted; by default
            all.

    Raises:
        BadImageError: it is no image, cut short or damaged, has more than 179 million pixels, or
            numbers of 32 bits for them.
        ValueError: no such number of channels.
    """
    if channels not in _MODES:
        raise ValueError(f"`channels` must be 1 or 3, got {channels}.")
    pixels = _decode_jpeg(data) if channels == 3 else None
    if pixels is None:
        return _decode_by_pillow(data, channels, crop)
    return _cut_out(pixels, _box(pixels, crop))


def has_16_bits(image: Image.Image) -> bool:
    """Whether a pixel has one number of 16 bits."""
    # Pillow brings the numbers of a PGM file to 16 bits.
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode RGB (3 channels) or L (1), as Pillow converts it; of 16 bits the upper 8.

    Raises:
        BadImageError: its numbers have 32 bits.
    """
    if has_16_bits(image):
        # Pillow's own conversion cuts at 255, and leaves white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImageError(
            "32 bits per pixel, whose range the file does not tell. Save it with 8 bits"
        )
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def decode_and_resize(
    data: bytes,
    size: int,
    *,
    channels: int,
    crop: Crop | None = None,
    draw_filter: Callable[[], Image.Resampling],
) -> Image.Image:
    """What `decode` gives, resized to a square of `size` pixels by a filter drawn after the crop.

    Raises:
        BadImageError: as `decode` does.
        ValueError: likewise.
    """
    pixels = _decode_jpeg(data) if channels == 3 else None
    if pixels is None:
        image = decode(data, channels=channels, crop=crop)
        return image.resize((size, size), draw_filter())
    box, interpolation = _box(pixels, crop), draw_filter()
    if resampling.can_resize(interpolation):
        return Image.fromarray(resampling.resize(pixels, box, size, interpolation))
    return _cut_out(pixels, box).resize((size, size), interpolation)


def _box(pixels: UInt8[np.ndarray, "h w 3"], crop: Crop | None) -> tuple[int, int, int, int]:
    height, width, _ = pixels.shape
    return crop(width, height) if crop else (0, 0, width, height)


def _cut_out(pixels: UInt8[np.ndarray, "h w 3"], box: tuple[int, int, int, int]) -> Image.Image:
    # Pillow takes its part of each row from where it is: a copy in between costs more.
    width, (left, top, right, bottom) = pixels.shape[1], box
    first = pixels.reshape(-1)[3 * (top * width + left) :]
    return Image.frombuffer("RGB", (right - left, bottom - top), first, "raw", "RGB", 3 * width, 1)


def _decode_by_pillow(data: bytes, channels: int, crop: Crop | None) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(data), formats=readable_formats())
        opened.load()
        image = to_channels(opened, channels)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError(f"{len(data)} bytes that are no image") from error
    # Each format's reader fails in its own way.
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    return image.crop(crop(*image.size)) if crop else image


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it reads by itself: for EPS it starts Ghostscript."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    # The library that Pillow has inside, and so its pixels, of which only the wanted part is
    # copied into Pillow's form. What is damaged, or converted otherwise (CMYK), is left to Pillow.
    if simplejpeg is None or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > _MAX_PIXELS or colorspace in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    # The latter for forms of subsampling that it does not know.
    except (ValueError, KeyError):
        return None


def to_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """The pixels; a grey image has one channel."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def crop_box(
    width: int,
    height: int,
    *,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A part of random size, shape and place (https://arxiv.org/abs/1409.4842).

    The area is drawn uniformly, the shape uniformly in its logarithm. What fits in none of ten
    tries is the largest part in the middle whose shape is allowed.

    Args:
        width: the image's, in pixels.
        height: likewise.
        rng: randomness.
        scale: least and greatest part of the area.
        ratio: least and greatest width over height.

    Returns:
        (left, top, right, bottom), in pixels.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(0, width - crop_width, endpoint=True))
            top = int(rng.integers(0, height - crop_height, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def simple_random_crop(
    image: Image.Image,
    size: int,
    *,
    rng: np.random.Generator,
    padding: int = 4,
    interpolation: Image.Resampling = BICUBIC,
) -> Image.Image:
    """Resizes the short side to `size`, mirrors a border around, and takes any square of `size`.

    DeiT III's crop for ImageNet-21K (https://arxiv.org/abs/2204.07118), by default with its filter.
    """
    image = resize_short_side(image, size, interpolation)
    pixels = np.asarray(image)
    borders = [(padding, padding)] * 2 + [(0, 0)] * (pixels.ndim - 2)
    padded = np.pad(pixels, borders, mode="reflect")
    top, left = (int(rng.integers(0, side - size, endpoint=True)) for side in padded.shape[:2])
    return Image.fromarray(np.ascontiguousarray(padded[top : top + size, left : left + size]))


def random_flip(
    image: Image.Image, *, rng: np.random.Generator, probability: float = 0.5
) -> Image.Image:
    """The mirror image, left for right, with this probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_shift(image: Image.Image, max_pixels: int, *, rng: np.random.Generator) -> Image.Image:
    """Moves the image by up to `max_pixels` up or down and left or right; black comes in."""
    top, left = (int(n) for n in rng.integers(-max_pixels, max_pixels, size=2, endpoint=True))
    return image.crop((left, top, left + image.width, top + image.height))


def evaluation_transform(
    image: Image.Image,
    size: int,
    *,
    crop_fraction: float = 1.0,
    interpolation: Image.Resampling = BICUBIC,
) -> Image.Image:
    """The middle square of `size` pixels of the image resized to `size / crop_fraction`.

    Args:
        image: the image.
        size: pixels per side of the result.
        crop_fraction: part of the resized image's short side that the result takes, in (0, 1].
        interpolation: the filter.
    """
    image = resize_short_side(image, resized_side(size, crop_fraction), interpolation)
    # Halves go to the even number, as in the published pipeline.
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resized_side(size: int, crop_fraction: float) -> int:
    """The short side of which a crop of `size` pixels is this fraction, which is cut off."""
    return math.floor(size / crop_fraction)


def resize_short_side(
    image: Image.Image, size: int, interpolation: Image.Resampling
) -> Image.Image:
    """Resizes to `size` pixels on the short side; on the long one fractions are cut off.

    Raises:
        BadImageError: see `size_with_short_side`.
    """
    new_size = size_with_short_side(*image.size, size)
    return image if new_size == image.size else image.resize(new_size, interpolation)


def size_with_short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an image after `resize_short_side`.

    Raises:
        BadImageError: it would then have more than 100 million pixels.
    """
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > _MAX_PIXELS:
        raise BadImageError(
            f"{width}x{height} pixels are too long and thin to resize to {size} on the short side. "
            "Crop it"
        )
    return (size, longer) if width <= height else (longer, size)


def color_jitter(
    image: Image.Image,
    *,
    rng: np.random.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
) -> Image.Image:
    """Changes brightness, contrast and saturation in random order.

    Args:
        image: the image; a grey one keeps its saturation.
        rng: randomness.
        brightness: its factor is drawn uniformly from [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
    """
    enhancers = [
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    ]
    changes = [
        functools.partial(
            enhance, enhancer=enhancer, factor=rng.uniform(max(0, 1 - width), 1 + width)
        )
        for enhancer, width in enhancers
        if width > 0
    ]
    for index in rng.permutation(len(changes)):
        image = changes[index](image)
    return image


def three_augment(image: Image.Image, *, rng: np.random.Generator) -> Image.Image:
    """One of grey, solarised and blurred (DeiT III, https://arxiv.org/abs/2204.07118)."""
    choice = rng.integers(3)
    if choice == 0:
        return image.convert("L").convert(image.mode)
    if choice == 1:
        return ImageOps.solarize(image)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))


def enhance(image: Image.Image, factor: float, *, enhancer: Any) -> Image.Image:
    """The image after one of Pillow's enhancers, of which 1 changes nothing."""
    return enhancer(image).enhance(factor)
