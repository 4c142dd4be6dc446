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

from metaformer_jax.training import settings
from metaformer_jax.training.provenance import check_same_classes, class_changes
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import (
    CLASS_NAMES,
    CONFIG,
    NUM_EXAMPLES,
    read_config,
    read_num_examples,
    saved_steps,
)

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
            `accept_changes` is not set; another run uses the folder; it cannot be written to; or
            folders in it cannot be renamed.
    """
    changes: list[str] = []
    with contextlib.ExitStack() as lock:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # Without a checkpoint there is nothing to continue, by whatever config.
            if saved_steps(workdir / "checkpoints"):
                if accept_changes:
                    changes = _accepted(workdir, config, class_names, num_examples)
                else:
                    _check_same_config(workdir, config, num_examples)
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


def describe(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
) -> None:
    """Writes what later starts compare with: config, class names and numbers of examples.

    To be called just before the first step, so that a failed start changes nothing.
    """
    contents = {CLASS_NAMES: class_names, NUM_EXAMPLES: num_examples}
    for name, content in (contents | {CONFIG: settings.as_json(config)}).items():
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


def _check_same_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, num_examples: dict[str, int]
) -> None:
    if changes := _config_changes(workdir, config) + _examples_changes(workdir, num_examples):
        raise ValueError(
            f"`workdir` must be new or made by the same config on the same data, but "
            f"{str(workdir)!r} was made with other values:\n" + "\n".join(changes) + "\nUse "
            "another --workdir, or continue this one with the new values by "
            "--accept_config_changes."
        )


def _accepted(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
) -> list[str]:
    changes = []
    for compare in (
        lambda: _config_changes(workdir, config),
        lambda: _examples_changes(workdir, num_examples),
        lambda: class_changes(workdir, class_names),
    ):
        try:
            changes += compare()
        # A damaged file is written anew.
        except CheckpointError as error:
            changes.append(f"  {error}")
    return changes


def _config_changes(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> list[str]:
    theirs = read_config(workdir)
    return settings.differences(theirs, settings.as_json(config)) if theirs else []


def _examples_changes(workdir: pathlib.Path, num_examples: dict[str, int]) -> list[str]:
    theirs = read_num_examples(workdir)
    if not theirs:
        return []
    return settings.differences(
        *({f"{split} examples": n for split, n in of.items()} for of in (theirs, num_examples))
    )
