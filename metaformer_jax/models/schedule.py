"""When the backward pass computes what the forward pass did not keep."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def run_after(x: Float[Array, "*b c"], cotangent: Float[Array, "*d e"]) -> Float[Array, "*b c"]:
    """`x`, and what is made of it not before `cotangent` is known.

    XLA for CPUs runs whatever can be run. What a backward pass makes of the kept input of a layer
    it would therefore make, and keep, in the forward pass. Other platforms order by memory.
    """
    return lax.platform_dependent(x, cotangent, cpu=_tied, default=lambda x, _: x)


def _tied(x: Array, cotangent: Array) -> Array:
    if 0 in cotangent.shape:
        return x
    first = lax.slice(cotangent, (0,) * cotangent.ndim, (1,) * cotangent.ndim)
    # Nothing, but a compiler may not know: of infinity it would not be a number. One image's
    # infinity must not become all others', and so is left out.
    nothing = 0 * jnp.where(jnp.abs(first) < 1, first, 0)
    return x + nothing.reshape(()).astype(x.dtype)
