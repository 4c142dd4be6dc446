"""The fields of a training config, their defaults, and the recipes as tables of differences."""

import ml_collections


def base_config() -> ml_collections.ConfigDict:
    """Every field that a training run has; a config file changes some and cannot add others.

    Epochs count passes over the training examples; steps count updates.
    """
    config = ml_collections.ConfigDict()
    # Initial parameters, order of the data, augmentation, dropped paths.
    config.seed = 0
    config.epochs = 300.0
    # Examples per update over all devices and processes.
    config.batch_size = 4096
    config.eval_batch_size = 1024
    config.label_smoothing = 0.1
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0

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
    # Weights to start from (and to evaluate without a workdir): "published" for those of this
    # name, or the path of a converted folder, another run's workdir or a checkpoint file.
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
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05
    # The global norm that gradients are cut to; 0 leaves them.
    config.optimizer.max_grad_norm = 0.0

    config.mesh = ml_collections.ConfigDict()
    # Devices along each axis; -1 takes all that the other leaves.
    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0
    # The latest so many are kept, and the best by accuracy.
    config.checkpoint.keep = 2
    return config.lock()


def digits() -> ml_collections.ConfigDict:
    """A small CAFormer on the handwritten digits that come with the package."""
    config = base_config()
    config.epochs = 15.0
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
    config.optimizer.update(learning_rate=2e-3, warmup_epochs=2.0)
    config.checkpoint.every_epochs = 5.0
    return config
