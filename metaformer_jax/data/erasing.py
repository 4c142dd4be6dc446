"""Random erasing on the device (https://arxiv.org/abs/1708.04896)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

_TRIES = 10


def random_erasing(
    images: Float[Array, "b h w c"],
    *,
    keys: Key[Array, " b"],
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "b h w c"]:
    """Fills one rectangle of an image with normal noise.

    Args:
        images: normalised, so that the noise is of their kind.
        keys: the randomness of each image.
        probability: that an image is erased; the few whose rectangle fits in none of ten tries
            are not.
        area: the rectangle's least and greatest part of the image, drawn uniformly.
        aspect: its least and greatest height over width, drawn uniformly in the logarithm.
    """
    if probability <= 0:
        return images

    def erase(key: Array, image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        height, width, _ = image.shape
        box_key, noise_key = jax.random.split(key)
        inside = draw_rectangle(box_key, (height, width), probability, area, aspect)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)
        return jnp.where(inside[..., None], noise, image)

    return jax.vmap(erase)(keys, images)


def draw_rectangle(
    key: Array,
    size: tuple[int, int],
    probability: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Bool[Array, "h w"]:
    """Which pixels of one image are erased; see `random_erasing`."""
    height, width = size
    # One draw of many numbers: each draw is compiled anew, and takes long to compile.
    uniform = jax.random.uniform(key, (2 * _TRIES + 3,))
    areas, aspects, (chance, top, left) = jnp.split(uniform, (_TRIES, 2 * _TRIES))
    target = height * width * _between(area, areas)
    ratio = jnp.exp(_between((math.log(aspect[0]), math.log(aspect[1])), aspects))
    heights, widths = jnp.rint(jnp.sqrt(target * ratio)), jnp.rint(jnp.sqrt(target / ratio))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    is_erased = fits[first] & (chance < probability)
    rows = _interval(top, heights[first], height)
    columns = _interval(left, widths[first], width)
    return rows[:, None] & columns & is_erased


def _between(ends: tuple[float, float], part: Float[Array, " n"]) -> Float[Array, " n"]:
    """The point at this part of the way from the first to the second."""
    return ends[0] + (ends[1] - ends[0]) * part


def _interval(place: Float[Array, ""], length: Float[Array, ""], size: int) -> Bool[Array, " size"]:
    """`length` neighbours out of `size` positions; every place as likely, `place` in [0, 1)."""
    start = jnp.floor(place * (size - length + 1))
    position = jnp.arange(size, dtype=jnp.float32)
    return (position >= start) & (position < start + length)
