"""What the command-line programs share: one line and an exit code for whatever ends them early."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from metaformer_jax.exit_codes import INTERRUPTED, USAGE_ERROR

_WAIT_FOR_IMPORT_SECONDS = 0.02


def run(
    work: Callable[[], int | None],
    *,
    if_interrupted: str = "interrupted",
    if_device_fails: str = "",
) -> int:
    """Does the work of a program; returns its exit code.

    Errors that a user can mend are told on stderr in one line. Others, which are bugs, pass.

    Args:
        work: all that may fail or take long, imports among it. Returns an exit code, or None for 0.
        if_interrupted: what to say after Ctrl-C.
        if_device_fails: a remedy, as a sentence.
    """
    try:
        with _imports_undisturbed():
            return work() or 0
    except KeyboardInterrupt:
        return failed(if_interrupted, INTERRUPTED)
    except BrokenPipeError as error:
        # It may be another pipe, such as that to a worker process.
        if not _has_lost_its_reader(sys.stdout):
            return failed(error)
        # Whoever read has read enough; Python's own flush at the end must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (ValueError, ImportError) as error:
        return failed(error)
    except RuntimeError as error:
        # Of the package's own classes, which tell of downloads and data, not of bugs.
        if type(error).__module__.startswith("metaformer_jax."):
            return failed(error)
        # Not before there is an error, for JAX takes seconds to import.
        from jax.errors import JaxRuntimeError

        if not isinstance(error, JaxRuntimeError):
            raise
        reason = str(error).partition("\n")[0]
        return failed(f"the device failed: {reason} {if_device_fails}".rstrip())


@contextlib.contextmanager
def naming_options(**options: str) -> Iterator[None]:
    """A context in which errors name a program's options instead of what is made of them.

    Args:
        **options: from the name of an argument, or of a config's field, to the option.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        told = str(error)
        for name, option in options.items():
            told = told.replace(f"`{name}`", f"`{option}`")
        if told == str(error):
            raise
        raise type(error)(told) from error


def failed(error: Exception | str, exit_code: int = USAGE_ERROR) -> int:
    """Says on stderr what is wrong; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return exit_code


def _has_lost_its_reader(stream: TextIO) -> bool:
    if sys.platform == "win32":  # It cannot be asked there.
        return True
    try:
        pipe = stream.fileno()
    except OSError:
        return False
    poll = select.poll()
    # Errors and hang-ups are told of unasked.
    poll.register(pipe, 0)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _imports_undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of an import, where the exception may turn into any other."""
    is_main = threading.current_thread() is threading.main_thread()
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_main or not is_heard or sys.platform == "win32":
        yield
        return
    waiting: list[threading.Timer] = []

    def interrupt(_: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise KeyboardInterrupt
        # To this thread, which may wait in a system call by then.
        to_main = threading.main_thread().ident, signal.SIGINT
        waiting.append(threading.Timer(_WAIT_FOR_IMPORT_SECONDS, signal.pthread_kill, to_main))
        waiting[-1].start()

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_importing(frame: FrameType | None) -> bool:
    # Whoever calls `run` may itself be imported.
    while frame is not None and frame.f_code is not run.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
