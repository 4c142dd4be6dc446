"""Recognises what a checkpoint is, from its keys and shapes alone."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from metaformer_jax.models import (
    FAMILIES,
    Attention,
    MetaFormerSpec,
    RandomMixing,
    SepConv,
    list_models,
    model_info,
    model_spec,
)
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.layouts import LAYOUTS, Path, key_table

ARCHITECTURES = tuple(dict.fromkeys(model_info(name).architecture for name in list_models()))
# The families that timm builds. IdentityFormer's checkpoints have PoolFormerV2's keys and shapes.
TIMM_FAMILIES = ("poolformerv2", "convformer", "caformer")

# The published blocks have these keys, and no other layout has them. A block of one's own may have
# another norm, or none.
_MARKS = {
    "sail": r"stages\.(\d+)\.(\d+)\.norm1\.weight",
    "timm": r"stages\.(\d+)\.blocks\.(\d+)\.norm1\.weight",
    "flax": r"stages\.(\d+)\.(\d+)\.norm1\.scale",
}
# The parameter by which a mixer shows itself; IdentityMixing and Pooling have none.
_MIXER_MARKS: dict[Any, str] = {SepConv: "pwconv1", Attention: "qkv", RandomMixing: "random_matrix"}
_HEAD: tuple[Path, ...] = (("head", "fc2", "kernel"), ("head", "fc", "kernel"))
_STEM: tuple[Path, ...] = (("downsample_layers", 0, "conv", "kernel"),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint from its keys and shapes.

    Attributes:
        layout: `"sail"`, `"timm"` or `"flax"`.
        architectures: the published architectures with these blocks. Empty for other networks; two
            for IdentityFormer and PoolFormerV2, which cannot be distinguished.
        num_classes: classes of the head; 0 without a head.
        in_channels: channels of the images; None if the stem is missing.
    """

    layout: str
    architectures: tuple[str, ...]
    num_classes: int
    in_channels: int | None


def recognise(tensors: Mapping[str, np.ndarray]) -> CheckpointInfo:
    """Recognises what a checkpoint is.

    Raises:
        CheckpointError: the keys are not those of a MetaFormer.
    """
    matches = {
        layout: sum(bool(re.fullmatch(_MARKS[layout], k)) for k in tensors) for layout in LAYOUTS
    }
    layout = max(matches, key=lambda layout: matches[layout])
    if ".".join(map(str, _STEM[0])) in tensors:
        # No other layout calls it a kernel.
        layout = "flax"
    elif not matches[layout]:
        some = ", ".join(list(tensors)[:5]) or "no tensor at all"
        raise CheckpointError(
            "The checkpoint must hold the tensors of a MetaFormer in the sail, timm or flax "
            f"layout, got {len(tensors)} tensors: {some}. Is it the right file?"
        )
    head = _size_of(_HEAD, tensors, layout, axis=-1)
    return CheckpointInfo(
        layout=layout,
        architectures=_matching_architectures(tensors, layout),
        num_classes=head or 0,
        in_channels=_size_of(_STEM, tensors, layout, axis=-2),
    )


def published_architecture(spec: MetaFormerSpec) -> str | None:
    """The published architecture with this specification; None if there is none."""
    return next((name for name in ARCHITECTURES if model_spec(name) == spec), None)


def _matching_architectures(tensors: Mapping[str, np.ndarray], layout: str) -> tuple[str, ...]:
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    mixers: dict[int, set[str]] = {}
    for key, tensor in tensors.items():
        if block := re.fullmatch(_MARKS[layout], key):
            stage = int(block[1])
            depths[stage] = max(depths.get(stage, 0), int(block[2]) + 1)
            dims[stage] = tensor.shape[0] if tensor.ndim else 0
        elif part := re.match(r"stages\.(\d+)\..*\.token_mixer\.(\w+)", key):
            mixers.setdefault(int(part[1]), set()).add(part[2])
    found = []
    for name in ARCHITECTURES:
        spec, family = model_spec(name), model_info(name).family
        if layout == "timm" and family not in TIMM_FAMILIES:
            continue
        if depths != dict(enumerate(spec.depths)) or dims != dict(enumerate(spec.dims)):
            continue
        marks = [
            {mark for mark in _MIXER_MARKS.values() if mark in mixers.get(stage, set())}
            for stage in range(len(spec.depths))
        ]
        expected = [
            {_MIXER_MARKS[mixer]} if mixer in _MIXER_MARKS else set()
            for mixer in FAMILIES[family].token_mixers
        ]
        if marks == expected:
            found.append(name)
    return tuple(found)


def _size_of(
    paths: Iterable[Path], tensors: Mapping[str, np.ndarray], layout: str, *, axis: int
) -> int | None:
    for path, (key, transform) in key_table(paths, layout).items():
        rank = 4 if "conv" in path else 2
        if key in tensors and tensors[key].ndim == rank:
            return transform.shape_here(tensors[key].shape)[axis]
    return None
