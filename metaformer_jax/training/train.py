"""A training run from a config: the only place below the programs that sees a ConfigDict."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from matplotlib.figure import Figure
from rich.console import Console

from metaformer_jax import models
from metaformer_jax.data import augment, loader
from metaformer_jax.data.device import DeviceTransform, check_groups
from metaformer_jax.data.randaugment import parse_policy
from metaformer_jax.data.sources import open_source
from metaformer_jax.training import optim, settings, sharding
from metaformer_jax.training.checkpoint import Checkpoints, has_checkpoint
from metaformer_jax.training.feeding import PlacedBatches
from metaformer_jax.training.metrics import MetricWriter, read_metrics
from metaformer_jax.training.pictures import (
    batch_figure,
    draw_curves,
    draw_misclassified,
    save,
    to_array,
)
from metaformer_jax.training.progress import TrainingProgress
from metaformer_jax.training.step import Engine, TrainState
from metaformer_jax.weights import hub
from metaformer_jax.weights.convert import Variables
from metaformer_jax.weights.pretrained import fitted_variables

# Most of what a picture of misclassified images can show at a readable size.
_MAX_PICTURED = 48


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results over all evaluation examples; the arrays in the order of the source.

    `indices` are places in the source: an example that cannot be read is left out.
    """

    accuracy: float
    loss: float
    predictions: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


