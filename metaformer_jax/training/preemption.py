"""Notices that the run is to end: SIGTERM, or what the cluster's service says."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from metaformer_jax.training.exit_codes import PREEMPTED, end_at_once


class PreemptedError(RuntimeError):
    """The run was told to end, and has saved what there was to save."""


class Preemption:
    """Within this context SIGTERM interrupts nothing; `noticed` and `reached` tell that it came.

    As long as there is nothing to save, it ends the process at once, with `PREEMPTED`: one that
    compiles for minutes cannot be asked.

    With several processes JAX's coordination service watches for it, and all processes agree on
    the step at which they stop.

    Attributes:
        noticed: whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.noticed = False
        self._has_something_to_save = False
        self._previous: tuple[Any, int] | None = None
        self._pipe: tuple[int, int] = (-1, -1)

    def trained(self) -> None:
        """From now on there is something to save."""
        self._has_something_to_save = True

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noticed

    def _notice(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        self.noticed = True

    def _watch(self, read_end: int) -> None:
        # Python tells its main thread of a signal between two of its own instructions, which may
        # be minutes apart; the number of the signal is in the pipe at once.
        while numbers := os.read(read_end, 64):
            if signal.SIGTERM in numbers and not self._has_something_to_save:
                print("told to end: there was nothing to save yet.", flush=True)
                os._exit(PREEMPTED)
        os.close(read_end)

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
            return self
        try:
            handler = signal.signal(signal.SIGTERM, self._notice)
        # Only a main thread may do so; elsewhere the caller decides about signals.
        except ValueError:
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = (handler, signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False))
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        if self._previous is None:
            return
        handler, wakeup_descriptor = self._previous
        if isinstance(error, PreemptedError) and handler is end_at_once:
            # The program is ending as it was told to; told again, it would not say what is saved.
            handler = signal.SIG_IGN
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup_descriptor)
        # The thread reads that this was all, and closes the other end.
        os.close(self._pipe[1])
