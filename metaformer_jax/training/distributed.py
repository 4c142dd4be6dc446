"""Connects the processes of a run, on one or several hosts, before JAX looks for devices."""

import contextlib
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request
from typing import NoReturn

import jax

# Variables in which launchers give the number of processes, or of slices of TPUs.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "MEGASCALE_NUM_SLICES")
# Those in which Kubernetes lists the hosts of a slice of TPUs.
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Where machines of Google Cloud ask about themselves, and their list of a slice's hosts.
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_METADATA_TRIES = 6
_METADATA_TIMEOUT_SECONDS = 5
_PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE_PCI_VENDOR = "0x1ae0"
# A process without a heartbeat for this long counts as dead, and JAX ends the others.
_HEARTBEAT_TIMEOUT_SECONDS = 30


class ClusterError(RuntimeError):
    """The processes of a training do not find each other, which may pass."""


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
            False means a single process; None looks whether the environment describes several. On a
            machine of Google Cloud with TPUs it asks the metadata server.

    Raises:
        ValueError: an argument is missing or wrong, the environment does not describe a cluster, or
            the devices belong to several processes that are not connected.
        ClusterError: the processes do not find each other at the given address.
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
        host, _, port = str(coordinator_address).rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(
                "`--coordinator_address` must be host:port of the first process, with a port from "
                f"1 to {2**16 - 1}, got {coordinator_address!r}."
            )
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
            )
        except jax.errors.JaxRuntimeError as error:
            raise ClusterError(
                "The processes must find each other at --coordinator_address, got "
                f"{coordinator_address!r}: {str(error).splitlines()[0].rstrip('.')}. Give the "
                "first process's host and a port that is free there, and start all of them."
            ) from error
    elif distributed is not False and (
        sign := "--distributed" if distributed else _sign_of_several()
    ):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS)
        except ValueError as error:
            raise ValueError(
                f"A cluster must be found in the environment with {sign}, got none that JAX knows "
                f"({error}). Under SLURM start each process by srun; elsewhere give "
                "--coordinator_address, --num_processes and --process_id. Or give --nodistributed, "
                "to run as a single process."
            ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            "`--distributed` must be given where the devices belong to several processes, got "
            f"{jax.process_count()} processes that are not connected. If no cluster is found then, "
            "give --coordinator_address, --num_processes and --process_id."
        )


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


def _sign_of_several() -> str:
    """What tells that this is one of several processes; "" if nothing does."""
    for name in _SIZES:
        if _number(name) > 1:
            return f"{name}={os.environ[name]}"
    for name in _HOSTS:
        if name in os.environ:
            return f"{name}={os.environ[name]}" if "," in os.environ[name] else ""
    hosts = _hosts_of_slice() if _may_be_in_slice() else ""
    return f"a TPU slice of the hosts {hosts}" if "," in hosts else ""


def _number(name: str) -> int:
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise ValueError(
            f"`{name}` must be a number in the environment, got {value!r}. Correct it, or give "
            "--nodistributed to run as a single process."
        )
    return int(value)


def _may_be_in_slice() -> bool:
    """Whether TPUs of Google Cloud may be attached; elsewhere nothing answers about them."""
    # JAX sets the first where it finds no TPU. Google's network cards have its number as well.
    if "TPU_SKIP_MDS_QUERY" in os.environ or "tpu" not in (
        os.environ.get("JAX_PLATFORMS") or "tpu"
    ):
        return False
    for vendor in _PCI_DEVICES.glob("*/vendor"):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR:
                return True
    return False


def _hosts_of_slice() -> str:
    """The hosts of this machine's slice of TPUs, with commas; "" if it is in none."""
    request = urllib.request.Request(
        _METADATA.format(os.environ.get("GCE_METADATA_IP", "metadata.google.internal")),
        headers={"Metadata-Flavor": "Google"},
    )
    # No proxy can know about this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for trial in range(_METADATA_TRIES):
        if trial:
            time.sleep(0.5)
        try:
            with opener.open(request, timeout=_METADATA_TIMEOUT_SECONDS) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
        # What is found out too late is told after the devices are initialized.
        except OSError:
            pass
    return ""
