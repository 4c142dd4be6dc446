"""Makes sure that all processes of a run do the same; each of them must call these functions."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from metaformer_jax.messages import first_few
from metaformer_jax.training import settings
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.weights.convert import Variables
from metaformer_jax.weights.integrity import crc32c_of_tensors
from metaformer_jax.weights.workdir import checkpoints_folder, saved_steps

# Where a host has the data, and how many of its cores read it. The weights at a path are compared.
_MAY_DIFFER = (
    *("data.root", "data.num_workers", "data.num_threads"),
    *("model.pretrained", "model.class_map"),
)
# How long a file that one host writes may take to show on another.
_SHOWS_AFTER_SECONDS = 5
# How long a network file system may answer from its cache which files there are.
_LISTED_FOR_SECONDS = 60
_MAX_HOST_BYTES = 64
_MAX_TOLD_BYTES = 1024


class DisagreementError(ValueError):
    """The processes of a run do not belong together; raised in each of them."""


class UnsharedWorkdirError(DisagreementError):
    """The processes of a run have different workdirs."""


def check_same(
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
    variables: Variables,
) -> None:
    """Makes sure that all processes have the same config, data and initial weights.

    Otherwise each would train or evaluate something else, as if nothing was wrong. Paths may
    differ, and how many cores read.

    Args:
        config: of the run.
        class_names: of the data, by label.
        num_examples: the numbers of examples by the name of the split.
        variables: the initial values by path; empty without pretrained weights.

    Raises:
        DisagreementError: in all of them, if one has others than the first.
    """
    if jax.process_count() == 1:
        return
    values = settings.as_json(config)
    mine: dict[str, Any] = {field: values[field] for field in values if field not in _MAY_DIFFER}
    mine |= {f"{split} examples": number for split, number in num_examples.items()}
    mine |= {f"class {label}": name for label, name in enumerate(class_names)}
    if variables:
        tensors = {".".join(map(str, path)): np.asarray(variables[path]) for path in variables}
        mine["CRC-32C of config.model.pretrained"] = crc32c_of_tensors(tensors, {})
    lines = settings.differences(json.loads(_of_first(json.dumps(mine).encode())), mine)
    told = _told_by_all("\n".join(first_few(lines)))
    if others := [f"{process}:\n{text}" for process, text in told if text]:
        raise DisagreementError(
            "All processes must have the same config and data, but some have others than "
            f"{told[0][0]}:\n"
            + "\n".join(first_few(others))
            + "\nStart all of them by the same command, with the same files on each host."
        )


def of_first(is_so: bool) -> bool:
    """What the first process says, for all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(is_so)))


def newest_step_of_first(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint that the first process sees; 0 without a checkpoint."""
    step = max(saved_steps(workdir), default=0) if is_first_process() else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def agreed_newest_step(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint for all processes; 0 without a checkpoint.

    Waits as long as other processes may see those that the first one has removed, and not yet all
    that are there.

    Raises:
        DisagreementError: in all of them, if one still sees others than the first.
    """
    step = newest_step_of_first(workdir)
    if jax.process_count() == 1:
        return step
    _wait_until(lambda: max(saved_steps(workdir), default=0) == step, _LISTED_FOR_SECONDS)
    seen = max(saved_steps(workdir), default=0)
    told = _told_by_all(f"step {seen:,}" if seen != step else "")
    if others := [f"{text} for {process}" for process, text in told if text]:
        raise DisagreementError(
            f"`workdir` must show the same checkpoints to all processes, got step {step:,} as the "
            f"newest in {checkpoints_folder(workdir)} for {told[0][0]}, but "
            f"{', '.join(first_few(others))}, even after "
            f"{_LISTED_FOR_SECONDS} s. Start again when all hosts see the same files there."
        )
    return step


def check_shared(workdir: pathlib.Path) -> None:
    """Makes sure that the workdir is one folder for all processes.

    Otherwise each process would wait forever for the others' parts of the first checkpoint.

    Raises:
        UnsharedWorkdirError: in all of them, if one does not see what the first one writes.
    """
    if jax.process_count() == 1:
        return
    # A new name: no host's cache can know it, or know that it did not exist.
    path = workdir / f"run-{_of_first(secrets.token_bytes(8)).hex()}.token"
    with contextlib.ExitStack() as clearing_up:
        if is_first_process():
            clearing_up.callback(path.unlink, missing_ok=True)
            path.touch()
        multihost_utils.sync_global_devices("token written")
        told = _told_by_all("" if _shows(path) else "does not see it")
    if blind := [process for process, text in told if text]:
        raise UnsharedWorkdirError(
            f"`workdir` must be one folder for all processes, got {str(workdir)!r} for process "
            f"{jax.process_index()} on {socket.gethostname()}; what the first process writes in "
            "its own does not show for "
            f"{', '.join(first_few(blind))}. Use a folder that all hosts "
            "share: NFS or Filestore, for example."
        )


def _of_first(content: bytes) -> bytes:
    """What the first process gives."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # All must give arrays of one shape.
    padded = np.frombuffer(content[:size].ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _told_by_all(text: str) -> list[tuple[str, str]]:
    """By which process and host, and what each of them tells."""
    parts = ((socket.gethostname(), _MAX_HOST_BYTES), (text, _MAX_TOLD_BYTES))
    mine = b"".join(
        part.encode(errors="replace")[:length].ljust(length, b"\0") for part, length in parts
    )
    told = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
    decoded = [
        [
            part.tobytes().rstrip(b"\0").decode(errors="replace")
            for part in np.split(theirs, [_MAX_HOST_BYTES])
        ]
        for theirs in told
    ]
    return [(f"process {index} on {host}", text) for index, (host, text) in enumerate(decoded)]


def _shows(path: pathlib.Path) -> bool:
    def opens() -> bool:
        # Network file systems answer from a cache; listing and opening ask the server.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
            with path.open("rb"):
                return True
        return False

    return _wait_until(opens, _SHOWS_AFTER_SECONDS)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
