"""Checkpoints of a run, written in the background: each is complete, or does not exist."""

import asyncio
import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, Self

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from metaformer_jax.messages import first_few, first_line
from metaformer_jax.training import settings
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.converted import flat_tensors, orbax_handler
from metaformer_jax.weights.integrity import write_checksums
from metaformer_jax.weights.workdir import ORBAX_STEP_FILES, checkpoints_folder, newest_whole

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "metaformer-jax")


class SaveError(RuntimeError):
    """A checkpoint could not be written."""


class _Checksummed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A temporary folder, which gets its final name once its files' checksums are written."""

    async def finalize(self) -> None:
        # This class also finishes the folders of single items, inside that of their step.
        if (self.get() / ORBAX_STEP_FILES[0]).exists():
            await asyncio.to_thread(write_checksums, self.get(), without=ORBAX_STEP_FILES)
        await super().finalize()


class _Best:
    """Keeps the checkpoint with the highest accuracy known when another one is saved.

    Orbax's own policy needs the metrics when a checkpoint is saved; they cannot be added later.
    """

    def __init__(self) -> None:
        self.accuracies: dict[int, float] = {}

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        known = [step for step in steps if step in self.accuracies]
        best = max(known, key=lambda step: (self.accuracies[step], step), default=None)
        return [step == best for step in steps]


