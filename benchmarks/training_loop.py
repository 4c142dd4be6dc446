"""Time per step that the training loop takes itself, beside the compiled step.

    PYTHONPATH=. python benchmarks/training_loop.py [--steps 2000] [--image-size 32]

The whole loop runs (placing batches, the guard, metrics files, progress), but with a step that
does nothing and batches that are there already: what is left is the loop's own.
"""

import argparse
import contextlib
import io
import pathlib
import tempfile
import time

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from metaformer_jax.training import loop, recipes, train
from metaformer_jax.training.feeding import PlacedBatches
from metaformer_jax.training.run import Run


def endless(batch):
    while True:
        yield batch


def own_seconds_per_step(config, workdir):
    times = []
    metrics = {name: jnp.float32(1) for name in ("loss", "accuracy", "grad_norm")}
    metrics["num_skipped"] = jnp.int32(0)

    def nothing(state, batch):
        times.append(time.perf_counter())
        return state, metrics

    size, count = config.data.image_size, config.batch_size
    batch = {
        "image": np.zeros((count, size, size, 1), np.uint8),
        "label": np.zeros(count, np.int32),
        "index": np.arange(count, dtype=np.int32),
        "bad": np.full(count, -1, np.int32),
    }

    @contextlib.contextmanager
    def ready_batches(self, start_step):
        yield PlacedBatches(endless(batch), self.engine.mesh, fields=("image", "label"))

    Run.training_batches = ready_batches
    loop.TrainingLoop._compiled = lambda self, state, batch: nothing
    train.train(config, workdir, console=Console(file=io.StringIO()))
    return (times[-1] - times[1]) / (len(times) - 2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    config = recipes.digits()
    config.batch_size = args.batch_size
    config.epochs = args.steps * args.batch_size / 1442
    config.log_every_steps = 50
    config.eval_every_epochs = config.checkpoint.every_epochs = 1e9
    config.data.image_size = args.image_size
    config.model.update(family="identityformer", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with tempfile.TemporaryDirectory() as workdir:
        seconds = own_seconds_per_step(config, pathlib.Path(workdir))
    print(
        f"{args.batch_size} images of {args.image_size} pixels: {seconds * 1000:.2f} ms per step, "
        f"{seconds / 0.1:.2%} of a step of 100 ms"
    )


if __name__ == "__main__":
    main()
