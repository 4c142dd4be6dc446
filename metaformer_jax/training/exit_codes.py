"""What the process of a training ends with, beside 0. No other module is needed to know them."""

import os
from typing import Any

TRAINING_FAILED = 1
USAGE_ERROR = 2
# Told to end (SIGTERM, or by the cluster), with nothing left unsaved: the same command continues.
# It is what sysexits.h calls a temporary failure.
PREEMPTED = 75
INTERRUPTED = 130


def end_at_once(*_: Any) -> None:
    """What a program does about SIGTERM while there is nothing to save."""
    os._exit(PREEMPTED)
