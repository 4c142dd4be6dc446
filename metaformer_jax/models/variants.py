"""The published models, as tables: families x sizes = 23 architectures, x tags = 55 names."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from metaformer_jax.models.layers import (
    HeadFn,
    LinearHead,
    MlpHead,
    NormFn,
    image_layer_norm,
    layer_norm,
)
from metaformer_jax.models.metaformer import MetaFormer, MetaFormerSpec
from metaformer_jax.models.mixers import (
    Attention,
    IdentityMixing,
    Pooling,
    RandomMixing,
    SepConv,
    TokenMixerFn,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Blocks and channels of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of a family share (mixer per stage, norm, head), and their sizes."""

    token_mixers: tuple[TokenMixerFn, ...]
    norm: NormFn
    head: HeadFn
    sizes: Mapping[str, Size]

    def spec(self, *, depths: tuple[int, ...], dims: tuple[int, ...]) -> MetaFormerSpec:
        """The specification of a model of this family, of a published size or any other."""
        return MetaFormerSpec(
            depths=depths,
            dims=dims,
            token_mixers=self.token_mixers,
            norm=self.norm,
            head=self.head,
        )


_BASIC_SIZES = {
    "s12": Size((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": Size((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": Size((6, 6, 18, 6), (64, 128, 320, 512)),
    "m36": Size((6, 6, 18, 6), (96, 192, 384, 768)),
    "m48": Size((8, 8, 24, 8), (96, 192, 384, 768)),
}
_COMMON_SIZES = {
    "s18": Size((3, 3, 9, 3), (64, 128, 320, 512)),
    "s36": Size((3, 12, 18, 3), (64, 128, 320, 512)),
    "m36": Size((3, 12, 18, 3), (96, 192, 384, 576)),
    "b36": Size((3, 12, 18, 3), (128, 256, 512, 768)),
}


def _basic(*token_mixers: TokenMixerFn) -> Family:
    return Family(
        token_mixers=token_mixers, norm=image_layer_norm, head=LinearHead, sizes=_BASIC_SIZES
    )


def _common(*token_mixers: TokenMixerFn) -> Family:
    return Family(token_mixers=token_mixers, norm=layer_norm, head=MlpHead, sizes=_COMMON_SIZES)


FAMILIES: dict[str, Family] = {
    "identityformer": _basic(*[IdentityMixing] * 4),
    "randformer": _basic(IdentityMixing, IdentityMixing, RandomMixing, RandomMixing),
    "poolformerv2": _basic(*[Pooling] * 4),
    "convformer": _common(*[SepConv] * 4),
    "caformer": _common(SepConv, SepConv, Attention, Attention),
}


@dataclasses.dataclass(frozen=True)
class Tag:
    """What distinguishes the checkpoints of one architecture."""

    image_size: int
    num_classes: int


TAGS: dict[str, Tag] = {
    "": Tag(224, 1000),
    "384": Tag(384, 1000),
    "in21ft1k": Tag(224, 1000),
    "384_in21ft1k": Tag(384, 1000),
    "in21k": Tag(224, 21841),
}

# Published figures, from the tables in the README of the original code (sail-sg/metaformer) as it
# stands after its corrections: ImageNet-1K top-1 in percent, in the order of TAGS.
_TOP1: dict[str, tuple[float, ...]] = {
    "identityformer_s12": (74.6,),
    "identityformer_s24": (78.2,),
    "identityformer_s36": (79.3,),
    "identityformer_m36": (80.0,),
    "identityformer_m48": (80.4,),
    "randformer_s12": (76.6,),
    "randformer_s24": (78.2,),
    "randformer_s36": (79.5,),
    "randformer_m36": (81.2,),
    "randformer_m48": (81.4,),
    "poolformerv2_s12": (78.0,),
    "poolformerv2_s24": (80.7,),
    "poolformerv2_s36": (81.6,),
    "poolformerv2_m36": (82.2,),
    "poolformerv2_m48": (82.6,),
    "convformer_s18": (83.0, 84.4, 83.7, 85.0),
    "convformer_s36": (84.1, 85.4, 85.4, 86.4),
    "convformer_m36": (84.5, 85.6, 86.1, 86.9),
    "convformer_b36": (84.8, 85.7, 87.0, 87.6),
    "caformer_s18": (83.6, 85.0, 84.1, 85.4),
    "caformer_s36": (84.5, 85.7, 85.8, 86.9),
    "caformer_m36": (85.2, 86.2, 86.6, 87.5),
    "caformer_b36": (85.5, 86.4, 87.4, 88.1),
}
# Millions of trained (and frozen) parameters, billions of multiply-adds at 224 (and 384) pixels;
# the tables give neither for the checkpoints with 21841 classes.
_PARAMS_AND_MACS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identityformer_s12": ((11.9,), (1.8,)),
    "identityformer_s24": ((21.3,), (3.4,)),
    "identityformer_s36": ((30.8,), (5.0,)),
    "identityformer_m36": ((56.1,), (8.8,)),
    "identityformer_m48": ((73.3,), (11.5,)),
    "randformer_s12": ((11.9, 0.2), (1.9,)),
    "randformer_s24": ((21.3, 0.5), (3.5,)),
    "randformer_s36": ((30.8, 0.7), (5.2,)),
    "randformer_m36": ((56.1, 0.7), (9.0,)),
    "randformer_m48": ((73.3, 0.9), (11.9,)),
    "poolformerv2_s12": ((11.9,), (1.8,)),
    "poolformerv2_s24": ((21.3,), (3.4,)),
    "poolformerv2_s36": ((30.8,), (5.0,)),
    "poolformerv2_m36": ((56.1,), (8.8,)),
    "poolformerv2_m48": ((73.3,), (11.5,)),
    "convformer_s18": ((27,), (3.9, 11.6)),
    "convformer_s36": ((40,), (7.6, 22.4)),
    "convformer_m36": ((57,), (12.8, 37.7)),
    "convformer_b36": ((100,), (22.6, 66.5)),
    "caformer_s18": ((26,), (4.1, 13.4)),
    "caformer_s36": ((39,), (8.0, 26.0)),
    "caformer_m36": ((56,), (13.2, 42.0)),
    "caformer_b36": ((99,), (23.2, 72.2)),
}

# Another spelling, which the publication's own table has.
_ALIASES = {"convformer_b36_384_in21kft1k": "convformer_b36_384_in21ft1k"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What was published about one model name.

    Attributes:
        name: the published name, of family, size and tag.
        family: one of `FAMILIES`.
        size: one of the family's sizes, such as "s18".
        tag: one of `TAGS`, such as "384_in21ft1k"; empty for ImageNet-1K at 224 pixels.
        image_size: height and width in pixels.
        num_classes: classes of the head.
        crop_pct: fraction of the resized image's short side that the evaluation crop takes.
        interpolation: filter with which evaluation resizes.
        mean: per channel, subtracted from images scaled to [0, 1].
        std: per channel, by which the result is divided.
        published_top1: ImageNet-1K accuracy in percent; None for ImageNet-21K checkpoints.
        published_params_millions: trained parameters.
        published_frozen_params_millions: frozen parameters, where the table gives them.
        published_gmacs: billions of multiply-adds per image.
        url: of the original PyTorch checkpoint.
    """

    name: str
    family: str
    size: str
    tag: str
    image_size: int
    num_classes: int
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    published_top1: float | None = None
    published_params_millions: float | None = None
    published_frozen_params_millions: float | None = None
    published_gmacs: float | None = None
    url: str

    @property
    def architecture(self) -> str:
        """Family and size; models of one differ in weights, pixels and classes only."""
        return f"{self.family}_{self.size}"


def _published_models() -> dict[str, ModelInfo]:
    models = {}
    for family, members in FAMILIES.items():
        for size in members.sizes:
            architecture = f"{family}_{size}"
            top1 = _TOP1[architecture]
            params, gmacs = _PARAMS_AND_MACS[architecture]
            # ImageNet-21K checkpoints exist where fine-tuned ones do, without an accuracy.
            tags = list(TAGS) if len(top1) > 1 else [""]
            for index, tag in enumerate(tags):
                name = f"{architecture}_{tag}" if tag else architecture
                setting = TAGS[tag]
                published: dict[str, Any] = {}
                if index < len(top1):
                    published = {
                        "published_top1": top1[index],
                        "published_params_millions": params[0],
                        "published_frozen_params_millions": params[1] if params[1:] else None,
                        "published_gmacs": gmacs[(224, 384).index(setting.image_size)],
                    }
                models[name] = ModelInfo(
                    name=name,
                    family=family,
                    size=size,
                    tag=tag,
                    image_size=setting.image_size,
                    num_classes=setting.num_classes,
                    url=f"https://huggingface.co/sail/dl/resolve/main/{family}/{name}.pth",
                    **published,
                )
    return models


_MODELS = _published_models()


def list_models(pattern: str | None = None) -> list[str]:
    """The published names, family by family; with a pattern, those that match it (as in a shell).

    Examples:
        >>> list_models("caformer_b36*384*")
        ['caformer_b36_384', 'caformer_b36_384_in21ft1k']
    """
    return [name for name in _MODELS if pattern is None or fnmatch.fnmatchcase(name, pattern)]


def is_published(name: str) -> bool:
    """Whether `model_info` knows the name, which may be another spelling of a published one."""
    return _ALIASES.get(name, name) in _MODELS


def model_info(name: str) -> ModelInfo:
    """What was published about a model.

    Examples:
        >>> model_info("caformer_s18_384").image_size
        384

    Raises:
        ValueError: no published model has this name; the message suggests similar ones.
    """
    name = _ALIASES.get(name, name)
    if name not in _MODELS:
        close = difflib.get_close_matches(str(name), _MODELS, n=5, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Families: {list(FAMILIES)}."
        raise ValueError(
            f"`name` must be a published model, got {name!r}. {hint} list_models() lists all."
        )
    return _MODELS[name]


def model_spec(name: str) -> MetaFormerSpec:
    """The specification of a published model, to inspect or to modify.

    Example:
        ConvFormer-S18 with 5x5 kernels::

            spec = dataclasses.replace(
                model_spec("convformer_s18"),
                token_mixers=(functools.partial(SepConv, kernel_size=5),) * 4,
            )

    Raises:
        ValueError: no published model has this name.
    """
    info = model_info(name)
    family = FAMILIES[info.family]
    return family.spec(**dataclasses.asdict(family.sizes[info.size]))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.0,
    dtype: Any = jnp.float32,
    remat: str | bool = "none",
    scan: int = 0,
    rngs: nnx.Rngs,
) -> MetaFormer:
    """Builds a published model with random weights.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the head, by default as published; 0 for no head.
        in_channels: channels of the images.
        image_size: pixels per side, or (height, width), by default as published. Only RandFormer
            depends on it: its mixing matrices fit one image size.
        drop_path_rate: stochastic depth of the last block.
        head_dropout: dropout rate in the head.
        dtype: compute dtype; parameters are always float32.
        remat: trades time for memory in the backward pass, see `MetaFormer`.
        scan: trades time for a shorter compilation, see `MetaFormer`.
        rngs: random keys for the initial values and the masks, see `MetaFormer`.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    info = model_info(name)
    return MetaFormer(
        model_spec(name),
        num_classes=info.num_classes if num_classes is None else num_classes,
        in_channels=in_channels,
        image_size=info.image_size if image_size is None else image_size,
        drop_path_rate=drop_path_rate,
        head_dropout=head_dropout,
        dtype=dtype,
        remat=remat,
        scan=scan,
        rngs=rngs,
    )
