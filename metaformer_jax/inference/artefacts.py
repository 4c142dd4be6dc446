"""Models as files that run without this package: StableHLO by jax.export, ONNX by jax2onnx."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.inference.classifier import Classifier
from metaformer_jax.messages import first_line
from metaformer_jax.models import Attention, MetaFormer, Pooling, StarReLU
from metaformer_jax.models.arguments import as_pair, is_floating
from metaformer_jax.models.layers import Linear
from metaformer_jax.models.lowering.attention import split_heads
from metaformer_jax.models.lowering.star_relu import squared_relu
from metaformer_jax.models.mixers import DepthwiseConv
from metaformer_jax.models.normalization import LayerNorm
from metaformer_jax.weights.convert import check_has_values

PLATFORMS = ("cpu", "cuda", "tpu")
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def export_stablehlo(
    model: MetaFormer,
    *,
    image_size: int | tuple[int, int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """The model, weights included, as `jax.export` serialises it, for any number of images.

    `jax.export.deserialize(data).call(images)` gives the logits of float32 images
    `[batch, height, width, channels]` on each of the platforms, without this package.

    Args:
        model: is exported in evaluation mode, whatever its own.
        image_size: pixels per side, or (height, width); by default what the model was built for.
        platforms: what the program is lowered for: "cpu", "cuda", "rocm", "tpu".

    Raises:
        ImportError: flatbuffers, in which the program is written, is not installed.
        ValueError: an unknown platform, or a size that the model does not take.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A StableHLO file needs flatbuffers. Install it with: "
            'pip install "metaformer-jax[export]"'
        ) from error
    if isinstance(platforms, str):
        platforms = (platforms,)
    if not platforms or set(platforms) - {"cpu", "cuda", "rocm", "tpu"}:
        raise ValueError(
            f"`platforms` must be some of cpu, cuda, rocm and tpu, got {', '.join(platforms)!r}."
        )
    model = _in_evaluation_mode(model)
    (batch,) = jax.export.symbolic_shape(BATCH)
    images = jax.ShapeDtypeStruct((batch, *_image_shape(model, image_size)), jnp.float32)
    exported = jax.export.export(jax.jit(functools.partial(_logits, model)), platforms=platforms)
    return bytes(exported(images).serialize())


def export_onnx(model: MetaFormer, *, image_size: int | tuple[int, int] | None = None) -> bytes:
    """The model, weights included, as an ONNX file, for any number of images.

    Its input is `images`, float32 `[batch, height, width, channels]`, its output `logits`. It
    computes in float32, whatever the model's dtype.

    Args:
        model: is exported in evaluation mode, whatever its own.
        image_size: pixels per side, or (height, width); by default what the model was built for.

    Raises:
        ImportError: jax2onnx is not installed.
        ValueError: a size that the model does not take, or an operation that jax2onnx does not.
    """
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise ImportError(
            'An ONNX file needs jax2onnx. Install it with: pip install "metaformer-jax[onnx]"'
        ) from error
    model = _in_evaluation_mode(model)
    shape = _image_shape(model, image_size)
    plain = _in_plain_operations(model)
    try:
        with _quiet():
            exported = jax2onnx.to_onnx(
                functools.partial(_logits, plain),
                [(BATCH, *shape)],
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
        # Of what it does not know it may also write a file that no runtime loads.
        onnx.checker.check_model(exported, full_check=True)
    # Its errors have no class in common.
    except Exception as error:
        raise ValueError(
            "`model` must be made of operations that jax2onnx can write, got "
            f"{type(error).__name__}: {first_line(error)}. Use others in mixers, norms "
            "and head of your own, or export_stablehlo, which takes any model."
        ) from error
    return exported.SerializeToString()


def describe(classifier: Classifier) -> dict[str, Any]:
    """What whoever runs the file has to know, as JSON: inputs, outputs and classes."""
    size, channels = classifier.transform.image_size, classifier.transform.channels
    return {
        "model": classifier.name,
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "shape": [BATCH, size, size, channels],
            "axes": "batch, height, width, channels (RGB, or grey)",
            "values": "(pixel / 255 - mean) / std",
            "mean": list(classifier.mean),
            "std": list(classifier.std),
            "crop_fraction": classifier.transform.crop_fraction,
            "interpolation": classifier.transform.interpolation,
        },
        "output": {
            "name": OUTPUT,
            "dtype": "float32",
            "shape": [BATCH, len(classifier.class_names)],
            "values": "logits; their softmax are the probabilities",
        },
        "class_names": list(classifier.class_names),
    }


