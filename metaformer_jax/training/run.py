"""Builds what a config describes: data sources, transforms, schedule, model and engine."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from metaformer_jax import models
from metaformer_jax.data import augment, loader
from metaformer_jax.data.device import DeviceTransform, check_groups
from metaformer_jax.data.randaugment import RandAugmentPolicy, parse_policy
from metaformer_jax.data.sources import Source, open_source
from metaformer_jax.models.cores import num_cores
from metaformer_jax.paths import local_path
from metaformer_jax.training import optim, settings, sharding
from metaformer_jax.training.feeding import PlacedBatches
from metaformer_jax.training.provenance import (
    check_same_network,
    check_same_normalisation,
    write_provenance,
)
from metaformer_jax.training.step import Average, Engine
from metaformer_jax.weights import hub
from metaformer_jax.weights.convert import Variables
from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.pretrained import fitted_variables
from metaformer_jax.weights.workdir import workdir_of

# An int32 counts them.
_MAX_STEPS = 2**31 - 1


class Run:
    """Everything that a config describes, built and checked, before anything is compiled.

    Args:
        config: all fields of `recipes.base_config()`.
        trains: False for evaluation alone, which needs no training data.
        devices: to run on; None for those present.
        sources: for training and evaluation, instead of those that the config names.

    Raises:
        ValueError: a field is unknown, missing or out of range, or fields contradict each other.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        trains: bool = True,
        devices: Sequence[jax.Device] | None = None,
        sources: tuple[Source, Source] | None = None,
    ):
        settings.check_fields(config)
        self.config = config
        self._trains = trains
        data = config.data
        if sources is not None:
            self.train_source, self.eval_source = sources
        else:
            if trains:
                self.train_source = _open_source(data, "train")
            self.eval_source = _open_source(data, "eval")
        self.num_examples = {"evaluation": len(self.eval_source)}
        self.class_names = self.eval_source.class_names
        channels = self.eval_source.channels
        for field in ("mean", "std"):
            if len(data[field]) != channels:
                raise ValueError(
                    f"`config.data.{field}` must have one value for each of the {channels} "
                    f"channels of {data.name!r}, got {tuple(data[field])}."
                )
        self.train_transform, self.eval_transform = _host_transforms(config, channels)
        self.workers = _workers(data)
        mesh = sharding.create_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
        device_transform = _device_transform(config, len(self.class_names))
        self.group_size = device_transform.group_size
        self.steps_per_epoch = 1.0
        if trains:
            num_examples = self.num_examples["training"] = len(self.train_source)
            _check_batch(config, num_examples, mesh.size, group_size=self.group_size)
            self.steps_per_epoch = num_examples / config.batch_size
        epochs = config.epochs + config.cooldown_epochs
        self.total_steps = max(1, round(epochs * self.steps_per_epoch))
        if self.total_steps > _MAX_STEPS:
            raise ValueError(
                f"`config.epochs` must take at most {_MAX_STEPS:,} steps, got {epochs:g} epochs of "
                f"{self.steps_per_epoch:,.0f}. Use larger batches."
            )
        # The last batch is padded to this size, and the padding does not count.
        self.eval_batch_size = math.ceil(config.eval_batch_size / mesh.size) * mesh.size
        self.schedule = optim.by_step(
            optim.epoch_schedule(
                config.optimizer.schedule,
                peak=config.optimizer.learning_rate,
                epochs=config.epochs,
                warmup_epochs=config.optimizer.warmup_epochs,
                warmup_from=config.optimizer.warmup_learning_rate,
                end=config.optimizer.min_learning_rate,
            ),
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            per_epoch=config.optimizer.schedule_by == "epoch",
        )
        self.engine = Engine(
            _model_builder(config, len(self.class_names), channels),
            optim.make_optimizer(
                config.optimizer.name,
                self.schedule,
                b1=config.optimizer.b1,
                b2=config.optimizer.b2,
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
                max_grad_norm=config.optimizer.max_grad_norm or None,
                layer_decay=config.optimizer.layer_decay,
            ),
            mesh=mesh,
            transform=device_transform,
            seed=config.seed,
            num_micro_batches=config.accumulation_steps,
            average=Average(**config.ema) if config.ema.decay else None,
            head_only=config.optimizer.head_only,
        )

    @functools.cached_property
    def counts(self) -> models.Counts:
        """The model's parameters, and its multiply-adds per image."""
        return models.count(self.engine.model)

    def write_provenance(self, workdir: pathlib.Path) -> None:
        """See `provenance.write_provenance`."""
        write_provenance(workdir, self.config, self.class_names, self.num_examples)

    def is_due(self, every_epochs: float, step: int) -> bool:
        """Whether something that is done every `every_epochs` epochs is due after this step."""
        every_steps = every_epochs * self.steps_per_epoch * (1 - optim.ROUNDING)
        return step // every_steps > (step - 1) // every_steps or step == self.total_steps

    def pretrained_variables(self) -> Variables:
        """The initial values from pretrained weights, by path; empty without such weights.

        Raises:
            ValueError: the weights do not fit.
            FileNotFoundError: there are none at the path.
            weights.DownloadError: the published ones could not be fetched.
        """
        config = self.config.model
        if not config.pretrained:
            return {}
        path = local_path(config.pretrained)
        if config.pretrained == "published":
            if not config.name:
                raise ValueError(
                    "`config.model.pretrained` must be a path unless config.model.name is set, "
                    f"got {config.pretrained!r}."
                )
            path = hub.converted_file(config.name)
        elif models.is_published(config.pretrained) and not path.exists():
            path = hub.converted_file(config.pretrained)
        elif (folder := workdir_of(path)) is not None:
            check_same_network(folder, self.config, self.engine.model.spec)
            if not self._trains:
                check_same_normalisation(folder, self.config)
        try:
            return fitted_variables(
                self.engine.model,
                path,
                name=config.name or None,
                keep_head=config.fresh_head,
                class_map=config.class_map or None,
                fit_channels=True,
            )
        except CheckpointError as error:
            if "mis-shaped: head." not in str(error):
                raise
            raise CheckpointError(
                f"{error} Or train another head, with config.model.fresh_head=True, or map that of "
                "ImageNet-21K by config.model.class_map."
            ) from error

    @contextlib.contextmanager
    def training_batches(self, start_step: int) -> Iterator[PlacedBatches]:
        """Training batches from this step on, on the devices; the context ends the workers."""
        with loader.training_batches(
            self.train_source,
            self.train_transform,
            share=self._share(self.config.batch_size),
            seed=self.config.seed,
            start_step=start_step,
            workers=self.workers,
            max_bad_fraction=self.config.data.max_bad_fraction,
        ) as batches:
            # No step needs the batch after the last one, which might be bad.
            needed = itertools.islice(batches, max(self.total_steps - start_step, 0))
            yield PlacedBatches(needed, self.engine.mesh, fields=("image", "label"))

    @contextlib.contextmanager
    def evaluation_batches(self) -> Iterator[PlacedBatches]:
        """Every evaluation example once, on the devices; the context ends the workers."""
        with loader.evaluation_batches(
            self.eval_source,
            self.eval_transform,
            share=self._share(self.eval_batch_size),
            workers=self.workers,
            max_bad_fraction=self.config.data.max_bad_fraction,
        ) as batches:
            yield PlacedBatches(
                batches, self.engine.mesh, fields=("image", "label", "mask", "index")
            )

    def _share(self, batch_size: int) -> loader.Share:
        return loader.Share(
            batch_size=batch_size,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
        )


