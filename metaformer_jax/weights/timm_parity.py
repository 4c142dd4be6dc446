"""Does the PyTorch implementation in timm give the same answers with the same file?"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from metaformer_jax.models import MetaFormer, model_info
from metaformer_jax.weights.files import import_torch, read_tensors
from metaformer_jax.weights.recognition import TIMM_FAMILIES, recognise

TOLERANCE = 1e-4
# Added to the variance in the heads of ConvFormer and CAFormer.
_HEAD_EPSILON = 1e-5


def relative_error_to_timm(
    path: pathlib.Path, model: MetaFormer, *, name: str, entry: str | None = None
) -> float:
    """Runs both models on random images: `max|a - b| / max|b|` of the logits.

    timm reads the file by itself: this project's tables have no part in it.

    Args:
        path: the PyTorch checkpoint that `model` has its weights from.
        model: with weights.
        name: its published name.
        entry: the entry of a training checkpoint, if not the first.

    Raises:
        ImportError: timm or torch is not installed.
        ValueError: timm has no such model.
    """
    info = model_info(name)
    if info.family not in TIMM_FAMILIES:
        raise ValueError(
            f"`name` must be a model that timm has, to verify it, got {name!r}. timm has the "
            f"families {', '.join(TIMM_FAMILIES)}."
        )
    torch = import_torch()
    timm, filter_fn = _import_timm()
    reference = timm.create_model(
        info.architecture, num_classes=model.num_classes, in_chans=model.in_channels
    ).eval()
    # timm's own is 1e-6, the published one is PyTorch's default; see docs/weights.md.
    for module in reference.modules():
        if type(module).__name__ == "MlpHead":
            module.norm.eps = _HEAD_EPSILON
    tensors, _ = read_tensors(path, entry=entry)
    layout = recognise(tensors).layout
    if layout == "flax":
        raise ValueError(
            f"`path` must be in the sail or timm layout, which timm can read as well, got {path}."
        )
    state_dict = {
        key: torch.from_numpy(np.array(tensor, np.float32)) for key, tensor in tensors.items()
    }
    reference.load_state_dict(filter_fn(state_dict, reference) if layout == "sail" else state_dict)
    shape = (2, *model.image_size, model.in_channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        desired = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    model.eval()
    actual = np.asarray(model(jnp.asarray(images)))
    return float(np.max(np.abs(actual - desired)) / np.max(np.abs(desired)))


def _import_timm() -> tuple[Any, Any]:
    try:
        import timm
        from timm.models.metaformer import checkpoint_filter_fn
    # A torchvision that was not made for this torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"Verifying needs timm, which cannot be imported ({error}): pip install timm and a "
            "torchvision that belongs to the installed torch, or convert without --verify."
        ) from error
    return timm, checkpoint_filter_fn
