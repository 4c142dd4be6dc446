"""The two forms in which the kernels of `mlp_mosaic` take images, and how they divide them.

`ChannelsAlongLanes` takes arrays `[b, h, w, c]`: the tokens of a row are a matrix `[t, c]`.
`ImagesAlongLanes` takes arrays `[n, c, b]`: `n` pixels of 128 images are a matrix `[c, t]`.

A *step* is what a kernel reads, computes and writes while the next one is read. Its *parts* are the
matrices of tokens that it multiplies, one after the other; so many tokens are taken *at once*. A
kernel is also given numbers *of images*, a row of them for each purpose: the factor of stochastic
depth and, for norms over images, their means and inverse deviations.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.lanes import LANES, fill_lanes
from metaformer_jax.models.lowering.mosaic import SUBLANES, block_spec, product

# With fewer tokens of an image in a row XLA's own operations are estimated to be faster.
_FEWEST_TOKENS = 128
# Tokens of one product of matrices, and of one step of a kernel, during which the arrays of the
# next one are read.
_FEWEST_AT_ONCE, _MOST_AT_ONCE, _MOST_OF_STEP = 48, 208, 784
# The same for images along the lanes: pixels of 128 images.
_MOST_PIXELS_AT_ONCE, _MOST_PIXELS_OF_STEP = 8, 32
# Numbers in the hidden layer of the tokens of one product, and of one step.
_FEWEST_HIDDEN, _MOST_HIDDEN, _MOST_HIDDEN_OF_STEP = 2**16, 2**18, 2**20


@dataclasses.dataclass(frozen=True)
class Norm:
    """Which values have a mean of zero and a variance of one after the norm.

    Attributes:
        epsilon: added to the variance.
        is_over_images: all those of an image; otherwise all channels of a token.
    """

    epsilon: float
    is_over_images: bool = False


@dataclasses.dataclass(frozen=True)
class ChannelsAlongLanes:
    """Arrays `[b, h, w, c]`, with the channels along the lanes of a TPU's vector unit.

    Attributes:
        shape: of the array; its rows fill tiles, or there is a single one.
        num_hidden: channels of the hidden layer.
    """

    shape: tuple[int, int, int, int]
    num_hidden: int
    # Of the matrix of a part.
    token_axis: ClassVar[int] = 0
    channel_axis: ClassVar[int] = 1
    # Cycles of a step of the kernels, beside those that the matrix units take, and how many times
    # as many it is of these: from 10 % less to 6 % more than in the kernels' schedules for v5e. The
    # compiler, which estimates its own operations, leaves kernels out.
    forward_cycles: ClassVar[tuple[int, float]] = (600, 2 * 1.05)
    backward_cycles: ClassVar[tuple[int, float]] = (700, 5 * 1.15)

    @classmethod
    def of(cls, shape: Sequence[int], num_hidden: int) -> "ChannelsAlongLanes | None":
        """The form of such images; None if it is not estimated to gain."""
        b, h, w, c = shape
        if w % SUBLANES or not _tokens_at_once(w):
            h, w = 1, h * w
        fills_lanes = c % LANES == num_hidden % LANES == 0
        is_taken = h * w >= _FEWEST_TOKENS and _tokens_at_once(w) and fills_lanes
        return cls((b, h, w, c), num_hidden) if is_taken else None

    def enter(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Images in this form."""
        return x.reshape(self.shape)

    def leave(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
        """The tokens of each image, of an array in this form."""
        b, _, _, c = self.shape
        return x.reshape(b, -1, c)

    @property
    def num_channels(self) -> int:
        return self.shape[3]

    @property
    def step(self) -> tuple[int, ...]:
        """Of the array, what a kernel takes in a step: tokens of one image."""
        _, h, w, c = self.shape
        size = _tokens_at_once(w)
        tokens = _largest_divisor(w, size, size, _MOST_OF_STEP)
        num_rows = _largest_divisor(h, 1, 1, _MOST_OF_STEP // tokens) if tokens == w else 1
        return 1, num_rows, tokens, c

    @property
    def num_tokens_of_step(self) -> int:
        """Tokens of a step, rounded up to whole tiles."""
        _, num_rows, tokens, _ = self.step
        return num_rows * math.ceil(tokens / SUBLANES) * SUBLANES

    @property
    def num_tokens_at_once(self) -> int:
        return _tokens_at_once(self.shape[2])

    @property
    def parts(self) -> list[Any]:
        """Of a step, the tokens of each product."""
        _, num_rows, tokens, _ = self.step
        size = self.num_tokens_at_once
        starts = range(0, tokens, size)
        return [(0, row, slice(at, at + size)) for row in range(num_rows) for at in starts]

    def grid(self, num_cores: int) -> tuple[int, ...]:
        """Cores, steps of the images of each, steps of an image."""
        _, num_rows, tokens, _ = self.step
        b, h, w, _ = self.shape
        cores = math.gcd(b, num_cores)
        return cores, b // cores, h // num_rows, w // tokens

    def blocks(self, num_cores: int, of_images: Any) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Block specs of the numbers of images, and of the array."""
        # Programs for other platforms do not wait for this import.
        from jax.experimental.pallas import tpu as mosaic

        images_of_core = self.grid(num_cores)[1]

        def place(core: Any, image: Any, *others: Any) -> tuple[Any, ...]:
            return core * images_of_core + image, *others, 0

        given = block_spec(of_images.shape, lambda *_: (0, 0), memory_space=mosaic.SMEM)
        return given, block_spec(self.step, place)

    def of_image(self, of_images: Any, row: int) -> Any:
        """In a kernel, what this row gives of the image of the tokens of a product."""
        return of_images[row, pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]

    def along_images(self, of_images: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
        """One number for each image, along the array."""
        return of_images[:, None, None, None]

    def image_sums(self, num_cores: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """The shape of two sums over each image, which stay apart by channel, and its blocks."""
        b, *_, c = self.shape
        images_of_core = self.grid(num_cores)[1]

        def place(core: Any, image: Any, *_: Any) -> tuple[Any, ...]:
            return core * images_of_core + image, 0, 0

        return (b, 2, c), block_spec((1, 2, c), place)

    def sum_over_image(self, tokens: Float[Array, "t c"]) -> Float[Array, "1 c"]:
        """In a kernel, what the tokens of a product add to a sum over their image."""
        return tokens.sum(0, keepdims=True)

    def image_means(self, sums: Float[Array, "b 2 c"]) -> Float[Array, "2 b"]:
        """The means over each image, of these sums."""
        return sums.sum(2).T / math.prod(self.shape[1:])

    def read(self, array: Any, part: Any) -> Float[Array, "t c"]:
        """In a kernel, the tokens of a part."""
        return array[part].astype(jnp.float32)

    def write(self, array: Any, part: Any, tokens: Float[Array, "t c"]) -> None:
        """In a kernel, writes the tokens of a part."""
        array[part] = tokens.astype(array.dtype)

    def apply(self, weights: Any, tokens: Float[Array, "t c"], axis: int) -> Float[Array, "t d"]:
        """The products of all tokens and `weights`, summed over this axis of the weights."""
        return product(tokens, weights[...], (1, axis))


@dataclasses.dataclass(frozen=True)
class ImagesAlongLanes:
    """Arrays `[n, c, b]`, with the images along the lanes: 128 of them fill these.

    Convolutions have images in this form if they fill the lanes (`lanes.fill_lanes`).

    Attributes:
        shape: of the array.
        num_hidden: channels of the hidden layer.
    """

    shape: tuple[int, int, int]
    num_hidden: int
    token_axis: ClassVar[int] = 1
    channel_axis: ClassVar[int] = 0
    # From 13 % less to 12 % more than in the schedules.
    forward_cycles: ClassVar[tuple[int, float]] = (600, 2 * 1.02)
    backward_cycles: ClassVar[tuple[int, float]] = (700, 5 * 1.05)

    @classmethod
    def of(cls, shape: Sequence[int], num_hidden: int) -> "ImagesAlongLanes | None":
        """The form of such images; None if it is not estimated to gain."""
        b, h, w, c = shape
        form = cls((h * w, c, b), num_hidden)
        fills_tiles = fill_lanes(b) and c % SUBLANES == num_hidden % SUBLANES == 0
        is_large = form.num_tokens_at_once * num_hidden >= _FEWEST_HIDDEN
        return form if fills_tiles and is_large else None

    def enter(self, x: Float[Array, "b h w c"]) -> Float[Array, "n c b"]:
        """Images in this form."""
        return x.transpose(1, 2, 3, 0).reshape(self.shape)

    def leave(self, x: Float[Array, "n c b"]) -> Float[Array, "b n c"]:
        """The tokens of each image, of an array in this form."""
        return x.transpose(2, 0, 1)

    @property
    def num_channels(self) -> int:
        return self.shape[1]

    @property
    def step(self) -> tuple[int, ...]:
        """Of the array, what a kernel takes in a step: pixels of as many images as fill lanes."""
        n, c, _ = self.shape
        size = self.num_tokens_at_once // LANES
        most = min(_MOST_HIDDEN_OF_STEP // (LANES * self.num_hidden), _MOST_PIXELS_OF_STEP)
        return _largest_divisor(n, size, size, most), c, LANES

    @property
    def num_tokens_of_step(self) -> int:
        return self.step[0] * LANES

    @property
    def num_tokens_at_once(self) -> int:
        most = min(_MOST_HIDDEN // (LANES * self.num_hidden), _MOST_PIXELS_AT_ONCE)
        return _largest_divisor(self.shape[0], 1, 1, max(most, 1)) * LANES

    @property
    def parts(self) -> list[Any]:
        """Of a step, the pixels of each product."""
        size = self.num_tokens_at_once // LANES
        return [range(at, at + size) for at in range(0, self.step[0], size)]

    def grid(self, num_cores: int) -> tuple[int, ...]:
        """Cores, lanes full of images, steps of the pixels of each core."""
        n, _, b = self.shape
        num_steps = n // self.step[0]
        cores = math.gcd(num_steps, num_cores)
        return cores, b // LANES, num_steps // cores

    def blocks(self, num_cores: int, of_images: Any) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Block specs of the numbers of images, and of the array."""
        steps_of_core = self.grid(num_cores)[2]

        def place(core: Any, images: Any, pixels: Any) -> tuple[Any, ...]:
            return core * steps_of_core + pixels, 0, images

        given = block_spec((len(of_images), LANES), lambda _, images, __: (0, images))
        return given, block_spec(self.step, place)

    def of_image(self, of_images: Any, row: int) -> Any:
        """In a kernel, what this row gives of the images of the tokens of a product."""
        images = of_images[row : row + 1]
        return jnp.concatenate([images] * (self.num_tokens_at_once // LANES), axis=1)

    def along_images(self, of_images: Float[Array, " b"]) -> Float[Array, " b"]:
        """One number for each image, along the array."""
        return of_images

    def image_sums(self, num_cores: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """The shape of two sums over each image, which stay apart by core, and its blocks."""
        shape = self.grid(num_cores)[0], 2, self.shape[2]
        return shape, block_spec((1, 2, LANES), lambda core, images, _: (core, 0, images))

    def sum_over_image(self, tokens: Float[Array, "c t"]) -> Float[Array, "1 images"]:
        """In a kernel, what the tokens of a product add to a sum over their images."""
        by_token = tokens.sum(0, keepdims=True)
        starts = range(0, by_token.shape[1], LANES)
        return functools.reduce(jnp.add, (by_token[:, at : at + LANES] for at in starts))

    def image_means(self, sums: Float[Array, "cores 2 b"]) -> Float[Array, "2 b"]:
        """The means over each image, of these sums."""
        return sums.sum(0) / math.prod(self.shape[:2])

    def read(self, array: Any, part: Any) -> Float[Array, "c t"]:
        """In a kernel, the tokens of a part."""
        return jnp.concatenate([array[pixel] for pixel in part], axis=1).astype(jnp.float32)

    def write(self, array: Any, part: Any, tokens: Float[Array, "c t"]) -> None:
        """In a kernel, writes the tokens of a part."""
        for number, pixel in enumerate(part):
            images = slice(number * LANES, (number + 1) * LANES)
            array[pixel] = tokens[:, images].astype(array.dtype)

    def apply(self, weights: Any, tokens: Float[Array, "c t"], axis: int) -> Float[Array, "d t"]:
        """The products of all tokens and `weights`, summed over this axis of the weights."""
        return product(weights[...], tokens, (axis, 0))


Form = ChannelsAlongLanes | ImagesAlongLanes


def num_bytes(form: Form) -> int:
    """The vector memory for the kernels: what the backward pass, the larger one, needs at most."""
    arrays = 3 * 2 * 2 * math.prod(form.step)
    weights = 2 * form.num_channels * form.num_hidden * (2 + 4)
    hidden = 2 * form.num_tokens_at_once * form.num_hidden * 12
    return (arrays + weights + hidden) * 5 // 4 + 2 * 2**20


def _tokens_at_once(across: int) -> int:
    """How many tokens of a row the matrices of a product have; 0 if no number is good."""
    if across <= _MOST_AT_ONCE:
        return across if across >= _FEWEST_AT_ONCE else 0
    return _largest_divisor(across, SUBLANES, _FEWEST_AT_ONCE, _MOST_AT_ONCE)


def _largest_divisor(number: int, multiple_of: int, least: int, most: int) -> int:
    sizes = range(least, max(least, most) + 1, multiple_of)
    return max((size for size in sizes if number % size == 0), default=0)
