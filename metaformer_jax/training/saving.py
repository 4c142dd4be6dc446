"""Saves the steps of a training, and those that a failure would cost."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NoReturn

import jax

from metaformer_jax.data.loader import DataError
from metaformer_jax.training.checkpoint import Checkpoints, SaveError
from metaformer_jax.training.metrics import MetricWriter, PendingMetrics
from metaformer_jax.training.run import Run
from metaformer_jax.training.step import TrainState


class Saving:
    """Saves a training's state together with the metrics that are not written yet.

    Args:
        run: what is trained.
        workdir: the run's folder.
        checkpoints: where the state is saved.
        pending: the metrics that are not written yet.
        writer: of the others; it notices that the folder is gone.
    """

    def __init__(
        self,
        run: Run,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        pending: PendingMetrics,
        writer: MetricWriter,
    ):
        self._run = run
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._pending = pending
        self._writer = writer

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write a checkpoint.

        Raises:
            SaveError: it, or the one before it, could not be written, or the folder is gone.
        """
        try:
            self._save(state)
        except SaveError as error:
            self._save_after(error, step, state)
        self._check_folder(step)

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            SaveError: it could not be.
        """
        self._checkpoints.wait()

    def check(self, step: int, state: TrainState) -> None:
        """Notices that the last checkpoint was not written, long before the next one is due.

        Raises:
            SaveError: it was not.
        """
        try:
            self._checkpoints.check()
        except SaveError as error:
            self._save_after(error, step, state)

    @contextlib.contextmanager
    def kept_if_data_fails(self, step: int, state: TrainState, *, is_saved: bool) -> Iterator[None]:
        """Saves what is trained by now where data cannot be read, before that ends the run.

        Args:
            step: the last one.
            state: after it.
            is_saved: whether it was saved before.
        """
        try:
            yield
        except DataError:
            # With several processes, only one may have met the bad images.
            if not is_saved and jax.process_count() == 1:
                self.save(step, state)
            raise

    def _save(self, state: TrainState) -> None:
        self._checkpoints.save(state, self._pending.to_host(), self._run.config)

    def _save_after(self, error: SaveError, step: int, state: TrainState) -> NoReturn:
        """Saves what is trained by now, if what went wrong has passed, and ends the run."""
        # The others know nothing of it.
        if jax.process_count() > 1:
            raise error
        try:
            self._save(state)
            self.wait()
        except SaveError:
            raise error from None
        self._check_folder(step)
        raise SaveError(f"{error} Step {step:,} could be saved after that.") from error

    def _check_folder(self, step: int) -> None:
        if not self._writer.has_lost_its_folder():
            return
        # The checkpoint has made the folder anew.
        self.wait()
        self._run.write_provenance(self._workdir)
        raise SaveError(
            f"{self._workdir} was moved or removed while the run wrote to it. Step {step} is saved "
            "in a new folder of that name, from which the same command continues, without the "
            "metrics up to there. Or continue the moved one: name it by --workdir."
        )
