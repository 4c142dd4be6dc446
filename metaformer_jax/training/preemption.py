"""Notices when the run is told to end, by SIGTERM or by the cluster."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from metaformer_jax.exit_codes import PREEMPTED, end_at_once


class PreemptedError(RuntimeError):
    """The run was told to end, and has saved its state."""


class Preemption:
    """A context in which SIGTERM interrupts nothing, but is reported by `noticed` and `reached`.

    As long as there is nothing to save, SIGTERM ends the process at once, with `PREEMPTED`: a
    process that compiles for minutes cannot check `noticed`.

    With several processes, JAX's coordination service handles SIGTERM, and all processes agree on
    the step at which they stop.

    Attributes:
        noticed: whether SIGTERM was received.
    """

    def __init__(self) -> None:
        self.noticed = False
        self._has_something_to_save = False
        self._previous: tuple[Any, int] | None = None
        self._pipe: tuple[int, int] = (-1, -1)

    def trained(self) -> None:
        """To be called before the first step: from now on there is something to save."""
        self._has_something_to_save = True

    def goes_on_from(self, step: int) -> None:
        """To be called as early as the step is known from which a run of several processes goes on.

        JAX agrees on the step after the last one that any process has named. If none was named
        yet, that is step 1, which such a run never reaches: it would train on until it is killed.
        """
        if jax.process_count() > 1:
            multihost_utils.reached_preemption_sync_point(step)

    def reached(self, step: int) -> bool:
        """Whether the run should save and end after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noticed

    def _notice(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        self.noticed = True

    def _watch(self, read_end: int) -> None:
        # Python runs a signal handler between two bytecode instructions of the main thread, which
        # may be minutes apart; the number of the signal is in the pipe at once.
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
        # Only the main thread may set handlers; elsewhere the caller decides about signals.
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
            # The program is already ending: a second SIGTERM must not suppress its last message.
            handler = signal.SIG_IGN
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup_descriptor)
        # The thread reads the end of the pipe, and closes its own end.
        os.close(self._pipe[1])
