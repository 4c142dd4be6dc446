"""The models: specification, mixers, published variants. Knows jax and flax only."""

from metaformer_jax.models.block import MetaFormerBlock
from metaformer_jax.models.class_names import imagenet_class_names, imagenet_synsets
from metaformer_jax.models.counting import Counts, count
from metaformer_jax.models.jit import compiler_options, jit_inference
from metaformer_jax.models.layers import (
    Dropout,
    Frozen,
    HeadFn,
    ImageKeys,
    LinearHead,
    MlpHead,
    NormFn,
    StarReLU,
    image_layer_norm,
    layer_norm,
)
from metaformer_jax.models.lowering.platform import without_kernels
from metaformer_jax.models.metaformer import ConvGeometry, MetaFormer, MetaFormerSpec
from metaformer_jax.models.mixers import (
    Attention,
    IdentityMixing,
    Pooling,
    RandomMixing,
    SepConv,
    TokenMixerFn,
)
from metaformer_jax.models.variants import (
    FAMILIES,
    Family,
    ModelInfo,
    create_model,
    is_published,
    list_models,
    model_info,
    model_spec,
)

__all__ = [
    "FAMILIES",
    "Attention",
    "ConvGeometry",
    "Counts",
    "Dropout",
    "Family",
    "Frozen",
    "HeadFn",
    "IdentityMixing",
    "ImageKeys",
    "LinearHead",
    "MetaFormer",
    "MetaFormerBlock",
    "MetaFormerSpec",
    "MlpHead",
    "ModelInfo",
    "NormFn",
    "Pooling",
    "RandomMixing",
    "SepConv",
    "StarReLU",
    "TokenMixerFn",
    "compiler_options",
    "count",
    "create_model",
    "image_layer_norm",
    "imagenet_class_names",
    "imagenet_synsets",
    "is_published",
    "jit_inference",
    "layer_norm",
    "list_models",
    "model_info",
    "model_spec",
    "without_kernels",
]
