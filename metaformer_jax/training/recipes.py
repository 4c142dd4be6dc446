"""The fields of a training config, and the published recipes as tables of differences.

Sources: the publication (https://arxiv.org/abs/2210.13452), section 3 and its appendix; the
original code's scripts (https://github.com/sail-sg/metaformer, `scripts/`), with their mistakes
corrected: `train_caformer_b36.sh` trains caformer_s36, `finetune_caformer_s36_384.sh` and
`finetune_caformer_m36_384.sh` run caformer_s18_384.
"""

import dataclasses

import ml_collections

# What may follow the `:` in --config=configs/caformer_b36.py:384; "" trains at 224 pixels.
STAGES = ("", "384", "in21k", "in21ft1k", "384_in21ft1k")


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    """A family's optimiser: its peak learning rate, that of fine-tuning, and other settings."""

    name: str
    learning_rate: float
    finetune_rate: float
    eps: float
    max_grad_norm: float


_ADAMW = _Optimizer("adamw", 4e-3, 5e-5, 1e-8, 0.0)
# The implementation of LAMB that was used clips the global gradient norm at 1 by default.
_LAMB = _Optimizer("lamb", 8e-3, 1e-4, 1e-6, 1.0)
# Optimiser and warm-up epochs.
_FAMILIES = {
    "identityformer": (_ADAMW, 5.0),
    "randformer": (_ADAMW, 5.0),
    "poolformerv2": (_ADAMW, 5.0),
    "convformer": (_ADAMW, 20.0),
    "caformer": (_LAMB, 20.0),
}
# Drop path and head dropout rates of the training from scratch.
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
    # Not 0.4, which the other two families have at this size.
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
# The same for fine-tuning at 384 pixels.
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
    """All fields of a training config, with defaults; a config file may change but not add fields.

    Epochs are passes over the training examples; steps are updates.
    """
    config = ml_collections.ConfigDict()
    # Of the initial parameters, the order of the data, augmentation, mixing and dropout.
    config.seed = 0
    # Epochs of the learning-rate schedule, then additional epochs at its last rate.
    config.epochs = 300.0
    config.cooldown_epochs = 10.0
    # Examples per update over all devices and processes, and the number of micro-batches in which
    # each device processes its share: more take less memory and more time, with the same result.
    config.batch_size = 4096
    config.accumulation_steps = 1
    config.eval_batch_size = 1024
    config.label_smoothing = 0.1
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    # A loss or gradient that is not finite changes no parameter. With "stop" the training then ends
    # and names the examples; with "skip" it goes on, unless more than `max_skipped_updates` updates
    # in a row are lost.
    config.on_nonfinite = "stop"
    config.max_skipped_updates = 10
    # The first and the last step of a profiler trace; () for no trace.
    config.profile_steps = ()

    config.model = ml_collections.ConfigDict()
    # Either a published name, or a family ("caformer") with depths and dims of your own.
    config.model.name = ""
    config.model.family = ""
    config.model.depths = ()
    config.model.dims = ()
    config.model.drop_path_rate = 0.0
    config.model.head_dropout = 0.0
    # "float32" or "bfloat16": the compute dtype; parameters are float32.
    config.model.dtype = "float32"
    # Which part of each block the backward pass recomputes instead of keeping it, for less memory
    # and usually more time: "none", "mlp", "products" or "block" (see `models.stages.REMAT`), or
    # "auto": on TPUs "mlp" in stages without kernels for MLPs, and "none" everywhere else.
    config.model.remat = "auto"
    # Runs the blocks of a stage as a loop with this many blocks per iteration, which compiles
    # faster and runs slower; 0 for no loop.
    config.model.scan = 0
    # Weights to start from (and to evaluate without a workdir): "published" for those of
    # `model.name`, another published name, or the path of a converted folder, another run's workdir
    # or a checkpoint file.
    config.model.pretrained = ""
    # Whether the head is initialised anew, for other classes than the checkpoint's.
    config.model.fresh_head = False
    # A JSON file that maps an ImageNet-21K head to the 1000 classes.
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
    # Worker processes that read and transform; -1 for one per core, 0 for the main process alone.
    config.data.num_workers = -1
    # Threads in each worker, or in the main process if there are no workers.
    config.data.num_threads = 2
    # Images that cannot be read are replaced (in evaluation: left out), up to this fraction.
    config.data.max_bad_fraction = 1e-3

    # What the host does to training images, in this order.
    config.augment = ml_collections.ConfigDict()
    # "random_resized", "simple" (resizes the short side, then crops a square at a random position),
    # or "none" (the whole image, resized to a square).
    config.augment.crop = "random_resized"
    # Fraction of the image's area, and width over height.
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.crop_ratio = (3 / 4, 4 / 3)
    # Filters, of which one is drawn for each image.
    config.augment.interpolations = ("bilinear", "bicubic")
    config.augment.flip_probability = 0.5
    # In timm's notation; "" for none.
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    # One of grey, solarise and blur, as in DeiT III.
    config.augment.three_augment = False
    # Of brightness, contrast and saturation. The published recipes use none with RandAugment.
    config.augment.color_jitter = 0.0
    # Images are translated by up to this many pixels.
    config.augment.max_shift = 0

    # What the device does to training batches.
    config.mixing = ml_collections.ConfigDict()
    config.mixing.mixup_alpha = 0.8
    config.mixing.cutmix_alpha = 1.0
    config.mixing.switch_probability = 0.5
    config.mixing.probability = 1.0
    # Images that share one random draw. A group never spans two devices.
    config.mixing.group_size = 128
    config.erasing_probability = 0.25

    # Evaluation: the fraction of the resized short side that the crop takes, and the filter.
    config.eval_crop_fraction = 1.0
    config.eval_interpolation = "bicubic"

    config.optimizer = ml_collections.ConfigDict()
    # "adamw" or "lamb".
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    # "cosine" or "constant", after the warm-up. The rate changes once per "epoch" or per "step".
    config.optimizer.schedule = "cosine"
    config.optimizer.schedule_by = "epoch"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05
    # The global norm to which gradients are clipped; 0 for no clipping.
    config.optimizer.max_grad_norm = 0.0
    # The learning rate of each layer is that of the layer after it times this.
    config.optimizer.layer_decay = 1.0
    # Trains the head alone.
    config.optimizer.head_only = False

    # Decay of an exponential moving average of the parameters, which is evaluated in addition to
    # them; 0 for no average. With the warm-up, the decay at update t is at most (1 + t) / (10 + t).
    config.ema = ml_collections.ConfigDict()
    config.ema.decay = 0.0
    config.ema.warmup = False

    config.mesh = ml_collections.ConfigDict()
    # Devices along each axis of the mesh; data=-1 takes all that `fsdp` leaves.
    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0
    # How many of the latest checkpoints are kept; the one with the best accuracy is kept as well.
    config.checkpoint.keep = 2

    # The project to log to at Weights & Biases, whose package must be installed; "" for none.
    config.wandb = ml_collections.ConfigDict()
    config.wandb.project = ""
    return config.lock()


