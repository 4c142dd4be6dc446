"""Connects the processes of a run, on one or several hosts, before JAX looks for devices."""

import contextlib
import os
import sys
from typing import NoReturn

import jax

# Variables in which launchers give the number of processes.
_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# A process without a heartbeat for this long counts as dead, and JAX ends the others.
_HEARTBEAT_TIMEOUT_SECONDS = 30


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool | None = None,
) -> None:
    """Calls `jax.distributed.initialize` if this is one of several processes.

    Args:
        coordinator_address: host:port of the first process; requires the next two arguments.
        num_processes: the number of all processes.
        process_id: of this process, from 0.
        distributed: True reads these from the environment (TPU pod, SLURM, Open MPI, Kubernetes);
            False means a single process; None looks whether the environment describes several.

    Raises:
        ValueError: an argument is missing, or the environment does not describe a cluster.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if missing or distributed is False:
            raise ValueError(
                "`--coordinator_address`, `--num_processes` and `--process_id` must be given "
                f"together and without --nodistributed, got {given}."
            )
        if not 0 <= process_id < num_processes:  # type: ignore[operator]
            raise ValueError(f"`--process_id` must be in [0, {num_processes}), got {process_id}.")
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    elif distributed or (distributed is None and _is_one_of_several()):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS)
        except ValueError as error:
            raise ValueError(
                "`--distributed` must be left out where no cluster is found in the environment "
                f"({error}). Or give --coordinator_address, --num_processes and --process_id."
            ) from error


def is_first_process() -> bool:
    """Whether this is the first of all processes, the only one that prints and writes files."""
    return jax.process_index() == 0


def explain(error: jax.errors.JaxRuntimeError) -> str:
    """What the user can do about an error of the devices or of the connection between processes.

    Raises:
        jax.errors.JaxRuntimeError: the same error, if no remedy is known.
    """
    reason = f"{str(error).strip().splitlines()[0].rstrip('.')}."
    if "RESOURCE_EXHAUSTED" in reason:
        return (
            f"The devices have too little memory: {reason} Raise config.accumulation_steps, split "
            "the state by config.mesh.fsdp, set config.model.remat, or lower config.batch_size."
        )
    if jax.distributed.is_initialized():
        return (
            f"Another process of this training has died or is out of reach: {reason} Start all of "
            "them again by the same command; they continue from the last checkpoint."
        )
    raise error


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code, without waiting for other processes or threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # JAX's own exit waits for all processes, which notice the end only by missing heartbeats; and
    # threads of Orbax wait minutes for the folder of a checkpoint that could not be created.
    os._exit(code)


def _is_one_of_several() -> bool:
    if any(int(os.environ.get(name) or 1) > 1 for name in _SIZES):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
