"""The training program: from a config to a workdir, with resumption after interruptions."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import ml_collections
from rich.console import Console

from metaformer_jax.data.loader import DataError
from metaformer_jax.training import agreement, settings
from metaformer_jax.training.checkpoint import Checkpoints, SaveError, set_aside_damaged
from metaformer_jax.training.claim import claimed_workdir, describe
from metaformer_jax.training.compilation_cache import share_compiled_programs
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.evaluation import (
    Evaluation,
    StoppedError,
    evaluate_state,
    picture_misclassified,
)
from metaformer_jax.training.failure import failing_if
from metaformer_jax.training.guard import Guard
from metaformer_jax.training.memory import memory_of
from metaformer_jax.training.metrics import (
    MetricWriter,
    PendingMetrics,
    import_wandb,
    read_accuracies,
    read_metrics,
)
from metaformer_jax.training.pictures import draw_curves, to_array
from metaformer_jax.training.preemption import PreemptedError, Preemption
from metaformer_jax.training.preview import draw_inputs
from metaformer_jax.training.progress import TrainingProgress, describe_run, elapsing, say
from metaformer_jax.training.run import Run
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.convert import Variables

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    accept_config_changes: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Trains what the config describes, or continues from the workdir's last checkpoint.

    The workdir gets `checkpoints/`, `config.json`, `class_names.json`, `num_examples.json`,
    `metrics.jsonl`, `tensorboard/`, `curves.png` and `misclassified.png`. If there are several
    processes, all of them must see it; only the first one writes, and their compiled programs are
    in `compiled/`.

    Returns:
        The evaluation of the last parameters, or of their moving average if there is one.

    Raises:
        ValueError: the config is wrong, the workdir belongs to another config or data or is not one
            folder for all processes, these have other configs or data than each other, or the
            pretrained weights or the checkpoint do not fit.
        FileNotFoundError: there are no pretrained weights at the path.
        DataError: too many images cannot be read.
        NonFiniteError: the loss or gradient became infinite or NaN.
        PreemptedError: the run was told to end; it has saved a checkpoint.
        SaveError: a checkpoint could not be written, or the workdir was moved or removed.
        TrainingError: after the first step something raised a ValueError, FileNotFoundError or
            ImportError, which is its cause.
        ImportError: Weights & Biases is requested but not installed.
    """
    console = console or Console()
    # Only the first process prints.
    console.quiet = console.quiet or not is_first_process()
    directory = workdir / "checkpoints"
    preemption = Preemption()
    start_step = agreement.newest_step_of_first(directory)
    preemption.goes_on_from(start_step)
    run = Run(config)
    # Whatever does not fit or is missing is reported before a workdir is created.
    if is_first_process() and config.wandb.project:
        import_wandb(config.wandb.project)
    variables = {} if start_step else run.pretrained_variables()
    agreement.check_same(config, run.class_names, run.num_examples, variables)
    claimed = claimed_workdir(
        workdir,
        config,
        run.class_names,
        run.num_examples,
        accept_changes=accept_config_changes,
        is_writer=is_first_process(),
    )
    with preemption, claimed as changes:
        agreement.check_shared(workdir)
        if is_first_process():
            for sentence in set_aside_damaged(directory):
                say(console, f"warning: {sentence}")
        if sentence := share_compiled_programs(workdir / "compiled"):
            say(console, sentence)
        # The first process has set aside those that are damaged.
        start_step = agreement.newest_step(directory)
        if changes:
            say(
                console,
                f"warning: continuing with other values, by which step {start_step:,} is epoch "
                f"{start_step / run.steps_per_epoch:.2f} of "
                f"{config.epochs + config.cooldown_epochs:g}:\n" + "\n".join(changes),
            )
        with Checkpoints(directory, keep=config.checkpoint.keep) as checkpoints:
            training = _Training(run, workdir, checkpoints, preemption, console)
            with failing_if(training.has_begun):
                evaluation = training.finish(start_step, variables)
        if is_first_process():
            with failing_if(training.has_begun):
                draw_curves(read_metrics(workdir), workdir / "curves.png")
                picture_misclassified(run, evaluation, workdir / "misclassified.png")
    say(console, evaluation)
    say(console, f"checkpoint, metrics and pictures: {workdir}")
    return evaluation


