"""The checkpoints of a training run in its workdir, and the weights in them."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metaformer_jax.messages import first_line
from metaformer_jax.models import FAMILIES, MetaFormerSpec, model_spec
from metaformer_jax.weights.converted import flat_tensors, orbax_handler
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.integrity import check_files

CONFIG = "config.json"
# Names of the classes, by label.
CLASS_NAMES = "class_names.json"
NUM_EXAMPLES = "num_examples.json"
# What Orbax writes into the folder of a step when all else is there.
ORBAX_STEP_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


def checkpoints_folder(path: pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints, each in a folder named by its step."""
    return path / "checkpoints"


def saved_steps(path: pathlib.Path) -> list[int]:
    """The steps of all of a run's checkpoints that were written to their end, newest first."""
    # While one is written its folder has a longer name.
    names = [folder.name for folder in checkpoints_folder(path).glob("*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_whole(path: pathlib.Path) -> tuple[int | None, dict[int, CheckpointError]]:
    """The step of a run's newest checkpoint that is as it was written; what ails newer ones."""
    damaged = {}
    for step in saved_steps(path):
        try:
            verify_checkpoint(checkpoints_folder(path) / str(step))
        except CheckpointError as error:
            damaged[step] = error
        else:
            return step, damaged
    return None, damaged


def verify_checkpoint(folder: pathlib.Path) -> None:
    """Compares all files of a checkpoint with the checksums that were written with them.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    if missing := [name for name in ORBAX_STEP_FILES if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} must hold {missing[0]}, got no such file.")
    check_files(folder)


def is_workdir(path: pathlib.Path) -> bool:
    """Whether this is the folder of a training run that has saved something."""
    return checkpoints_folder(path).is_dir()


def workdir_of(path: pathlib.Path) -> pathlib.Path | None:
    """The run's folder if this is one, or one of the checkpoints in it; None for anything else."""
    if is_workdir(path):
        return path
    folder = path.absolute().parent.parent
    is_step = path.is_dir() and path.name.isdecimal()
    return folder if is_step and path.absolute().parent == checkpoints_folder(folder) else None


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The values by field that the run wrote beside its checkpoints; {} where none are there.

    Raises:
        CheckpointError: the file is damaged.
    """
    remedy = "write it anew by training on with --accept_config_changes"
    return _read_json(path / CONFIG, lambda config: isinstance(config, dict), remedy) or {}


def read_class_names(path: pathlib.Path) -> tuple[str, ...] | None:
    """The classes that the run trained on, by label; None if it kept no names.

    Raises:
        CheckpointError: the file is damaged.
    """

    def are_names(names: Any) -> bool:
        return isinstance(names, list) and all(isinstance(name, str) for name in names)

    remedy = "remove it if the classes of the data are still the same"
    names = _read_json(path / CLASS_NAMES, are_names, remedy)
    return None if names is None else tuple(names)


def read_num_examples(path: pathlib.Path) -> dict[str, int]:
    """The numbers of examples by split that the run wrote; {} if it kept none.

    Raises:
        CheckpointError: the file is damaged.
    """

    def are_numbers(numbers: Any) -> bool:
        return isinstance(numbers, dict) and all(type(n) is int for n in numbers.values())

    remedy = "remove it if the data is still the same"
    return _read_json(path / NUM_EXAMPLES, are_numbers, remedy) or {}


def _read_json(file: pathlib.Path, is_right: Callable[[Any], bool], remedy: str) -> Any:
    """What the file holds; None where it is not there."""
    try:
        content = json.loads(file.read_bytes())
        if not is_right(content):
            raise ValueError(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} must be the JSON that a run wrote, got something else. Restore it, or "
            f"{remedy}."
        ) from error
    return content


def read_model_name(path: pathlib.Path) -> str | None:
    """The published name that the run trains; None for a network of its own.

    Raises:
        CheckpointError: the run's config is damaged.
    """
    return read_config(path).get("model.name") or None


def read_sizes(path: pathlib.Path) -> dict[str, int]:
    """The `num_classes`, `in_channels` and `image_size` of what the run trains, as far as kept.

    Raises:
        CheckpointError: the run's config or its names of classes are damaged.
    """
    config, names = read_config(path), read_class_names(path)
    mean, image_size = config.get("data.mean", []), config.get("data.image_size", 0)
    if not isinstance(mean, list) or not isinstance(image_size, int):
        raise CheckpointError(
            f"{path / CONFIG} must be the config that the run wrote, with a list as data.mean and "
            f"a whole number as data.image_size, got {mean!r} and {image_size!r}."
        )
    kept = {
        "num_classes": names and len(names),
        "in_channels": len(mean),
        "image_size": image_size,
    }
    return {key: value for key, value in kept.items() if value}


def read_spec(path: pathlib.Path) -> MetaFormerSpec | None:
    """The network that the run trains, by its config; None if its family is not known here.

    Raises:
        CheckpointError: the run's config is damaged.
    """
    config = read_config(path)
    try:
        if name := config.get("model.name"):
            return model_spec(name)
        if config.get("model.family") not in FAMILIES:
            return None
        return family_spec(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / CONFIG} must be the config that the run wrote, got "
            f"{type(error).__name__}: {error}."
        ) from error


def family_spec(config: dict[str, Any]) -> MetaFormerSpec:
    """The network of a run's config that names a family and a size of its own.

    Raises:
        KeyError: it does not, or the family is not known here.
        TypeError, ValueError: these are no sizes.
    """
    return FAMILIES[config["model.family"]].spec(
        depths=tuple(config["model.depths"]), dims=tuple(config["model.dims"])
    )


def read_step(path: pathlib.Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a checkpoint in the flax layout, by what it holds weights under.

    That is "params", and "ema" for their average, in this order.

    Raises:
        CheckpointError: it is damaged, or has been deleted.
    """
    state = _state(path, step)
    return {entry: _read_entry(state, entry) for entry in _verified_entries(state)}


def read_workdir(
    path: pathlib.Path, *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a checkpoint in the flax layout, and which they are.

    Args:
        path: the run's folder, for its newest checkpoint, or that of a checkpoint in it.
        entry: "params" for the last parameters, "ema" for their moving average; by default the
            average of a run that keeps one.

    Raises:
        CheckpointError: there is no complete one, it is damaged, or has no such entry.
    """
    given = None if is_workdir(path) else int(path.name)
    folder = path if given is None else path.absolute().parent.parent
    while True:
        step = newest_step(folder) if given is None else given
        state = _state(folder, step)
        try:
            there_are = _verified_entries(state)
            chosen = entry or there_are[-1]
            if chosen not in there_are:
                raise CheckpointError(
                    f"`entry` must be {' or '.join(map(repr, there_are))} for {path}, got "
                    f"{entry!r}."
                )
            return _read_entry(state, chosen), f"{chosen} of step {step}"
        except CheckpointError:
            # A run that goes on deletes it when it has saved another.
            if given is not None or newest_step(folder) == step:
                raise


def newest_step(path: pathlib.Path) -> int:
    """The step of the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    steps = saved_steps(path)
    if not steps:
        raise CheckpointError(
            f"`path` must be a run with a checkpoint, got {path}, which has none yet."
        )
    return steps[0]


def _state(path: pathlib.Path, step: int) -> pathlib.Path:
    return (checkpoints_folder(path) / str(step) / "state").absolute()


def _verified_entries(state: pathlib.Path) -> list[str]:
    with _explained(state):
        verify_checkpoint(state.parent)
        metadata = orbax_handler().metadata(state).tree
        return [entry for entry in ("params", "ema") if metadata.get(entry)]


def _read_entry(state: pathlib.Path, entry: str) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    handler = orbax_handler()
    with _explained(state):
        metadata: dict[str, Any] = handler.metadata(state).tree
        # The optimiser's moments, twice as large, stay on the disk.
        wanted = {name: metadata[name] for name in (entry, "frozen") if metadata.get(name)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restored = handler.restore(
            state,
            args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True),
        )
    return {key: array for tree in restored.values() for key, array in flat_tensors(tree)}


@contextlib.contextmanager
def _explained(state: pathlib.Path) -> Iterator[None]:
    try:
        yield
    # Damage shows in any layer below: Orbax, TensorStore, JSON.
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{state.parent} must be a whole checkpoint of a training run, got: {reason}. Move "
            "this folder elsewhere to read the checkpoint before it."
        ) from error
