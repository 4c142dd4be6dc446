"""Checks a config before any work, and remembers the one that a workdir was made with."""

import difflib
import json
import pathlib
from typing import Any

import ml_collections

from metaformer_jax.models.stages import REMAT
from metaformer_jax.training import optim, recipes


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Refuses fields that no run reads, missing ones, and numbers out of range.

    Raises:
        ValueError: naming the field, its value and what would do.
    """
    known, given = flatten(recipes.base_config()), flatten(config)
    for field in given:
        check_known(field)
    for field in known:
        if field not in given:
            raise ValueError(
                f"`config.{field}` is missing. Start from recipes.base_config(), which has it."
            )
    positive = (
        "epochs",
        "batch_size",
        "accumulation_steps",
        "eval_batch_size",
        "log_every_steps",
        "eval_every_epochs",
        "data.image_size",
        "mixing.group_size",
        "optimizer.learning_rate",
        "optimizer.layer_decay",
        "max_skipped_updates",
        "checkpoint.every_epochs",
        "checkpoint.keep",
    )
    for field in positive:
        if not given[field] > 0:
            raise ValueError(f"`config.{field}` must be positive, got {given[field]}.")
    not_negative = (
        "seed",
        "cooldown_epochs",
        "model.scan",
        "data.num_threads",
        "data.max_bad_fraction",
        "augment.color_jitter",
        "augment.max_shift",
        "mixing.mixup_alpha",
        "mixing.cutmix_alpha",
        "optimizer.warmup_epochs",
        "optimizer.warmup_learning_rate",
        "optimizer.min_learning_rate",
        "optimizer.weight_decay",
        "optimizer.max_grad_norm",
    )
    for field in not_negative:
        if given[field] < 0:
            raise ValueError(f"`config.{field}` must not be negative, got {given[field]}.")
    if given["optimizer.warmup_epochs"] >= given["epochs"]:
        raise ValueError(
            f"`config.optimizer.warmup_epochs` must be less than the {given['epochs']:g} epochs of "
            f"the training, got {given['optimizer.warmup_epochs']:g}."
        )
    for field in ("label_smoothing", "optimizer.b1", "optimizer.b2", "ema.decay"):
        if not 0 <= given[field] < 1:
            raise ValueError(f"`config.{field}` must be in [0, 1), got {given[field]}.")
    for field in ("mixing.switch_probability", "mixing.probability", "erasing_probability"):
        if not 0 <= given[field] <= 1:
            raise ValueError(f"`config.{field}` must be in [0, 1], got {given[field]}.")
    if given["data.num_workers"] < -1:
        raise ValueError(
            "`config.data.num_workers` must be a number of processes, or -1 for one on each core, "
            f"got {given['data.num_workers']}."
        )
    for field in ("data.mean", "data.std"):
        if any(not isinstance(value, int | float) for value in given[field]):
            raise ValueError(f"`config.{field}` must be numbers, got {given[field]}.")
    if any(value <= 0 for value in given["data.std"]):
        raise ValueError(f"`config.data.std` must be positive, got {given['data.std']}.")
    for field in ("model.fresh_head", "model.class_map"):
        if given[field] and not given["model.pretrained"]:
            raise ValueError(
                f"`config.{field}` must be left out without config.model.pretrained, got "
                f"{given[field]!r}."
            )
    choices = {
        "model.dtype": ("float32", "bfloat16"),
        "model.remat": tuple(REMAT),
        "optimizer.name": optim.OPTIMIZERS,
        "optimizer.schedule": optim.SCHEDULES,
        "optimizer.schedule_by": ("epoch", "step"),
        "on_nonfinite": ("stop", "skip"),
    }
    for field, values in choices.items():
        if given[field] not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise ValueError(f"`config.{field}` must be {allowed}, got {given[field]!r}.")
    if given["optimizer.head_only"] and given["optimizer.layer_decay"] != 1:
        raise ValueError(
            "`config.optimizer.layer_decay` must be 1 where config.optimizer.head_only leaves one "
            f"layer to train, got {given['optimizer.layer_decay']:g}."
        )
    steps = given["profile_steps"]
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ValueError(
            "`config.profile_steps` must be the first and the last step of a trace, or (), got "
            f"{tuple(steps)}."
        )


def check_known(field: str) -> None:
    """Refuses a dotted name that no training config has.

    Raises:
        ValueError: offering the close ones.
    """
    known = flatten(recipes.base_config())
    # A part of the tree, "model", is not a value, but it is there.
    if field not in known and not any(name.startswith(f"{field}.") for name in known):
        by_last_part = {name.rpartition(".")[2]: name for name in known}
        close = difflib.get_close_matches(field, known, n=3) or [
            by_last_part[part] for part in difflib.get_close_matches(field, by_last_part, n=3)
        ]
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known)}."
        raise ValueError(f"`config.{field}` is not a field of a training config. {hint}")


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values by dotted field name, `{"model.dtype": "float32", ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def claim_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    *,
    accept_changes: bool = False,
    is_writer: bool = True,
) -> None:
    """Makes the folder and writes `config.json`, or checks that this config made it.

    Args:
        workdir: the run's folder.
        config: what the run does.
        accept_changes: another config may have made it.
        is_writer: whether this process writes; each one checks.

    Raises:
        ValueError: another config made it, and `accept_changes` is not set; or it cannot be
            written to.
    """
    mine = as_json(config)
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not accept_changes:
            _check_same(json.loads(path.read_text()), mine, workdir)
        if not is_writer:
            return
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(mine, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise ValueError(
            f"`workdir` must be a folder that can be written to, got {str(workdir)!r}: "
            f"{error.strerror}."
        ) from error


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """A line for each field, of two flat configs out of JSON, that is not the same."""
    absent = "(absent)"
    return [
        f"  {field}: {theirs.get(field, absent)} -> {mine.get(field, absent)}"
        for field in sorted({*theirs, *mine})
        if theirs.get(field, absent) != mine.get(field, absent)
    ]


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The flat config as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(flatten(config)))


def _check_same(theirs: dict[str, Any], mine: dict[str, Any], workdir: pathlib.Path) -> None:
    if changes := differences(theirs, mine):
        raise ValueError(
            f"`workdir` must be new or made by the same config, but {str(workdir)!r} was made with "
            "other values:\n" + "\n".join(changes) + "\nUse another --workdir, or continue "
            "this one with the new values by --accept_config_changes."
        )
