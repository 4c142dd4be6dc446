"""What the process of a training ends with, beside 0. No other module is needed to know them."""

TRAINING_FAILED = 1
USAGE_ERROR = 2
# Told to end (SIGTERM, or by the cluster), with nothing left unsaved: the same command continues.
# It is what sysexits.h calls a temporary failure.
PREEMPTED = 75
INTERRUPTED = 130
