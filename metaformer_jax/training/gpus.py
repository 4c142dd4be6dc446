"""NVIDIA GPUs that XLA compiles programs for, whether or not this machine has one."""

import dataclasses
from typing import Any

# JAX takes this part of a GPU's memory for itself, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
MEMORY_FRACTION = 0.75
# Which algorithm is the fastest can only be tried out on a GPU. Without one, XLA takes the default
# ones of cuBLAS and cuDNN; its own matrix products have no default that fits every shape.
OPTIONS_WITHOUT_GPU: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_triton_gemm": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the compiler has to know of a GPU.

    The figures are those of the makers' data sheets, and of the descriptions of GPUs that XLA comes
    with (https://github.com/openxla/xla, xla/backends/gpu/target_config/specs).

    Attributes:
        device_kind: as JAX names it.
        capability: compute capability, major and minor.
        num_cores: streaming multiprocessors.
        units_per_core: lanes for float32.
        clock_ghz: boost clock.
        memory_bytes: as CUDA reports it.
        memory_bytes_per_second: bandwidth.
        l2_bytes: second-level cache.
        shared_bytes_per_core: shared memory.
        shared_bytes_per_block: of which a block of threads may ask for.
    """

    device_kind: str
    capability: tuple[int, int]
    num_cores: int
    units_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int

    @property
    def memory_limit(self) -> int:
        """The bytes that programs of JAX can use, by default."""
        return int(self.memory_bytes * MEMORY_FRACTION)


_AMPERE: dict[str, Any] = {
    "capability": (8, 0),
    "num_cores": 108,
    "units_per_core": 64,
    "clock_ghz": 1.41,
    "l2_bytes": 40 * 2**20,
    "shared_bytes_per_core": 164 * 2**10,
    "shared_bytes_per_block": 163 * 2**10,
}
_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "num_cores": 132,
    "units_per_core": 128,
    "clock_ghz": 1.98,
    "l2_bytes": 50 * 2**20,
    "shared_bytes_per_core": 228 * 2**10,
    "shared_bytes_per_block": 227 * 2**10,
}
GPUS = {
    "a100-40gb": Gpu(
        device_kind="NVIDIA A100-SXM4-40GB",
        memory_bytes=42_331_013_120,
        memory_bytes_per_second=1_555_200_000_000,
        **_AMPERE,
    ),
    "a100": Gpu(
        device_kind="NVIDIA A100-SXM4-80GB",
        memory_bytes=85_100_068_864,
        memory_bytes_per_second=2_039_040_000_000,
        **_AMPERE,
    ),
    "h100": Gpu(
        device_kind="NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        memory_bytes_per_second=3_352_320_000_000,
        **_HOPPER,
    ),
    "h200": Gpu(
        device_kind="NVIDIA H200 141GB HBM3e",
        memory_bytes=151_397_597_184,
        memory_bytes_per_second=4_800_000_000_000,
        **_HOPPER,
    ),
    "b200": Gpu(
        device_kind="NVIDIA B200",
        capability=(10, 0),
        num_cores=148,
        units_per_core=128,
        clock_ghz=1.965,
        memory_bytes=191_514_411_008,
        memory_bytes_per_second=7_672_320_000_000,
        l2_bytes=132_644_864,
        shared_bytes_per_core=228 * 2**10,
        shared_bytes_per_block=227 * 2**10,
    ),
}


def gpu_of_kind(device_kind: str) -> Gpu | None:
    """The GPU that JAX gives this name; None for any other device.

    >>> gpu_of_kind("NVIDIA H200 141GB HBM3e").num_cores
    132
    """
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def target_config(gpu: Gpu) -> str:
    """The description of a GPU that XLA compiles for, as the text of its protocol buffer."""
    major, minor = gpu.capability
    # The version of cuDNN is asked for by fused attention.
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.num_cores}
          fpus_per_core: {gpu.units_per_core}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory_bytes}
          memory_bandwidth: {gpu.memory_bytes_per_second}
          l2_cache_size: {gpu.l2_bytes}
          shared_memory_per_core: {gpu.shared_bytes_per_core}
          shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          threads_per_warp: 32
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{gpu.device_kind}"
    """
