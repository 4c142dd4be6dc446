"""The training loop: steps, logging, checkpoints, evaluations, and the end when told to."""

import contextlib
import pathlib
import time
from collections.abc import Callable

import jax
from rich.console import Console

from metaformer_jax.figures import to_array
from metaformer_jax.training import agreement, settings
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.evaluation import Evaluation, StoppedError, evaluate_state
from metaformer_jax.training.guard import Guard
from metaformer_jax.training.memory import memory_of
from metaformer_jax.training.metrics import (
    MetricWriter,
    PendingMetrics,
    read_accuracies,
    read_metrics,
)
from metaformer_jax.training.preemption import PreemptedError, Preemption
from metaformer_jax.training.preview import draw_inputs
from metaformer_jax.training.progress import TrainingProgress, describe_run, elapsing, say
from metaformer_jax.training.run import Run
from metaformer_jax.training.saving import Saving
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.convert import Variables

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


class TrainingLoop:
    """Trains from a step to the end.

    Args:
        run: what is trained.
        workdir: the run's folder.
        checkpoints: in the workdir.
        preemption: notices that the run is told to end.
        console: where progress is shown.
    """

    def __init__(
        self,
        run: Run,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        preemption: Preemption,
        console: Console,
    ):
        self._run = run
        self._config = run.config
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._preemption = preemption
        self._console = console
        skips = run.config.on_nonfinite == "skip"
        self._guard = Guard(
            workdir,
            run.train_source,
            max_skipped=run.config.max_skipped_updates if skips else 0,
            process_index=jax.process_index(),
        )
        self._held_out = ""
        self._has_begun = False

    def has_begun(self) -> bool:
        """Whether a step was compiled, which is then trained."""
        return self._has_begun

    def finish(self, start_step: int, variables: Variables) -> Evaluation:
        """Trains to the end, from the newest checkpoint or, without one, from these values."""
        run, engine = self._run, self._run.engine
        for step, accuracy in read_accuracies(self._workdir).items():
            # Later ones belong to checkpoints that are gone.
            if step <= start_step:
                self._checkpoints.evaluated(step, accuracy)
        describe_run(run, self._workdir, start_step, self._console)
        if start_step:
            state = self._checkpoints.restore(engine.abstract_state, self._config)
        else:
            state = engine.with_weights(engine.initial_state(), variables)
        # Network file systems may show other processes older metrics than the first one's.
        lacks_evaluation = agreement.of_first(self._lacks_evaluation(start_step))
        if start_step < run.total_steps or lacks_evaluation:
            return self._train(state, start_step, evaluates_first=lacks_evaluation)
        run.write_provenance(self._workdir)
        return evaluate_state(
            run, engine.averaged(state) if state.ema else state, console=self._console
        )

    def _train(self, state: TrainState, start_step: int, *, evaluates_first: bool) -> Evaluation:
        """Trains from after `start_step` to the end."""
        run, config, total_steps = self._run, self._config, self._run.total_steps
        pending = PendingMetrics(self._guard, self._checkpoints.pending_metrics())
        with (
            contextlib.ExitStack() as trace,
            run.training_batches(start_step) as batches,
            MetricWriter(
                self._workdir,
                start_step=start_step,
                is_writer=is_first_process(),
                wandb_project=config.wandb.project,
                config=settings.flatten(config),
            ) as writer,
            TrainingProgress(
                self._console,
                total_steps=total_steps,
                start_step=start_step,
                batch_size=config.batch_size,
                macs_per_image=run.counts.macs,
            ) as progress,
        ):
            saving = Saving(run, self._workdir, self._checkpoints, pending, writer)
            if evaluates_first:
                evaluation = self._evaluate(state, start_step, writer)
            if start_step >= total_steps:
                run.write_provenance(self._workdir)
            # What a run starts from is kept.
            is_saved = True
            train_step: Step | None = None
            for step in range(start_step + 1, total_steps + 1):
                kept = saving.kept_if_data_fails(step - 1, state, is_saved=is_saved)
                with kept, progress.waiting_for_data():
                    batch = next(batches)
                if train_step is None:
                    train_step = self._compiled(state, batch)
                    run.write_provenance(self._workdir)
                    self._has_begun = True
                if step == 1:
                    writer.write_picture(0, "train/batch", to_array(draw_inputs(run, batch, 0)))
                self._trace(trace, step, start_step, state)
                self._guard.expect(step, batches.indices)
                self._preemption.trained()
                state, metrics = train_step(state, batch)
                pending.add(step, metrics, num_replaced=batches.num_replaced)
                progress.update(step)
                is_logged = step % config.log_every_steps == 0 or step == total_steps
                if is_logged:
                    self._log(step, pending, writer, progress)
                # Before the evaluation: if that fails, no training is lost.
                is_saved = run.is_due(config.checkpoint.every_epochs, step)
                if is_saved:
                    saving.save(step, state)
                elif is_logged:
                    saving.check(step, state)
                is_told = False
                if is_saved or run.is_due(config.eval_every_epochs, step):
                    kept = saving.kept_if_data_fails(step, state, is_saved=is_saved)
                    with progress.paused(), kept:
                        try:
                            evaluation = self._evaluate(state, step, writer)
                        except StoppedError:
                            is_told = True
                if is_told or (self._preemption.reached(step) and step < total_steps):
                    if not is_saved:
                        saving.save(step, state)
                    saving.wait()
                    raise PreemptedError(
                        f"told to end: step {step} of {total_steps} is saved. The same command "
                        "continues from there."
                    )
        return evaluation

    def _log(
        self, step: int, pending: PendingMetrics, writer: MetricWriter, progress: TrainingProgress
    ) -> None:
        """Writes and shows the figures of all steps since the last call."""
        row = pending.take()
        row["learning_rate"] = float(self._run.schedule(step - 1))
        speed = progress.speed(step)
        progress.show(step, row | speed, held_out=self._held_out)
        writer.write(step, train=row, speed=speed)

    def _compiled(self, state: TrainState, batch: dict[str, jax.Array]) -> Step:
        started = time.monotonic()
        with elapsing(self._console, "compiling the training step"):
            compiled = self._run.engine.train_step.lower(state, batch).compile()
        text = f"compiled in {time.monotonic() - started:.0f} s"
        memory = memory_of(compiled)
        if memory is not None:
            limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
            text += f"; it takes {memory.total / 2**30:.2f} GiB on each device"
            text += f" of {limit / 2**30:.2f}" if limit else ""
        say(self._console, text)
        return compiled

    def _trace(
        self, stack: contextlib.ExitStack, step: int, start_step: int, state: TrainState
    ) -> None:
        """Starts a profiler trace before the first of `profile_steps`, and ends it after the last.

        If some of these steps were done before this start of the run, the others are traced.
        """
        if not self._config.profile_steps:
            return
        first, last = self._config.profile_steps
        folder = self._workdir / "profile"
        if step in (max(first, start_step + 1), last + 1):
            # The devices may be steps behind.
            jax.block_until_ready(state)
        if step == max(first, start_step + 1) and step <= last:
            # Called when the trace is written, whether by the step after the last or by the end.
            stack.callback(say, self._console, f"profiler trace: {folder}")
            stack.enter_context(jax.profiler.trace(str(folder)))
        elif step == last + 1:
            stack.close()

    def _evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> Evaluation:
        """Evaluates and logs; returns the evaluation of the average if there is one."""

        def evaluated(state: TrainState) -> Evaluation:
            return evaluate_state(
                self._run,
                state,
                console=self._console,
                is_stopped=lambda: self._preemption.noticed,
            )

        evaluation = evaluated(state)
        rows = {"eval": evaluation.figures()}
        if state.ema:
            evaluation = evaluated(self._run.engine.averaged(state))
            rows["eval_ema"] = evaluation.figures()
        writer.write(step, **rows)
        self._checkpoints.evaluated(step, evaluation.accuracy)
        self._held_out = f"  held out {evaluation.accuracy:.1%}"
        return evaluation

    def _lacks_evaluation(self, start_step: int) -> bool:
        """Whether the evaluation due after this step is missing, as it was interrupted."""
        if not start_step:
            return False
        config = self._config
        due = any(
            self._run.is_due(every_epochs, start_step)
            for every_epochs in (config.eval_every_epochs, config.checkpoint.every_epochs)
        )
        return due and not any(
            row["step"] == start_step and "eval/loss" in row for row in read_metrics(self._workdir)
        )
