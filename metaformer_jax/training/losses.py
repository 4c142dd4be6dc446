"""The training loss."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def smoothed_cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Cross-entropy per example against one-hot labels smoothed over all classes, in float32.

    Of each target `label_smoothing` goes to all classes alike (https://arxiv.org/abs/1512.00567).
    """
    logits = logits.astype(jnp.float32)
    targets = optax.smooth_labels(
        jnp.eye(logits.shape[-1], dtype=jnp.float32)[labels], label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)