class _Training:
    """The training loop, with logging, checkpoints and evaluations."""

    def __init__(
        self,
        run: Run,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        preemption: Preemption,
        console: Console,
    ):
        self._run = run
        self.config = run.config
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.preemption = preemption
        self.console = console
        skips = self.config.on_nonfinite == "skip"
        self.guard = Guard(
            workdir,
            run.train_source,
            max_skipped=self.config.max_skipped_updates if skips else 0,
            process_index=jax.process_index(),
        )
        self.held_out = ""
        self._begun = False

    def has_begun(self) -> bool:
        """Whether a step was compiled, which is then trained."""
        return self._begun

    def finish(self, start_step: int, variables: Variables) -> Evaluation:
        """Trains to the end, from the newest checkpoint or, without one, from these values."""
        run, engine = self._run, self._run.engine
        for step, accuracy in read_accuracies(self.workdir).items():
            # Later ones belong to checkpoints that are gone.
            if step <= start_step:
                self.checkpoints.evaluated(step, accuracy)
        describe_run(run, self.workdir, start_step, self.console)
        if start_step:
            state = self.checkpoints.restore(engine.abstract_state, self.config)
        else:
            state = engine.with_weights(engine.initial_state(), variables)
        if start_step < run.total_steps or self._lacks_evaluation(start_step):
            return self._train(state, start_step)
        self._keep_description()
        return evaluate_state(
            run, engine.averaged(state) if state.ema else state, console=self.console
        )

    def _train(self, state: TrainState, start_step: int) -> Evaluation:
        """Trains from after `start_step` to the end."""
        run, config, total_steps = self._run, self.config, self._run.total_steps
        pending = PendingMetrics(self.guard, self.checkpoints.pending_metrics())
        with (
            contextlib.ExitStack() as trace,
            run.training_batches(start_step) as batches,
            MetricWriter(
                self.workdir,
                start_step=start_step,
                is_writer=is_first_process(),
                wandb_project=config.wandb.project,
                config=settings.flatten(config),
            ) as writer,
            TrainingProgress(
                self.console,
                total_steps=total_steps,
                start_step=start_step,
                batch_size=config.batch_size,
                macs_per_image=run.counts.macs,
            ) as progress,
        ):
            if self._lacks_evaluation(start_step):
                evaluation = self._evaluate(state, start_step, writer)
            if start_step >= total_steps:
                self._keep_description()
            # What a run starts from is kept.
            saves = True
            train_step: Step | None = None
            for step in range(start_step + 1, total_steps + 1):
                kept = self._kept_if_data_fails(saves, step - 1, state, pending, writer)
                with kept, progress.waiting_for_data():
                    batch = next(batches)
                if train_step is None:
                    train_step = self._compiled(state, batch)
                    self._keep_description()
                    self._begun = True
                if step == 1:
                    picture = to_array(draw_inputs(run, batch, 0))
                    writer.write_picture(0, "train/batch", picture)
                self._trace(trace, step, start_step, state)
                self.guard.expect(step, batches.indices)
                self.preemption.trained()
                state, metrics = train_step(state, batch)
                pending.add(step, metrics, num_replaced=batches.num_replaced)
                progress.update(step)
                saves = run.is_due(config.checkpoint.every_epochs, step)
                is_logged = step % config.log_every_steps == 0 or step == total_steps
                if is_logged:
                    row = pending.take()
                    row["learning_rate"] = float(run.schedule(step - 1))
                    speed = progress.speed(step)
                    progress.show(step, row | speed, held_out=self.held_out)
                    writer.write(step, train=row, speed=speed)
                if saves:
                    # Before the evaluation: if that fails, no training is lost.
                    self._save(step, state, pending, writer)
                elif is_logged:
                    self._check_saved(step, state, pending, writer)
                stopped = False
                if saves or run.is_due(config.eval_every_epochs, step):
                    kept = self._kept_if_data_fails(saves, step, state, pending, writer)
                    with progress.paused(), kept:
                        try:
                            evaluation = self._evaluate(state, step, writer)
                        except StoppedError:
                            stopped = True
                if stopped or (self.preemption.reached(step) and step < total_steps):
                    if not saves:
                        self._save(step, state, pending, writer)
                    self.checkpoints.wait()
                    raise PreemptedError(
                        f"told to end: step {step} of {total_steps} is saved. The same command "
                        "continues from there."
                    )
        return evaluation

    def _keep_description(self) -> None:
        if is_first_process():
            run = self._run
            describe(self.workdir, run.config, run.class_names, run.num_examples)

    def _save(
        self, step: int, state: TrainState, pending: PendingMetrics, writer: MetricWriter
    ) -> None:
        try:
            self.checkpoints.save(state, pending.to_host(), self.config)
        except SaveError as error:
            self._save_after(error, step, state, pending, writer)
        self._check_folder(step, writer)

    @contextlib.contextmanager
    def _kept_if_data_fails(
        self,
        is_saved: bool,
        step: int,
        state: TrainState,
        pending: PendingMetrics,
        writer: MetricWriter,
    ) -> Iterator[None]:
        """Saves what is trained by now where data cannot be read, before that ends the run."""
        try:
            yield
        except DataError:
            # With several processes, only one may have met the bad images.
            if not is_saved and jax.process_count() == 1:
                self._save(step, state, pending, writer)
            raise

    def _check_saved(
        self, step: int, state: TrainState, pending: PendingMetrics, writer: MetricWriter
    ) -> None:
        """Notices that the last checkpoint was not written, long before the next one is due."""
        try:
            self.checkpoints.check()
        except SaveError as error:
            self._save_after(error, step, state, pending, writer)

    def _save_after(
        self,
        error: SaveError,
        step: int,
        state: TrainState,
        pending: PendingMetrics,
        writer: MetricWriter,
    ) -> NoReturn:
        """Saves what is trained by now, if what went wrong has passed, and ends the run."""
        # The others know nothing of it.
        if jax.process_count() > 1:
            raise error
        try:
            self.checkpoints.save(state, pending.to_host(), self.config)
            self.checkpoints.wait()
        except SaveError:
            raise error from None
        self._check_folder(step, writer)
        raise SaveError(f"{error} Step {step:,} could be saved after that.") from error

    def _check_folder(self, step: int, writer: MetricWriter) -> None:
        if not writer.has_lost_its_folder():
            return
        # The checkpoint has made the folder anew.
        self.checkpoints.wait()
        self._keep_description()
        raise SaveError(
            f"{self.workdir} was moved or removed while the run wrote to it. Step {step} is saved "
            "in a new folder of that name, from which the same command continues, without the "
            "metrics up to there. Or continue the moved one: name it by --workdir."
        )

    def _compiled(self, state: TrainState, batch: dict[str, jax.Array]) -> Step:
        started = time.monotonic()
        with elapsing(self.console, "compiling the training step"):
            compiled = self._run.engine.train_step.lower(state, batch).compile()
        text = f"compiled in {time.monotonic() - started:.0f} s"
        memory = memory_of(compiled)
        if memory is not None:
            limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
            text += f"; it takes {memory.total / 2**30:.2f} GiB on each device"
            text += f" of {limit / 2**30:.2f}" if limit else ""
        say(self.console, text)
        return compiled

    def _trace(
        self, stack: contextlib.ExitStack, step: int, start_step: int, state: TrainState
    ) -> None:
        """Starts a profiler trace before the first of `profile_steps`, and ends it after the last.

        If some of these steps were done before this start of the run, the others are traced.
        """
        if not self.config.profile_steps:
            return
        first, last = self.config.profile_steps
        folder = self.workdir / "profile"
        if step in (max(first, start_step + 1), last + 1):
            # The devices may be steps behind.
            jax.block_until_ready(state)
        if step == max(first, start_step + 1) and step <= last:
            # Called when the trace is written, whether by the step after the last or by the end.
            stack.callback(say, self.console, f"profiler trace: {folder}")
            stack.enter_context(jax.profiler.trace(str(folder)))
        elif step == last + 1:
            stack.close()

    def _evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> Evaluation:
        """Evaluates and logs; returns the evaluation of the average if there is one."""

        def evaluated(state: TrainState) -> Evaluation:
            return evaluate_state(
                self._run,
                state,
                console=self.console,
                is_stopped=lambda: self.preemption.noticed,
            )

        evaluation = evaluated(state)
        rows = {"eval": evaluation.figures()}
        if state.ema:
            evaluation = evaluated(self._run.engine.averaged(state))
            rows["eval_ema"] = evaluation.figures()
        writer.write(step, **rows)
        self.checkpoints.evaluated(step, evaluation.accuracy)
        self.held_out = f"  held out {evaluation.accuracy:.1%}"
        return evaluation

    def _lacks_evaluation(self, start_step: int) -> bool:
        """Whether the evaluation due after this step is missing, as it was interrupted."""
        if not start_step:
            return False
        config = self.config
        due = any(
            self._run.is_due(every_epochs, start_step)
            for every_epochs in (config.eval_every_epochs, config.checkpoint.every_epochs)
        )
        return due and not any(
            row["step"] == start_step and "eval/loss" in row for row in read_metrics(self.workdir)
        )