def published(architecture: str, stage: str = "") -> ml_collections.ConfigDict:
    """The published training of an architecture, or one of its further stages.

    Args:
        architecture: one of `ARCHITECTURES`.
        stage: "" trains on ImageNet-1K at 224 pixels. ConvFormer and CAFormer also have "384"
            (fine-tunes the result at 384), "in21k" (trains on ImageNet-21K), and "in21ft1k" and
            "384_in21ft1k" (fine-tune the result of "in21k" on ImageNet-1K at 224 or 384).

    Raises:
        ValueError: there is no such architecture or stage.
    """
    if architecture not in _FROM_SCRATCH:
        raise ValueError(
            f"`architecture` must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}."
        )
    stages = STAGES if architecture in _FINE_TUNED else STAGES[:1]
    if stage not in stages:
        there_are = ", ".join(map(repr, stages))
        must = f"be one of {there_are}" if stages[1:] else "be left out"
        raise ValueError(f"The stage of {architecture} must {must}, got {stage!r}.")
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
        # There is no script: images, classes and epochs are the publication's, everything else is
        # as on ImageNet-1K. TFDS does not have this data set.
        config.update(epochs=90.0, cooldown_epochs=0.0)
        config.data.name = "folder"
    elif stage:
        _fine_tune(config, architecture, stage, optimizer)
    return config


def _fine_tune(
    config: ml_collections.ConfigDict, architecture: str, stage: str, optimizer: _Optimizer
) -> None:
    # There is no script for fine-tuning from ImageNet-21K: all but the initial weights and the
    # image size is as published for fine-tuning at 384 pixels.
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