def _in_evaluation_mode(model: MetaFormer) -> MetaFormer:
    check_has_values(model)
    model = nnx.clone(model)
    model.eval()
    return model


def _logits(model: MetaFormer, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
    return model(images)


def _image_shape(
    model: MetaFormer, image_size: int | tuple[int, int] | None
) -> tuple[int, int, int]:
    height, width = model.image_size if image_size is None else as_pair(image_size)
    # Refuses what the model does, in words.
    jax.eval_shape(lambda images: model(images), jnp.zeros((1, height, width, model.in_channels)))
    return height, width, model.in_channels


class _Conv(nnx.Conv):
    __call__ = nnx.Conv.__call__


class _Linear(nnx.Linear):
    __call__ = nnx.Linear.__call__


class _BlockLinear(Linear):
    __call__ = nnx.Linear.__call__


class _LayerNorm(LayerNorm):
    __call__ = nnx.LayerNorm.__call__


class _StarReLU(StarReLU):
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return self.scale[...] * squared_relu(x) + self.bias[...]


class _Attention(Attention):
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        value = split_heads(self.qkv(x), self.num_heads)[2]
        mixed = jnp.einsum("bkts,bskd->btkd", Attention.weights(self, x), value)
        return self.proj(mixed.reshape(*x.shape[:-1], self.num_heads * self.head_dim))


class _DepthwiseConv(DepthwiseConv):
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.lax.conv_general_dilated(
            x,
            self.kernel[...][:, :, None, :],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )


class _Pooling(Pooling):
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        average = nnx.avg_pool(
            x,
            window_shape=(self.pool_size, self.pool_size),
            strides=(1, 1),
            padding="SAME",
            count_include_pad=False,
        )
        return average - x


def _in_plain_operations(model: MetaFormer) -> MetaFormer:
    # jax2onnx replaces Flax's layers by its own, which do not take all arguments of ours, and it
    # knows no branches by platform.
    plain: dict[type, type] = {
        nnx.Conv: _Conv,
        nnx.Linear: _Linear,
        Linear: _BlockLinear,
        LayerNorm: _LayerNorm,
        StarReLU: _StarReLU,
        Attention: _Attention,
        Pooling: _Pooling,
        DepthwiseConv: _DepthwiseConv,
    }
    for _, module in nnx.iter_modules(model):
        kind = next((kind for kind in type(module).__mro__ if kind in plain), None)
        # A subclass with a call of its own may compute something else.
        if kind is not None and type(module).__call__ is kind.__call__:
            call = {"__call__": plain[kind].__call__}
            name = type(module).__name__
            object.__setattr__(module, "__class__", type(name, (type(module),), call))
        if is_floating(vars(module).get("dtype")):
            module.dtype = jnp.float32  # type: ignore[attr-defined]
    # Of a loop over blocks it would write a file that no runtime loads.
    model.scan, model.remat = 0, "none"
    # NumPy, with which jax2onnx computes constants, has no bfloat16.
    nnx.update(model, jax.tree.map(_widened, nnx.state(model)))
    return model


def _widened(leaf: Any) -> Any:
    return leaf.astype(jnp.float32) if is_floating(getattr(leaf, "dtype", None)) else leaf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Of what the libraries find odd in each other, nothing can be done here.
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
