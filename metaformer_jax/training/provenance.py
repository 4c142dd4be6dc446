"""What a run's weights were trained with, compared with what they are to be used with."""

import itertools
import pathlib

import ml_collections

from metaformer_jax.models import MetaFormerSpec
from metaformer_jax.training import settings
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import read_class_names, read_config, spec

_ARCHITECTURE = tuple(f"model.{field}" for field in ("name", "family", "depths", "dims"))
# Weights learn with these; size, crop and filter may be tried out.
_NORMALISATION = ("data.mean", "data.std")
_MAX_NAMED = 5


def check_same_network(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, mine: MetaFormerSpec
) -> None:
    """Compares the network with the one that the run trained.

    Parameters do not tell networks apart whose mixers have none.

    Args:
        workdir: the run's folder.
        config: describes the network, as the message says.
        mine: the network.

    Raises:
        CheckpointError: it is another.
    """
    # The same may be described by a name, or as that size of its family.
    if spec(workdir) != mine:
        _compare(workdir, config, _ARCHITECTURE, "network")


def check_same_normalisation(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Compares how images are normalised with how the run did it.

    Raises:
        CheckpointError: otherwise.
    """
    _compare(workdir, config, _NORMALISATION, "normalisation of images")


def check_same_classes(workdir: pathlib.Path, class_names: tuple[str, ...]) -> None:
    """Compares the data's classes with those that the run trained on, if it kept their names.

    Raises:
        ValueError: a label would mean another class.
    """
    theirs = read_class_names(workdir)
    if theirs in (class_names, None):
        return
    pairs = itertools.zip_longest(theirs, class_names, fillvalue="(absent)")
    changes = [f"  {label}: {old} -> {new}" for label, (old, new) in enumerate(pairs) if old != new]
    more = len(changes) - _MAX_NAMED
    shown = [*changes[:_MAX_NAMED], *([f"  and {more:,} more"] if more > 0 else [])]
    raise ValueError(
        f"`data` must have the classes that the run in {str(workdir)!r} was trained on, got "
        "others:\n" + "\n".join(shown) + "\nBring them back. If these are other names of "
        "the same classes, train on with --accept_config_changes, which keeps them; or "
        "evaluate by config.model.pretrained in place of --workdir."
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
            "got other values:\n" + "\n".join(changes) + "\nGive those of the run."
        )
