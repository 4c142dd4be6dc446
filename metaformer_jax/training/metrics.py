"""The numbers of a run, as JSON lines and as TensorBoard events."""

import json
import pathlib
from types import TracebackType
from typing import Any, Self

import numpy as np
import tensorboardX
from jaxtyping import UInt8


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's events in `tensorboard/`.

    A resumed run continues the file: rows after the step that it resumes from are taken out, so
    that no step stands there twice.

    Args:
        workdir: the run's folder.
        start_step: updates done before the first row to come.
    """

    def __init__(self, workdir: pathlib.Path, *, start_step: int = 0):
        self._path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        rewritten.replace(self._path)
        self._file = self._path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one row: the values after so many updates."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Adds a picture to TensorBoard's events."""
        self._events.add_image(name, picture, step, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._events.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, without a last one that was cut short; [] if none."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
