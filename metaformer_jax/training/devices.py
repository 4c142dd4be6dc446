"""Performance figures of accelerators, by name."""

import dataclasses

import jax

# Peak bfloat16 FLOP/s of one device (dense), from the makers' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
# Of a training step: a multiply-add is two operations, and the gradients of inputs and parameters
# take twice the forward pass.
TRAINING_FLOPS_PER_MAC = 2 * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The figures of a TPU chip on which estimates rest.

    Attributes:
        hbm_bytes: the memory that the compiler lets a program use (libtpu 0.0.42.1, according to
            its error messages): the data sheet's 32, 16, 95 and 32 GiB without a reserved part.
        clock_hz: of the cores. v4: Jouppi et al. 2023 (https://arxiv.org/abs/2304.01433), table 4;
            v5e: https://jax-ml.github.io/scaling-book/tpus. Those of v5p and v6e are not published:
            they are derived from the peak, with 8 matrix units of 128x128, or 4 of 256x256,
            multiply-adds per cycle, which agrees with the compiler's estimates.
        ici_bytes_per_second: sent over all links to other chips together: half of what
            https://cloud.google.com/tpu/docs gives for both directions.
    """

    hbm_bytes: int
    clock_hz: float
    ici_bytes_per_second: float


_CHIPS = {
    "TPU v4": Chip(hbm_bytes=int(30.75 * 2**30), clock_hz=1.05e9, ici_bytes_per_second=300e9),
    "TPU v5 lite": Chip(hbm_bytes=int(15.75 * 2**30), clock_hz=1.5e9, ici_bytes_per_second=200e9),
    "TPU v5": Chip(hbm_bytes=int(95.74 * 2**30), clock_hz=1.75e9, ici_bytes_per_second=600e9),
    "TPU v6 lite": Chip(hbm_bytes=int(31.25 * 2**30), clock_hz=1.75e9, ici_bytes_per_second=400e9),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, by the name that JAX gives it; None if it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    matching = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(matching, key=len)] if matching else None


def chip(device_kind: str) -> Chip | None:
    """The figures of a TPU, by the name that JAX gives it; None for any other device.

    >>> chip("TPU v5 lite").clock_hz
    1500000000.0
    """
    return _CHIPS.get(device_kind)


def model_flops_utilization(images_per_second: float, macs_per_image: int) -> float | None:
    """The fraction of all devices' peak that training uses; None if the peak is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    flops = images_per_second * macs_per_image * TRAINING_FLOPS_PER_MAC
    return flops / (peak * jax.device_count())
