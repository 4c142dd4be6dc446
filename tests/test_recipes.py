"""Every published recipe against literal published numbers, and the model that it trains."""

import importlib.util
import pathlib

import pytest
from flax import nnx

from metaformer_jax import models
from metaformer_jax.training import recipes, settings
from metaformer_jax.training.run import _model_builder

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

# optimiser, peak rate, epsilon, norm that gradients are cut to, epochs of warm-up, drop path, head
# dropout: scripts/*/train_*.sh and the defaults of their train.py.
FROM_SCRATCH = {
    "identityformer_s12": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "identityformer_s24": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "identityformer_s36": ("adamw", 4e-3, 1e-8, 0, 5, 0.2, 0),
    "identityformer_m36": ("adamw", 4e-3, 1e-8, 0, 5, 0.3, 0),
    "identityformer_m48": ("adamw", 4e-3, 1e-8, 0, 5, 0.4, 0),
    "randformer_s12": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "randformer_s24": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "randformer_s36": ("adamw", 4e-3, 1e-8, 0, 5, 0.2, 0),
    "randformer_m36": ("adamw", 4e-3, 1e-8, 0, 5, 0.3, 0),
    "randformer_m48": ("adamw", 4e-3, 1e-8, 0, 5, 0.3, 0),
    "poolformerv2_s12": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "poolformerv2_s24": ("adamw", 4e-3, 1e-8, 0, 5, 0.1, 0),
    "poolformerv2_s36": ("adamw", 4e-3, 1e-8, 0, 5, 0.2, 0),
    "poolformerv2_m36": ("adamw", 4e-3, 1e-8, 0, 5, 0.3, 0),
    "poolformerv2_m48": ("adamw", 4e-3, 1e-8, 0, 5, 0.4, 0),
    "convformer_s18": ("adamw", 4e-3, 1e-8, 0, 20, 0.2, 0),
    "convformer_s36": ("adamw", 4e-3, 1e-8, 0, 20, 0.3, 0),
    "convformer_m36": ("adamw", 4e-3, 1e-8, 0, 20, 0.4, 0),
    "convformer_b36": ("adamw", 4e-3, 1e-8, 0, 20, 0.6, 0),
    "caformer_s18": ("lamb", 8e-3, 1e-6, 1, 20, 0.15, 0),
    "caformer_s36": ("lamb", 8e-3, 1e-6, 1, 20, 0.3, 0.4),
    "caformer_m36": ("lamb", 8e-3, 1e-6, 1, 20, 0.4, 0.4),
    "caformer_b36": ("lamb", 8e-3, 1e-6, 1, 20, 0.6, 0.5),
}
# rate, drop path, head dropout: scripts/*/finetune_*_384.sh.
FINE_TUNED = {
    "convformer_s18": (5e-5, 0.3, 0.4),
    "convformer_s36": (5e-5, 0.5, 0.4),
    "convformer_m36": (5e-5, 0.8, 0.5),
    "convformer_b36": (5e-5, 0.8, 0.5),
    "caformer_s18": (1e-4, 0.3, 0.4),
    "caformer_s36": (1e-4, 0.5, 0.4),
    "caformer_m36": (1e-4, 0.7, 0.4),
    "caformer_b36": (1e-4, 0.8, 0.5),
}
COMMON = {
    "label_smoothing": 0.1,
    "augment.crop": "random_resized",
    "augment.crop_scale": (0.08, 1.0),
    "augment.interpolations": ("bilinear", "bicubic"),
    "augment.flip_probability": 0.5,
    "augment.randaugment": "rand-m9-mstd0.5-inc1",
    "augment.color_jitter": 0.0,
    "mixing.switch_probability": 0.5,
    "mixing.probability": 1.0,
    "mixing.group_size": 128,
    "erasing_probability": 0.25,
    "eval_crop_fraction": 1.0,
    "eval_interpolation": "bicubic",
    "optimizer.weight_decay": 0.05,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.schedule_by": "epoch",
    "optimizer.warmup_learning_rate": 1e-6,
    "optimizer.min_learning_rate": 1e-5,
    "optimizer.layer_decay": 1.0,
    "optimizer.head_only": False,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
}


def load(name, *stage):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*stage)


def assert_fields(config, **expected):
    fields = settings.flatten(config)
    for field, value in {**COMMON, **expected}.items():
        assert fields[field] == value, field


