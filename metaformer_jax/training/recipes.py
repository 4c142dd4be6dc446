"""The fields of a training config, and the published recipes as tables of differences.

Sources: the publication (https://arxiv.org/abs/2210.13452), section 4 and its appendix; the
original code's scripts (https://github.com/sail-sg/metaformer, `scripts/`), with the mistakes in
them put right: `train_caformer_b36.sh` trains caformer_s36, `finetune_caformer_s36_384.sh` and
`finetune_caformer_m36_384.sh` run caformer_s18_384.
"""

import dataclasses

import ml_collections

# What `:` in --config=configs/caformer_b36.py:384 may be followed by; "" trains at 224 pixels.
STAGES = ("", "384", "in21k", "in21ft1k", "384_in21ft1k")


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    """Of a family: peak rate at 224 pixels, rate of fine-tuning, and what differs otherwise."""

    name: str
    learning_rate: float
    finetune_rate: float
    eps: float
    max_grad_norm: float


_ADAMW = _Optimizer("adamw", 4e-3, 5e-5, 1e-8, 0.0)
# Its implementation cuts the norm of all gradients at 1, unasked.
_LAMB = _Optimizer("lamb", 8e-3, 1e-4, 1e-6, 1.0)
# Optimiser, and epochs of warm-up.
_FAMILIES = {
    "identityformer": (_ADAMW, 5.0),
    "randformer": (_ADAMW, 5.0),
    "poolformerv2": (_ADAMW, 5.0),
    "convformer": (_ADAMW, 20.0),
    "caformer": (_LAMB, 20.0),
}
# Drop path and head dropout of the training from scratch.
_FROM_SCRATCH = {
    "identityformer_s12": (0.1, 0.0),
    "identityformer_s24": (0.1, 0.0),
    "identityformer_s36": (0.2, 0.0),
    "identityformer_m36": (0.3, 0.0),
    "identityformer_m48": (0.4, 0.0),
    "randformer_s12": (0.1, 0.0),
    "randformer_s24": (0.1, 0.0),
    "randformer_s36": (0.2, 0.0),
    "randformer_m36": (0.3, 0.0),
    # Not 0.4 as the other two families of this size.
    "randformer_m48": (0.3, 0.0),
    "poolformerv2_s12": (0.1, 0.0),
    "poolformerv2_s24": (0.1, 0.0),
    "poolformerv2_s36": (0.2, 0.0),
    "poolformerv2_m36": (0.3, 0.0),
    "poolformerv2_m48": (0.4, 0.0),
    "convformer_s18": (0.2, 0.0),
    "convformer_s36": (0.3, 0.0),
    "convformer_m36": (0.4, 0.0),
    "convformer_b36": (0.6, 0.0),
    "caformer_s18": (0.15, 0.0),
    "caformer_s36": (0.3, 0.4),
    "caformer_m36": (0.4, 0.4),
    "caformer_b36": (0.6, 0.5),
}
# The same of fine-tuning at 384 pixels.
_FINE_TUNED = {
    "convformer_s18": (0.3, 0.4),
    "convformer_s36": (0.5, 0.4),
    "convformer_m36": (0.8, 0.5),
    "convformer_b36": (0.8, 0.5),
    "caformer_s18": (0.3, 0.4),
    "caformer_s36": (0.5, 0.4),
    "caformer_m36": (0.7, 0.4),
    "caformer_b36": (0.8, 0.5),
}
ARCHITECTURES = tuple(_FROM_SCRATCH)


