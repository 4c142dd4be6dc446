"""Values that each field of a config can have, and values that it cannot."""

import os

import ml_collections
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from metaformer_jax import models
from metaformer_jax.data import augment
from metaformer_jax.models.stages import AUTO, REMAT
from metaformer_jax.training import recipes
from metaformer_jax.training.settings import flatten

FIELDS = tuple(flatten(recipes.base_config()))


def bounded(examples):
    return settings(
        max_examples=examples * int(os.environ.get("FUZZ_FACTOR", "1")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Values by their kind.
COUNTS = st.integers(1, 50)
FLAGS = st.booleans()
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def numbers(least=0.0, most=1e6):
    return st.floats(least, most, allow_subnormal=False).filter(lambda x: x == 0 or x >= 1e-30)


def four(values):
    return st.tuples(values, values, values, values)


def pair(values):
    return st.tuples(values, values).map(lambda drawn: tuple(sorted(drawn)))


POSITIVE = numbers(1e-30, 1e30)
POSITIVE_FRACTION = numbers(1e-30, 1.0)
BELOW_ONE = numbers(0.0, 0.9999)
FRACTION = numbers(0.0, 1.0)
ALPHA = st.just(0.0) | numbers(0.001, 1000.0)
FILTERS = st.sampled_from(sorted(augment.INTERPOLATIONS))
POLICIES = st.builds(
    "rand-m{}-mstd{}-n{}-p{}-inc1".format,
    st.integers(0, 10),
    st.sampled_from(["0", "0.5", "999999999"]),
    st.integers(1, 5),
    st.sampled_from(["0", "0.5", "1"]),
)

VALID = {
    "seed": st.integers(0, 2**32 - 1),
    "epochs": numbers(1e-30),
    "cooldown_epochs": numbers(),
    "batch_size": COUNTS,  # of mixing groups, devices and accumulation steps
    "accumulation_steps": st.sampled_from([1, 2, 3]),
    "eval_batch_size": st.integers(1, 2**31 - 1),
    "label_smoothing": BELOW_ONE,
    "log_every_steps": st.integers(1, 2**31 - 1),
    "eval_every_epochs": POSITIVE,
    "on_nonfinite": st.sampled_from(["stop", "skip"]),
    "max_skipped_updates": COUNTS,
    "profile_steps": st.just(()) | pair(COUNTS),
    "model.name": st.sampled_from(models.list_models("*former*_s12")),
    "model.family": st.sampled_from(sorted(models.FAMILIES)),
    "model.depths": four(st.integers(1, 2)),
    "model.dims": four(st.integers(1, 40) | st.just(2**14)),
    "model.drop_path_rate": BELOW_ONE,
    "model.head_dropout": BELOW_ONE,
    "model.dtype": st.sampled_from(["float32", "bfloat16"]),
    "model.remat": st.sampled_from((AUTO, *REMAT)),
    "model.scan": st.integers(0, 256),
    "model.pretrained": TEXT,
    "model.fresh_head": FLAGS,
    "model.class_map": TEXT,
    "data.name": st.just("digits"),
    "data.root": TEXT,
    "data.image_size": st.integers(3, 64),
    "data.mean": st.tuples(FRACTION),
    "data.std": st.tuples(POSITIVE),
    "data.num_workers": st.integers(-1, 64),
    "data.num_threads": st.integers(0, 64),
    "data.max_bad_fraction": FRACTION,
    "augment.crop": st.sampled_from(augment.CROPS),
    "augment.crop_scale": pair(POSITIVE_FRACTION),
    "augment.crop_ratio": pair(POSITIVE),
    "augment.interpolations": st.lists(FILTERS, min_size=1).map(tuple)
    | st.lists(FILTERS, min_size=1),
    "augment.flip_probability": FRACTION,
    "augment.randaugment": st.just("") | POLICIES,
    "augment.three_augment": FLAGS,
    "augment.color_jitter": numbers(0.0, 100.0),
    "augment.max_shift": st.integers(0, 3),
    "mixing.mixup_alpha": ALPHA,
    "mixing.cutmix_alpha": ALPHA,
    "mixing.switch_probability": FRACTION,
    "mixing.probability": FRACTION,
    "mixing.group_size": st.sampled_from([1, 2, 4]),
    "erasing_probability": FRACTION,
    "eval_crop_fraction": numbers(0.1, 1.0),
    "eval_interpolation": FILTERS,
    "optimizer.name": st.sampled_from(["adamw", "lamb"]),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.schedule": st.sampled_from(["cosine", "constant"]),
    "optimizer.schedule_by": st.sampled_from(["epoch", "step"]),
    "optimizer.warmup_epochs": BELOW_ONE,  # of the epochs
    "optimizer.warmup_learning_rate": numbers(0.0, 1e30),
    "optimizer.min_learning_rate": numbers(0.0, 1e30),
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": numbers(0.0, 1e30),
    "optimizer.max_grad_norm": numbers(0.0, 1e30),
    "optimizer.layer_decay": numbers(1e-30, 1.0),
    "optimizer.head_only": FLAGS,
    "ema.decay": BELOW_ONE,
    "ema.warmup": FLAGS,
    "mesh.data": st.just(-1),
    "mesh.fsdp": st.sampled_from([1, 2, 4, 8]),
    "checkpoint.every_epochs": POSITIVE,
    "checkpoint.keep": COUNTS,
    "wandb.project": TEXT,
}

# What is no value of a kind, and of no other kind either.
OTHER = (
    st.none() | st.binary() | st.just({}) | st.just({"a": 1}) | st.just([[1]]) | st.just((None,))
)
WORDS = st.text(max_size=20)
HUGE = st.sampled_from([2**31, 2**63, 10**400, 10**5000])
BROKEN = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e31, 5e-324, 10**5000])
NO_NUMBER = OTHER | WORDS | FLAGS | st.just(()) | st.just((1.0,)) | BROKEN
NO_WHOLE = NO_NUMBER | st.floats()
NO_FLAG = OTHER | WORDS | st.integers() | st.floats()
NO_TEXT = (
    OTHER | FLAGS | st.integers() | st.floats() | st.sampled_from(["\0", "a\0b", "\ud800", ("a",)])
)
NO_COUNT = NO_WHOLE | HUGE | st.integers(max_value=0)