class Run:
    """What a config describes, built and checked, before anything is compiled.

    Args:
        config: all fields of `recipes.base_config()`.

    Raises:
        ValueError: a field is unknown, missing or out of range, or fields contradict each other.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        settings.check_fields(config)
        self.config = config
        data = config.data
        self.train_source = open_source(data.name, "train", root=data.root)
        self.eval_source = open_source(data.name, "eval", root=data.root)
        self.num_classes = len(self.train_source.class_names)
        channels = self.train_source.channels
        for field in ("mean", "std"):
            if len(data[field]) != channels:
                raise ValueError(
                    f"`config.data.{field}` must have one value for each of the {channels} "
                    f"channels of {data.name!r}, got {tuple(data[field])}."
                )
        if config.batch_size > len(self.train_source):
            raise ValueError(
                f"`config.batch_size` must be at most the {len(self.train_source):,} training "
                f"examples of {data.name!r}, got {config.batch_size}."
            )
        self.train_transform, self.eval_transform = _host_transforms(config, channels)
        self.workers = _workers(data)
        self.steps_per_epoch = len(self.train_source) / config.batch_size
        self.total_steps = max(1, round(config.epochs * self.steps_per_epoch))
        mesh = sharding.create_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
        for field in ("batch_size", "eval_batch_size"):
            if config[field] % mesh.size:
                raise ValueError(
                    f"`config.{field}` must divide by the {mesh.size} devices, got "
                    f"{config[field]}. Use {math.ceil(config[field] / mesh.size) * mesh.size}."
                )
        self.schedule = optim.warmup_cosine(
            peak=config.optimizer.learning_rate,
            warmup_steps=round(config.optimizer.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_steps,
            warmup_from=config.optimizer.warmup_learning_rate,
            end=config.optimizer.min_learning_rate,
        )
        optimizer = optim.adamw(
            self.schedule,
            b1=config.optimizer.b1,
            b2=config.optimizer.b2,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm or None,
        )
        device_transform = _device_transform(config, self.num_classes)
        if device_transform.mixes:
            check_groups(config.batch_size, mesh.size, device_transform.mixing_group_size)
        self.engine = Engine(
            _model_builder(config, self.num_classes, channels),
            optimizer,
            mesh=mesh,
            transform=device_transform,
            seed=config.seed,
        )

    def is_due(self, every_epochs: float, step: int) -> bool:
        """Whether something done every so many epochs is done after this step."""
        every_steps = every_epochs * self.steps_per_epoch
        return step // every_steps > (step - 1) // every_steps or step == self.total_steps

    def pretrained_variables(self) -> Variables:
        """The values that the training starts from, by path; none without pretrained weights.

        Raises:
            ValueError: the weights do not fit.
            FileNotFoundError: there are none at the path.
            weights.DownloadError: the published ones could not be fetched.
        """
        config = self.config.model
        if not config.pretrained:
            return {}
        path = config.pretrained
        if path == "published":
            if not config.name:
                raise ValueError(
                    "`config.model.pretrained` must be a path unless config.model.name is set, "
                    f"got {path!r}."
                )
            path = hub.converted_file(config.name)
        return fitted_variables(
            self.engine.model,
            path,
            name=config.name or None,
            keep_head=config.fresh_head,
            class_map=config.class_map or None,
            fit_channels=True,
        )

    @contextlib.contextmanager
    def training_batches(self, start_step: int) -> Iterator[PlacedBatches]:
        """Batches on the devices, from a step on; the workers end with the context."""
        with loader.training_batches(
            self.train_source,
            self.train_transform,
            share=self._share(self.config.batch_size),
            seed=self.config.seed,
            start_step=start_step,
            workers=self.workers,
            max_bad_fraction=self.config.data.max_bad_fraction,
        ) as batches:
            yield PlacedBatches(batches, self.engine.mesh, fields=("image", "label"))

    def evaluate(self, state: TrainState) -> Evaluation:
        """Loss and accuracy over every evaluation example, once each."""
        with loader.evaluation_batches(
            self.eval_source,
            self.eval_transform,
            share=self._share(self.config.eval_batch_size),
            workers=self.workers,
            max_bad_fraction=self.config.data.max_bad_fraction,
        ) as batches:
            placed = PlacedBatches(
                batches, self.engine.mesh, fields=("image", "label", "mask", "index")
            )
            outputs = [self.engine.eval_step(state, batch) for batch in placed]
        on_host = jax.device_get(outputs)
        columns = {key: np.concatenate([out[key] for out in on_host]) for key in on_host[0]}
        present = {key: column[columns["mask"]] for key, column in columns.items()}
        return Evaluation(
            accuracy=float(np.mean(present["prediction"] == present["label"])),
            loss=float(np.mean(present["loss"], dtype=np.float64)),
            predictions=present["prediction"],
            probabilities=present["probability"],
            labels=present["label"],
            indices=present["index"],
        )

    def evaluation_image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        """One image as the evaluation takes it, before it is normalised."""
        return self.eval_transform(self.eval_source[int(index)]["image"])

    def _share(self, batch_size: int) -> loader.Share:
        return loader.Share(
            batch_size=batch_size,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
        )


def _host_transforms(
    config: ml_collections.ConfigDict, channels: int
) -> tuple[augment.TrainTransform, augment.EvalTransform]:
    policy = config.augment.randaugment
    train = augment.TrainTransform(
        image_size=config.data.image_size,
        channels=channels,
        crop=config.augment.crop,
        crop_scale=tuple(config.augment.crop_scale),
        crop_ratio=tuple(config.augment.crop_ratio),
        interpolations=tuple(config.augment.interpolations),
        flip_probability=config.augment.flip_probability,
        randaugment=parse_policy(policy) if policy else None,
        fill=tuple(round(255 * value) for value in config.data.mean),
        three_augment=config.augment.three_augment,
        color_jitter=config.augment.color_jitter,
        max_shift=config.augment.max_shift,
    )
    evaluation = augment.EvalTransform(
        image_size=config.data.image_size,
        channels=channels,
        crop_fraction=config.eval_crop_fraction,
        interpolation=config.eval_interpolation,
    )
    return train, evaluation


def _workers(data: ml_collections.ConfigDict) -> loader.Workers:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_workers = data.num_workers if data.num_workers >= 0 else cores or 1
    return loader.Workers(num_workers=num_workers, num_threads=data.num_threads)


def _device_transform(config: ml_collections.ConfigDict, num_classes: int) -> DeviceTransform:
    return DeviceTransform(
        num_classes=num_classes,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixing.mixup_alpha,
        cutmix_alpha=config.mixing.cutmix_alpha,
        switch_probability=config.mixing.switch_probability,
        mixing_probability=config.mixing.probability,
        mixing_group_size=config.mixing.group_size,
        erasing_probability=config.erasing_probability,
    )


def _model_builder(
    config: ml_collections.ConfigDict, num_classes: int, channels: int
) -> Callable[[nnx.Rngs], models.MetaFormer]:
    arguments = {
        "num_classes": num_classes,
        "in_channels": channels,
        "image_size": config.data.image_size,
        "drop_path_rate": config.model.drop_path_rate,
        "head_dropout": config.model.head_dropout,
        "dtype": jnp.dtype(config.model.dtype),
    }
    if bool(config.model.name) == bool(config.model.family):
        raise ValueError(
            "One of `config.model.name` and `config.model.family` must be set, got "
            f"{config.model.name!r} and {config.model.family!r}."
        )
    if config.model.name:
        return lambda rngs: models.create_model(config.model.name, **arguments, rngs=rngs)
    if config.model.family not in models.FAMILIES:
        raise ValueError(
            f"`config.model.family` must be one of {', '.join(models.FAMILIES)}, got "
            f"{config.model.family!r}."
        )
    spec = models.FAMILIES[config.model.family].spec(
        depths=tuple(config.model.depths), dims=tuple(config.model.dims)
    )
    return lambda rngs: models.MetaFormer(spec, **arguments, rngs=rngs)


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    accept_config_changes: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Trains what the config describes, or continues where the workdir's last checkpoint stands.

    The workdir holds `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`, `curves.png`
    and `misclassified.png`.

    Raises:
        ValueError: the config is wrong, the workdir belongs to another one, or the pretrained
            weights do not fit.
        FileNotFoundError: there are no pretrained weights at the path.
        FloatingPointError: the loss became infinite or not a number.
    """
    console = console or Console()
    run = Run(config)
    # What does not fit shows before a workdir is made.
    variables = {} if has_checkpoint(workdir / "checkpoints") else run.pretrained_variables()
    settings.claim_workdir(workdir, config, accept_changes=accept_config_changes)
    engine = run.engine
    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        start_step = checkpoints.latest_step() or 0
        _describe(run, workdir, start_step, console)
        if start_step:
            state = checkpoints.restore(engine.abstract_state)
        else:
            state = engine.with_weights(engine.initial_state(), variables)
        if start_step < run.total_steps:
            state, evaluation = _train_loop(run, state, start_step, workdir, checkpoints, console)
        else:
            evaluation = run.evaluate(state)
    _report(run, evaluation, workdir, console)
    return evaluation


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | None = None,
    *,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates the newest checkpoint of a run, or without a workdir the pretrained weights.

    Raises:
        ValueError: the config is wrong, the workdir holds no checkpoint, or the weights do not fit.
    """
    console = console or Console()
    run = Run(config)
    if workdir is None:
        state = _pretrained_state(run)
    elif not has_checkpoint(workdir / "checkpoints"):
        raise ValueError(
            f"`workdir` must hold a checkpoint, got {str(workdir)!r}. Train first, with "
            "--mode=train; or leave it out to evaluate config.model.pretrained."
        )
    else:
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            state = checkpoints.restore(run.engine.abstract_state)
    evaluation = run.evaluate(state)
    _print_result(evaluation, console)
    return evaluation


def _pretrained_state(run: Run) -> TrainState:
    config = run.config.model
    if not config.pretrained or config.fresh_head:
        raise ValueError(
            "Either `workdir` must be given, or `config.model.pretrained` without a fresh head, to "
            f"have something to evaluate, got {config.pretrained!r} and fresh_head="
            f"{config.fresh_head}."
        )
    # Every value is replaced: none is drawn. An evaluation asks for no optimiser.
    undrawn = dataclasses.replace(
        run.engine.abstract_state, step=jnp.zeros((), jnp.int32), opt_state=()
    )
    return run.engine.with_weights(undrawn, run.pretrained_variables())


def _train_loop(
    run: Run,
    state: TrainState,
    start_step: int,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    console: Console,
) -> tuple[TrainState, Evaluation]:
    config, engine, total_steps = run.config, run.engine, run.total_steps
    waiting: list[dict[str, jax.Array]] = []
    num_replaced = 0
    figures = held_out = ""
    with (
        run.training_batches(start_step) as batches,
        MetricWriter(workdir, start_step=start_step) as writer,
        TrainingProgress(console, total_steps=total_steps, start_step=start_step) as progress,
    ):
        for step in range(start_step + 1, total_steps + 1):
            batch = next(batches)
            if step == start_step + 1:
                console.print("compiling the training step ...")
            if step == 1:
                writer.write_picture(
                    0, "train/batch", to_array(_batch_figure(run, batch, step - 1))
                )
            state, metrics = engine.train_step(state, batch)
            waiting.append(metrics)
            num_replaced += batches.num_replaced
            save = run.is_due(config.checkpoint.every_epochs, step)
            # A row before every checkpoint: a resumed run then averages over the same steps.
            if step % config.log_every_steps == 0 or save:
                row = _mean_over_steps(waiting, step)
                row["learning_rate"] = float(run.schedule(step - 1))
                row["replaced_examples"] = num_replaced
                waiting, num_replaced = [], 0
                writer.write(step, {f"train/{name}": value for name, value in row.items()})
                figures = f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}{held_out}"
            progress.update(step, figures)
            if save or run.is_due(config.eval_every_epochs, step):
                evaluation = run.evaluate(state)
                results = {"accuracy": evaluation.accuracy, "loss": evaluation.loss}
                held_out = f"  held out {evaluation.accuracy:.1%}"
                writer.write(step, {f"eval/{name}": value for name, value in results.items()})
                if save:
                    checkpoints.save(state, metrics=results)
    return state, evaluation


def preview(
    config: ml_collections.ConfigDict, output: pathlib.Path, *, console: Console | None = None
) -> None:
    """Draws the first training batch as the first step sees it, without the model.

    Raises:
        ValueError: the config is wrong.
        OSError: the output cannot be written.
    """
    run = Run(config)
    with run.training_batches(0) as batches:
        save(_batch_figure(run, next(batches), 0), output)
    (console or Console()).print(
        f"the first training batch: {output}", highlight=False, soft_wrap=True
    )


def _batch_figure(run: Run, batch: dict[str, jax.Array], step: int) -> Figure:
    inputs = run.engine.training_inputs(batch, jnp.int32(step))
    images, targets = (
        np.concatenate([shard.data for shard in array.addressable_shards])[:_MAX_PICTURED]
        for array in inputs
    )
    return batch_figure(
        images * np.array(run.config.data.std) + np.array(run.config.data.mean),
        targets,
        run.train_source.class_names,
        title=f"training images of step {step + 1}",
    )


def _mean_over_steps(waiting: list[dict[str, jax.Array]], step: int) -> dict[str, float]:
    on_host = jax.device_get(waiting)
    for past, metrics in enumerate(reversed(on_host)):
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"The loss of step {step - past} is {metrics['loss']} (gradient norm "
                f"{metrics['grad_norm']}). Lower optimizer.learning_rate or set "
                "optimizer.max_grad_norm; the last checkpoint is good."
            )
    return {key: float(np.mean([metrics[key] for metrics in on_host])) for key in on_host[0]}


def _describe(run: Run, workdir: pathlib.Path, start_step: int, console: Console) -> None:
    config = run.config
    counts = models.count(lambda: run.engine.build(nnx.Rngs(0)))
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.engine.mesh.shape.items())
    device = jax.devices()[0]
    console.print(
        f"model    {config.model.name or config.model.family}: {counts.params:,} parameters, "
        f"{counts.frozen_params:,} frozen, {counts.macs / 1e6:,.1f} M multiply-adds per image\n"
        f"data     {config.data.name}: {len(run.train_source):,} for training, "
        f"{len(run.eval_source):,} for evaluation, {config.data.image_size} pixels\n"
        f"devices  {jax.device_count()} x {device.device_kind} in {jax.process_count()} processes "
        f"({mesh})\n"
        f"steps    {run.total_steps:,} of {config.batch_size:,} images "
        f"({config.epochs:g} epochs)\n"
        f"workdir  {workdir}",
        highlight=False,
    )
    if config.model.pretrained and not start_step:
        head = ", with a fresh head" if config.model.fresh_head else ""
        console.print(f"starting from {config.model.pretrained}{head}", highlight=False)
    if start_step >= run.total_steps:
        console.print(f"This training is finished: {start_step:,} steps are done.")
    elif start_step:
        console.print(f"continuing after step {start_step:,}")


def _report(run: Run, evaluation: Evaluation, workdir: pathlib.Path, console: Console) -> None:
    draw_curves(read_metrics(workdir), workdir / "curves.png")
    wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
    surest_first = wrong[np.argsort(-evaluation.probabilities[wrong], kind="stable")]
    names = run.eval_source.class_names
    draw_misclassified(
        [
            (
                run.evaluation_image(evaluation.indices[row]),
                names[evaluation.labels[row]],
                names[evaluation.predictions[row]],
                float(evaluation.probabilities[row]),
            )
            for row in surest_first[:_MAX_PICTURED].tolist()
        ],
        workdir / "misclassified.png",
        title=f"{len(wrong)} of {len(evaluation.labels)} misclassified",
    )
    _print_result(evaluation, console)
    console.print(f"checkpoint, metrics and pictures: {workdir}", highlight=False)


def _print_result(evaluation: Evaluation, console: Console) -> None:
    correct = int(np.sum(evaluation.predictions == evaluation.labels))
    console.print(
        f"accuracy {evaluation.accuracy:.2%} ({correct} of {len(evaluation.labels)})  "
        f"loss {evaluation.loss:.4f}",
        highlight=False,
    )
