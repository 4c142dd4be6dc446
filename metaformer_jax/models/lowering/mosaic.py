"""What the kernels for TPUs, written in Pallas for Mosaic, have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.platform import is_for, kernels_are_allowed

# Rows of a tile of 16-bit numbers.
SUBLANES = 16
# The smallest of any chip, in bytes, for one that is not known.
_LEAST_VECTOR_MEMORY = 16 * 2**20
# The matrix units of earlier chips take no bfloat16.
_FIRST_GENERATION = 4


def takes(x: Any) -> bool:
    """Whether kernels may take such an array, in a program that is meant for TPUs."""
    if not (kernels_are_allowed() and is_for("tpu") and x.dtype == jnp.bfloat16):
        return False
    if (chip := _chip()) is not None and chip.generation < _FIRST_GENERATION:
        return False
    # In exported programs a size may be unknown.
    return all(isinstance(size, int) for size in x.shape) and x.shape[0] > 0


def fits(num_bytes: int) -> bool:
    """Whether a core's vector memory holds so many bytes, and what the compiler needs besides."""
    return num_bytes <= 0.9 * vector_memory()


def vector_memory() -> int:
    """Bytes of a core's vector memory; the smallest of any chip if it is not known."""
    chip = _chip()
    return _LEAST_VECTOR_MEMORY if chip is None else chip.vmem_capacity_bytes


def num_cores_of_chip() -> int:
    """The cores of a chip that run a kernel together."""
    chip = _chip()
    return 1 if chip is None else chip.num_cores


def _chip() -> Any:
    # Programs for other platforms do not wait for this import.
    from jax.experimental.pallas import tpu as mosaic

    try:
        return mosaic.get_tpu_info()
    except ValueError:
        return None


def block_spec(
    shape: Sequence[int], place: Callable[..., tuple[Any, ...]], **options: Any
) -> pl.BlockSpec:
    """A `pl.BlockSpec` with places of 32 bits, as the compiler wants them, whatever JAX's default.

    Args:
        shape: of the block.
        place: the number of the block along each axis, for a point of the grid.
        options: of `pl.BlockSpec`.
    """

    def place_in_32_bits(*point: Any) -> tuple[Any, ...]:
        return tuple(jnp.asarray(number, jnp.int32) for number in place(*point))

    return pl.BlockSpec(tuple(shape), place_in_32_bits, **options)


def product(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "m n"]:
    """In a kernel, the product of two matrices, summed in float32 over one axis of each."""
    first, second = axes
    summed = (((first,), (second,)), ((), ()))
    return lax.dot_general(a, b, summed, preferred_element_type=jnp.float32)
