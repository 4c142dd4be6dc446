"""The metrics of a run, as JSON lines, TensorBoard events, and for Weights & Biases."""

import hashlib
import json
import math
import os
import pathlib
import sys
import time
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import UInt8

from metaformer_jax.messages import first_line
from metaformer_jax.training.guard import Guard
from metaformer_jax.weights.workdir import CONFIG

# Steps that may wait for the devices. Each holds its batch in their memory, and all of them are
# waited for when a run is told to end.
_MAX_AHEAD = 2


class PendingMetrics:
    """Figures of the steps since the last row, which stay on the devices until they are needed.

    Keeps the program from running ahead: when a step is added, those before the last two are done.

    Args:
        guard: checks the figures of every step.
        restored: the figures that were pending when a checkpoint was saved.
    """

    def __init__(self, guard: Guard, restored: list[dict[str, float]] | None = None):
        self._guard = guard
        self._on_host = list(restored or [])
        self._on_device: list[tuple[int, dict[str, Any]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array], *, num_replaced: int) -> None:
        """Adds the figures of a step, which need not be computed yet."""
        self._on_device.append((step, {**metrics, "num_replaced": num_replaced}))
        # With the newest of the others, all before it are done.
        jax.block_until_ready(self._on_device[:-_MAX_AHEAD][-1:])

    def to_host(self) -> list[dict[str, float]]:
        """All figures, step by step; waits for the last step.

        Raises:
            NonFiniteError: a step's loss or gradient is not finite.
        """
        arrived = jax.device_get(self._on_device)
        self._on_device = []
        for step, metrics in arrived:
            figures = {name: float(value) for name, value in metrics.items()}
            was_updated = self._guard.check(step, figures)
            self._on_host.append({"updated": float(was_updated), **figures})
        # A copy: a checkpoint writes it in the background, while figures of later steps come in.
        return list(self._on_host)

    def take(self) -> dict[str, float]:
        """All figures as one row: means over the steps that made an update, and counts."""
        steps, self._on_host = self.to_host(), []
        updated = [figures for figures in steps if figures["updated"]]
        row = {
            name: float(np.mean([figures[name] for figures in updated])) if updated else math.nan
            for name in ("loss", "accuracy", "grad_norm")
        }
        row["replaced_examples"] = int(sum(figures["num_replaced"] for figures in steps))
        row["skipped_updates"] = len(steps) - len(updated)
        return row


class MetricWriter:
    """Appends to `metrics.jsonl`, to TensorBoard events in `tensorboard/`, and to W&B if requested.

    A resumed run continues the file: rows after the step from which it resumes are removed, so that
    no step is there twice.

    Args:
        workdir: the run's folder.
        start_step: the step from which the run continues; 0 for a new run.
        is_writer: whether this process writes at all.
        wandb_project: at Weights & Biases; empty for none.
        config: sent to W&B.

    Raises:
        ImportError: W&B is requested but not installed.
        ValueError: W&B does not take the run, or a line of the file is damaged.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        start_step: int = 0,
        is_writer: bool = True,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ):
        self._is_writer = is_writer
        if not is_writer:
            return
        self._path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(map(_line, rows)))
        rewritten.replace(self._path)
        self._wandb = _start_wandb(wandb_project, workdir, config or {}) if wandb_project else None
        self._file = self._path.open("a")
        self._events = _Events(workdir / "tensorboard", start_step)

    def write(self, step: int, **groups: dict[str, float]) -> None:
        """Adds one row with the values after this step, named `group/name`."""
        if not self._is_writer:
            return
        values = {
            f"{group}/{name}": value for group, row in groups.items() for name, value in row.items()
        }
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        self._events.add_scalars(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def has_lost_its_folder(self) -> bool:
        """Whether the workdir was moved or removed, so that what is written shows nowhere there."""
        if not self._is_writer:
            return False
        return _is_gone(self._path) and _is_gone(self._path.with_name(CONFIG))

    def write_picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Adds a picture to TensorBoard's events."""
        if not self._is_writer:
            return
        self._events.add_picture(step, name, picture)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_writer:
            return
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))


def _line(row: dict[str, float]) -> str:
    # JSON has no infinity and no NaN.
    lost = [name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    return json.dumps(row | dict.fromkeys(lost)) + "\n"


def _is_gone(path: pathlib.Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # A network file system that does not answer.
        pass
    return False


class _Events:
    """The TensorBoard file of one start of a run; each call writes to disk.

    tensorboardX's usual writer works in a thread. A full disk ends that thread, and the program
    then waits for it forever.

    Args:
        folder: of the files of all starts.
        start_step: TensorBoard hides later steps that earlier starts have written.
    """

    def __init__(self, folder: pathlib.Path, start_step: int):
        _import_tensorboardx()
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._proto, self._summary = event_pb2, summary
        folder.mkdir(exist_ok=True)
        self._writer = event_file_writer.EventsWriter(
            str(folder / "events"), filename_suffix=f".{os.getpid()}"
        )
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(start_step + 1, session_log=start)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def add_picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        self._add(step, summary=self._summary.image(name, picture, dataformats="HWC"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._proto.Event(step=step, wall_time=time.time(), **content)
        self._writer.write_event(event)


def _import_tensorboardx() -> None:
    # tensorboardX would import an installed torch, for features not used here: that takes seconds.
    hides_torch = "torch" not in sys.modules
    if hides_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX  # noqa: F401
    finally:
        if hides_torch:
            del sys.modules["torch"]


def import_wandb(project: str) -> Any:
    """The module of Weights & Biases, for a project there.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"`config.wandb.project` is {project!r}, but wandb is not installed: pip install wandb"
        ) from error
    return wandb


def _start_wandb(project: str, workdir: pathlib.Path, config: dict[str, Any]) -> Any:
    # A resumed run is the same run at W&B: its id is derived from the folder.
    run_id = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    wandb = import_wandb(project)
    try:
        return wandb.init(
            project=project,
            id=run_id,
            name=workdir.name,
            dir=str(workdir),
            config=config,
            resume="allow",
        )
    # Its errors have no class in common.
    except Exception as error:
        raise ValueError(
            f"`config.wandb.project` must be one that this machine can write to, got {project!r}: "
            f"{first_line(error)}. Log in by `wandb login`, or leave it empty."
        ) from error


def read_accuracies(workdir: pathlib.Path) -> dict[int, float]:
    """The accuracy of each evaluated step: of the moving average where the run keeps one."""
    return {
        row["step"]: row.get("eval_ema/accuracy", row["eval/accuracy"])
        for row in read_metrics(workdir)
        if "eval/accuracy" in row
    }


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, without a last one that was cut short; [] if none.

    Raises:
        ValueError: a line is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            row = {name: math.nan if v is None else v for name, v in content.items()}
            if not isinstance(row["step"], int):
                raise TypeError(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            shown = line[:50].decode(errors="replace")
            raise ValueError(
                f"Line {number} of {path} must be the JSON of a step, got {shown!r}. Mend the "
                "line, or remove it."
            ) from error
        rows.append(row)
    return rows
