"""What a training prints: what it is about to do, and how far it is; a bar on a terminal."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from metaformer_jax.training.devices import model_flops_utilization

if TYPE_CHECKING:
    from metaformer_jax.training.run import Run

# If the output is not a terminal, one line is printed in this time, so that logs stay short.
_SECONDS_PER_LINE = 10.0
# The same for work of which the progress is unknown.
_SECONDS_PER_SIGN_OF_LIFE = 30.0


class TrainingProgress:
    """Steps done, speed, remaining time, and the latest figures.

    Args:
        console: where it is shown.
        total_steps: of the whole training.
        start_step: steps done before this start.
        batch_size: images of a step.
        macs_per_image: multiply-adds of the model's forward pass.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        start_step: int = 0,
        batch_size: int,
        macs_per_image: int,
    ):
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", start=False, total=total_steps, completed=start_step, figures=""
        )
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._macs_per_image = macs_per_image
        self._since: float | None = None
        self._since_step = start_step
        self._waited = 0.0
        self._figures = ""
        self._last_line = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time within as time spent waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time within, that of an evaluation, from the speed."""
        start = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - start

    def update(self, step: int) -> None:
        """Shows that this step was started."""
        if self._since is None:
            # The first step is not timed: it has waited for the workers to start.
            self._since, self._since_step, self._waited = time.monotonic(), step, 0.0
            self._last_line = self._since
            self._bar.start_task(self._task)
        self._bar.update(self._task, completed=step)

    def speed(self, step: int) -> dict[str, float]:
        """Speed and share of waiting since the last call, with all steps up to this one done.

        Empty if no step was timed.
        """
        now = time.monotonic()
        if self._since is None or step <= self._since_step:
            return {}
        elapsed = max(now - self._since, 1e-9)
        images_per_second = (step - self._since_step) * self._batch_size / elapsed
        speed = {
            "images_per_second": images_per_second,
            "images_per_second_per_device": images_per_second / jax.device_count(),
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        utilization = model_flops_utilization(images_per_second, self._macs_per_image)
        if utilization is not None:
            speed["mfu"] = utilization
        self._since, self._since_step, self._waited = now, step, 0.0
        return speed

    def show(self, step: int, figures: dict[str, float], *, held_out: str) -> None:
        """Shows the latest figures; if the output is not a terminal, as a line now and then."""
        parts = [f"loss {figures['loss']:.3f}  accuracy {figures['accuracy']:.1%}{held_out}"]
        speed = figures.get("images_per_second")
        if speed:
            parts.append(f"{_rounded(speed)} images/s")
            if jax.device_count() > 1:
                parts.append(f"{_rounded(figures['images_per_second_per_device'])} per device")
            if "mfu" in figures:
                parts.append(f"MFU {figures['mfu']:.0%}")
            parts.append(f"waiting for data {figures['data_wait']:.0%}")
        shown = "  ".join(parts)
        self._bar.update(self._task, figures=shown)
        now = time.monotonic()
        if not self._console.is_terminal and speed and now - self._last_line > _SECONDS_PER_LINE:
            self._last_line = now
            remaining = (self._total_steps - step) * self._batch_size / speed
            left = _duration(remaining)
            say(self._console, f"step {step}/{self._total_steps}  {left} left  {shown}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


@contextlib.contextmanager
def evaluation_progress(console: Console | None, num_batches: int) -> Iterator[Callable[[], None]]:
    """A progress bar over the batches, on a terminal; yields a function that advances it by one."""
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("evaluation"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=num_batches)
        yield lambda: bar.advance(task)


def say(console: Console, text: object) -> None:
    """Prints text as it is: not wrapped, and paths and names are no markup."""
    # Names of files need not be valid text.
    valid = str(text).encode(errors="backslashreplace").decode()
    console.print(valid, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def elapsing(
    console: Console, what: str, *, seconds_per_line: float = _SECONDS_PER_SIGN_OF_LIFE
) -> Iterator[None]:
    """Shows that something is going on, and for how long: continuously on a terminal.

    Args:
        console: where it is shown.
        what: in words, such as "compiling the training step".
        seconds_per_line: how often a line is printed if the output is not a terminal.
    """
    say(console, f"{what} ...")
    if console.is_terminal:
        with Progress(TimeElapsedColumn(), console=console, transient=True) as clock:
            clock.add_task("")
            yield
        return
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(seconds_per_line):
            elapsed = time.monotonic() - started
            say(console, f"{what}: {elapsed:.0f} s so far")

    teller = threading.Thread(target=tell, name="tell", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def describe_run(run: "Run", workdir: pathlib.Path, start_step: int, console: Console) -> None:
    """Prints what a training is about to do: model, data, devices, recipe, steps and workdir."""
    config = run.config
    counts = run.counts
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.engine.mesh.shape.items())
    cooldown = f" + {config.cooldown_epochs:g}" if config.cooldown_epochs else ""
    parts = (
        f" in {config.accumulation_steps} parts on each device"
        if config.accumulation_steps > 1
        else ""
    )
    described: dict[str, Any] = {
        "model": f"{config.model.name or config.model.family}: {counts.params:,} parameters, "
        f"{counts.frozen_params:,} frozen, {counts.macs / 1e6:,.1f} M multiply-adds per image",
        "data": f"{config.data.name}: {len(run.train_source):,} for training, "
        f"{len(run.eval_source):,} for evaluation, {config.data.image_size} pixels",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} processes ({mesh}), computing in {config.model.dtype}",
        "recipe": f"{config.optimizer.name} at {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule} by {config.optimizer.schedule_by} after "
        f"{config.optimizer.warmup_epochs:g} epochs of warm-up",
        "steps": f"{run.total_steps:,} of {config.batch_size:,} images{parts} "
        f"({config.epochs:g}{cooldown} epochs)",
        "workdir": workdir,
    }
    for name, text in described.items():
        say(console, f"{name:<8} {text}")
    if config.model.pretrained and not start_step:
        head = ", with a fresh head" if config.model.fresh_head else ""
        say(console, f"starting from {config.model.pretrained}{head}")
    if start_step >= run.total_steps:
        say(console, f"This training is finished: {start_step:,} steps are done.")
    elif start_step:
        say(console, f"continuing after step {start_step:,}")
