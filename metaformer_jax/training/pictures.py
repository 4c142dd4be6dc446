"""Pictures of a run: curves, training batches and misclassified images.

matplotlib is imported where it draws: most starts of a program draw nothing.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from metaformer_jax.figures import save_png
from metaformer_jax.messages import cut

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss, accuracy and learning rate over the steps, from the rows of `metrics.jsonl`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("loss", _curves_of("loss"), 1),
        ("accuracy in %", _curves_of("accuracy"), 100),
        ("learning rate", {"": "train/learning_rate"}, 1),
    )
    for axes, (title, curves, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, key in curves.items():
            points = [(row["step"], scale * row[key]) for row in rows if key in row]
            if not points:
                continue
            marker = None if key.startswith("train/") else "o"
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    save_png(figure, path)


def _curves_of(name: str) -> dict[str, str]:
    return {
        "training": f"train/{name}",
        "evaluation": f"eval/{name}",
        "evaluation of the average": f"eval_ema/{name}",
    }


def draw_misclassified(
    examples: Sequence[tuple[UInt8[np.ndarray, "h w c"], str, str, float]],
    path: pathlib.Path,
    *,
    title: str,
) -> None:
    """A grid of images, each with its label, the wrong prediction and that one's probability."""
    figure = _image_grid(
        [image for image, *_ in examples],
        [
            f"{cut(label, 24)}\nnot {cut(prediction, 20)}\n({probability:.0%} sure)"
            for _, label, prediction, probability in examples
        ],
        title=title,
    )
    save_png(figure, path)


def batch_figure(
    images: Float[np.ndarray, "b h w c"],
    targets: Float[np.ndarray, "b classes"],
    class_names: Sequence[str],
    *,
    title: str,
    smallest: float = 0.0,
) -> "Figure":
    """A grid of training images as a step sees them, with their two main classes and weights.

    Args:
        images: scaled to [0, 1]; values beyond are clipped.
        targets: the class probabilities of the loss.
        class_names: for the captions.
        title: above the grid.
        smallest: the weight that smoothing gives to every class; those of the image have more.
    """
    captions = []
    for target in targets:
        first, *others = np.argsort(-target)[:2]
        main = [first, *(index for index in others if target[index] > smallest + 1e-4)]
        captions.append(
            "\n".join(f"{cut(class_names[index], 19)} {target[index]:.0%}" for index in main)
        )
    return _image_grid(np.clip(images, 0, 1), captions, title=title)


def _image_grid(
    images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], *, title: str
) -> "Figure":
    """Images of one size, each below a caption of up to three lines."""
    from matplotlib.figure import Figure

    columns = max(1, min(8, len(images)))
    num_rows = max(1, -(-len(images) // columns))
    # In inches.
    image_width, gap, caption_height, title_height = 1.5, 0.15, 0.5, 0.4
    height, width = images[0].shape[:2] if len(images) else (1, 1)
    image_height = image_width * height / width
    cell_width, cell_height = image_width + gap, image_height + caption_height + gap
    grid_width, grid_height = columns * cell_width, num_rows * cell_height
    figure_width, figure_height = max(6, grid_width), title_height + grid_height
    figure = Figure(figsize=(figure_width, figure_height))
    figure.suptitle(title, y=1 - title_height / 2 / figure_height, verticalalignment="center")
    # One pair of axes for all images: matplotlib would take seconds for a pair each.
    axes = figure.add_axes(
        (
            (figure_width - grid_width) / 2 / figure_width,
            0,
            grid_width / figure_width,
            grid_height / figure_height,
        )
    )
    axes.axis("off")
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        left = column * cell_width + gap / 2
        top = grid_height - row * cell_height - caption_height
        axes.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image,
            cmap="gray",
            vmin=0,
            vmax=1 if np.issubdtype(image.dtype, np.floating) else 255,
            extent=(left, left + image_width, top - image_height, top),
            aspect="auto",
        )
        axes.text(
            left + image_width / 2,
            top + gap / 3,
            # Class names may be any text: no formulas, and not always valid Unicode.
            caption.encode("utf-8", "replace").decode(),
            parse_math=False,
            fontsize=8,
            horizontalalignment="center",
            verticalalignment="bottom",
        )
    # Showing an image moves the limits to it.
    axes.set(xlim=(0, grid_width), ylim=(0, grid_height))
    return figure
