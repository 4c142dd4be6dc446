"""Compiling models: the compiler's options, and weights that stay as they are."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metaformer_jax.models.cores import InParts
from metaformer_jax.models.lowering.platform import without_kernels
from metaformer_jax.models.metaformer import MetaFormer

# On CPUs XLA hands matrix products, convolutions and sums to the library YNNPACK. With Eigen, its
# other library, for the first two, these models are up to 1.2 times as fast (on two AVX-512 cores;
# other CPUs were not measured); sums and softmaxes are faster with YNNPACK. In its own loops XLA
# uses half of AVX-512's width by default; with the full width, depthwise convolutions of 56x56
# pixels take three quarters of the time.
_FOR_CPUS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": "512",
}
# Packages of which no layer, and nothing that a layer calls, looks at other images.
_KNOWN = ("metaformer_jax", "flax", "jax")


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """The best `jax.jit(..., compiler_options=...)` for these models.

    JAX accepts compiler options for the outermost `jax.jit` only.

    Args:
        platform: such as `cpu`, `gpu` or `tpu`; by default that of `jax.default_backend()`.

    Returns:
        Options that the installed release of JAX knows; empty for all platforms but CPUs.
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
    model: nnx.Module,
    function: Callable[..., Any] = operator.call,
    *,
    per_image: bool | None = None,
) -> Callable[..., Any]:
    """A model with its current weights as a fast function, jitted with `compiler_options`.

    On a CPU the weights become constants of the program: XLA arranges them for its matrix products
    once instead of in every call. Such a program takes longer to compile, and about three times the
    memory of the weights; for a few images `nnx.jit` is the better choice. The cores also work on
    parts of a batch at the same time. On other platforms, and for weights on several devices, the
    weights are arguments and the batch stays whole, as usual.

    Args:
        model: is not changed; later changes to it have no effect. It runs in evaluation mode. Its
            arrays are not copied: where they are donated to a program later, only shapes that were
            compiled before still work, and those on CPUs alone. Give
            `jax.tree.map(jnp.copy, model)` if a training that donates them goes on.
        function: called with a model and the arguments of the returned function, such as
            `metaformer_jax.MetaFormer.features`; by default calls the model.
        per_image: whether the function returns, for each image of a batch, what depends on this
            image alone, along the first axis of each array. Only then can the batch be divided. By
            default it is taken to be so for the call and the methods of a `MetaFormer` that is made
            of layers and functions of this package, of Flax and of JAX, and not for any other
            function or model. Give False if one of these was put where it looks along the first
            axis, such as a convolution in the place of the head's linear layer.

    Returns:
        A function of the arguments of `function` other than the model, all of which must be arrays,
        positional or by keyword. It is compiled once for each shape; inside another `jax.jit` or a
        gradient it becomes a part of that program.

    Raises:
        ValueError: the model is abstract (`nnx.eval_shape`), not an `nnx.Module`, or has a plain
            function in the place of a module. The returned function raises one where results of a
            `per_image` function have no axis of images.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"`model` must be an nnx.Module, got {type(model).__name__}. Give a method's function "
            "beside the model: jit_inference(model, MetaFormer.features)."
        )
    graphdef, state = nnx.split(model)
    # Only the arrays: the variables that hold them belong to the model, and change with it.
    by_path, structure = jax.tree.flatten_with_path(state)
    for path, leaf in by_path:
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"`model.{jax.tree_util.keystr(path, simple=True, separator='.')}` must be an "
                f"array or a module, got {leaf!r}. Set it to nnx.static(...) of a function."
            )
    leaves = [leaf for _, leaf in by_path]
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
    if per_image is None:
        methods = (operator.call, *vars(MetaFormer).values())
        per_image = function in methods and keeps_images_apart(model)
    platforms = _platforms(leaves)
    inlined: Callable[..., Any] = functools.partial(answer, leaves)
    if platforms == ["cpu"]:
        jitted: Callable[..., Any] = jax.jit(inlined, compiler_options=compiler_options("cpu"))
        if per_image:
            jitted = InParts(jitted)
        jitted = _at_weights(leaves, jitted)
    else:
        jitted = functools.partial(
            jax.jit(answer, compiler_options=compiler_options(platforms[0])), leaves
        )
        if len(platforms) > 1:
            jitted, inlined = _by_operations_of_xla(jitted), _by_operations_of_xla(inlined)

    numbers = (leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    # A copy, because the weights may be donated to a program before the next call.
    smallest = [jnp.copy(leaf) for leaf in sorted(numbers, key=lambda leaf: leaf.size)[:1]]

    def answer_jitted(*inputs: Any, **named: Any) -> Any:
        # Inside a traced program a negation is traced even if no input is. It is taken of a number
        # on the device, because programs may forbid transfers to it.
        if _is_traced((inputs, named, [-leaf for leaf in smallest])):
            return inlined(*inputs, **named)
        return jitted(*inputs, **named)

    return answer_jitted


def keeps_images_apart(model: nnx.Module) -> bool:
    """Whether what a model makes of an image surely depends on no other of the batch.

    Layers and functions from elsewhere may do anything.
    """
    if type(model) is not MetaFormer:
        return False
    # `nnx.iter_modules` leaves out a mixer or a norm that is a function, but not its block.
    parts = [part for _, part in nnx.iter_modules(model)]
    held = (value for part in parts for value in vars(part).values() if callable(value))
    return all(_origin(part) in _KNOWN and _is_by_image(part) for part in [*parts, *held])


def _origin(part: Any) -> str:
    """The package that a module, or what it calls, comes from."""
    return (getattr(part, "__module__", None) or "").partition(".")[0]


def _is_by_image(part: Any) -> bool:
    """Whether the settings of a layer or function keep it from looking along the images' axis."""
    # None is what Flax's norms over groups of channels say for all axes but that of the images.
    axes = getattr(part, "reduction_axes", None)
    axes = (axes,) if isinstance(axes, int) else axes or ()
    # Counted from the end, the axis of the images is another one for features than for images.
    keeps_apart = all(axis > 0 or axis == -1 for axis in axes)
    # Of a function, what was set is not known.
    return keeps_apart and not isinstance(part, functools.partial)


def _by_operations_of_xla(jitted: Callable[..., Any]) -> Callable[..., Any]:
    """`jitted` without custom kernels, which XLA cannot divide among several devices."""

    def answer(*inputs: Any, **named: Any) -> Any:
        with without_kernels():
            return jitted(*inputs, **named)

    return answer


def _at_weights(leaves: list[Any], jitted: Callable[..., Any]) -> Callable[..., Any]:
    """`jitted`, of which these weights are constants, on their device if they are bound to one.

    Constants do not tell JAX where to run, arguments do.
    """
    bound = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array) and leaf.committed]
    if not bound:
        return jitted

    (device,) = bound[0].device_set

    def place(given: Any) -> Any:
        # Images that are bound to a device are answered there.
        is_bound = isinstance(given, jax.Array) and given.committed
        return given if is_bound else jax.device_put(given, device)

    def answer(*inputs: Any, **named: Any) -> Any:
        inputs, named = jax.tree.map(place, (inputs, named))
        return jitted(*inputs, **named)

    return answer


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _platforms(leaves: list[Any]) -> list[str]:
    """The platform of each device that holds weights."""
    devices = {
        device
        for leaf in leaves
        for device in (leaf.devices() if isinstance(leaf, jax.Array) else jax.devices()[:1])
    }
    return [device.platform for device in devices] or [jax.default_backend()]
