"""What the backward pass may keep instead of computing it again, and when it computes."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Names for `jax.checkpoint` of what `models.stages.REMAT` may keep.
# Of tensors that take a product of matrices, or a convolution, to compute again.
PRODUCT = "product"
# Of means and variances, two numbers for each token.
STATISTICS = "statistics"


def run_after(x: Float[Array, "*b c"], cotangent: Float[Array, "*d e"]) -> Float[Array, "*b c"]:
    """`x`, tied to `cotangent`, so that nothing is computed from it before `cotangent` is known.

    XLA for CPUs runs every operation as soon as its inputs are ready. Whatever the backward pass
    recomputes from a layer's input would therefore be computed, and kept, in the forward pass.
    Other platforms schedule by memory.
    """
    return lax.platform_dependent(x, cotangent, cpu=_tied, default=lambda x, _: x)


def _tied(x: Array, cotangent: Array) -> Array:
    if 0 in cotangent.shape:
        return x
    first = lax.slice(cotangent, (0,) * cotangent.ndim, (1,) * cotangent.ndim)
    # Zero, but the compiler cannot know that: infinity would give NaN. It is left out here, because
    # the infinity of one image must not spoil all others.
    nothing = 0 * jnp.where(jnp.abs(first) < 1, first, 0)
    return x + nothing.reshape(()).astype(x.dtype)