def optimizer_fields(architecture):
    name, rate, eps, max_grad_norm, *_ = FROM_SCRATCH[architecture]
    values = {"name": name, "learning_rate": rate, "eps": eps, "max_grad_norm": max_grad_norm}
    return {f"optimizer.{field}": value for field, value in values.items()}


def test_there_is_a_config_for_each_architecture_and_the_digits():
    architectures = {models.model_info(name).architecture for name in models.list_models()}
    assert {path.stem for path in CONFIGS.glob("*.py")} == architectures | {"digits"}
    assert set(recipes.ARCHITECTURES) == set(FROM_SCRATCH) == architectures


@pytest.mark.parametrize("architecture", FROM_SCRATCH)
def test_training_from_scratch_is_as_published(architecture):
    *_, warmup_epochs, drop_path, head_dropout = FROM_SCRATCH[architecture]
    config = load(architecture)
    settings.check_fields(config)
    assert_fields(
        config,
        **optimizer_fields(architecture),
        **{
            "epochs": 300,
            "cooldown_epochs": 10,
            "batch_size": 4096,
            "model.name": architecture,
            "model.pretrained": "",
            "model.drop_path_rate": drop_path,
            "model.head_dropout": head_dropout,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_epochs": warmup_epochs,
            "mixing.mixup_alpha": 0.8,
            "mixing.cutmix_alpha": 1.0,
            "ema.decay": 0.0,
            "data.name": "imagenet2012",
            "data.image_size": 224,
        },
    )


@pytest.mark.parametrize("architecture", FINE_TUNED)
@pytest.mark.parametrize(
    ("stage", "image_size", "start"),
    [("384", 384, ""), ("in21ft1k", 224, "_in21k"), ("384_in21ft1k", 384, "_in21k")],
)
def test_fine_tuning_is_as_published_for_384_pixels(architecture, stage, image_size, start):
    rate, drop_path, head_dropout = FINE_TUNED[architecture]
    config = load(architecture, stage)
    settings.check_fields(config)
    assert_fields(
        config,
        **optimizer_fields(architecture)
        | {
            "epochs": 30,
            "cooldown_epochs": 0,
            "batch_size": 1024,
            "model.name": f"{architecture}_{stage}",
            "model.pretrained": architecture + start,
            "model.drop_path_rate": drop_path,
            "model.head_dropout": head_dropout,
            "optimizer.learning_rate": rate,
            "optimizer.schedule": "constant",
            "optimizer.warmup_epochs": 0,
            "mixing.mixup_alpha": 0.0,
            "mixing.cutmix_alpha": 0.0,
            "ema.decay": 0.9999,
            "data.name": "imagenet2012",
            "data.image_size": image_size,
        },
    )
    info = models.model_info(config.model.name)
    assert (info.image_size, info.num_classes) == (image_size, 1000)
    assert models.model_info(config.model.pretrained).architecture == architecture


@pytest.mark.parametrize("architecture", FINE_TUNED)
def test_on_imagenet_21k_only_epochs_and_data_differ(architecture):
    before, config = settings.flatten(load(architecture)), load(architecture, "in21k")
    settings.check_fields(config)
    fields = settings.flatten(config)
    changed = {field: value for field, value in fields.items() if value != before[field]}
    assert changed == {
        "epochs": 90,
        "cooldown_epochs": 0,
        "model.name": f"{architecture}_in21k",
        "data.name": "folder",
    }
    assert models.model_info(config.model.name).num_classes == 21841


@pytest.mark.parametrize(
    "name", ["identityformer_m48", "randformer_s36", "poolformerv2_m36", "convformer_s18"]
)
@pytest.mark.parametrize("stage", recipes.STAGES)
def test_a_config_builds_the_model_that_it_is_named_after(name, stage):
    if stage and name not in FINE_TUNED:
        with pytest.raises(ValueError, match=f"stage of {name} must be left out, got '{stage}'"):
            load(name, stage)
        return
    config = load(name, stage)
    info = models.model_info(config.model.name)
    assert info.architecture == name
    build = _model_builder(config, info.num_classes, 3)
    published = models.count(lambda: models.create_model(info.name, rngs=nnx.Rngs(0)))
    assert models.count(lambda: build(nnx.Rngs(0))) == published


def test_what_is_not_published_is_refused():
    with pytest.raises(ValueError, match=r"one of identityformer_s12, .*got 'caformer_x'"):
        recipes.published("caformer_x")
    with pytest.raises(ValueError, match=r"one of '', '384', .*got '512'"):
        recipes.published("caformer_s18", "512")
