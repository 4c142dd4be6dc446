"""Draws a training batch as a step sees it."""

import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console

from metaformer_jax.figures import save_png
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.pictures import batch_figure
from metaformer_jax.training.progress import say
from metaformer_jax.training.run import Run
from metaformer_jax.weights.outputs import check_can_be_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Most of a batch that a picture can show at a readable size.
_MAX_PICTURED = 48


def preview(
    config: ml_collections.ConfigDict, output: pathlib.Path, *, console: Console | None = None
) -> None:
    """Draws the first training batch as the first step sees it; the model is not run.

    If there are several processes, the first one writes the picture, of its own share of the batch.

    Raises:
        ValueError: the config is wrong, or the output cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"`--output` must end in .png, got {output}.")
    check_can_be_written(output)
    console = console or Console()
    console.quiet = console.quiet or not is_first_process()
    run = Run(config)
    with run.training_batches(0) as batches:
        # All processes take part, because the devices of all mix the batch.
        figure = draw_inputs(run, next(batches), 0)
    if is_first_process():
        save_png(figure, output)
    say(console, f"the first training batch: {output}")


def draw_inputs(run: Run, batch: dict[str, jax.Array], step: int) -> "Figure":
    """The images and targets that a step trains on, of this process's share of the batch."""
    inputs = run.engine.training_inputs(batch, jnp.int32(step))
    images, targets = (
        np.concatenate([shard.data for shard in array.addressable_shards])[:_MAX_PICTURED]
        for array in inputs
    )
    return batch_figure(
        images * np.array(run.config.data.std) + np.array(run.config.data.mean),
        targets,
        run.class_names,
        title=f"training images of step {step + 1}",
        smallest=run.config.label_smoothing / len(run.class_names),
    )
