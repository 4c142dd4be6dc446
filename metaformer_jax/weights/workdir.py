"""The weights of a training run, read out of its workdir."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from metaformer_jax.weights.converted import flat_tensors, orbax_handler
from metaformer_jax.weights.errors import CheckpointError

_CHECKPOINTS = "checkpoints"
# Orbax writes it last.
_COMMITTED = "_CHECKPOINT_METADATA"


def is_workdir(path: pathlib.Path) -> bool:
    """Whether this is the folder of a training run that has saved something."""
    return (path / _CHECKPOINTS).is_dir()


def model_name(path: pathlib.Path) -> str | None:
    """The published name that the run trains; None for a network of its own."""
    try:
        return json.loads((path / "config.json").read_text())["model.name"] or None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def read_workdir(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of the newest checkpoint in the flax layout, averaged if the run averages them.

    The second result says which checkpoint it is.

    Raises:
        CheckpointError: there is no complete one, or it is damaged.
    """
    import orbax.checkpoint as ocp

    folder = path / _CHECKPOINTS
    steps = [int(entry.parent.name) for entry in folder.glob(f"*/{_COMMITTED}")]
    if not steps:
        raise CheckpointError(
            f"`path` must be a run with a checkpoint, got {path}, which has none yet."
        )
    state = (folder / str(max(steps)) / "state").absolute()
    handler = orbax_handler()
    try:
        metadata: dict[str, Any] = handler.metadata(state).tree
        # The optimiser's moments, twice as large, stay on the disk.
        # A run that keeps a moving average keeps it for this.
        entries = ("ema" if metadata.get("ema") else "params", "frozen")
        wanted = {entry: metadata[entry] for entry in entries if metadata.get(entry)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restored = handler.restore(
            state,
            args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True),
        )
    # Damage shows in any layer below: Orbax, TensorStore, JSON.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"{state} must be a whole checkpoint of a training run, got: {reason}"
        ) from error
    tensors = {key: array for tree in restored.values() for key, array in flat_tensors(tree)}
    return tensors, f"step {max(steps)}"
