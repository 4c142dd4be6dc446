"""A block's norm, MLP and shortcut for TPUs as two kernels, written in Pallas for Mosaic.

The hidden layer has four times as many channels as the block. The compiler for TPUs writes it to
memory and reads it again, in the backward pass several times. A kernel takes some tokens after the
other from the norm to the sum with the shortcut, and their hidden layer never leaves the chip's
vector memory. The backward pass computes it again, and keeps the sums over all tokens there, too.
Means over whole images are taken by XLA: before a kernel, and in the backward pass after it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.lanes import LANES
from metaformer_jax.models.lowering.mlp_forms import (
    ChannelsAlongLanes,
    Form,
    ImagesAlongLanes,
    Norm,
    num_bytes,
)
from metaformer_jax.models.lowering.mosaic import (
    block_spec,
    fits,
    num_cores_of_chip,
    product,
    takes,
    vector_memory,
)
from metaformer_jax.models.lowering.normalization import moments

# Of a core's vector memory, what the hidden layer takes at least for kernels to gain after a norm
# over images. XLA's own operations keep a smaller one there, and such a norm costs them little. By
# estimates for v5e, with 128 MiB, kernels lose up to 37 MiB and gain from 49 MiB on.
_LEAST_HIDDEN = 0.35


def form_of(
    x: Float[Array, "b h w c"], num_hidden: int, *, norm: Norm, takes_any_form: bool
) -> Form | None:
    """The form in which kernels take such an array, in a program that is meant for TPUs.

    Args:
        x: the input.
        num_hidden: channels of the hidden layer.
        norm: of the input.
        takes_any_form: whether what comes before can give images along the lanes as well.
    """
    if not takes(x):
        return None
    hidden = x.dtype.itemsize * x.size // x.shape[-1] * num_hidden
    if norm.is_over_images and hidden < _LEAST_HIDDEN * vector_memory():
        return None
    form = (
        ImagesAlongLanes.of(x.shape, num_hidden) if takes_any_form else None
    ) or ChannelsAlongLanes.of(x.shape, num_hidden)
    return form if form is not None and fits(num_bytes(form)) else None


def transform(
    form: Form,
    x: Array,
    keep: Float[Array, " b"],
    shortcut: Float[Array, " c"] | None,
    up: Float[Array, "c d"],
    down: Float[Array, "d c"],
    offset: Float[Array, " c"],
    *,
    norm: Norm,
    interpret: bool = False,
) -> Array:
    """`residual_mlp.residual_mlp` for an array in this form.

    Args:
        form: of the array.
        x: the input.
        keep: a factor for each image.
        shortcut: a factor for each channel of `x`; None for ones.
        up: from the channels to those of the hidden layer.
        down: back from these.
        offset: for each channel.
        norm: of the input.
        interpret: interprets the kernel, slowly, on any device.
    """
    from jax.experimental.pallas import tpu as mosaic

    vectors = _vectors(form, offset, shortcut)
    of_images = _of_images(form, x, keep, norm)
    # The core that takes a step does not matter here, and is left to the compiler.
    given, tokens = form.blocks(1, of_images)
    grid = form.grid(1)
    return pl.pallas_call(
        functools.partial(_transform, form, norm=norm),
        grid=grid,
        in_specs=[given, tokens, *map(_whole, (up, down, *vectors))],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=(mosaic.PARALLEL,) * len(grid), vmem_limit_bytes=num_bytes(form)
        ),
        interpret=interpret,
        name="mlp_transform",
        cost_estimate=_cost(x, up, products=2, arrays=2),
        metadata=_cycles(form, up, form.forward_cycles),
    )(of_images, x, up.astype(x.dtype), down.astype(x.dtype), *vectors)


def gradients(
    form: Form,
    x: Array,
    keep: Float[Array, " b"],
    shortcut: Float[Array, " c"] | None,
    up: Float[Array, "c d"],
    down: Float[Array, "d c"],
    offset: Float[Array, " c"],
    cotangent: Array,
    *,
    norm: Norm,
    interpret: bool = False,
) -> tuple[Array, Array, Array | None, Array, Array, Array]:
    """The gradients of all arrays of `transform`, among which `keep` is a constant."""
    from jax.experimental.pallas import tpu as mosaic

    _, *of_shortcut = vectors = _vectors(form, offset, shortcut)
    of_images = _of_images(form, x, keep, norm)
    # Each core of a chip has its own sums.
    num_cores = num_cores_of_chip()
    given, tokens = form.blocks(num_cores, of_images)
    grid = form.grid(num_cores)
    sums = [
        jax.ShapeDtypeStruct((grid[0], *array.shape), jnp.float32) for array in (up, up, *vectors)
    ]
    out_shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), *sums]
    out_specs = [tokens, *map(_of_core, sums)]
    if norm.is_over_images:
        shape, block = form.image_sums(num_cores)
        out_shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        out_specs.append(block)
    x_gradient, *totals = pl.pallas_call(
        functools.partial(_gradients, form, norm=norm),
        grid=grid,
        in_specs=[given, tokens, tokens, *map(_whole, (up, down, *of_shortcut))],
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=(mosaic.PARALLEL, *(mosaic.ARBITRARY,) * (len(grid) - 1)),
            vmem_limit_bytes=num_bytes(form),
        ),
        interpret=interpret,
        name="mlp_gradients",
        cost_estimate=_cost(x, up, products=5, arrays=3),
        metadata=_cycles(form, up, form.backward_cycles),
    )(
        of_images,
        x,
        cotangent,
        up.astype(x.dtype),
        # The derivative of the squares has a factor of two.
        (2 * down).astype(x.dtype),
        *of_shortcut,
    )
    if norm.is_over_images:
        # Known when the kernel has seen the whole image.
        x_gradient = _moved_back(form, x, x_gradient, of_images, form.image_means(totals.pop()))
    up_gradient, down_gradient, *vector_gradients = (total.sum(0) for total in totals)
    offset_gradient, shortcut_gradient = (*(one.ravel() for one in vector_gradients), None)[:2]
    return (
        x_gradient,
        jnp.zeros_like(keep),
        shortcut_gradient,
        up_gradient,
        down_gradient.T,
        offset_gradient,
    )


def _transform(
    form: Form,
    of_images: Any,
    x: Any,
    up: Any,
    down: Any,
    offset: Any,
    *others: Any,
    norm: Norm,
) -> None:
    *shortcut, out = others
    keep = form.of_image(of_images, 0)
    normalize = _normalizing(form, of_images, norm)
    for part in form.parts:
        wide = form.read(x, part)
        normalized, _ = normalize(wide)
        positive = jnp.maximum(form.apply(up, normalized.astype(up.dtype), 0), 0)
        branch = form.apply(down, jnp.square(positive).astype(down.dtype), 0) + offset[...]
        scaled = wide * shortcut[0][...] if shortcut else wide
        form.write(out, part, scaled + keep * branch)


def _gradients(
    form: Form,
    of_images: Any,
    x: Any,
    cotangent: Any,
    up: Any,
    twice_down: Any,
    *others: Any,
    norm: Norm,
) -> None:
    outputs = list(others)
    by_image = outputs.pop() if norm.is_over_images else None
    # With a shortcut comes one more sum.
    shortcut = outputs.pop(0) if len(outputs) == 6 else None
    x_gradient, *totals = outputs
    up_gradient, down_gradient, offset_gradient = totals[:3]
    # All axes of the grid but that of the cores.
    is_first = [pl.program_id(axis) == 0 for axis in range(1, len(form.grid(1)))]
    channels, over_tokens = form.channel_axis, (form.token_axis, form.token_axis)

    @pl.when(functools.reduce(jnp.logical_and, is_first))
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    if by_image is not None:

        @pl.when(functools.reduce(jnp.logical_and, is_first[1:]))
        def _() -> None:
            by_image[...] = jnp.zeros_like(by_image)

    keep = form.of_image(of_images, 0)
    normalize = _normalizing(form, of_images, norm)
    for part in form.parts:
        wide, given = form.read(x, part), form.read(cotangent, part)
        branch_gradient = keep * given
        normalized, inverse = normalize(wide)
        narrow, shares = normalized.astype(up.dtype), branch_gradient.astype(up.dtype)
        positive = jnp.maximum(form.apply(up, narrow, 0), 0)
        hidden_gradient = (form.apply(twice_down, shares, 1) * positive).astype(up.dtype)
        normalized_gradient = form.apply(up, hidden_gradient, 1)
        up_gradient[0] += product(narrow, hidden_gradient, over_tokens)
        # Transposed: of the two matrices, the one with fewer channels is turned for the product.
        down_gradient[0] += product(shares, jnp.square(positive).astype(up.dtype), over_tokens)
        offset_gradient[0] += branch_gradient.sum(form.token_axis, keepdims=True)
        if by_image is not None:
            centred_gradient = normalized_gradient
            by_image[0, :1] += form.sum_over_image(normalized_gradient)
            by_image[0, 1:] += form.sum_over_image(normalized_gradient * normalized)
        else:
            # A shift or a scaling of all channels does not change what the norm returns.
            moved = normalized_gradient.mean(channels, keepdims=True)
            stretched = (normalized_gradient * normalized).mean(channels, keepdims=True)
            centred_gradient = normalized_gradient - moved - normalized * stretched
        if shortcut is not None:
            totals[-1][0] += (given * wide).sum(form.token_axis, keepdims=True)
            given = given * shortcut[...]
        form.write(x_gradient, part, inverse * centred_gradient + given)


def _of_images(form: Form, x: Array, keep: Float[Array, " b"], norm: Norm) -> Float[Array, "k b"]:
    """What a kernel is given of each image: factors, and mean and inverse deviation where needed.

    A matrix: `jax.vmap` puts another axis before it, and of a block one axis must be whole.
    """
    rows = [keep]
    if norm.is_over_images:
        mean, variance = moments(form.leave(x), (1, 2))
        rows += [mean.ravel(), lax.rsqrt(variance.ravel() + norm.epsilon)]
    # `jnp.stack` would put the axis of `jax.vmap` between the two.
    return jnp.concatenate([row[None] for row in rows])


def _moved_back(form: Form, x: Array, x_gradient: Array, of_images: Array, means: Array) -> Array:
    """The gradient by `x`, without what a shift or a scaling of a whole image would change."""
    mean, inverse, moved, stretched = map(form.along_images, (*of_images[1:], *means))
    wide = x_gradient.astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * inverse
    return (wide - inverse * (moved + normalized * stretched)).astype(x_gradient.dtype)


def _normalizing(form: Form, of_images: Any, norm: Norm) -> Callable[[Array], tuple[Array, Array]]:
    """In a kernel: tokens with a mean of zero and a variance of one, and the factor it takes."""
    if norm.is_over_images:
        mean, inverse = form.of_image(of_images, 1), form.of_image(of_images, 2)
        return lambda tokens: ((tokens - mean) * inverse, inverse)

    def normalize(tokens: Array) -> tuple[Array, Array]:
        centred = tokens - tokens.mean(form.channel_axis, keepdims=True)
        variance = jnp.square(centred).mean(form.channel_axis, keepdims=True)
        inverse = lax.rsqrt(variance + norm.epsilon)
        return centred * inverse, inverse

    return normalize


def _vectors(form: Form, *vectors: Float[Array, " c"] | None) -> list[Array]:
    """Vectors of channels as matrices, which broadcast over tokens."""
    return [jnp.expand_dims(one, form.token_axis) for one in vectors if one is not None]


def _whole(array: Any) -> pl.BlockSpec:
    """A block that stays the same: held once, not twice to read the next one ahead."""
    return block_spec(array.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1))


def _of_core(array: Any) -> pl.BlockSpec:
    shape = (1, *array.shape[1:])
    return block_spec(shape, lambda core, *_: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _cost(x: Array, up: Array, *, products: int, arrays: int) -> pl.CostEstimate:
    """The arithmetic and traffic of a kernel, for the compiler."""
    return pl.CostEstimate(
        flops=2 * products * x.size * up.shape[1],
        transcendentals=x.size // up.shape[0],
        bytes_accessed=arrays * x.nbytes + 4 * products * up.size,
    )


def _cycles(form: Form, up: Array, cycles: tuple[int, float]) -> dict[str, str]:
    """What a kernel says of itself, for `training.hlo`."""
    c, d = up.shape
    # Of fewer than 128 channels, half of the products take as long as of 128.
    filled = (c + math.ceil(c / LANES) * LANES) / 2
    of_product = form.num_tokens_of_step * filled * d / (4 * LANES**2)
    num_steps = math.prod(form.grid(1))
    return {"kernel_cycles": str(round(num_steps * (cycles[0] + cycles[1] * of_product)))}
