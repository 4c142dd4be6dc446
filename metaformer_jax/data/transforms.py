"""What happens to an image on the host: functions from uint8 `[h, w, c]` to the same."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def resize(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """Resizes to a square of `size` pixels with Pillow's bicubic filter."""
    # Pillow wants a greyscale image without an axis for its channel.
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return resized.reshape(size, size, image.shape[-1])


def random_shift(
    image: UInt8[np.ndarray, "h w c"], max_pixels: int, *, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """Moves the image by up to `max_pixels` up or down and left or right; black comes in."""
    height, width, channels = image.shape
    top, left = rng.integers(0, 2 * max_pixels, size=2, endpoint=True)
    padded = np.zeros((height + 2 * max_pixels, width + 2 * max_pixels, channels), image.dtype)
    padded[max_pixels : max_pixels + height, max_pixels : max_pixels + width] = image
    return padded[top : top + height, left : left + width]
