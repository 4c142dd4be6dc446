"""Pictures of a run: its curves, and the images it got wrong."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curves(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss, accuracy and learning rate over the steps, from the rows of `metrics.jsonl`."""
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
    save(figure, path)


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
    """A grid of images, each with its label, the prediction instead and its probability."""
    columns = max(1, min(8, len(examples)))
    num_rows = max(1, -(-len(examples) // columns))
    figure = Figure(figsize=(max(6, 1.6 * columns), 0.6 + 2.1 * num_rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, label, prediction, probability) in zip(grid.flat, examples, strict=False):
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
        axes.set_title(f"{label}, not {prediction}\n({probability:.0%} sure)", fontsize=9)
    save(figure, path)


def batch_figure(
    images: Float[np.ndarray, "b h w c"],
    targets: Float[np.ndarray, "b classes"],
    class_names: Sequence[str],
    *,
    title: str,
) -> Figure:
    """A grid of training images as a step sees them, over the shares of their two main classes.

    Args:
        images: scaled to [0, 1]; noise beyond is cut.
        targets: what the loss compares with.
        class_names: for the captions.
        title: above the grid.
    """
    columns = max(1, min(8, len(images)))
    num_rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 0.6 + 2.2 * num_rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, target in zip(grid.flat, np.clip(images, 0, 1), targets, strict=False):
        axes.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1
        )
        # Smoothing gives every class a share; those that an image shows stand out.
        main = [index for index in np.argsort(-target)[:2] if target[index] > 2 * target.min()]
        lines = [f"{class_names[index]} {target[index]:.0%}" for index in main]
        axes.set_title("\n".join(lines), fontsize=8)
    return figure


def to_array(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    """The figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the figure as a PNG."""
    FigureCanvasAgg(figure).print_png(str(path))
