"""What lies beside weights: a run's config, a conversion's record, a publication's figures."""

import dataclasses
import pathlib
from typing import Any

from metaformer_jax.data.sources import open_source
from metaformer_jax.models import (
    MetaFormerSpec,
    imagenet_class_names,
    imagenet_synsets,
    model_info,
)
from metaformer_jax.weights import CheckpointError, read_record, workdir
from metaformer_jax.weights.files import SAFETENSORS, suffix_of

# What a run's config tells of the images, and the JSON types of it.
_SETTINGS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "image_size": ("data.image_size", int),
    "crop_fraction": ("eval_crop_fraction", (int, float)),
    "interpolation": ("eval_interpolation", str),
    "mean": ("data.mean", list),
    "std": ("data.std", list),
}


@dataclasses.dataclass(frozen=True)
class Told:
    """What weights tell of themselves.

    Attributes:
        name: the published name; None if they do not say it, or have none.
        spec: the network of a run without a published name.
        title: what to call that.
        settings: `image_size`, and of a run `crop_fraction`, `interpolation`, `mean`, `std`.
        data: name and root of the data that a run trained with.
        kept_names: its classes, where the run kept their names.
    """

    name: str | None = None
    spec: MetaFormerSpec | None = None
    title: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: tuple[str, str] | None = None
    kept_names: tuple[str, ...] | None = None

    def class_names(self) -> tuple[tuple[str, ...] | None, str | None]:
        """The classes of the run's data in words, or None and why, if there is a reason."""
        if self.data is None:
            return None, None
        name, root = self.data
        names = self.kept_names
        if names is None:
            try:
                names = open_source(name, "eval", root=root or None).class_names
            except (ValueError, OSError, ImportError) as error:
                return None, str(error)
        in_words = dict(zip(imagenet_synsets(), imagenet_class_names(), strict=True))
        return tuple(in_words.get(name, name) for name in names), None


def read_settings(path: pathlib.Path) -> Told:
    """What is told by the folder or file of weights; of a bare checkpoint nothing.

    Raises:
        CheckpointError: a run's config or names of classes, or a conversion's record, is damaged;
            or the run's family is not in `FAMILIES`.
    """
    if (folder := workdir.workdir_of(path)) is not None:
        return _read_run(folder)
    if path.is_dir():
        record = read_record(path)
    elif path.is_file() and suffix_of(path) == SAFETENSORS:
        try:
            record = read_record(path)
        except CheckpointError:
            # PyTorch's: no record is in it. What is damaged shows when it is read.
            return Told()
    else:
        return Told()
    height, width = record.image_size
    size = height if height == width else (height, width)
    return Told(name=record.model, settings={"image_size": size})


def published_settings(name: str, channels: int) -> dict[str, Any]:
    """As a published model was evaluated; one channel gets the average of the three colours."""
    info = model_info(name)
    mean, std = info.mean, info.std
    if channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)  # type: ignore[assignment]
    return {
        "image_size": info.image_size,
        "crop_fraction": info.crop_pct,
        "interpolation": info.interpolation,
        "mean": mean,
        "std": std,
    }


def _read_run(folder: pathlib.Path) -> Told:
    path = folder / workdir.CONFIG
    config = workdir.read_config(folder)
    try:
        for field, types in _SETTINGS.values():
            if not isinstance(config[field], types):
                raise TypeError(f"{config[field]!r} as {field}")
        settings = {name: config[field] for name, (field, _) in _SETTINGS.items()}
        title, data = config["model.family"], (config["data.name"], config["data.root"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must be the config that the run wrote, got {type(error).__name__}: {error}. "
            "Write it anew by training on with --accept_config_changes."
        ) from error
    name = workdir.read_model_name(folder)
    spec = None if name else workdir.read_spec(folder)
    if name is None and spec is None:
        raise CheckpointError(
            f"The family that {path} names must be known here, got {title!r}. Add it to "
            "`metaformer_jax.models.FAMILIES` and load the run in code, see docs/extending.md."
        )
    return Told(
        name=name,
        spec=spec,
        title="" if name else title,
        settings=settings,
        data=data,
        kept_names=workdir.read_class_names(folder),
    )
