"""What the process of a training ends with, beside 0. No other module is needed to know them."""

import os
import signal
import threading
from types import FrameType

TRAINING_FAILED = 1
USAGE_ERROR = 2
# Told to end (SIGTERM, or by the cluster), with nothing left unsaved: the same command continues.
# It is what sysexits.h calls a temporary failure.
PREEMPTED = 75
INTERRUPTED = 130

_ending = threading.Lock()


def end_at_once(signal_number: int, _: FrameType | None) -> None:
    """What a program does about SIGTERM and Ctrl-C while there is nothing to save."""
    # The main thread and the one that watches both hear of a signal.
    if not _ending.acquire(blocking=False):
        return
    if signal_number == signal.SIGINT:
        # Not by print, which it may have interrupted.
        os.write(2, b"error: stopped: there was nothing to save yet.\n")
        os._exit(INTERRUPTED)
    os._exit(PREEMPTED)


def end_at_once_when_told() -> None:
    """Has SIGTERM and Ctrl-C end the program from now on, whatever its main thread is doing."""
    signal.signal(signal.SIGTERM, end_at_once)
    # A shell's background jobs ignore Ctrl-C, and are to go on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()


def _watch(read_end: int) -> None:
    # The main thread hears of a signal between two of Python's instructions, which are minutes
    # apart where it waits for other processes or compiles; its number is in the pipe at once.
    while True:
        for number in os.read(read_end, 64):
            if signal.getsignal(number) is end_at_once:
                end_at_once(number, None)
