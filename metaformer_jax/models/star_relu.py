"""StarReLU, and how it is applied together with the layer after it."""

from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models.lowering.star_relu import star_relu


class StarReLU(nnx.Module):
    """`s * relu(x) ** 2 + b` with one learned `s` and `b` (the publication's own activation)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (1,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (1,), jnp.float32))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return star_relu(x, self.scale[...], self.bias[...])


class AfterStarReLU(Protocol):
    """A layer that can be applied together with a StarReLU before it."""

    def __call__(self, x: Array) -> Array: ...

    def after_star_relu(self, x: Array, scale: Array, bias: Array) -> Array:
        """The layer applied to the StarReLU, with this scale and bias, of `x`."""


def activate_and_apply(activation: Any, layer: Any, x: Float[Array, "*b c"]) -> Array:
    """`layer(activation(x))`.

    For a StarReLU before a layer that supports it (`AfterStarReLU`), the backward pass keeps only
    `x` and recomputes the activation. Autodiff would also keep the squares and the activation,
    which is two more arrays; filling them takes longer than computing the activation again.
    """
    if type(activation) is StarReLU and _is_applied_with_it(layer):
        return layer.after_star_relu(x, activation.scale[...], activation.bias[...])
    return layer(activation(x))


def _is_applied_with_it(layer: Any) -> bool:
    # A subclass that changes the call alone computes something else than the inherited method.
    for owner in type(layer).__mro__:
        if "after_star_relu" in vars(owner):
            return True
        if "__call__" in vars(owner):
            return False
    return False
