"""Changes to a trained model before fine-tuning: head, classes, channels, image size."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metaformer_jax.models import MetaFormer, RandomMixing
from metaformer_jax.models.arguments import as_pair, at_least, check_rate, check_rngs
from metaformer_jax.paths import local_path
from metaformer_jax.weights.convert import check_has_values

NUM_IMAGENET_1K = 1000
NUM_IMAGENET_21K = 21841
# "teddy bear" is no class of the 21841; the published fine-tuning starts it at the mean class.
_WITHOUT_COUNTERPART = 850


def replace_head(
    model: MetaFormer, num_classes: int, *, head_dropout: float | None = None, rngs: nnx.Rngs
) -> None:
    """Gives the model a head with random weights for another number of classes, in place.

    The whole head is initialised anew, including the hidden layer of an MLP head. If the
    model has dropout, and all of it is in evaluation mode, so is that of the new head.

    Args:
        model: everything before the head is unchanged.
        num_classes: classes of the new head; 0 for no head.
        head_dropout: dropout rate in the head, by default that of the old head.
        rngs: random keys for the initial values and the dropout.

    Raises:
        ValueError: `num_classes` is negative, `head_dropout` not in [0, 1), or `rngs` of another
            type or without a stream that is drawn.
    """
    num_classes = at_least(0, num_classes=num_classes)
    if head_dropout is None:
        dropout = getattr(model.head, "dropout", None)
        head_dropout = 0.0 if dropout is None else dropout.rate
    head_dropout = check_rate("head_dropout", head_dropout)
    check_rngs(rngs, has_dropout=head_dropout > 0)
    parts = [part for _, part in nnx.iter_modules(model) if isinstance(part, nnx.Dropout)]
    head = (
        model.spec.head(model.spec.dims[-1], num_classes, dropout=head_dropout, rngs=rngs)
        if num_classes
        else None
    )
    if head is not None and parts and all(part.deterministic for part in parts):
        head.eval()
    model.head = nnx.data(head)
    model.num_classes = num_classes


def map_head_to_imagenet_1k(model: MetaFormer, class_map: str | os.PathLike[str]) -> None:
    """Turns an ImageNet-21K head into one for ImageNet-1K, class by class, in place.

    Each class of the last layer takes the weights of the ImageNet-21K class with the same meaning;
    class 850, which has no counterpart, starts at the mean of all 21841. The rest of the head is
    unchanged.

    Args:
        model: a model with 21841 classes.
        class_map: a JSON file with two lists of the same length: `in1k_idx`, classes of
            ImageNet-1K, and `in21k_idx`, the class of the 21841 that corresponds to each.

    Raises:
        ValueError: the model does not have 21841 classes or is abstract; or the map does not have
            this form, names a class twice or out of range, or lacks a class other than 850.
    """
    if model.num_classes != NUM_IMAGENET_21K:
        raise ValueError(
            f"`model` must have the {NUM_IMAGENET_21K} classes of ImageNet-21K, got "
            f"{model.num_classes}. Load one of list_models('*_in21k')."
        )
    target, source = _read_class_map(class_map)
    head: Any = model.head
    check_has_values(head)
    layer = head.fc2 if hasattr(head, "fc2") else head.fc
    for variable in (layer.kernel, layer.bias):
        values = variable[...]
        mean = jnp.mean(values, axis=-1, keepdims=True)
        mapped = jnp.repeat(mean, NUM_IMAGENET_1K, axis=-1)
        variable.set_value(mapped.at[..., target].set(values[..., source]))
    layer.out_features = NUM_IMAGENET_1K
    model.num_classes = NUM_IMAGENET_1K


def change_in_channels(model: MetaFormer, in_channels: int) -> None:
    """Changes the number of input channels of the stem, in place.

    With more channels, the old ones come first and keep their filters, and the new ones start at
    zero: the model's output does not depend on them at first. With fewer channels, each gets the
    mean filter, scaled so that images whose channels are all equal give the same output as before.

    Raises:
        ValueError: `in_channels` is below 1, or the model is abstract.
    """
    in_channels = at_least(1, in_channels=in_channels)
    conv = model.downsample_layers[0].conv
    check_has_values(conv)
    kernel = conv.kernel[...]
    old = kernel.shape[2]
    if in_channels > old:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, in_channels - old), (0, 0)))
    elif in_channels < old:
        kernel = jnp.repeat(kernel.sum(axis=2, keepdims=True) / in_channels, in_channels, axis=2)
    conv.kernel.set_value(kernel)
    conv.in_features = in_channels
    conv.kernel_shape = kernel.shape
    model.in_channels = in_channels


def set_image_size(
    model: MetaFormer, image_size: int | tuple[int, int], *, resample: bool = False
) -> None:
    """Changes the image size that the model is built for, in place.

    Models without mixers that are bound to a size accept any as they are. RandFormer's matrices fit
    one number of tokens: another size is refused unless `resample` is given. They are then
    resampled bilinearly over the positions of output and input tokens, and scaled so that each row
    sums to 1 again.

    Args:
        model: the model.
        image_size: pixels per side, or (height, width).
        resample: whether random matrices may be resampled.

    Raises:
        ValueError: the model has random matrices of another size and `resample` is not given, or
            mixers of another kind that are bound to another size; the size is too small for the
            model; or matrices to be resampled are abstract.
    """
    size = as_pair(image_size)
    resolutions = model.spec.stage_resolutions(size)
    changed: list[tuple[RandomMixing, tuple[int, int]]] = []
    for resolution, blocks in zip(resolutions, model.stages, strict=True):
        for mixer in (block.token_mixer for block in blocks):
            if tuple(getattr(mixer, "resolution", resolution)) == resolution:
                continue
            if not isinstance(mixer, RandomMixing):
                raise ValueError(
                    f"`image_size` must be {model.image_size}, the size that the model's "
                    f"{type(mixer).__name__} was built for, got {size}. Build the model anew."
                )
            changed.append((mixer, resolution))
    if changed and not resample:
        raise ValueError(
            f"`image_size` must be {model.image_size}, for which the model's random matrices were "
            f"drawn, got {size}. Resize the images, or give resample=True to resample the matrices."
        )
    for mixer, _ in changed:
        check_has_values(mixer)
    for mixer, resolution in changed:
        matrix = _resample(mixer.random_matrix[...], mixer.resolution, resolution)
        mixer.random_matrix.set_value(matrix)
        mixer.resolution = resolution
    model.image_size = size


def _resample(matrix: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    resized = jax.image.resize(matrix.reshape(*old, *old), (*new, *new), method="linear")
    matrix = resized.reshape(new[0] * new[1], new[0] * new[1])
    return matrix / matrix.sum(axis=-1, keepdims=True)


def _read_class_map(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = json.loads(local_path(path).read_text())
        target, source = (np.asarray(content[key]) for key in ("in1k_idx", "in21k_idx"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "`class_map` must be a JSON file with the lists `in1k_idx` and `in21k_idx`, got "
            f"{path}: {error!r}."
        ) from error
    if target.ndim != 1 or target.shape != source.shape or not target.size:
        raise ValueError(
            "`class_map` must hold two lists of numbers of the same length, got shapes "
            f"{target.shape} for in1k_idx and {source.shape} for in21k_idx."
        )
    for key, indices, limit in (
        ("in1k_idx", target, NUM_IMAGENET_1K),
        ("in21k_idx", source, NUM_IMAGENET_21K),
    ):
        wrong = [n for n in indices.tolist() if type(n) is not int or not 0 <= n < limit]
        if wrong:
            raise ValueError(
                f"`class_map` must hold whole numbers from 0 to {limit - 1} in {key}, got "
                f"{wrong[0]!r}."
            )
    names, counts = np.unique(target, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            "`class_map` must name each class once in in1k_idx, got some more often: "
            f"{names[counts > 1].tolist()}."
        )
    absent = set(range(NUM_IMAGENET_1K)) - set(names.tolist()) - {_WITHOUT_COUNTERPART}
    if absent:
        raise ValueError(
            f"`class_map` must name every class but {_WITHOUT_COUNTERPART} in in1k_idx, got none "
            f"for {sorted(absent)[:10]} ({len(absent)} in all)."
        )
    return target, source
