"""Counting a model's parameters and multiply-adds without running or allocating it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metaformer_jax.models.layers import Frozen
from metaformer_jax.models.metaformer import MetaFormer


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters (numbers, not bytes) and multiply-adds per image."""

    params: int
    frozen_params: int
    macs: int


def count(model: MetaFormer | Callable[[], MetaFormer]) -> Counts:
    """Counts for one image of the size that the model is built for.

    As in the publication, the multiply-adds are those of convolutions and matrix products
    (including attention and random mixing); norms, activations, pooling and scales do not count.

    Args:
        model: a model, which may be abstract (`nnx.eval_shape`), or a function that builds one. It
            is only traced.

    Examples:
        >>> from metaformer_jax import create_model
        >>> count(lambda: create_model("identityformer_s12", rngs=nnx.Rngs(0))).params
        11891712
    """
    if not isinstance(model, MetaFormer):
        model = nnx.eval_shape(model)
    graphdef, state = nnx.split(model)
    height, width = model.image_size
    images = jax.ShapeDtypeStruct((1, height, width, model.in_channels), jnp.float32)

    def forward(state: nnx.State, images: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, state)
        merged.eval()
        return merged(images)

    jaxpr = jax.make_jaxpr(forward)(state, images)
    return Counts(
        params=_num_elements(nnx.state(model, nnx.Param)),
        frozen_params=_num_elements(nnx.state(model, Frozen)),
        macs=_macs(jaxpr.jaxpr),
    )


def _num_elements(state: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def _macs(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracting)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * math.prod(kernel) // out_features
        else:
            inner = [_macs(inner) for inner in _inner_jaxprs(equation)]
            if equation.primitive.name == "cond":
                # The branches are the forms of one operation on different platforms: one counts.
                total += max(inner)
            else:
                total += sum(inner) * equation.params.get("length", 1)
    return total


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
    ):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)