def _open_source(data: ml_collections.ConfigDict, split: str) -> Source:
    try:
        with settings.naming(root="data.root", split="data.name"):
            return open_source(data.name, split, root=data.root)
    except OSError as error:
        raise ValueError(
            f"`config.data.root` must be a folder that can be read, got {data.root!r}: "
            f"{error.strerror or error}."
        ) from error


def _host_transforms(
    config: ml_collections.ConfigDict, channels: int
) -> tuple[augment.TrainTransform, augment.EvalTransform]:
    policy = config.augment.randaugment
    fields_of = {name: f"augment.{name}" for name in config.augment}
    fields_of["interpolation"] = "augment.interpolations"
    of_policy = (field.name for field in dataclasses.fields(RandAugmentPolicy))
    with settings.naming(**fields_of, **dict.fromkeys(of_policy, "augment.randaugment")):
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
    with settings.naming(crop_fraction="eval_crop_fraction", interpolation="eval_interpolation"):
        evaluation = augment.EvalTransform(
            image_size=config.data.image_size,
            channels=channels,
            crop_fraction=config.eval_crop_fraction,
            interpolation=config.eval_interpolation,
        )
    return train, evaluation


def _check_batch(
    config: ml_collections.ConfigDict, num_examples: int, num_devices: int, *, group_size: int
) -> None:
    if config.batch_size > num_examples:
        raise ValueError(
            f"`config.batch_size` must be at most the {num_examples:,} training examples of "
            f"{config.data.name!r}, got {config.batch_size}."
        )
    parts = num_devices * config.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"`config.batch_size` must divide by the {num_devices} devices x "
            f"{config.accumulation_steps} accumulation steps, got {config.batch_size}. Use "
            f"{math.ceil(config.batch_size / parts) * parts}."
        )
    check_groups(config.batch_size, num_devices, group_size)


def _workers(data: ml_collections.ConfigDict) -> loader.Workers:
    num_workers = data.num_workers if data.num_workers >= 0 else num_cores()
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
        "remat": config.model.remat,
        "scan": config.model.scan,
    }
    if bool(config.model.name) == bool(config.model.family):
        raise ValueError(
            "One of `config.model.name` and `config.model.family` must be set, got "
            f"{config.model.name!r} and {config.model.family!r}."
        )
    name = config.model.name
    if not name and config.model.family not in models.FAMILIES:
        raise ValueError(
            f"`config.model.family` must be one of {', '.join(models.FAMILIES)}, got "
            f"{config.model.family!r}."
        )
    with settings.naming(
        "model.depths", name="model.name", depths="model.depths", dims="model.dims"
    ):
        spec = (
            models.model_spec(name)
            if name
            else models.FAMILIES[config.model.family].spec(
                depths=tuple(config.model.depths), dims=tuple(config.model.dims)
            )
        )
    with settings.naming("data.image_size"):
        spec.stage_resolutions(config.data.image_size)

    def build(rngs: nnx.Rngs) -> models.MetaFormer:
        with settings.naming(
            drop_path_rate="model.drop_path_rate", head_dropout="model.head_dropout"
        ):
            if name:
                return models.create_model(name, **arguments, rngs=rngs)
            return models.MetaFormer(spec, **arguments, rngs=rngs)

    return build
