"""Notices that the run is to end: SIGTERM, or what the cluster's service says."""

import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class PreemptedError(RuntimeError):
    """The run was told to end, and has saved a checkpoint."""


class Preemption:
    """Within this context SIGTERM ends nothing; `reached` tells that it came.

    With several processes JAX's coordination service watches for it, and all processes agree on
    the step at which they stop.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._previous: Any = None

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def _notice(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        self._noticed = True

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            try:
                self._previous = signal.signal(signal.SIGTERM, self._notice)
            # Only a main thread may do so; elsewhere the caller decides about signals.
            except ValueError:
                self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
