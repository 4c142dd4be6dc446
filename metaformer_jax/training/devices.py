"""What is known of accelerators by name."""

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
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
# Forward, and twice as much for the gradients of inputs and of parameters; a multiply-add is two.
_FLOPS_PER_MAC = 2 * 3


def peak_flops(device_kind: str) -> float | None:
    """Of one device, by the name that JAX gives it; None where it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    matching = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(matching, key=len)] if matching else None


def model_flops_utilization(images_per_second: float, macs_per_image: int) -> float | None:
    """The part of all devices' peak that training uses; None where the peak is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return images_per_second * macs_per_image * _FLOPS_PER_MAC / (peak * jax.device_count())
