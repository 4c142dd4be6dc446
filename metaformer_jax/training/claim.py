"""Makes sure that a workdir is used by one config, one run at a time, and all its processes."""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import time
import warnings
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from metaformer_jax.training import settings
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.provenance import check_same_classes
from metaformer_jax.weights.workdir import CLASS_NAMES, CONFIG, read_config, saved_steps

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart.
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = "run.lock"
# How long a file that one host writes may take to show on another.
_SHOWS_AFTER_SECONDS = 5
_MAX_HOST_BYTES = 64
_MAX_NAMED = 5


class UnsharedWorkdirError(ValueError):
    """The processes of a run have different workdirs; raised in each of them."""


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


def check_shared(workdir: pathlib.Path) -> None:
    """Makes sure that the workdir is one folder for all processes; all of them must call this.

    Otherwise each process would wait forever for the others' parts of the first checkpoint.

    Raises:
        UnsharedWorkdirError: in all of them, if one does not see what the first one writes.
    """
    if jax.process_count() == 1:
        return
    drawn = np.frombuffer(secrets.token_bytes(8), np.uint32)
    # A new name: no host's cache can know it, or know that it did not exist.
    path = workdir / f"run-{multihost_utils.broadcast_one_to_all(drawn).tobytes().hex()}.token"
    with contextlib.ExitStack() as clearing_up:
        if is_first_process():
            clearing_up.callback(path.unlink, missing_ok=True)
            path.touch()
        multihost_utils.sync_global_devices("token written")
        host = socket.gethostname()
        named = host.encode()[:_MAX_HOST_BYTES].ljust(_MAX_HOST_BYTES, b"\0")
        mine = np.frombuffer(bytes([_shows(path)]) + named, np.uint8)
        all_of_them = multihost_utils.process_allgather(mine)
    blind = [
        f"process {index} on {theirs[1:].tobytes().rstrip(bytes(1)).decode(errors='replace')}"
        for index, theirs in enumerate(all_of_them)
        if not theirs[0]
    ]
    if blind:
        more = f" and {len(blind) - _MAX_NAMED} more" if len(blind) > _MAX_NAMED else ""
        raise UnsharedWorkdirError(
            f"`workdir` must be one folder for all processes, got {str(workdir)!r} for process "
            f"{jax.process_index()} on {host}; what the first process writes in its own does not "
            f"show for {', '.join(blind[:_MAX_NAMED])}{more}. Use a folder that all hosts share: "
            "NFS, Filestore, a mounted bucket."
        )


def _shows(path: pathlib.Path) -> bool:
    until = time.monotonic() + _SHOWS_AFTER_SECONDS
    while True:
        # Network file systems answer from a cache; listing and opening ask the server.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
            with path.open("rb"):
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


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
