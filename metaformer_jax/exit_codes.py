"""The programs' exit codes besides 0, and how to end at once. Imports nothing that is slow."""

import os
import signal
import threading
from types import FrameType

TRAINING_FAILED = 1
USAGE_ERROR = 2
# Told to end (by SIGTERM or by the cluster) with everything saved: the same command continues.
# In sysexits.h this code is EX_TEMPFAIL, a temporary failure.
PREEMPTED = 75
INTERRUPTED = 130

_ending = threading.Lock()


def end_at_once(signal_number: int, _: FrameType | None) -> None:
    """Handles SIGTERM and Ctrl-C while there is nothing to save: ends the process."""
    # Both the main thread and the watching thread receive a signal.
    if not _ending.acquire(blocking=False):
        return
    if signal_number == signal.SIGINT:
        # Not by print, which the signal may have interrupted.
        os.write(2, b"error: stopped: there was nothing to save yet.\n")
        os._exit(INTERRUPTED)
    os._exit(PREEMPTED)


def end_at_once_when_told() -> None:
    """From now on SIGTERM and Ctrl-C end the program, whatever its main thread is doing."""
    signal.signal(signal.SIGTERM, end_at_once)
    # Background jobs of a shell ignore Ctrl-C, and must continue to do so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()


def _watch(read_end: int) -> None:
    # The main thread handles a signal between two bytecode instructions, which are minutes apart
    # while it waits for other processes or compiles; the signal's number is in the pipe at once.
    while True:
        for number in os.read(read_end, 64):
            if signal.getsignal(number) is end_at_once:
                end_at_once(number, None)
