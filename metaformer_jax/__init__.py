"""MetaFormer baselines for vision in JAX and Flax NNX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaformer_jax.models import (
        MetaFormer,
        MetaFormerSpec,
        ModelInfo,
        compiler_options,
        imagenet_class_names,
        jit_inference,
        list_models,
        model_info,
        model_spec,
    )
    from metaformer_jax.weights import create_model, load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "MetaFormer",
    "MetaFormerSpec",
    "ModelInfo",
    "compiler_options",
    "create_model",
    "imagenet_class_names",
    "jit_inference",
    "list_models",
    "load_weights",
    "model_info",
    "model_spec",
    "save_weights",
]

_OF_WEIGHTS = ("create_model", "load_weights", "save_weights")
_ROOMS = ("models", "weights", "explain", "inference")


def __getattr__(name: str) -> Any:
    # Imported when first asked for: a program's --help should not wait seconds for JAX.
    if name in _ROOMS:
        return importlib.import_module(f"metaformer_jax.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "weights" if name in _OF_WEIGHTS else "models"
    value = getattr(importlib.import_module(f"metaformer_jax.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