class _Manager(ocp.CheckpointManager):
    """Leaves it to the training loop to ask whether the run should end.

    Orbax would ask as well, for the step of the checkpoint, when it is written at last. JAX takes
    the step that is named last for the one where the process is, and processes that have named a
    later one would agree on a step that some of them have passed.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints of one run, one folder per step, with Orbax.

    A checkpoint holds the state, the config, the versions of packages, and checksums of all of
    these. It gets its final name only when it is completely written.

    Args:
        workdir: the run's folder; that of the checkpoints in it is created if it does not exist.
        keep: how many of the latest are kept, in addition to the best of those `evaluated`.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        if keep < 1:
            raise ValueError(f"`config.checkpoint.keep` must be at least 1, got {keep}.")
        self._best = _Best()
        policy = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep), self._best]
        )
        self._manager = _Manager(
            checkpoints_folder(workdir).absolute(),
            item_handlers={
                "state": _state_handler(),
                "pending": ocp.JsonCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                # Removes what a killed run had written in part.
                cleanup_tmp_directories=True,
                temporary_path_class=_Checksummed,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _explained():
            self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        pending: list[dict[str, float]],
        config: ml_collections.ConfigDict,
    ) -> None:
        """Starts to write a checkpoint; errors in writing the one before are raised here.

        Args:
            state: all arrays.
            pending: figures of steps that are not yet in a row of the metrics.
            config: of the run.

        Raises:
            SaveError: this one cannot be written, or the one before could not.
        """
        about = {"versions": _versions(), "config": settings.as_json(config)}
        with _explained():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(vars(state)),
                    pending=ocp.args.JsonSave({"steps": pending}),
                    about=ocp.args.JsonSave(about),
                ),
                # The caller decides when to save.
                force=True,
            )

    def evaluated(self, step: int, accuracy: float) -> None:
        """Records the accuracy of a checkpoint, saved in this or an earlier start of the run."""
        self._best.accuracies[step] = accuracy

    def check(self) -> None:
        """Raises what went wrong in writing the last one, if that is known; waits for nothing.

        Raises:
            SaveError: it could not be written.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            SaveError: a checkpoint could not be written.
        """
        with _explained():
            self._manager.wait_until_finished()

    def restore(self, abstract_state: TrainState, config: ml_collections.ConfigDict) -> TrainState:
        """The newest checkpoint, with the shardings of `abstract_state`.

        Raises:
            ValueError: it has other arrays, or is damaged.
        """
        step = self.latest_step()
        item = vars(abstract_state)
        if others := self._other_shapes(step, item):
            raise ValueError(
                f"{self._manager.directory / str(step)} must hold the parameters of this run's "
                "network, got others:\n" + "\n".join(others) + "\nBring network and classes back. "
                "To train others from these weights, give a new --workdir and name this one by "
                "config.model.pretrained; for other classes, with config.model.fresh_head=True."
            )
        try:
            arrays = ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arrays))
        # Orbax's own message prints whole trees, and damage can raise errors in any layer below it.
        except Exception as error:
            raise ValueError(self._why_not(step, config, error)) from error
        return TrainState(**restored["state"])

    def _other_shapes(self, step: int | None, item: dict[str, Any]) -> list[str]:
        """A line for each of the first parameters that has another shape, or is not there."""
        folder = self._manager.directory / str(step) / "state"
        try:
            saved: dict[str, Any] = orbax_handler().metadata(folder).tree["params"]
        # Damage shows when it is read.
        except Exception:
            return []
        theirs, mine = (
            {name: str(tuple(leaf.shape)) for name, leaf in flat_tensors(tree)}
            for tree in (saved, item["params"])
        )
        absent = dict.fromkeys([*theirs, *mine], "absent")
        lines = settings.differences(absent | theirs, absent | mine)
        return first_few(lines, indent="  ")

    def _why_not(
        self, step: int | None, config: ml_collections.ConfigDict, error: Exception
    ) -> str:
        folder = self._manager.directory / str(step)
        reason = first_line(error)
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            changes = settings.differences(about["config"], settings.as_json(config))
        except Exception:
            changes = []
        if changes:
            return (
                f"{folder} was saved by a run with other values, which it cannot be continued "
                f"without ({reason[:200]}):\n" + "\n".join(changes)
            )
        return (
            f"{folder} must be a whole checkpoint, got: {reason[:200]}. Move this folder elsewhere "
            "to continue from the checkpoint before it."
        )

    def pending_metrics(self) -> list[dict[str, float]]:
        """The `pending` figures saved with the newest checkpoint; [] without a checkpoint."""
        step = self.latest_step()
        if step is None:
            return []
        restored = self._manager.restore(
            step, args=ocp.args.Composite(pending=ocp.args.JsonRestore())
        )
        return restored["pending"]["steps"]


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    # By default, each device that holds a copy of an array writes a part of it, which it gets by a
    # slice that was compiled for it: for arrays of gigabytes. Here are hundreds of small ones.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


def set_aside_damaged(workdir: pathlib.Path) -> list[str]:
    """Moves damaged checkpoints that are newer than the newest intact one out of the way.

    Args:
        workdir: the run's folder; damaged checkpoints are moved to `damaged` in it.

    Returns:
        A sentence about each of them.

    Raises:
        ValueError: no checkpoint is intact; nothing was moved.
    """
    newest, damaged = newest_whole(workdir)
    if damaged and newest is None:
        reasons = "\n".join(f"  {error}" for error in damaged.values())
        raise ValueError(
            f"{checkpoints_folder(workdir)} must hold a whole checkpoint, but none is:\n"
            f"{reasons}\nBring one back from a copy, or remove the folder to start anew."
        )
    sentences = []
    for step, error in damaged.items():
        place = workdir / "damaged" / str(step)
        while place.exists():
            place = place.with_name(f"{place.name}+")
        place.parent.mkdir(exist_ok=True)
        (checkpoints_folder(workdir) / str(step)).rename(place)
        sentences.append(
            f"The checkpoint of step {step} is damaged and was moved to {place}; that of step "
            f"{newest} is used. {error}"
        )
    return sentences


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    # Whatever goes wrong in any layer below: the file system, TensorStore, Orbax.
    except Exception as error:
        reason = first_line(error)
        raise SaveError(
            f"A checkpoint could not be written: {reason}. Those before it are good: once there is "
            "room and the right to write, the same command continues."
        ) from error


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
