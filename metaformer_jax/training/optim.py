"""Learning-rate schedule and optimiser."""

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    warmup_from: float = 1e-6,
    end: float = 1e-5,
) -> optax.Schedule:
    """Linear warm-up, then a cosine from the peak to the end; the rate for each step.

    As in the published recipe the cosine is not shifted by the warm-up: it would start at step 0.

    Raises:
        ValueError: the warm-up is as long as the training, or longer.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"`warmup_steps` must be less than the {total_steps} steps of the training, got "
            f"{warmup_steps}. Shorten the warm-up or train longer."
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        cosine = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))
        warmup = warmup_from + (peak - warmup_from) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, end))

    return schedule


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW, without weight decay on one-dimensional parameters (scales and biases).

    Args:
        learning_rate: the rate for each step.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: share of a parameter, times the learning rate, taken off at each step.
        max_grad_norm: the global norm that gradients are cut to; None leaves them.
    """
    transforms = [
        optax.adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        )
    ]
    if max_grad_norm is not None:
        transforms.insert(0, optax.clip_by_global_norm(max_grad_norm))
    return optax.chain(*transforms)