def no_choice(*choices):
    return (NO_TEXT | WORDS).filter(lambda value: value not in choices)


NEGATIVE = st.floats(max_value=-1e-30) | st.integers(max_value=-1)
NO_POSITIVE = NO_NUMBER | NEGATIVE | st.sampled_from([0, 0.0, -0.0])
NO_BELOW_ONE = NO_NUMBER | NEGATIVE | st.floats(1.0) | st.sampled_from([1, 1 - 1e-12])
NO_FRACTION = NO_NUMBER | NEGATIVE | st.floats(1.0, exclude_min=True) | st.integers(2)
NO_ALPHA = NO_NUMBER | NEGATIVE | numbers(1e-30, 0.0009) | numbers(1001.0, 1e30)
NO_PAIR = (
    NO_NUMBER
    | st.floats()
    | st.sampled_from([(), (1.0,), (0.1, 0.2, 0.3), (0.5, 0.1), (0.0, 1.0), (-1.0, 1.0)])
    | st.sampled_from([(0.5, float("inf")), (float("nan"), 1.0), ("0.1", "1"), (True, True)])
)
NO_SIZES = (
    OTHER
    | WORDS
    | st.integers()
    | st.lists(st.integers(1, 4), max_size=9).filter(lambda sizes: len(sizes) != 4).map(tuple)
    | st.tuples(*[st.integers(1, 9)] * 3, NO_COUNT)
)
NO_CHANNEL = OTHER | WORDS | st.floats() | st.sampled_from([(), (0.5,) * 3, ("0.5",), (True,)])

