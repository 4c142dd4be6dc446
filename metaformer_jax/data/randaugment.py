"""RandAugment as the published recipe has it (https://arxiv.org/abs/1909.13719; timm's form)."""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from metaformer_jax.data.transforms import enhance

_MAX_MAGNITUDE = 10.0
_MAX_STD = 100.0
_PART = re.compile(
    r"(?P<name>mstd|inc|m|p|n(?=\d{1,3}$))(?P<value>\d{1,9}(?:\.\d{1,9})?)", re.ASCII
)
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

Fill = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One of the fifteen operations.

    Attributes:
        apply: `(image, argument)`, or with a filter and a fill colour for geometric ones.
        argument: from a magnitude in [0, 10] and a sign to the argument; None without one.
        has_sign: whether the sign matters, and is drawn.
        is_geometric: whether pixels move.
    """

    apply: Callable[..., Image.Image]
    argument: Callable[[float, int], float] | None = None
    has_sign: bool = False
    is_geometric: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentPolicy:
    """What `rand-m9-mstd0.5-inc1` says.

    Attributes:
        magnitude: mean of the magnitudes, in [0, 10].
        magnitude_std: their standard deviation; they are cut to [0, 10]. Above 100 they are uniform
            in [0, magnitude] instead of normal.
        num_operations: drawn for each image, uniformly with replacement.
        probability: that one that is drawn is applied.

    Raises:
        ValueError: a number is out of range.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_operations: int = 2
    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.magnitude <= _MAX_MAGNITUDE:
            raise ValueError(f"`magnitude` must be in [0, 10], got {self.magnitude}.")
        if self.magnitude_std < 0:
            raise ValueError(f"`magnitude_std` must not be negative, got {self.magnitude_std}.")
        if self.num_operations < 1:
            raise ValueError(f"`num_operations` must be positive, got {self.num_operations}.")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"`probability` must be in [0, 1], got {self.probability}.")


def parse_policy(text: str) -> RandAugmentPolicy:
    """The policy of timm's notation: m(agnitude), mstd, n(umber), p(robability), inc(reasing).

    >>> parse_policy("rand-m9-mstd0.5-inc1")
    RandAugmentPolicy(magnitude=9.0, magnitude_std=0.5, num_operations=2, probability=0.5)

    Raises:
        ValueError: it is not of this form, or asks for operations that do not increase with the
            magnitude.
    """
    name, *parts = text.split("-")
    fields: dict[str, float] = {}
    for part in parts:
        match = _PART.fullmatch(part)
        if match is None or match["name"] in fields:
            break
        fields[match["name"]] = float(match["value"])
    if name != "rand" or len(fields) != len(parts) or fields.get("inc") != 1:
        raise ValueError(
            "`randaugment` must be of the form 'rand-m9-mstd0.5-inc1', with m, mstd, n (whole) "
            f"and p as numbers and inc1, got {text!r}."
        )
    return RandAugmentPolicy(
        magnitude=fields.get("m", 10.0),
        magnitude_std=fields.get("mstd", 0.0),
        num_operations=int(fields.get("n", 2)),
        probability=fields.get("p", 0.5),
    )


def randaugment(
    image: Image.Image,
    *,
    rng: np.random.Generator,
    policy: RandAugmentPolicy,
    fill: tuple[int, ...] = (124, 116, 104),
) -> Image.Image:
    """Applies random operations.

    Args:
        image: of mode RGB or L.
        rng: randomness.
        policy: how many operations, and how strong.
        fill: the colour of what geometric operations leave empty, a value for each channel.
    """
    names = tuple(OPERATIONS)
    color: Fill = fill[0] if image.mode == "L" else fill
    for index in rng.integers(len(names), size=policy.num_operations):
        if rng.random() >= policy.probability:
            continue
        operation = OPERATIONS[names[index]]
        magnitude = _draw_magnitude(rng, policy)
        sign = int(rng.choice((-1, 1))) if operation.has_sign else 1
        resample = _RESAMPLING[rng.integers(2)] if operation.is_geometric else None
        image = apply(image, operation, magnitude, sign=sign, resample=resample, fill=color)
    return image


def _draw_magnitude(rng: np.random.Generator, policy: RandAugmentPolicy) -> float:
    if policy.magnitude_std > _MAX_STD:
        return rng.uniform(0, policy.magnitude)
    return min(max(rng.normal(policy.magnitude, policy.magnitude_std), 0), _MAX_MAGNITUDE)


