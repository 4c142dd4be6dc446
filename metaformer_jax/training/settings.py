"""Checks a config before any work, and compares it with another."""

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from metaformer_jax.training import fields, recipes

# The largest side, in pixels, of a resized image from which an evaluation takes its centre crop.
_MAX_RESIZED = 2**15
# What users of other programs call these fields.
_ABBREVIATED = {
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "warmup_lr": "optimizer.warmup_learning_rate",
    "wd": "optimizer.weight_decay",
    "opt": "optimizer.name",
    "clip_grad": "optimizer.max_grad_norm",
    "smoothing": "label_smoothing",
    "drop_path": "model.drop_path_rate",
    "workers": "data.num_workers",
}


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Checks that a config has all known fields, no others, and valid values.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    known, given = flatten(recipes.base_config()), flatten(config)
    for field in given:
        if field not in known:
            check_known(field)
    for field in known:
        if field not in given:
            raise ValueError(
                f"`config.{field}` is missing. Start from recipes.base_config(), which has it."
            )
    for field, value in given.items():
        fields.check(field, value)
    if given["optimizer.warmup_epochs"] >= given["epochs"]:
        raise ValueError(
            f"`config.optimizer.warmup_epochs` must be less than the {given['epochs']:g} epochs of "
            f"the training, got {given['optimizer.warmup_epochs']:g}."
        )
    if given["augment.max_shift"] > given["data.image_size"]:
        raise ValueError(
            f"`config.augment.max_shift` must be at most the {given['data.image_size']} pixels of "
            f"config.data.image_size, got {given['augment.max_shift']}."
        )
    if 0 < given["eval_crop_fraction"] < given["data.image_size"] / _MAX_RESIZED:
        raise ValueError(
            f"`config.eval_crop_fraction` must leave at most {_MAX_RESIZED:,} pixels to crop "
            f"{given['data.image_size']} from, got {given['eval_crop_fraction']}."
        )
    for field in ("model.fresh_head", "model.class_map"):
        if given[field] and not given["model.pretrained"]:
            raise ValueError(
                f"`config.{field}` must be left out without config.model.pretrained, got "
                f"{given[field]!r}."
            )
    if given["optimizer.head_only"] and given["optimizer.layer_decay"] != 1:
        raise ValueError(
            "`config.optimizer.layer_decay` must be 1 where config.optimizer.head_only leaves one "
            f"layer to train, got {given['optimizer.layer_decay']:g}."
        )


@contextlib.contextmanager
def naming(default: str | None = None, **fields_of: str) -> Iterator[None]:
    """A context in which an error about an argument names the config's field instead.

    Args:
        default: the field for errors that do not begin with one of the arguments named here.
        **fields_of: from an argument's name to the field that it comes from.
    """
    try:
        yield
    except ValueError as error:
        argument = re.match(r"`(\w+)`", str(error))
        if "`config." in str(error):
            raise
        if argument and argument[1] in fields_of:
            rest = str(error)[argument.end() :]
            raise ValueError(f"`config.{fields_of[argument[1]]}`{rest}") from error
        if default is None:
            raise
        raise ValueError(f"config.{default}: {error}") from error


def check_known(field: str) -> None:
    """Checks that a dotted name is a field of a training config.

    Raises:
        ValueError: it is not; the message suggests similar ones.
    """
    known = flatten(recipes.base_config())
    # "model" is not a value, but a part of the tree.
    if field not in known and not any(name.startswith(f"{field}.") for name in known):
        by_last_part = {name.rpartition(".")[2]: name for name in known}
        last_part = field.rpartition(".")[2]
        close = (
            [_ABBREVIATED[last_part]]
            if last_part in _ABBREVIATED
            else difflib.get_close_matches(field, known, n=3)
            or [by_last_part[part] for part in difflib.get_close_matches(field, by_last_part, n=3)]
        )
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known)}."
        raise ValueError(
            f"`config.{repr(field)[1:-1]}` is not a field of a training config. {hint}"
        )


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values by dotted field name, `{"model.dtype": "float32", ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """A line for each field in which two flat configs, read from JSON, differ."""
    absent = "(absent)"
    return [
        f"  {field}: {theirs.get(field, absent)} -> {mine.get(field, absent)}"
        for field in sorted({*theirs, *mine})
        if theirs.get(field, absent) != mine.get(field, absent)
    ]


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The flat config as JSON returns it, with lists instead of tuples."""
    return json.loads(json.dumps(flatten(config)))