def base_config() -> ml_collections.ConfigDict:
    """Every field that a training run has; a config file changes some and cannot add others.

    Epochs count passes over the training examples; steps count updates.
    """
    config = ml_collections.ConfigDict()
    # Initial parameters, order of the data, augmentation, dropped paths.
    config.seed = 0
    # Of the schedule; then so many more at its lowest rate.
    config.epochs = 300.0
    config.cooldown_epochs = 10.0
    # Examples per update over all devices and processes, and the parts that each device works its
    # share off in: more parts take less memory and more time, and give the same.
    config.batch_size = 4096
    config.accumulation_steps = 1
    config.eval_batch_size = 1024
    config.label_smoothing = 0.1
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    # A loss or gradient that is not finite changes no parameter. Then "stop" ends the training
    # and says which examples they were; "skip" goes on, unless so many updates in a row are lost.
    config.on_nonfinite = "stop"
    config.max_skipped_updates = 10
    # The first and the last of the steps that a profiler trace is taken of; () takes none.
    config.profile_steps = ()

    config.model = ml_collections.ConfigDict()
    # A published name, or a family ("caformer") in a size of one's own.
    config.model.name = ""
    config.model.family = ""
    config.model.depths = ()
    config.model.dims = ()
    config.model.drop_path_rate = 0.0
    config.model.head_dropout = 0.0
    # "float32" or "bfloat16": the compute dtype; parameters are float32.
    config.model.dtype = "float32"
    # What of each block the backward pass computes again in place of keeping it, for less memory
    # and mostly more time: "none", "mlp", "products" or "block" (see `models.stages.REMAT`), or
    # "auto": "mlp" on TPUs, where it is estimated to be the fastest, and elsewhere "none".
    config.model.remat = "auto"
    # Blocks in each round of a loop over those of a stage, which compiles sooner and runs slower;
    # 0 writes all blocks out.
    config.model.scan = 0
    # Weights to start from (and to evaluate without a workdir): "published" for those of this
    # name, another published name, or the path of a converted folder, another run's workdir or a
    # checkpoint file.
    config.model.pretrained = ""
    # Whether the head starts anew, as other classes than the checkpoint's need it.
    config.model.fresh_head = False
    # The JSON file that maps an ImageNet-21K head to the 1000 classes.
    config.model.class_map = ""

    config.data = ml_collections.ConfigDict()
    # "folder" with train/ and val/ in config.data.root; "digits"; or a data set of TFDS, with its
    # version if there are several: "imagenet2012", "imagenet2012:5.1.0".
    config.data.name = "imagenet2012"
    # The folder's root, or TFDS's data_dir; empty for TFDS's default.
    config.data.root = ""
    # Pixels per side.
    config.data.image_size = 224
    # Per channel, for images scaled to [0, 1].
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    # Processes that read and transform beside the main one; -1 takes one for each core.
    config.data.num_workers = -1
    # Threads that do so in each of them, or in the main process where there are none.
    config.data.num_threads = 2
    # Images that cannot be read are replaced, up to this fraction of the training examples.
    config.data.max_bad_fraction = 1e-3

    # What the host does to training images, in this order.
    config.augment = ml_collections.ConfigDict()
    # "random_resized", "simple" (short side to size, then any place), or "none" (the whole image,
    # squeezed to a square).
    config.augment.crop = "random_resized"
    # Part of the image's area, and width over height.
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.crop_ratio = (3 / 4, 4 / 3)
    # Filters that one is drawn from for each image.
    config.augment.interpolations = ("bilinear", "bicubic")
    config.augment.flip_probability = 0.5
    # timm's notation; empty leaves it out.
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.three_augment = False
    # Brightness, contrast and saturation. The published recipes leave it out beside RandAugment.
    config.augment.color_jitter = 0.0
    # Images move by up to this many pixels.
    config.augment.max_shift = 0

    # What the device does to training batches.
    config.mixing = ml_collections.ConfigDict()
    config.mixing.mixup_alpha = 0.8
    config.mixing.cutmix_alpha = 1.0
    config.mixing.switch_probability = 0.5
    config.mixing.probability = 1.0
    # Images that share a draw. A group never lies on two devices.
    config.mixing.group_size = 128
    config.erasing_probability = 0.25

    # Evaluation: the part of the resized short side that the crop takes, and the filter.
    config.eval_crop_fraction = 1.0
    config.eval_interpolation = "bicubic"

    config.optimizer = ml_collections.ConfigDict()
    # "adamw" or "lamb".
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    # "cosine" or "constant", after the warm-up; the rate changes by "epoch" or by "step".
    config.optimizer.schedule = "cosine"
    config.optimizer.schedule_by = "epoch"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05
    # The global norm that gradients are cut to; 0 leaves them.
    config.optimizer.max_grad_norm = 0.0
    # Factor of the rate from each layer to the one before it.
    config.optimizer.layer_decay = 1.0
    # The trunk stays as it is.
    config.optimizer.head_only = False

    # A moving average of the parameters, evaluated beside them; 0 keeps none. With the warm-up it
    # follows closely at first: (1 + t) / (10 + t) at update t.
    config.ema = ml_collections.ConfigDict()
    config.ema.decay = 0.0
    config.ema.warmup = False

    config.mesh = ml_collections.ConfigDict()
    # Devices along each axis; -1 takes all that the other leaves.
    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0
    # The latest so many are kept, and the best by accuracy.
    config.checkpoint.keep = 2

    # Logs to Weights & Biases under this project's name, where its package is installed.
    config.wandb = ml_collections.ConfigDict()
    config.wandb.project = ""
    return config.lock()