def apply(
    image: Image.Image,
    operation: Operation,
    magnitude: float,
    *,
    sign: int = 1,
    resample: Image.Resampling | None = None,
    fill: Fill = (124, 116, 104),
) -> Image.Image:
    """One operation of a given strength.

    Args:
        image: of mode RGB or L.
        operation: one of `OPERATIONS`.
        magnitude: in [0, 10].
        sign: 1 or -1.
        resample: the filter of a geometric operation.
        fill: its fill colour.
    """
    arguments = [] if operation.argument is None else [operation.argument(magnitude, sign)]
    if operation.is_geometric:
        return operation.apply(image, *arguments, resample=resample, fill=fill)
    return operation.apply(image, *arguments)


def _invert(image: Image.Image) -> Image.Image:
    return image.point(_table(tuple(range(255, -1, -1)), len(image.getbands())))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    # Of 0 bits nothing is left: black, which Pillow's own function refuses to give.
    mask = ~(2 ** (8 - int(bits)) - 1)
    return image.point(_table(tuple(i & mask & 255 for i in range(256)), len(image.getbands())))


def _solarize(image: Image.Image, threshold: float) -> Image.Image:
    values = tuple(i if i < threshold else 255 - i for i in range(256))
    return image.point(_table(values, len(image.getbands())))


def _solarize_add(image: Image.Image, addend: float) -> Image.Image:
    values = tuple(min(255, i + int(addend)) if i < 128 else i for i in range(256))
    return image.point(_table(values, len(image.getbands())))


@functools.cache
def _table(values: tuple[int, ...], bands: int) -> list[int]:
    return list(values) * bands


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    # What ImageEnhance.Sharpness does, whose smoothing takes four times as long. The border stays,
    # and of thirteen no sum lies half-way, so that rounding leaves no doubt.
    pixels = np.asarray(image)
    wide = pixels.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth = pixels.copy()
    smooth[1:-1, 1:-1] = (2 * sums + 13) // 26
    return Image.blend(Image.fromarray(smooth), image, factor)


def _rotate(
    image: Image.Image, degrees: float, *, resample: Image.Resampling, fill: Fill
) -> Image.Image:
    return image.rotate(degrees, resample=resample, fillcolor=fill)


def _shear(
    image: Image.Image, factor: float, *, resample: Image.Resampling, fill: Fill, axis: int
) -> Image.Image:
    matrix = (1, factor, 0, 0, 1, 0) if axis == 0 else (1, 0, 0, factor, 1, 0)
    return _affine(image, matrix, resample, fill)


def _translate(
    image: Image.Image, part: float, *, resample: Image.Resampling, fill: Fill, axis: int
) -> Image.Image:
    pixels = part * image.size[axis]
    matrix = (1, 0, pixels, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, pixels)
    return _affine(image, matrix, resample, fill)


def _affine(
    image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling, fill: Fill
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill
    )


def _signed(largest: float) -> Callable[[float, int], float]:
    """Zero at no magnitude, +-`largest` at 10."""
    return lambda magnitude, sign: sign * (magnitude / _MAX_MAGNITUDE) * largest


def _enhancement(magnitude: float, sign: int) -> float:
    """1, which changes nothing, at no magnitude; 1.9 or 0.1 at 10."""
    return max(0.1, 1 + sign * (magnitude / _MAX_MAGNITUDE) * 0.9)


def _enhancer(enhancer: type) -> Operation:
    return Operation(functools.partial(enhance, enhancer=enhancer), _enhancement, has_sign=True)


def _geometric(apply: Callable[..., Image.Image], largest: float, **fixed: int) -> Operation:
    return Operation(
        functools.partial(apply, **fixed), _signed(largest), has_sign=True, is_geometric=True
    )


# timm's "increasing" set: every operation is the stronger, the larger the magnitude.
OPERATIONS = {
    "AutoContrast": Operation(ImageOps.autocontrast),
    "Equalize": Operation(ImageOps.equalize),
    "Invert": Operation(_invert),
    "Rotate": _geometric(_rotate, 30.0),
    "PosterizeIncreasing": Operation(_posterize, lambda m, _: 4 - int(m / _MAX_MAGNITUDE * 4)),
    "SolarizeIncreasing": Operation(_solarize, lambda m, _: 256 - int(m / _MAX_MAGNITUDE * 256)),
    "SolarizeAdd": Operation(_solarize_add, lambda m, _: min(128, int(m / _MAX_MAGNITUDE * 110))),
    "ColorIncreasing": _enhancer(ImageEnhance.Color),
    "ContrastIncreasing": _enhancer(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhancer(ImageEnhance.Brightness),
    "SharpnessIncreasing": Operation(_sharpness, _enhancement, has_sign=True),
    "ShearX": _geometric(_shear, 0.3, axis=0),
    "ShearY": _geometric(_shear, 0.3, axis=1),
    "TranslateXRel": _geometric(_translate, 0.45, axis=0),
    "TranslateYRel": _geometric(_translate, 0.45, axis=1),
}
