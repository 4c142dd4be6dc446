"""TPU slices for which any machine can compile programs, without having them."""

import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

# Examples of the arrangements of each kind's chips, from one host to the largest slice.
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "4x4x4", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "4x4x4", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# libtpu asks which machine it runs on: it is told that of a machine without a metadata server, and
# that several programs may load it, since those that only compile do not disturb each other.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU slice, such as `"v5e:4x4"`, to compile for but not to run on.

    JAX then computes on the CPU, and does not use a TPU of this machine.

    Raises:
        ValueError: there is no such slice.
        ImportError: libtpu is not installed.
    """
    kind, shape = _checked(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "`--topology` needs TPUs' compiler, the package libtpu, which is not installed. "
            'Install the extra tpu: pip install -e ".[tpu]".'
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    # The time of a compilation is to be reported, not that of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)
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


def _checked(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in TOPOLOGIES:
        raise _unknown(name)
    shape = tuple(map(int, match[2].split("x")))
    num_axes = TOPOLOGIES[match[1]][0].count("x") + 1
    whole_hosts = math.prod(shape) == 1 or all(side % 2 == 0 for side in shape[:2])
    if len(shape) != num_axes or min(shape) < 1 or not whole_hosts:
        raise _unknown(name)
    if num_axes == 2 and max(shape) > 16:
        raise _unknown(name)
    return match[1], shape


def _unknown(name: str, reason: str = "") -> ValueError:
    kinds = difflib.get_close_matches(name.partition(":")[0], TOPOLOGIES, n=1) or TOPOLOGIES
    good = ", ".join(f"{kind}:{shape}" for kind in kinds for shape in TOPOLOGIES[kind])
    return ValueError(
        f"`--topology` must be a TPU's kind and its chips' arrangement, got {name!r}{reason}. "
        f"There are, for example: {good}."
    )
