"""Compiling models: the compiler's options, and weights that stay as they are."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# XLA gives matrix products, convolutions and sums on CPUs to YNNPACK. With the first two by Eigen,
# its other library, these models are up to 1.2 times as fast (on two AVX-512 cores; others were not
# measured); sums and softmaxes are better off with YNNPACK. Loops of its own it writes for half of
# AVX-512's width by default: by all of it, depthwise convolutions of 56x56 pixels take three
# quarters of the time.
_FOR_CPUS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": "512",
}


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """What to give `jax.jit(..., compiler_options=...)` for these models.

    JAX takes options for an outermost `jax.jit` only.

    Args:
        platform: such as `cpu`, `gpu` or `tpu`; by default that of `jax.default_backend()`.

    Returns:
        Options that this release of JAX knows; empty for all but CPUs.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return dict(_FOR_CPUS) if _knows_options_for_cpus() else {}


@functools.cache
def _knows_options_for_cpus() -> bool:
    try:
        with jax.default_device("cpu"):
            jax.jit(lambda: 0).lower().compile(compiler_options=_FOR_CPUS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit_inference(
    model: nnx.Module, function: Callable[..., Any] = operator.call
) -> Callable[..., Any]:
    """What a model answers with the weights that it has now, jitted with `compiler_options`.

    On a CPU the weights become constants of the program: XLA arranges them for its matrix products
    once, and not in every call. Such a program takes longer to compile, and about three times the
    memory of the weights; for a few images `nnx.jit` is the better choice. On other platforms, and
    for weights on several devices, they are arguments as usual.

    Args:
        model: is not changed, and may be changed afterwards. It answers in evaluation mode.
        function: of a model and what the result is called with, such as
            `metaformer_jax.MetaFormer.features`; by default the model itself.

    Returns:
        A function of what `function` takes beside the model, arrays all of it, by place or by
        keyword. Compiled once for each shape; within another `jax.jit` or gradient it is a part of
        that.

    Raises:
        ValueError: the model is abstract (`nnx.eval_shape`), or none.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"`model` must be an nnx.Module, got {type(model).__name__}. Give a method's function "
            "beside the model: jit_inference(model, MetaFormer.features)."
        )
    graphdef, state = nnx.split(model)
    # Only the arrays: what holds them is the model's own, and changes with it.
    leaves, structure = jax.tree.flatten(state)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise ValueError(
            "`model` must have values, got one made under nnx.eval_shape. Load its weights first."
        )

    def answer(leaves: list[Any], *inputs: Any, **named: Any) -> Any:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        model.eval()
        return function(model, *inputs, **named)

    if _is_traced(leaves):
        return functools.partial(answer, leaves)
    platforms = _platforms(leaves)
    if platforms == ["cpu"]:
        jitted: Callable[..., Any] = jax.jit(
            functools.partial(answer, leaves), compiler_options=compiler_options("cpu")
        )
    else:
        jitted = functools.partial(
            jax.jit(answer, compiler_options=compiler_options(platforms[0])), leaves
        )

    numbers = (leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    smallest = sorted(numbers, key=lambda leaf: leaf.size)[:1]

    def answer_jitted(*inputs: Any, **named: Any) -> Any:
        # In a program that is traced a negative is, too, where no input may be. Of a number on the
        # device: there are programs that forbid to send it any.
        if _is_traced((inputs, named, [-leaf for leaf in smallest])):
            return answer(leaves, *inputs, **named)
        return jitted(*inputs, **named)

    return answer_jitted


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _platforms(leaves: list[Any]) -> list[str]:
    """Of each device that holds weights."""
    devices = {
        device
        for leaf in leaves
        for device in (leaf.devices() if isinstance(leaf, jax.Array) else jax.devices()[:1])
    }
    return [device.platform for device in devices] or [jax.default_backend()]
