"""What a run keeps of its config and data, and how later starts and other uses compare with it."""

import itertools
import json
import pathlib

import ml_collections

from metaformer_jax.messages import first_few
from metaformer_jax.models import MetaFormerSpec
from metaformer_jax.training import settings
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import (
    CLASS_NAMES,
    CONFIG,
    NUM_EXAMPLES,
    read_class_names,
    read_config,
    read_num_examples,
    read_spec,
)

_ARCHITECTURE = tuple(f"model.{field}" for field in ("name", "family", "depths", "dims"))
# Weights depend on the normalisation of training; size, crop and filter may be changed.
_NORMALISATION = ("data.mean", "data.std")


def write_provenance(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
) -> None:
    """Writes what later starts compare with: config, class names and numbers of examples.

    To be called just before the first step, so that a failed start changes nothing. Of several
    processes only the first one writes.
    """
    if not is_first_process():
        return
    contents = {
        CONFIG: settings.as_json(config),
        CLASS_NAMES: class_names,
        NUM_EXAMPLES: num_examples,
    }
    for name, content in contents.items():
        path = workdir / name
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)


def check_same_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, num_examples: dict[str, int]
) -> None:
    """Compares the config and the numbers of examples with those that the run kept.

    Raises:
        ValueError: they differ.
    """
    if changes := _config_changes(workdir, config) + _examples_changes(workdir, num_examples):
        raise ValueError(
            f"`workdir` must be new or made by the same config on the same data, but "
            f"{str(workdir)!r} was made with other values:\n" + "\n".join(changes) + "\nUse "
            "another --workdir, or continue this one with the new values by "
            "--accept_config_changes."
        )


def all_changes(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
) -> list[str]:
    """A line for each value, and for the first classes, that differ from what the run kept."""
    changes = []
    for compare in (
        lambda: _config_changes(workdir, config),
        lambda: _examples_changes(workdir, num_examples),
        lambda: _class_changes(workdir, class_names),
    ):
        try:
            changes += compare()
        # A damaged file is written anew.
        except CheckpointError as error:
            changes.append(f"  {error}")
    return changes


def check_same_network(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, mine: MetaFormerSpec
) -> None:
    """Compares the network with the one that the run trained.

    Networks whose mixers have no parameters cannot be distinguished by their parameters.

    Args:
        workdir: the run's folder.
        config: of the network, for the error message.
        mine: the specification of the network.

    Raises:
        CheckpointError: the run trained another network.
    """
    # One network may be given by its name, or by its family and size.
    if read_spec(workdir) != mine:
        _compare(workdir, config, _ARCHITECTURE, "network")


def check_same_normalisation(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Compares the normalisation of images with that of the run.

    Raises:
        CheckpointError: they differ.
    """
    _compare(workdir, config, _NORMALISATION, "normalisation of images")


def check_same_classes(workdir: pathlib.Path, class_names: tuple[str, ...]) -> None:
    """Compares the data's classes with those that the run trained on, if it kept their names.

    Raises:
        ValueError: they differ, so that a label would mean another class.
    """
    if changes := _class_changes(workdir, class_names):
        raise ValueError(
            f"`data` must have the classes that the run in {str(workdir)!r} was trained on, got "
            "others:\n" + "\n".join(changes) + "\nBring them back. If these are other names of "
            "the same classes, train on with --accept_config_changes, which keeps them; or "
            "evaluate by config.model.pretrained in place of --workdir."
        )


def _class_changes(workdir: pathlib.Path, class_names: tuple[str, ...]) -> list[str]:
    """A line for each of the first classes that differ from those that the run kept."""
    theirs = read_class_names(workdir)
    if theirs in (class_names, None):
        return []
    pairs = itertools.zip_longest(theirs, class_names, fillvalue="(absent)")
    changes = [f"  {label}: {old} -> {new}" for label, (old, new) in enumerate(pairs) if old != new]
    return first_few(changes, indent="  ")


def _config_changes(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> list[str]:
    theirs = read_config(workdir)
    return settings.differences(theirs, settings.as_json(config)) if theirs else []


def _examples_changes(workdir: pathlib.Path, num_examples: dict[str, int]) -> list[str]:
    theirs = read_num_examples(workdir)
    if not theirs:
        return []
    return settings.differences(
        *({f"{split} examples": n for split, n in of.items()} for of in (theirs, num_examples))
    )


def _compare(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, fields: tuple[str, ...], what: str
) -> None:
    theirs, mine = read_config(workdir), settings.as_json(config)
    there_are = [field for field in fields if field in theirs]
    changes = settings.differences(
        {field: theirs[field] for field in there_are}, {field: mine[field] for field in there_are}
    )
    if changes:
        raise CheckpointError(
            f"The weights in {workdir} must be used with the {what} that they were trained with, "
            "got other values:\n" + "\n".join(changes) + "\nGive those of the run, or evaluate it "
            "by the command that trained it, with --mode=eval."
        )
