"""TPU slices and GPUs for which any machine can compile programs, without having them."""

import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from metaformer_jax.training.gpus import GPUS, target_config

# Examples of the arrangements of each kind of TPU, from one host to the largest slice.
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "4x4x4", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "4x4x4", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# Numbers of GPUs, and of hosts with so many each.
_OF_GPUS = ("1", "8", "2x8")
_MOST_GPUS = 4096
# Of JAX's plugin for CUDA.
CUDA_PACKAGES = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# libtpu asks which machine it runs on: it is told that of a machine without a metadata server, and
# that several programs may load it, since those that only compile do not disturb each other.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of `"v5e:4x4"`, a TPU slice, or `"h100:8"`, GPUs: to compile for, not to run on.

    JAX then computes on the CPU, and does not use a TPU or GPU of this machine.

    Args:
        name: the kind, and the arrangement of a slice's chips, or the number of GPUs; `"h100:2x8"`
            are two hosts with eight GPUs each.

    Raises:
        ValueError: there are no such devices.
        ImportError: their compiler is not installed.
    """
    kind, shape = _checked(name)
    return _gpus(kind, shape) if kind in GPUS else _tpus(name, kind, shape)


def _gpus(kind: str, shape: tuple[int, ...]) -> list[jax.Device]:
    if not any(map(importlib.util.find_spec, CUDA_PACKAGES)):
        raise ImportError(
            "`--topology` needs GPUs' compiler, JAX's plugin for CUDA, which is not installed. "
            'Install the extra gpu: pip install -e ".[gpu]".'
        )
    _compute_on_the_cpu()
    hosts, gpus = (1, *shape)[-2:]
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target_config(GPUS[kind]),
        topology=f"1x{hosts}x{gpus}",
    )
    return list(description.devices)


def _tpus(name: str, kind: str, shape: tuple[int, ...]) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "`--topology` needs TPUs' compiler, the package libtpu, which is not installed. "
            'Install the extra tpu: pip install -e ".[tpu]".'
        )
    os.environ.update(_ENVIRONMENT)
    _compute_on_the_cpu()
    # A chip's two cores are one device, as in v5p and wherever JAX runs on v4.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, shape))}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(name, f" ({error})") from error
    return list(description.devices)


def _compute_on_the_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")
    # The time of a compilation is to be reported, not that of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)


def _checked(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in {*TOPOLOGIES, *GPUS}:
        raise _unknown(name)
    shape = tuple(map(int, match[2].split("x")))
    if match[1] in GPUS:
        if len(shape) > 2 or not 1 <= math.prod(shape) <= _MOST_GPUS:
            raise _unknown(name)
        return match[1], shape
    num_axes = TOPOLOGIES[match[1]][0].count("x") + 1
    whole_hosts = math.prod(shape) == 1 or all(side % 2 == 0 for side in shape[:2])
    if len(shape) != num_axes or min(shape) < 1 or not whole_hosts:
        raise _unknown(name)
    if num_axes == 2 and max(shape) > 16:
        raise _unknown(name)
    return match[1], shape


def _unknown(name: str, reason: str = "") -> ValueError:
    shapes = TOPOLOGIES | dict.fromkeys(GPUS, _OF_GPUS)
    kinds = difflib.get_close_matches(name.partition(":")[0], shapes, n=1) or shapes
    good = ", ".join(f"{kind}:{shape}" for kind in kinds for shape in shapes[kind])
    return ValueError(
        "`--topology` must be a TPU's kind and its chips' arrangement, or a GPU's kind and how "
        f"many, got {name!r}{reason}. There are, for example: {good}."
    )
