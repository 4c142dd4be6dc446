"""What the kernels for TPUs, written in Pallas for Mosaic, have in common."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from metaformer_jax.models.kernels import are_allowed
from metaformer_jax.models.lanes import is_for_tpus

# Rows of a tile of 16-bit numbers.
SUBLANES = 16
# Of a chip that is not known.
_LEAST_VECTOR_MEMORY = 16 * 2**20


def takes(x: Any) -> bool:
    """Whether kernels may take such an array, in a program that is meant for TPUs."""
    if not (are_allowed() and is_for_tpus() and x.dtype == jnp.bfloat16):
        return False
    # In exported programs a size may be unknown.
    return all(isinstance(size, int) for size in x.shape) and x.shape[0] > 0


def vector_memory() -> int:
    """The bytes of a core's vector memory."""
    chip = _chip()
    return _LEAST_VECTOR_MEMORY if chip is None else chip.vmem_capacity_bytes


def num_cores() -> int:
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


def product(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "m n"]:
    """In a kernel, the product of two matrices, summed in float32 over one axis of each."""
    first, second = axes
    summed = (((first,), (second,)), ((), ()))
    return lax.dot_general(a, b, summed, preferred_element_type=jnp.float32)
