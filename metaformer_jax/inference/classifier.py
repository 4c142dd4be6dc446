"""A model with everything needed to get from an image file to named probabilities."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from metaformer_jax import models
from metaformer_jax.data.augment import EvalTransform
from metaformer_jax.data.device import normalize
from metaformer_jax.inference import trained
from metaformer_jax.models import MetaFormer, MetaFormerSpec, model_info
from metaformer_jax.models.arguments import at_least
from metaformer_jax.models.cores import InParts
from metaformer_jax.models.jit import keeps_images_apart
from metaformer_jax.paths import local_path
from metaformer_jax.weights import CheckpointError, hub
from metaformer_jax.weights.convert import to_variables
from metaformer_jax.weights.pretrained import fill
from metaformer_jax.weights.read import read_checkpoint
from metaformer_jax.weights.recognition import CheckpointInfo, recognise
from metaformer_jax.weights.surgery import NUM_IMAGENET_1K


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with its image transform, normalisation and class names.

    Attributes:
        model: in evaluation mode.
        name: the published name, or a description of the model that the run trained.
        transform: from the content of an image file to uint8 pixels `[h, w, c]`.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        class_names: by class.
        notes: what a user should know about where these come from.
    """

    model: MetaFormer
    name: str
    transform: EvalTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def normalize(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The pixels, normalised for the model.

        Raises:
            ValueError: they are not uint8, so their range is unknown.
        """
        if images.dtype != jnp.uint8:
            raise ValueError(
                f"`images` must be pixels from 0 to 255 in uint8, got {images.dtype}. Convert "
                "them, or give normalised images to the model itself."
            )
        return normalize(images, mean=self.mean, std=self.std)

    def logits(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits for pixels; not jitted."""
        return self.model(self.normalize(images))

    def probabilities(self, images: UInt8[np.ndarray, "b h w c"]) -> Float[Array, "b classes"]:
        """The softmax of the logits for pixels. Compiled once for each batch size."""
        return self._compiled(jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Any:
        graphdef, state = nnx.split(self.model)

        @functools.partial(jax.jit, compiler_options=models.compiler_options())
        def probabilities(state: nnx.State, images: Array) -> Array:
            logits = dataclasses.replace(self, model=nnx.merge(graphdef, state)).logits(images)
            return jax.nn.softmax(logits, axis=-1)

        if jax.default_backend() == "cpu" and keeps_images_apart(self.model):
            return InParts(probabilities, state)
        return functools.partial(probabilities, state)


def load_classifier(
    name: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Loads a model with its image transform, normalisation and class names.

    For a training run's workdir all of these come from its config. For other weights the published
    name determines size, crop, filter, mean and standard deviation; a thousand classes are taken to
    be ImageNet-1K's, and any other number of classes is numbered.

    Args:
        name: a published name. Without it the weights must identify the model, by their record,
            their run's config, their file name or their shapes.
        weights: any path that `create_model(pretrained=...)` accepts; by default the published
            weights, downloaded once.
        image_size: pixels per side; by default that of the training or the publication.
        class_names: one for each class, instead of those that are found.
        dtype: compute dtype.

    Raises:
        ValueError: the name is unknown, or missing and needed; or the weights do not fit or have no
            head.
        FileNotFoundError: nothing is at the path.
        weights.DownloadError: the published weights could not be fetched.
        OSError: the cache of published weights cannot be written to.
        ImportError: PyTorch is not installed, which `.pth` files take: also the published ones of
            RandFormer and IdentityFormer.
    """
    if name is not None:
        name = model_info(name).name
    if weights is None:
        if name is None:
            raise ValueError(
                "`name` (--model) must be given where no weights (--weights) are. "
                "metaformer_jax.list_models() and `metaformer-jax zoo` list the published ones."
            )
        weights = hub.converted_file(name)
    path = local_path(weights)
    told = trained.read_settings(path)
    checkpoint = read_checkpoint(path, name=name or told.name)
    found = recognise(checkpoint.tensors)
    if not found.num_classes:
        raise CheckpointError(
            f"The weights must have a head to predict classes with, got {path} without one."
        )
    spec = told.spec
    if name or spec is None:
        name = name or told.name or _only_name(found.architectures, path)
        spec = models.model_spec(name)
    settings = _image_settings(name, told, found, path, image_size=image_size)
    model = _filled(spec, checkpoint.tensors, found.num_classes, settings, dtype)
    class_names, notes = _class_names(class_names, told, found.num_classes)
    return Classifier(
        model=model,
        name=name or told.title,
        transform=EvalTransform(
            image_size=settings.image_size,
            channels=settings.channels,
            crop_fraction=settings.crop_fraction,
            interpolation=settings.interpolation,
        ),
        mean=settings.mean,
        std=settings.std,
        class_names=class_names,
        notes=notes,
    )


def _only_name(architectures: tuple[str, ...], path: pathlib.Path) -> str:
    # A file that kept its published name tells the resolution, too.
    if models.is_published(path.stem) and model_info(path.stem).architecture in architectures:
        return path.stem
    if len(architectures) != 1:
        looks = f", which looks like {' or '.join(architectures)}" if architectures else ""
        raise ValueError(
            f"`name` (--model) must be given for {path}{looks}: keys and shapes do not tell."
        )
    return architectures[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageSettings:
    image_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)


def _image_settings(
    name: str | None,
    told: trained.Told,
    found: CheckpointInfo,
    path: pathlib.Path,
    *,
    image_size: int | None,
) -> _ImageSettings:
    """What is asked for, or else what the weights tell, or else what was published."""
    settings = {} if name is None else trained.published_settings(name, found.in_channels or 3)
    # A conversion's record is of the name it was converted by, a run's config of the run.
    if told.data is not None or told.name in (name, None):
        settings |= told.settings
    if image_size is not None:
        settings["image_size"] = at_least(1, image_size=image_size)
    elif not isinstance(settings["image_size"], int):
        height, width = settings["image_size"]
        raise CheckpointError(
            f"The weights must be for square pictures, got {height}x{width} in {path}. Give "
            "another size (--image-size), or resize and call the model itself."
        )
    settings |= {key: tuple(settings[key]) for key in ("mean", "std")}
    channels = found.in_channels or len(settings["mean"])
    if channels not in (1, 3) or channels != len(settings["mean"]):
        raise CheckpointError(
            f"The weights must be for pictures of 1 or 3 channels, got {channels} in {path}."
        )
    return _ImageSettings(**settings)


def _filled(
    spec: MetaFormerSpec,
    tensors: dict[str, np.ndarray],
    num_classes: int,
    settings: _ImageSettings,
    dtype: Any,
) -> MetaFormer:
    model = nnx.eval_shape(
        lambda: MetaFormer(
            spec,
            num_classes=num_classes,
            in_channels=settings.channels,
            image_size=settings.image_size,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    fill(model, to_variables(tensors, model))
    model.eval()
    return model


def _class_names(
    given: Sequence[str] | None, told: trained.Told, num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if given is not None:
        if len(given) != num_classes:
            raise ValueError(
                f"`class_names` must be one for each of the {num_classes} classes, got "
                f"{len(given)}."
            )
        return tuple(given), notes
    names, reason = told.class_names()
    if names is not None:
        # Those of folders need not be text.
        names = tuple(name.encode("utf-8", "backslashreplace").decode() for name in names)
    if names is None and reason is None and num_classes == NUM_IMAGENET_1K:
        names = models.imagenet_class_names()
    if names is not None and len(names) == num_classes:
        return names, notes
    if names is not None:
        reason = f"the data has {len(names)} classes, the weights {num_classes}"
    if reason is not None:
        notes = (f"classes are numbered, for their names are not known: {reason}",)
    return tuple(f"class {index}" for index in range(num_classes)), notes
