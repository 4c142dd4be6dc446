"""A workdir belongs to one config, and at any time to one run."""

import contextlib
import datetime
import itertools
import json
import os
import pathlib
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import ml_collections

from metaformer_jax.models import MetaFormerSpec
from metaformer_jax.training import settings
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import CLASS_NAMES, read_class_names, read_config, spec

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart.
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = "run.lock"
_ARCHITECTURE = tuple(f"model.{field}" for field in ("name", "family", "depths", "dims"))
# Weights learn with these; size, crop and filter may be tried out.
_MAX_NAMED = 5
_NORMALISATION = ("data.mean", "data.std")


@contextlib.contextmanager
def claimed_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    *,
    accept_changes: bool = False,
    is_writer: bool = True,
) -> Iterator[None]:
    """Makes the folder and writes config and classes, or checks that these made it.

    Within the context no other run can claim it. The system gives it free when the process ends,
    however that happens.

    Args:
        workdir: the run's folder.
        config: what the run does.
        class_names: of its data, by label.
        accept_changes: another config, or other names, may have made it.
        is_writer: whether this process writes; each one checks the config, and this one locks.

    Raises:
        ValueError: another config or other classes made it, and `accept_changes` is not set;
            another run is using it; or it cannot be written to.
    """
    mine = settings.as_json(config)
    with contextlib.ExitStack() as lock:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / "config.json"
            if not accept_changes:
                if path.exists():
                    _check_same(path, mine)
                check_same_classes(workdir, class_names)
            if is_writer:
                lock.enter_context(_locked(workdir))
                _write(workdir / CLASS_NAMES, class_names)
                _write(path, mine)
        except OSError as error:
            raise ValueError(
                f"`workdir` must be a folder that can be written to, got {str(workdir)!r}: "
                f"{error.strerror}."
            ) from error
        yield


def check_same_network(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, mine: MetaFormerSpec
) -> None:
    """Compares the network with the one that the run trained.

    Parameters do not tell networks apart whose mixers have none.

    Args:
        workdir: the run's folder.
        config: describes the network, as the message says.
        mine: the network.

    Raises:
        CheckpointError: it is another.
    """
    # The same may be described by a name, or as that size of its family.
    if spec(workdir) != mine:
        _refuse(workdir, config, _ARCHITECTURE, "network")


def check_same_normalisation(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Compares how images are normalised with how the run did it.

    Raises:
        CheckpointError: otherwise.
    """
    _refuse(workdir, config, _NORMALISATION, "normalisation of images")


def check_same_classes(workdir: pathlib.Path, class_names: tuple[str, ...]) -> None:
    """Compares the data's classes with those that the run trained on, if it kept their names.

    Raises:
        ValueError: a label would mean another class.
    """
    theirs = read_class_names(workdir)
    if theirs in (class_names, None):
        return
    pairs = itertools.zip_longest(theirs, class_names, fillvalue="(absent)")
    changes = [f"  {label}: {old} -> {new}" for label, (old, new) in enumerate(pairs) if old != new]
    more = len(changes) - _MAX_NAMED
    shown = [*changes[:_MAX_NAMED], *([f"  and {more:,} more"] if more > 0 else [])]
    raise ValueError(
        f"`data` must have the classes that the run in {str(workdir)!r} was trained on, got "
        "others:\n" + "\n".join(shown) + "\nBring them back. If these are other names of "
        "the same classes, train on with --accept_config_changes, which keeps them; or "
        "evaluate by config.model.pretrained in place of --workdir."
    )


def _refuse(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, fields: tuple[str, ...], what: str
) -> None:
    theirs, mine = read_config(workdir), settings.as_json(config)
    there_are = [field for field in fields if field in theirs]
    changes = settings.differences(
        {field: theirs[field] for field in there_are}, {field: mine[field] for field in there_are}
    )
    if changes:
        raise CheckpointError(
            f"The weights in {workdir} must be used with the {what} that they were trained with, "
            "got other values:\n" + "\n".join(changes) + "\nGive those of the run."
        )


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    path = workdir / _LOCK_NAME
    # Not opened for writing as usual: that would empty what the other run has written.
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


def _write(path: pathlib.Path, content: Any) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def _check_same(path: pathlib.Path, mine: dict[str, Any]) -> None:
    if changes := settings.differences(read_config(path.parent), mine):
        raise ValueError(
            f"`workdir` must be new or made by the same config, but {str(path.parent)!r} was made "
            "with other values:\n" + "\n".join(changes) + "\nUse another --workdir, or continue "
            "this one with the new values by --accept_config_changes."
        )
