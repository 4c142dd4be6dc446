"""The valid values of each field of a training config, as one table of invariants."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from metaformer_jax.models.stages import AUTO, REMAT
from metaformer_jax.training import optim


@dataclasses.dataclass(frozen=True)
class Invariant:
    """A condition on a value.

    Attributes:
        text: what an error message says after "must be".
        holds: whether a value meets it, given that it meets the invariants before it.
    """

    text: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (value == 0 or _LEAST <= abs(value) <= _GREATEST)


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _all_are(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple | list) and all(map(holds, values))


def _one_of(*choices: str) -> Invariant:
    return Invariant(" or ".join(map(repr, choices)), lambda value: value in choices)


def _at_most(most: float) -> Invariant:
    return Invariant(f"at most {most:,}", lambda value: value <= most)


# float32 cannot hold smaller numbers, nor the products of some larger ones.
_LEAST, _GREATEST = 1e-30, 1e30
WHOLE = Invariant("a whole number of at most 64 bits", _is_whole)
NUMBER = Invariant(f"a number, 0 or of a size from {_LEAST:g} to {_GREATEST:g}", _is_number)
TEXT = Invariant("text, of characters that a path can have", _is_text)
FLAG = Invariant("True or False", lambda value: isinstance(value, bool))
NUMBERS = Invariant("a tuple of numbers", _all_are(_is_number))
WHOLES = Invariant("a tuple of whole numbers of at most 64 bits", _all_are(_is_whole))
TEXTS = Invariant("a tuple of texts", _all_are(_is_text))
PAIR = Invariant("two numbers, the least and the greatest", lambda values: len(values) == 2)
POSITIVE = Invariant("positive", lambda value: value > 0)
NOT_NEGATIVE = Invariant("at least 0", lambda value: value >= 0)
FRACTION = Invariant("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_ONE = Invariant("in [0, 1)", lambda value: 0 <= value < 1)
# For rates whose complement to 1 is a divisor.
ROUNDS_BELOW_ONE = Invariant("below 1 in float32 too", lambda value: bool(np.float32(value) < 1))
# Counts of steps, examples or pixels become an int32 somewhere.
COUNT = (WHOLE, POSITIVE, _at_most(2**31 - 1))
PROCESSES = Invariant(
    "a number of processes up to 4,096, or -1 for one on each core",
    lambda value: -1 <= value <= 4096,
)
STEPS = Invariant(
    "the first and the last step of a trace, or ()",
    lambda steps: (
        _all_are(_is_whole)(steps)
        and (not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]))
    ),
)
# With smaller or larger parameters, draws from Beta distributions leave the range of float32.
BETA = Invariant("0, or from 0.001 to 1000", lambda alpha: alpha == 0 or 1e-3 <= alpha <= 1e3)

# Where the code that uses a field checks its range, only the kind of value is checked here.
FIELDS: Mapping[str, tuple[Invariant, ...]] = {
    "seed": (WHOLE, NOT_NEGATIVE, _at_most(2**32 - 1)),
    "epochs": (NUMBER, POSITIVE, _at_most(1e6)),
    "cooldown_epochs": (NUMBER, NOT_NEGATIVE, _at_most(1e6)),
    "batch_size": COUNT,
    "accumulation_steps": COUNT,
    "eval_batch_size": COUNT,
    "label_smoothing": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "log_every_steps": COUNT,
    "eval_every_epochs": (NUMBER, POSITIVE),
    "on_nonfinite": (TEXT, _one_of("stop", "skip")),
    "max_skipped_updates": COUNT,
    "profile_steps": (STEPS,),
    "model.name": (TEXT,),
    "model.family": (TEXT,),
    "model.depths": (WHOLES, Invariant("at most 256 blocks", lambda depths: sum(depths) <= 256)),
    "model.dims": (
        WHOLES,
        Invariant("at most 16,384 channels", lambda dims: max((0, *dims)) <= 2**14),
    ),
    "model.drop_path_rate": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "model.head_dropout": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "model.dtype": (TEXT, _one_of("float32", "bfloat16")),
    "model.remat": (TEXT, _one_of(AUTO, *REMAT)),
    "model.scan": (WHOLE, NOT_NEGATIVE, _at_most(256)),
    "model.pretrained": (TEXT,),
    "model.fresh_head": (FLAG,),
    "model.class_map": (TEXT,),
    "data.name": (TEXT,),
    "data.root": (TEXT,),
    "data.image_size": (WHOLE, POSITIVE, _at_most(2**14)),
    "data.mean": (NUMBERS, Invariant("in [0, 1]", lambda mean: all(0 <= m <= 1 for m in mean))),
    "data.std": (NUMBERS, Invariant("positive", lambda std: all(s > 0 for s in std))),
    "data.num_workers": (WHOLE, PROCESSES),
    "data.num_threads": (WHOLE, NOT_NEGATIVE, _at_most(1024)),
    "data.max_bad_fraction": (NUMBER, NOT_NEGATIVE, _at_most(1)),
    "augment.crop": (TEXT,),
    "augment.crop_scale": (NUMBERS, PAIR),
    "augment.crop_ratio": (NUMBERS, PAIR),
    "augment.interpolations": (TEXTS,),
    "augment.flip_probability": (NUMBER,),
    "augment.randaugment": (TEXT,),
    "augment.three_augment": (FLAG,),
    "augment.color_jitter": (NUMBER, NOT_NEGATIVE, _at_most(100)),
    "augment.max_shift": (WHOLE, NOT_NEGATIVE),
    "mixing.mixup_alpha": (NUMBER, NOT_NEGATIVE, BETA),
    "mixing.cutmix_alpha": (NUMBER, NOT_NEGATIVE, BETA),
    "mixing.switch_probability": (NUMBER, FRACTION),
    "mixing.probability": (NUMBER, FRACTION),
    "mixing.group_size": COUNT,
    "erasing_probability": (NUMBER, FRACTION),
    "eval_crop_fraction": (NUMBER,),
    "eval_interpolation": (TEXT,),
    "optimizer.name": (TEXT, _one_of(*optim.OPTIMIZERS)),
    "optimizer.learning_rate": (NUMBER, POSITIVE),
    "optimizer.schedule": (TEXT, _one_of(*optim.SCHEDULES)),
    "optimizer.schedule_by": (TEXT, _one_of("epoch", "step")),
    "optimizer.warmup_epochs": (NUMBER, NOT_NEGATIVE),
    "optimizer.warmup_learning_rate": (NUMBER, NOT_NEGATIVE),
    "optimizer.min_learning_rate": (NUMBER, NOT_NEGATIVE),
    "optimizer.b1": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "optimizer.b2": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "optimizer.eps": (NUMBER, POSITIVE),
    "optimizer.weight_decay": (NUMBER, NOT_NEGATIVE),
    "optimizer.max_grad_norm": (NUMBER, NOT_NEGATIVE),
    "optimizer.layer_decay": (NUMBER, POSITIVE, _at_most(1)),
    "optimizer.head_only": (FLAG,),
    "ema.decay": (NUMBER, BELOW_ONE, ROUNDS_BELOW_ONE),
    "ema.warmup": (FLAG,),
    "mesh.data": (WHOLE,),
    "mesh.fsdp": (WHOLE,),
    "checkpoint.every_epochs": (NUMBER, POSITIVE),
    "checkpoint.keep": COUNT,
    "wandb.project": (TEXT,),
}


def check(field: str, value: Any) -> None:
    """Checks the value of a field.

    Raises:
        ValueError: it is not valid; the message says what it must be.
    """
    for invariant in FIELDS[field]:
        if not invariant.holds(value):
            raise ValueError(f"`config.{field}` must be {invariant.text}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    try:
        return repr(tuple(value) if isinstance(value, list) else value)
    except ValueError:
        return "more digits than Python prints"
