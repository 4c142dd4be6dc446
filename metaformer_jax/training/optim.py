"""Learning-rate schedules and optimisers of the published recipes, on optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

SCHEDULES = ("cosine", "constant")
# More than rounding adds to a number of steps, and less than what is between two of them.
ROUNDING = 1e-14
OPTIMIZERS = ("adamw", "lamb")

Tree = dict[str, Any]
# From epochs, whole or fractional, to learning rates; NumPy arrays in float64, or JAX arrays.
EpochSchedule = Callable[[Any], Any]


def epoch_schedule(
    name: str,
    *,
    peak: float,
    epochs: float,
    warmup_epochs: float,
    warmup_from: float = 1e-6,
    end: float = 1e-5,
) -> EpochSchedule:
    """Linear warm-up, then a cosine from `peak` to `end`, or a constant `peak`.

    As in the published recipe the cosine is not shifted by the warm-up: it starts at epoch 0, and
    the warm-up replaces its beginning. After `epochs` the cosine stays at `end`.

    Args:
        name: `"cosine"` or `"constant"`.
        peak: the highest rate.
        epochs: length of the cosine.
        warmup_epochs: length of the warm-up.
        warmup_from: the first rate of the warm-up.
        end: the last rate of the cosine.

    Raises:
        ValueError: there is no such schedule, or the warm-up is not shorter than the training.
    """
    if name not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"`warmup_epochs` must be less than the {epochs:g} epochs of the training, got "
            f"{warmup_epochs:g}. Shorten the warm-up or train longer."
        )

    def schedule(epoch: Any) -> Any:
        xp = jnp if isinstance(epoch, jax.Array) else np
        warmup = warmup_from + epoch * (peak - warmup_from) / (warmup_epochs or 1)
        main = xp.full_like(warmup, peak)
        if name == "cosine":
            cosine = end + 0.5 * (peak - end) * (1 + xp.cos(xp.pi * epoch / epochs))
            main = xp.where(epoch < epochs, cosine, end)
        return xp.where(epoch < warmup_epochs, warmup, main)

    return schedule


def by_step(
    schedule: EpochSchedule, *, steps_per_epoch: float, total_steps: int, per_epoch: bool
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
        schedule: the rate as a function of the epoch.
        steps_per_epoch: may be fractional, because batches run across the end of an epoch.
        total_steps: of the training.
        per_epoch: whether the rate changes only at the first step of each epoch, as published, and
            not at every step.
    """
    if not per_epoch:
        return lambda step: schedule(jnp.asarray(step, jnp.float32) / steps_per_epoch)
    epochs = np.arange(np.ceil(total_steps / steps_per_epoch) + 1)
    # A table of whole steps, with rates computed in float64: no rounding shifts an epoch or a rate.
    # A product that should be a whole number may be slightly above it.
    first_steps = np.ceil(epochs * steps_per_epoch * (1 - ROUNDING))
    first_steps = np.minimum(first_steps, np.iinfo(np.int32).max).astype(np.int32)
    rates = schedule(epochs).astype(np.float32)
    return lambda step: jnp.asarray(rates)[jnp.searchsorted(first_steps, step, side="right") - 1]


def is_decayed(params: Tree) -> Tree:
    """For each parameter, whether weight decay applies to it: not to scales and biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def layer_scales(params: Tree, decay: float) -> Tree:
    """For each parameter, `decay` to the power of its distance from the head (BEiT, appendix H).

    The layers are the stem, each block (with the downsampling before it), and norm and head.

    Args:
        params: of a `MetaFormer`.
        decay: 1 for equal rates.
    """
    depths = [len(params["stages"][stage]) for stage in range(len(params["stages"]))]
    last = sum(depths) + 1

    def layer(path: tuple[Any, ...]) -> int:
        name, *inner = (entry.key for entry in path)
        if name == "stages":
            return sum(depths[: inner[0]]) + inner[1] + 1
        if name == "downsample_layers":
            return sum(depths[: inner[0]]) + 1 if inner[0] else 0
        return last

    return jax.tree_util.tree_map_with_path(lambda path, _: decay ** (last - layer(path)), params)


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    max_grad_norm: float | None = None,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (https://arxiv.org/abs/1711.05101) or LAMB (https://arxiv.org/abs/1904.00962).

    Neither applies weight decay to one-dimensional parameters (scales and biases). LAMB, as
    published for CAFormer, scales each update to the norm of its parameter (the trust ratio,
    unclipped), but not for parameters without weight decay: those of one dimension, or all if
    `weight_decay` is 0.

    Args:
        name: `"adamw"` or `"lamb"`.
        learning_rate: as a function of the step.
        b1: decay of the mean of the gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: fraction of a parameter, times the learning rate, subtracted at each step.
        max_grad_norm: the global norm to which gradients are clipped; None for no clipping.
        layer_decay: the factor by which rates decrease from layer to layer, see `layer_scales`.

    Raises:
        ValueError: there is no such optimiser.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
    off = optax.identity()
    has_trust_ratio = name == "lamb" and weight_decay
    # Each has its place in the state, also where it is off, so that a run can go on with it on.
    return optax.chain(
        off if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_decayed),
        optax.masked(optax.scale_by_trust_ratio() if has_trust_ratio else off, is_decayed),
        off if layer_decay == 1 else _scale_layers(layer_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_layers(decay: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay))
    )
