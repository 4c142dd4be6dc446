"""What happens to a batch on the device, before the model sees it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalize(
    images: UInt8[Array, "b h w c"], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Scales to [0, 1], subtracts the mean and divides by the standard deviation per channel."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
