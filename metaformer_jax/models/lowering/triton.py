"""The common part of the kernels for NVIDIA GPUs, which are written in Pallas for Triton.

If JAX has no Triton compiler (it is to be removed some day), XLA's own operations are used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.platform import is_for, kernels_are_allowed

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None  # type: ignore[assignment]

THREADS = 128
# Indices into an array have 32 bits.
_MOST_NUMBERS = 2**31 - 1


def has_kernels(*arrays: Array) -> bool:
    """Whether there are kernels for arrays of such dtypes and sizes on the GPUs that are meant.

    Kernels are traced only if they might run: where no GPU is meant they cost no tracing time.
    """
    is_meant = triton is not None and is_for("gpu") and _are_recent_enough()
    return kernels_are_allowed() and is_meant and all(map(_is_supported, arrays))


def _is_supported(array: Any) -> bool:
    # In exported programs a size may be unknown.
    is_known = all(isinstance(side, int) for side in array.shape)
    is_short = array.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    return is_short and is_known and 0 < array.size <= _MOST_NUMBERS


@functools.cache
def _are_recent_enough() -> bool:
    """Whether the GPUs are of the Ampere generation or later, as all are that are not here."""
    if jax.default_backend() == "cpu":
        return True
    device = jax.local_devices()[0]
    return device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8


def call(
    body: functools.partial[None], grid: tuple[int, ...], out: Any, *arrays: Array, interpret: bool
) -> Any:
    """Runs `body` for each point of the grid, with references to whole arrays.

    Args:
        body: a partial of the function that names the kernel.
        grid: the number of thread blocks along each axis.
        out: shape and dtype of the result, or of several.
        arrays: the input.
        interpret: interprets the kernel, slowly, on any device.
    """
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        in_specs=[_whole(array) for array in arrays],
        out_specs=jax.tree.map(_whole, out),
        compiler_params=triton.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        interpret=interpret,
        name=body.func.__name__.strip("_"),
    )(*arrays)


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def load(part: Any, is_inside: Array) -> Float[Array, "..."]:
    """Loads values as float32, with zeros where they are not inside the array."""
    return triton.load(part, mask=is_inside, other=0).astype(jnp.float32)


def store(part: Any, values: Array, is_inside: Array) -> None:
    """Stores values in the array's dtype, where they are inside the array."""
    triton.store(part, values.astype(part.dtype), mask=is_inside)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`; block sizes must be such."""
    return 1 << (number - 1).bit_length()