INVALID = {
    "seed": NO_WHOLE | st.integers(max_value=-1) | st.integers(2**32),
    "epochs": NO_POSITIVE | st.just(1e7),
    "cooldown_epochs": NO_NUMBER | NEGATIVE | st.just(1e7),
    "batch_size": NO_COUNT | st.integers(1443) | st.integers(1, 7),
    "accumulation_steps": NO_COUNT | st.integers(17),
    "eval_batch_size": NO_COUNT,
    "label_smoothing": NO_BELOW_ONE,
    "log_every_steps": NO_COUNT,
    "eval_every_epochs": NO_POSITIVE,
    "on_nonfinite": no_choice("stop", "skip"),
    "max_skipped_updates": NO_COUNT,
    "profile_steps": NO_FLAG
    | st.sampled_from([(5,), (2, 1), (0, 1), (1, 2, 3), (1.0, 2.0), ("1", "2"), (True, 2), 3]),
    "model.name": no_choice("", *models.list_models()),
    "model.family": no_choice(*models.FAMILIES),
    "model.depths": NO_SIZES,
    "model.dims": NO_SIZES,
    "model.drop_path_rate": NO_BELOW_ONE,
    "model.head_dropout": NO_BELOW_ONE,
    "model.dtype": no_choice("float32", "bfloat16"),
    "model.remat": no_choice(AUTO, *REMAT),
    "model.scan": NO_WHOLE | HUGE | st.integers(max_value=-1) | st.just(257),
    "model.pretrained": NO_TEXT,
    "model.fresh_head": NO_FLAG | st.just(True),
    "model.class_map": NO_TEXT | st.just("map.json"),
    "data.name": no_choice("digits"),
    "data.root": NO_TEXT,
    "data.image_size": NO_COUNT | st.integers(1, 2) | st.integers(2**14 + 1),
    "data.mean": NO_CHANNEL | st.tuples(NO_FRACTION),
    "data.std": NO_CHANNEL | st.tuples(NO_POSITIVE),
    "data.num_workers": NO_WHOLE | HUGE | st.integers(max_value=-2),
    "data.num_threads": NO_WHOLE | HUGE | st.integers(max_value=-1),
    "data.max_bad_fraction": NO_FRACTION,
    "augment.crop": no_choice(*augment.CROPS),
    "augment.crop_scale": NO_PAIR | st.just((0.5, 1.5)),
    "augment.crop_ratio": NO_PAIR,
    "augment.interpolations": NO_FLAG | st.just(()) | st.just(("cubic",)) | st.just("bicubic"),
    "augment.flip_probability": NO_FRACTION,
    "augment.randaugment": NO_TEXT
    | WORDS.filter(lambda text: text and not text.startswith("rand-m9"))
    | st.sampled_from(["rand", "rand-m11-inc1", "rand-n0-inc1", "rand-n1.5-inc1", "rand-p2-inc1"])
    | st.sampled_from(["rand-m" + "9" * 400 + "-inc1", "rand-n99999-inc1", "rand-m\u0663-inc1"]),
    "augment.three_augment": NO_FLAG,
    "augment.color_jitter": NO_NUMBER | NEGATIVE,
    "augment.max_shift": NO_WHOLE | HUGE | st.integers(max_value=-1) | st.integers(33),
    "mixing.mixup_alpha": NO_ALPHA,
    "mixing.cutmix_alpha": NO_ALPHA,
    "mixing.switch_probability": NO_FRACTION,
    "mixing.probability": NO_FRACTION,
    "mixing.group_size": NO_COUNT | st.integers(17) | st.sampled_from([3, 5, 12]),
    "erasing_probability": NO_FRACTION,
    "eval_crop_fraction": NO_FRACTION | st.sampled_from([0, 0.0, 1e-30, 1e-4]),
    "eval_interpolation": no_choice(*augment.INTERPOLATIONS),
    "optimizer.name": no_choice("adamw", "lamb"),
    "optimizer.learning_rate": NO_POSITIVE,
    "optimizer.schedule": no_choice("cosine", "constant"),
    "optimizer.schedule_by": no_choice("epoch", "step"),
    "optimizer.warmup_epochs": NO_NUMBER | NEGATIVE | numbers(15.0, 1e30),
    "optimizer.warmup_learning_rate": NO_NUMBER | NEGATIVE,
    "optimizer.min_learning_rate": NO_NUMBER | NEGATIVE,
    "optimizer.b1": NO_BELOW_ONE,
    "optimizer.b2": NO_BELOW_ONE,
    "optimizer.eps": NO_POSITIVE,
    "optimizer.weight_decay": NO_NUMBER | NEGATIVE,
    "optimizer.max_grad_norm": NO_NUMBER | NEGATIVE,
    "optimizer.layer_decay": NO_POSITIVE | st.floats(1.0, exclude_min=True),
    "optimizer.head_only": NO_FLAG,
    "ema.decay": NO_BELOW_ONE,
    "ema.warmup": NO_FLAG,
    "mesh.data": NO_WHOLE | HUGE | st.integers(max_value=-2) | st.sampled_from([0, 3]),
    "mesh.fsdp": NO_WHOLE | HUGE | st.integers(max_value=-1) | st.sampled_from([0, 3]),
    "checkpoint.every_epochs": NO_POSITIVE,
    "checkpoint.keep": NO_COUNT,
    "wandb.project": NO_TEXT,
}
STARTS = {
    "digits": recipes.digits,
    "the published training": lambda: recipes.published("caformer_b36"),
    "the published fine-tuning": lambda: recipes.published("convformer_s18", "384"),
}


def small(start="digits"):
    """A recipe on the digits, for the smallest model."""
    config = STARTS[start]()
    config.model.update(name="", family="identityformer", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    config.model.pretrained = ""
    config.data.update(name="digits", root="", image_size=32, mean=(0.3,), std=(0.4,))
    config.update(epochs=15.0, batch_size=128)
    config.optimizer.warmup_epochs = 2.0
    config.mixing.update(mixup_alpha=0.8, group_size=2)
    return config


def change(config, field, value):
    """Sets any value, as a config file can that builds its config from a plain dict."""
    fields = flatten(config)
    fields[field] = value
    nested = {}
    for name, leaf in fields.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return ml_collections.ConfigDict(nested)
