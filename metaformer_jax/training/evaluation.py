"""Loss and accuracy over all evaluation examples, and pictures of the misclassified ones."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from metaformer_jax.data.loader import check_few_bad, why_bad
from metaformer_jax.training import agreement
from metaformer_jax.training.compilation_cache import share_compiled_programs
from metaformer_jax.training.distributed import is_first_process
from metaformer_jax.training.pictures import draw_misclassified
from metaformer_jax.training.progress import evaluation_progress, say
from metaformer_jax.training.provenance import (
    check_same_classes,
    check_same_network,
    check_same_normalisation,
)
from metaformer_jax.training.run import Run
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.convert import Variables, to_variables
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.workdir import newest_step, read_step, saved_steps

# The most misclassified images that a picture can show at a readable size.
_MAX_PICTURED = 48
_TOP = 5


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results over all evaluation examples; the arrays are in the order of the source.

    `indices` are positions in the source; examples that cannot be read are left out. `ranks` are
    the ranks of the labels among the logits, 0 where the prediction is right.
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    predictions: np.ndarray
    probabilities: np.ndarray
    ranks: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def figures(self) -> dict[str, float]:
        """The figures that are logged."""
        figures = {"accuracy": self.accuracy, "loss": self.loss}
        return figures | {"top5_accuracy": self.top5_accuracy}

    def __str__(self) -> str:
        num_right, num_in_top = (int(np.sum(self.ranks < top)) for top in (1, _TOP))
        of = len(self.labels)
        return (
            f"accuracy {self.accuracy:.2%} ({num_right} of {of})  "
            f"top-{_TOP} {self.top5_accuracy:.2%} ({num_in_top} of {of})  loss {self.loss:.4f}"
        )


class StoppedError(RuntimeError):
    """An evaluation was stopped before its end."""


def evaluate_state(
    run: Run,
    state: TrainState,
    *,
    console: Console | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluates parameters on every example of the run's evaluation source, once each.

    Args:
        run: data, model and devices.
        state: the parameters.
        console: where a progress bar is shown; none by default.
        is_stopped: called before each batch; True stops the evaluation.

    Raises:
        StoppedError: the evaluation was stopped.
        DataError: too many images cannot be read; with several processes in all of them, unless
            one has met too many by itself.
    """
    num_batches = -(-len(run.eval_source) // run.eval_batch_size)
    with (
        run.evaluation_batches() as batches,
        evaluation_progress(console, num_batches) as advance,
    ):
        outputs = []
        for batch in batches:
            if is_stopped():
                raise StoppedError
            outputs.append(run.engine.eval_step(state, batch))
            # One batch is computed while the next is transferred; no more are kept on the devices.
            if len(outputs) > 1:
                outputs[-2] = jax.device_get(outputs[-2])
            advance()
        outputs = jax.device_get(outputs)
    columns = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    present = {key: column[columns["mask"]] for key, column in columns.items()}
    # Each process counts only the bad images of its own share.
    missing = np.setdiff1d(np.arange(len(run.eval_source)), present["index"]).tolist()
    check_few_bad(
        run.eval_source,
        missing,
        run.config.data.max_bad_fraction,
        why_bad=functools.partial(why_bad, run.eval_source, run.eval_transform),
    )
    return Evaluation(
        accuracy=float(np.mean(present["rank"] == 0)),
        top5_accuracy=float(np.mean(present["rank"] < _TOP)),
        loss=float(np.mean(present["loss"], dtype=np.float64)),
        predictions=present["prediction"],
        probabilities=present["probability"],
        ranks=present["rank"],
        labels=present["label"],
        indices=present["index"],
    )


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | None = None,
    *,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates the newest checkpoint of a run or, without a workdir, the pretrained weights.

    If the run keeps a moving average, parameters and average are evaluated, and the evaluation of
    the average is returned. The run may go on at the same time.

    Raises:
        ValueError: the config is wrong, the workdir holds no checkpoint, the weights do not fit, or
            processes have other configs, data or weights than each other.
        FileNotFoundError: there are no pretrained weights at the path.
        DataError: too many images cannot be read.
        DownloadError: the published weights could not be fetched.
        ImportError: the weights are a `.pth` file, and PyTorch is not installed.
    """
    console = console or Console()
    console.quiet = console.quiet or not is_first_process()
    run = Run(config, trains=False)
    variables = {} if workdir else _pretrained_variables(run)
    agreement.check_same(config, run.class_names, run.num_examples, variables)
    if workdir is None:
        evaluation = evaluate_state(run, _state_of(run, variables), console=console)
        say(console, evaluation)
        return evaluation
    if not saved_steps(workdir):
        raise ValueError(
            f"`workdir` must hold a checkpoint, got {str(workdir)!r}. Train first, with "
            "--mode=train; or leave it out to evaluate config.model.pretrained."
        )
    check_same_network(workdir, config, run.engine.model.spec)
    check_same_normalisation(workdir, config)
    check_same_classes(workdir, run.class_names)
    if sentence := share_compiled_programs(workdir / "compiled"):
        say(console, sentence)
    step, weights = _read_newest(run, workdir)
    say(console, f"evaluating step {step:,} of {workdir}")
    names = {"params": "last parameters", "ema": "their average"} if len(weights) > 1 else {}
    for entry, variables in weights.items():
        evaluation = evaluate_state(run, _state_of(run, variables), console=console)
        name = f"{names[entry]:<16} " if names else ""
        say(console, f"{name}{evaluation}")
    return evaluation


def picture_misclassified(run: Run, evaluation: Evaluation, path: pathlib.Path) -> None:
    """Draws the misclassified images, those with the most confident predictions first."""
    wrong = np.flatnonzero(evaluation.ranks)
    surest_first = wrong[np.argsort(-evaluation.probabilities[wrong], kind="stable")]
    names = run.class_names
    draw_misclassified(
        [
            (
                run.eval_transform(run.eval_source[int(evaluation.indices[row])]["image"]),
                names[evaluation.labels[row]],
                names[evaluation.predictions[row]],
                float(evaluation.probabilities[row]),
            )
            for row in surest_first[:_MAX_PICTURED].tolist()
        ],
        path,
        title=f"{len(wrong)} of {len(evaluation.labels)} misclassified",
    )


def _read_newest(run: Run, workdir: pathlib.Path) -> tuple[int, dict[str, Variables]]:
    """The step of the newest checkpoint, one for all processes, and its weights by entry."""
    while True:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(newest_step(workdir))))
        tensors = None
        try:
            tensors = read_step(workdir, step)
        except CheckpointError:
            # The training may have deleted it meanwhile, after saving a newer one.
            if newest_step(workdir) == step:
                raise
        all_have = np.all(multihost_utils.process_allgather(np.array(tensors is not None)))
        if tensors is not None and all_have:
            model = run.engine.model
            return step, {entry: to_variables(tensors[entry], model) for entry in tensors}


def _pretrained_variables(run: Run) -> Variables:
    config = run.config.model
    if not config.pretrained or config.fresh_head:
        raise ValueError(
            "Either `workdir` must be given, or `config.model.pretrained` without a fresh head, to "
            f"have something to evaluate, got {config.pretrained!r} and fresh_head="
            f"{config.fresh_head}."
        )
    return run.pretrained_variables()


def _state_of(run: Run, variables: Variables) -> TrainState:
    # Every value is replaced, so none is drawn; an evaluation needs no optimiser state.
    zero = jnp.zeros((), jnp.int32)
    undrawn = dataclasses.replace(
        run.engine.abstract_state, step=zero, opt_state=(), ema={}, num_skipped=zero
    )
    return run.engine.with_weights(undrawn, variables)
