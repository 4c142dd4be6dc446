"""Compares how a run's weights were trained with how they are to be used."""

import itertools
import pathlib

import ml_collections

from metaformer_jax.models import MetaFormerSpec
from metaformer_jax.training import settings
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import read_class_names, read_config, spec

_ARCHITECTURE = tuple(f"model.{field}" for field in ("name", "family", "depths", "dims"))
# Weights depend on the normalisation of training; size, crop and filter may be changed.
_NORMALISATION = ("data.mean", "data.std")
_MAX_NAMED = 5


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
    if spec(workdir) != mine:
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
    if changes := class_changes(workdir, class_names):
        raise ValueError(
            f"`data` must have the classes that the run in {str(workdir)!r} was trained on, got "
            "others:\n" + "\n".join(changes) + "\nBring them back. If these are other names of "
            "the same classes, train on with --accept_config_changes, which keeps them; or "
            "evaluate by config.model.pretrained in place of --workdir."
        )


def class_changes(workdir: pathlib.Path, class_names: tuple[str, ...]) -> list[str]:
    """A line for each of the first classes that differ from those that the run kept."""
    theirs = read_class_names(workdir)
    if theirs in (class_names, None):
        return []
    pairs = itertools.zip_longest(theirs, class_names, fillvalue="(absent)")
    changes = [f"  {label}: {old} -> {new}" for label, (old, new) in enumerate(pairs) if old != new]
    more = len(changes) - _MAX_NAMED
    return [*changes[:_MAX_NAMED], *([f"  and {more:,} more"] if more > 0 else [])]


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
            "got other values:\n" + "\n".join(changes) + "\nGive those of the run."
        )
