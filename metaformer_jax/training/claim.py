"""Makes sure that a workdir is used by one config, and one run at a time."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import warnings
from collections.abc import Iterator

import ml_collections

from metaformer_jax.training import settings
from metaformer_jax.training.provenance import check_same_classes
from metaformer_jax.weights.workdir import CLASS_NAMES, CONFIG, read_config, saved_steps

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart.
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = "run.lock"


@contextlib.contextmanager
def claimed_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    *,
    accept_changes: bool = False,
    is_writer: bool = True,
) -> Iterator[None]:
    """Creates the folder, or checks that its checkpoints fit this config and these classes.

    Within the context no other run can claim the folder. The operating system releases the claim
    when the process ends, however that happens.

    Args:
        workdir: the run's folder.
        config: of the run.
        class_names: of the data, by label.
        accept_changes: whether the checkpoints may have been made by another config or with other
            class names.
        is_writer: whether this process writes; all processes check the config, the writer locks.

    Raises:
        ValueError: the checkpoints were made by another config or with other class names, and
            `accept_changes` is not set; another run uses the folder; or it cannot be written to.
    """
    with contextlib.ExitStack() as lock:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # Without a checkpoint there is nothing to continue, by whatever config.
            if saved_steps(workdir / "checkpoints") and not accept_changes:
                _check_same_config(workdir, config)
                check_same_classes(workdir, class_names)
            if is_writer:
                lock.enter_context(_locked(workdir))
        except OSError as error:
            raise ValueError(
                f"`workdir` must be a folder that can be written to, got {str(workdir)!r}: "
                f"{error.strerror}."
            ) from error
        yield


def describe(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, class_names: tuple[str, ...]
) -> None:
    """Writes the config and the class names to the workdir, for later starts to compare with.

    To be called just before the first step, so that a failed start changes nothing.
    """
    for name, content in ((CLASS_NAMES, class_names), (CONFIG, settings.as_json(config))):
        path = workdir / name
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    path = workdir / _LOCK_NAME
    # Not opened with "w", which would erase what another run has written.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"`workdir` must not be in use, but {str(workdir)!r} is: "
                    f"{_described(os.read(descriptor, 4096))}. Wait for that run, end it, or use "
                    "another --workdir."
                ) from error
            except OSError as error:
                warnings.warn(
                    f"{str(workdir)!r} lies on a file system without locks ({error.strerror}): "
                    "nothing keeps a second run out of it.",
                    stacklevel=2,
                )
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(me).encode())
        yield
    finally:
        os.close(descriptor)


def _described(content: bytes) -> str:
    try:
        run = json.loads(content)
        return f"process {run['pid']} on {run['host']} trains in it since {run['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process trains in it"


def _check_same_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    if not (theirs := read_config(workdir)):
        return
    if changes := settings.differences(theirs, settings.as_json(config)):
        raise ValueError(
            f"`workdir` must be new or made by the same config, but {str(workdir)!r} was made "
            "with other values:\n" + "\n".join(changes) + "\nUse another --workdir, or continue "
            "this one with the new values by --accept_config_changes."
        )
