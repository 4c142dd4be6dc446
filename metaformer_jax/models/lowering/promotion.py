"""Explicit dtype promotion, for programs that forbid JAX's implicit promotion.

They use `jax.numpy_dtype_promotion("strict")`, under which `jnp.promote_types` is refused as well.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def wide_dtype(dtype: Any) -> np.dtype:
    """float32, or the dtype itself if it is wider."""
    return np.promote_types(dtype, jnp.float32)


def promoted(*arrays: Array) -> list[Array]:
    """The arrays, all in the smallest dtype that can hold the values of each."""
    dtype = functools.reduce(np.promote_types, (array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]
