"""Tells a training that fails from a command that is wrong."""

import contextlib
from collections.abc import Callable, Iterator


class TrainingError(RuntimeError):
    """After the first step something failed that before it would be the fault of the command."""


@contextlib.contextmanager
def failing_if(has_begun: Callable[[], bool]) -> Iterator[None]:
    """Raises what would refuse a command as a `TrainingError`, once the training has begun."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        if not has_begun():
            raise
        raise TrainingError(
            f"the training failed: {type(error).__name__}: {error}. The same command continues "
            "from the last checkpoint."
        ) from error
