"""Makes sure that a workdir is used by one config on the same data, and one run at a time."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import tempfile
import warnings
from collections.abc import Iterator

import ml_collections

from metaformer_jax.training.provenance import (
    all_changes,
    check_same_classes,
    check_same_config,
)
from metaformer_jax.weights.outputs import check_name_for_orbax
from metaformer_jax.weights.workdir import saved_steps

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
    num_examples: dict[str, int],
    *,
    accept_changes: bool = False,
    is_writer: bool = True,
) -> Iterator[list[str]]:
    """Creates the folder, or checks that its checkpoints fit this config and this data.

    Within the context no other run can claim the folder. The operating system releases the claim
    when the process ends, however that happens. The context gives a line for each accepted change.

    Args:
        workdir: the run's folder.
        config: of the run.
        class_names: of the data, by label.
        num_examples: the numbers of examples by split.
        accept_changes: whether the checkpoints may have been made by another config or with other
            class names or numbers of examples.
        is_writer: whether this process writes; all processes check the config, the writer locks.

    Raises:
        ValueError: the checkpoints were made by another config or on other data, and
            `accept_changes` is not set; another run uses the folder; it cannot be written to;
            folders in it cannot be renamed; or Orbax could not read what it writes there.
    """
    check_name_for_orbax(workdir.absolute(), what="`workdir`")
    changes: list[str] = []
    with contextlib.ExitStack() as lock:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # Without a checkpoint there is nothing to continue, by whatever config.
            if saved_steps(workdir):
                if accept_changes:
                    changes = all_changes(workdir, config, class_names, num_examples)
                else:
                    check_same_config(workdir, config, num_examples)
                    check_same_classes(workdir, class_names)
            if is_writer:
                lock.enter_context(_locked(workdir))
                _check_renames_folders(workdir)
        except OSError as error:
            raise ValueError(
                f"`workdir` must be a folder that can be written to, got {str(workdir)!r}: "
                f"{error.strerror}."
            ) from error
        yield changes


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


def _check_renames_folders(workdir: pathlib.Path) -> None:
    """Checkpoints get their final name when they are whole; buckets often have no such thing."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=workdir) as folder:
        source = pathlib.Path(folder, "part")
        (source / "state").mkdir(parents=True)
        (source / "state" / "file").touch()
        try:
            os.rename(source, source.with_name("whole"))
        except OSError as error:
            raise ValueError(
                "`workdir` must be in a file system that renames folders, as checkpoints are when "
                f"they are whole, got {str(workdir)!r}: {error.strerror}. Mount a bucket with a "
                "hierarchical namespace, or set gcsfuse's rename-dir-limit to more than the files "
                "of a checkpoint; or use another file system."
            ) from error


def _described(content: bytes) -> str:
    try:
        run = json.loads(content)
        return f"process {run['pid']} on {run['host']} trains in it since {run['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process trains in it"
