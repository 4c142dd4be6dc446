"""Pictures with what a model looks at, drawn over them."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from metaformer_jax import explain
from metaformer_jax.figures import save_png
from metaformer_jax.inference.batches import Classified
from metaformer_jax.inference.classifier import Classifier
from metaformer_jax.messages import cut
from metaformer_jax.models import compiler_options
from metaformer_jax.models.class_names import shortened

_MAX_COLUMNS = 6
_NAME_LENGTH = 26


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A picture as the model saw it, a title, and maps over it by what they show."""

    image: UInt8[np.ndarray, "h w c"]
    title: str
    maps: dict[str, Float[np.ndarray, "h2 w2"]]


class Explainer:
    """Computes the maps of a classifier's stage; compiled once for each batch size.

    Args:
        classifier: the model.
        stage: from 1 for the first; by default the last that sees more than one place.

    Raises:
        ValueError: there is no such stage.
    """

    def __init__(self, classifier: Classifier, stage: int | None = None):
        sizes = classifier.model.spec.stage_resolutions(classifier.transform.image_size)
        if stage is None:
            stage = max((n for n, size in enumerate(sizes, 1) if size != (1, 1)), default=1)
        if not 1 <= stage <= len(sizes):
            raise ValueError(f"`stage` must be in [1, {len(sizes)}], got {stage}.")
        self.classifier = classifier
        self.stage = stage
        index = stage - 1
        with_attention = explain.has_attention(classifier.model, index)
        graphdef, state = nnx.split(classifier.model)

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def maps(state: nnx.State, images: Any, classes: Any) -> dict[str, Any]:
            model = nnx.merge(graphdef, state)
            images = classifier.normalize(images)
            found = {"Grad-CAM": explain.grad_cam(model, images, classes, index)}
            if with_attention:
                found["attention"] = explain.received_attention(model, images, index)
            return found

        self._maps = maps
        self._state = state

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], classes: Int[np.ndarray, " b"]
    ) -> list[dict[str, Float[np.ndarray, "h2 w2"]]]:
        """The maps of each image for a class, by what they show: Grad-CAM first."""
        maps = jax.device_get(self._maps(self._state, images, classes))
        return [{name: values[row] for name, values in maps.items()} for row in range(len(images))]


def explain_pictures(
    explainer: Explainer, pictures: Sequence[Classified], path: pathlib.Path
) -> None:
    """Draws where the model looks for the likeliest class of each picture."""
    explanations = []
    # One by one: a picture of a few takes longer to compile in batches than to compute.
    for picture in pictures:
        best = np.argmax(picture.probabilities)
        maps = explainer(picture.pixels[None], np.array([best]))[0]
        name = explainer.classifier.class_names[best]
        title = title_of(str(picture.path), name, float(picture.probabilities[best]))
        explanations.append(Explanation(picture.pixels, title, maps))
    save_png(explanations_figure(explanations), path)


def explanations_figure(explanations: Sequence[Explanation]) -> Figure:
    """For each picture a title, the picture alone and under each of its maps; several in a grid."""
    panels = 1 + len(explanations[0].maps)
    columns = max(1, min(len(explanations), _MAX_COLUMNS // panels))
    rows = -(-len(explanations) // columns)
    figure = Figure(figsize=(2.1 * panels * columns, 2.5 * rows), layout="constrained")
    grid = figure.subfigures(rows, columns, squeeze=False)
    for place, explanation in zip(grid.flat, explanations, strict=False):
        place.suptitle(explanation.title, fontsize=9, parse_math=False)
        all_axes = place.subplots(1, panels, squeeze=False)[0]
        _show(all_axes[0], explanation.image)
        for axes, (name, values) in zip(all_axes[1:], explanation.maps.items(), strict=True):
            _show(axes, explanation.image)
            overlay(axes, values, explanation.image.shape[:2])
            axes.set_title(name, fontsize=8)
    return figure


def overlay(axes: Any, values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> None:
    """Lays a map over a picture of (height, width): each map from its least to its most."""
    height, width = size
    axes.imshow(
        values,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap="turbo",
        norm=Normalize(values.min(), max(values.max(), values.min() + 1e-12)),
        alpha=0.5,
        interpolation="bilinear",
    )


def _show(axes: Any, image: UInt8[np.ndarray, "h w c"]) -> None:
    axes.axis("off")
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)


def title_of(path: str, name: str, probability: float) -> str:
    """The file, and the class's name, of ImageNet's names the first, with its probability."""
    # A name need not be text.
    file = os.fsencode(pathlib.PurePath(path).name).decode("utf-8", "replace")
    return f"{cut(file, _NAME_LENGTH)}\n{cut(shortened(name), _NAME_LENGTH)} {probability:.1%}"
