"""MetaFormer baselines for vision in JAX and Flax NNX."""

from metaformer_jax.models import (
    MetaFormer,
    MetaFormerSpec,
    ModelInfo,
    create_model,
    list_models,
    model_info,
    model_spec,
)

__version__ = "0.1.0"

__all__ = [
    "MetaFormer",
    "MetaFormerSpec",
    "ModelInfo",
    "create_model",
    "list_models",
    "model_info",
    "model_spec",
]
