"""What the process of a training ends with, beside 0. No other module is needed to know them."""

import os
import signal
from types import FrameType

TRAINING_FAILED = 1
USAGE_ERROR = 2
# Told to end (SIGTERM, or by the cluster), with nothing left unsaved: the same command continues.
# It is what sysexits.h calls a temporary failure.
PREEMPTED = 75
INTERRUPTED = 130


def end_at_once(signal_number: int, _: FrameType | None = None) -> None:
    """What a program does about SIGTERM and Ctrl-C while there is nothing to save."""
    if signal_number == signal.SIGINT:
        # Not by print, which it may have interrupted.
        os.write(2, b"error: stopped before anything was done.\n")
        os._exit(INTERRUPTED)
    os._exit(PREEMPTED)
