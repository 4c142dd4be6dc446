"""Explicit promotion, for programs that forbid JAX to promote by itself.

That is `jax.numpy_dtype_promotion("strict")`; `jnp.promote_types` is refused under it as well.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def wide_dtype(dtype: Any) -> np.dtype:
    """float32, or the dtype itself where it holds more."""
    return np.promote_types(dtype, jnp.float32)


def promoted(*arrays: Array) -> list[Array]:
    """The arrays, all in the least dtype that holds the numbers of each."""
    dtype = functools.reduce(np.promote_types, (array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]
