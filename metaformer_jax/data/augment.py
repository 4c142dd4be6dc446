"""The transforms of a recipe in their order, as values that travel to worker processes."""

import dataclasses
import functools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from metaformer_jax.data import transforms
from metaformer_jax.data.randaugment import RandAugmentPolicy, randaugment

CROPS = ("random_resized", "simple", "none")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """From an image file's content to a training image, by the generator that comes with it.

    Crop, flip, then what is asked for of RandAugment, three-augment, jitter and shifts.

    Attributes:
        image_size: pixels per side of the result.
        channels: 3, or 1 for grey images.
        crop: `"random_resized"` (a `crop_box` resized to a square), `"simple"` (see
            `simple_random_crop`) or `"none"` (the whole image resized to a square).
        crop_scale: least and greatest part of the area.
        crop_ratio: least and greatest width over height.
        interpolations: names of the filters that one is drawn from for each image.
        flip_probability: of a mirror image.
        randaugment: the policy; None leaves it out.
        fill: the colour of what geometric operations leave empty.
        three_augment: grey, solarised or blurred, as DeiT III does.
        color_jitter: of brightness, contrast and saturation.
        max_shift: pixels.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """

    image_size: int
    channels: int = 3
    crop: str = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolations: tuple[str, ...] = ("bilinear", "bicubic")
    flip_probability: float = 0.5
    randaugment: RandAugmentPolicy | None = None
    fill: tuple[int, ...] = (124, 116, 104)
    three_augment: bool = False
    color_jitter: float = 0.0
    max_shift: int = 0

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"`crop` must be one of {', '.join(CROPS)}, got {self.crop!r}.")
        _check_image_size(self.image_size)
        for name in self.interpolations:
            check_interpolation(name)
        if not self.interpolations:
            raise ValueError("`interpolations` must name at least one filter, got none.")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"`crop_scale` must be in order and in (0, 1], got {self.crop_scale}.")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"`crop_ratio` must be positive and in order, got {self.crop_ratio}.")
        for name in ("color_jitter", "max_shift"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"`flip_probability` must be in [0, 1], got {self.flip_probability}.")

    def __call__(self, data: bytes, rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
        """The image that a file of this content gives.

        Raises:
            BadImageError: it gives none.
        """
        image = self._decode_and_crop(data, rng)
        image = transforms.random_flip(image, rng=rng, probability=self.flip_probability)
        if self.randaugment is not None:
            image = randaugment(image, rng=rng, policy=self.randaugment, fill=self.fill)
        if self.three_augment:
            image = transforms.three_augment(image, rng=rng)
        if self.color_jitter:
            jitter = dict.fromkeys(("brightness", "contrast", "saturation"), self.color_jitter)
            image = transforms.color_jitter(image, rng=rng, **jitter)
        if self.max_shift:
            image = transforms.random_shift(image, self.max_shift, rng=rng)
        return transforms.to_array(image)

    def _decode_and_crop(self, data: bytes, rng: np.random.Generator) -> Image.Image:
        def draw_filter() -> Image.Resampling:
            return INTERPOLATIONS[self.interpolations[rng.integers(len(self.interpolations))]]

        if self.crop == "simple":
            image = transforms.decode(data, channels=self.channels)
            return transforms.simple_random_crop(
                image, self.image_size, rng=rng, interpolation=draw_filter()
            )
        box = None
        if self.crop == "random_resized":
            box = functools.partial(
                transforms.crop_box, rng=rng, scale=self.crop_scale, ratio=self.crop_ratio
            )
        return transforms.decode_and_resize(
            data, self.image_size, channels=self.channels, crop=box, draw_filter=draw_filter
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """From an image file's content to an evaluation image, see `transforms.evaluation_transform`.

    Attributes:
        image_size: pixels per side of the result.
        channels: 3, or 1 for grey images.
        crop_fraction: part of the resized short side that the result takes.
        interpolation: the filter's name.

    Raises:
        ValueError: the filter is unknown or the fraction out of range.
    """

    image_size: int
    channels: int = 3
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self):
        _check_image_size(self.image_size)
        check_interpolation(self.interpolation)
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"`crop_fraction` must be in (0, 1], got {self.crop_fraction}.")

    def __call__(self, data: bytes) -> UInt8[np.ndarray, "h w c"]:
        """The image that a file of this content gives.

        Raises:
            BadImageError: it gives none.
        """
        return self.of_image(transforms.decode(data, channels=self.channels))

    def of_image(self, image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
        """The same from a decoded image, of mode RGB or L as the channels say.

        Raises:
            BadImageError: see `check_size`.
        """
        image = transforms.evaluation_transform(
            image,
            self.image_size,
            crop_fraction=self.crop_fraction,
            interpolation=INTERPOLATIONS[self.interpolation],
        )
        return transforms.to_array(image)

    def check_size(self, width: int, height: int) -> None:
        """Makes sure that an image can be resized as this transform does, before it is decoded.

        Raises:
            BadImageError: it is too long and thin.
        """
        side = transforms.resized_side(self.image_size, self.crop_fraction)
        transforms.size_with_short_side(width, height, side)


def _check_image_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"`image_size` must be positive, got {size}.")


def check_interpolation(name: str) -> None:
    """Refuses an unknown filter.

    Raises:
        ValueError: naming those that there are.
    """
    if name not in INTERPOLATIONS:
        raise ValueError(
            f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {name!r}."
        )
