"""MetaFormer baselines for vision in JAX and Flax NNX."""

from metaformer_jax.models import (
    MetaFormer,
    MetaFormerSpec,
    ModelInfo,
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
    "create_model",
    "list_models",
    "load_weights",
    "model_info",
    "model_spec",
    "save_weights",
]
