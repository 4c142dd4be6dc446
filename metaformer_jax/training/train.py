"""The training program: from a config to a workdir, with resumption after interruptions."""

import pathlib

import jax
import ml_collections
from rich.console import Console

from metaformer_jax.training import agreement
from metaformer_jax.training.checkpoint import Checkpoints, set_aside_damaged
from metaformer_jax.training.claim import claimed_workdir
from metaformer_jax.training.compilation_cache import share_compiled_programs
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.evaluation import Evaluation, picture_misclassified
from metaformer_jax.training.failure import failing_if
from metaformer_jax.training.loop import TrainingLoop
from metaformer_jax.training.metrics import import_wandb, read_metrics
from metaformer_jax.training.pictures import draw_curves
from metaformer_jax.training.preemption import Preemption
from metaformer_jax.training.progress import say
from metaformer_jax.training.run import Run


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
        ImportError: Weights & Biases is requested but not installed, or PyTorch for a `.pth` file.
        DownloadError: the published weights could not be fetched.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise ValueError(
            "JAX_DISABLE_JIT must be off for a training, whose step is compiled ahead, got True. "
            "To debug a model, call it from Python."
        )
    console = console or Console()
    # Only the first process prints.
    console.quiet = console.quiet or not is_first_process()
    preemption = Preemption()
    start_step = agreement.newest_step_of_first(workdir)
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
            for sentence in set_aside_damaged(workdir):
                say(console, f"warning: {sentence}")
        if sentence := share_compiled_programs(workdir / "compiled"):
            say(console, sentence)
        # The first process has set aside those that are damaged.
        start_step = agreement.agreed_newest_step(workdir)
        if changes:
            say(
                console,
                f"warning: continuing with other values, by which step {start_step:,} is epoch "
                f"{start_step / run.steps_per_epoch:.2f} of "
                f"{config.epochs + config.cooldown_epochs:g}:\n" + "\n".join(changes),
            )
        with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
            training = TrainingLoop(run, workdir, checkpoints, preemption, console)
            with failing_if(training.has_begun):
                evaluation = training.finish(start_step, variables)
        if is_first_process():
            with failing_if(training.has_begun):
                draw_curves(read_metrics(workdir), workdir / "curves.png")
                picture_misclassified(run, evaluation, workdir / "misclassified.png")
    say(console, evaluation)
    say(console, f"checkpoint, metrics and pictures: {workdir}")
    return evaluation
