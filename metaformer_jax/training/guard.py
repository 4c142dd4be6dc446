"""Checks the loss and gradient of every step, and names the examples if they are not finite."""

import contextlib
import json
import math
import pathlib

import numpy as np

from metaformer_jax.data.sources import Source


class NonFiniteError(FloatingPointError):
    """A loss or gradient is not finite, and the training is to stop."""


class Guard:
    """Checks the figures of steps when they arrive, and remembers the examples of their batches.

    Args:
        workdir: where `nonfinite.json` is written.
        source: of the examples, to name them.
        max_skipped: how many updates in a row may be lost; 0 stops at the first.
        process_index: of this process, which knows only its own share of a batch.
    """

    def __init__(
        self, workdir: pathlib.Path, source: Source, *, max_skipped: int, process_index: int = 0
    ):
        suffix = f"-process{process_index}" if process_index else ""
        self._path = workdir / f"nonfinite{suffix}.json"
        self._source = source
        self._max_skipped = max_skipped
        self._indices: dict[int, np.ndarray] = {}

    def expect(self, step: int, indices: np.ndarray) -> None:
        """Remembers the positions in the source of a step's examples."""
        self._indices[step] = indices

    def check(self, step: int, figures: dict[str, float]) -> bool:
        """Whether a step's update took place.

        Raises:
            NonFiniteError: it did not, and more than `max_skipped` in a row were lost; a report is
                written.
        """
        indices = self._indices.pop(step)
        loss, grad_norm = float(figures["loss"]), float(figures["grad_norm"])
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        if figures["num_skipped"] > self._max_skipped:
            report = {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                "updates_lost_in_a_row": int(figures["num_skipped"]),
                "indices": indices.tolist(),
                "examples": [self._source.describe(int(index)) for index in indices],
            }
            # What it says matters more than that it is written.
            with contextlib.suppress(OSError):
                self._path.write_text(json.dumps(report, indent=2) + "\n")
            lost, go_on = "", "or go on without such updates by on_nonfinite='skip'"
            if self._max_skipped:
                lost = f": {report['updates_lost_in_a_row']} such updates in a row"
                go_on = f"or allow more in a row by max_skipped_updates (now {self._max_skipped})"
            raise NonFiniteError(
                f"The loss of step {step} is {loss} and its gradient norm {grad_norm}{lost}. Its "
                f"examples are named in {self._path}. The update was not made and the last "
                "checkpoint is good: lower optimizer.learning_rate, set optimizer.max_grad_norm, "
                f"{go_on}."
            )
        return False
