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

# Lines of a message that are shown.
_MAX_NAMED = 5


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
    """A context in which an error about an argument is prefixed with the config's field.

    Args:
        default: the field for errors that do not begin with one of the arguments named here.
        **fields_of: from an argument's name to the field that it comes from.
    """
    try:
        yield
    except ValueError as error:
        argument = re.match(r"`(\w+)`", str(error))
        field = fields_of.get(argument[1], default) if argument else default
        if field is None or "`config." in str(error):
            raise
        raise ValueError(f"config.{field}: {error}") from error


def check_known(field: str) -> None:
    """Checks that a dotted name is a field of a training config.

    Raises:
        ValueError: it is not; the message suggests similar ones.
    """
    known = flatten(recipes.base_config())
    # "model" is not a value, but a part of the tree.
    if field not in known and not any(name.startswith(f"{field}.") for name in known):
        by_last_part = {name.rpartition(".")[2]: name for name in known}
        close = difflib.get_close_matches(field, known, n=3) or [
            by_last_part[part] for part in difflib.get_close_matches(field, by_last_part, n=3)
        ]
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


def first_few(lines: list[str], *, indent: str = "") -> list[str]:
    """The first lines of a message, and how many more there are."""
    more = len(lines) - _MAX_NAMED
    return [*lines[:_MAX_NAMED], *([f"{indent}and {more:,} more"] if more > 0 else [])]


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The flat config as JSON returns it, with lists instead of tuples."""
    return json.loads(json.dumps(flatten(config)))