def published(architecture: str, stage: str = "") -> ml_collections.ConfigDict:
    """The published training of an architecture, or a stage that follows it.

    Args:
        architecture: one of `ARCHITECTURES`.
        stage: "" trains on ImageNet-1K at 224 pixels. For ConvFormer and CAFormer also "384"
            (fine-tunes that at 384), "in21k" (trains on ImageNet-21K), "in21ft1k" and
            "384_in21ft1k" (fine-tune the latter on ImageNet-1K at 224 or 384).

    Raises:
        ValueError: there is no such architecture or stage.
    """
    if architecture not in _FROM_SCRATCH:
        raise ValueError(
            f"`architecture` must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}."
        )
    stages = STAGES if architecture in _FINE_TUNED else STAGES[:1]
    if stage not in stages:
        there_are = ", ".join(repr(stage) for stage in stages)
        raise ValueError(f"The stage of {architecture} must be one of {there_are}, got {stage!r}.")
    optimizer, warmup_epochs = _FAMILIES[architecture.split("_")[0]]
    config = base_config()
    config.model.name = f"{architecture}_{stage}" if stage else architecture
    config.model.dtype = "bfloat16"
    config.model.drop_path_rate, config.model.head_dropout = _FROM_SCRATCH[architecture]
    config.optimizer.update(
        name=optimizer.name,
        learning_rate=optimizer.learning_rate,
        eps=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        warmup_epochs=warmup_epochs,
    )
    if stage == "in21k":
        # The publication gives images, classes and epochs, and there is no script: all else is as
        # on ImageNet-1K. TFDS has no such set.
        config.update(epochs=90.0, cooldown_epochs=0.0)
        config.data.name = "folder"
    elif stage:
        _fine_tune(config, architecture, stage, optimizer)
    return config


def _fine_tune(
    config: ml_collections.ConfigDict, architecture: str, stage: str, optimizer: _Optimizer
) -> None:
    # For those that come from ImageNet-21K there is no script: all but the start and the image
    # size is as published for 384 pixels.
    config.update(epochs=30.0, cooldown_epochs=0.0, batch_size=1024)
    config.model.pretrained = architecture if stage == "384" else f"{architecture}_in21k"
    config.model.drop_path_rate, config.model.head_dropout = _FINE_TUNED[architecture]
    config.optimizer.update(
        schedule="constant", learning_rate=optimizer.finetune_rate, warmup_epochs=0.0
    )
    config.mixing.update(mixup_alpha=0.0, cutmix_alpha=0.0)
    config.ema.decay = 0.9999
    config.data.image_size = 384 if stage.startswith("384") else 224


def digits() -> ml_collections.ConfigDict:
    """A small CAFormer on the handwritten digits that come with the package."""
    config = base_config()
    config.update(epochs=15.0, cooldown_epochs=0.0)
    config.batch_size = 64
    config.eval_batch_size = 128
    config.log_every_steps = 10
    config.model.update(family="caformer", depths=(1, 1, 2, 1), dims=(32, 64, 96, 128))
    config.model.drop_path_rate = 0.05
    config.data.update(name="digits", image_size=32, mean=(0.305,), std=(0.376,), num_workers=0)
    config.augment.update(crop="none", interpolations=("bicubic",), flip_probability=0.0)
    config.augment.update(randaugment="", max_shift=3)
    config.mixing.update(mixup_alpha=0.0, cutmix_alpha=0.0)
    config.erasing_probability = 0.0
    config.optimizer.update(learning_rate=2e-3, warmup_epochs=2.0, schedule_by="step")
    config.checkpoint.every_epochs = 5.0
    return config
