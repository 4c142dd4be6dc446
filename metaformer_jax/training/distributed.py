"""Joins the processes of a run, on several hosts, before JAX looks for devices."""

import os

import jax

# Of launchers that start several processes: how many there are.
_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool | None = None,
) -> None:
    """Calls `jax.distributed.initialize` where this is one process of several.

    Args:
        coordinator_address: host:port of the first process; with it the next two.
        num_processes: all of them.
        process_id: this one, from 0.
        distributed: True finds all that out from the environment (TPU pod, SLURM, Open MPI,
            Kubernetes); False runs alone; None looks whether the environment speaks of several.

    Raises:
        ValueError: something is missing, or there is nothing to find out.
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
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif distributed or (distributed is None and _is_one_of_several()):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "`--distributed` must be left out where no cluster is found in the environment "
                f"({error}). Or give --coordinator_address, --num_processes and --process_id."
            ) from error


def is_first_process() -> bool:
    """Whether this is the one of all processes that speaks and writes."""
    return jax.process_index() == 0


def _is_one_of_several() -> bool:
    if any(int(os.environ.get(name) or 1) > 1 for name in _SIZES):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
