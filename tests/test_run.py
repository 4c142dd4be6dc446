"""Every field of a config reaches what it is named after."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from metaformer_jax.training import recipes, settings
from metaformer_jax.training.run import Run
from metaformer_jax.weights import DownloadError, hub

# Another value for each field, than that of the config below.
CHANGES = {
    "seed": 1,
    "epochs": 3.0,
    "cooldown_epochs": 1.0,
    "batch_size": 64,
    "accumulation_steps": 2,
    "eval_batch_size": 64,
    "label_smoothing": 0.2,
    "model.family": "convformer",
    "model.depths": (1, 1, 2, 1),
    "model.dims": (8, 16, 16, 16),
    "model.drop_path_rate": 0.1,
    "model.head_dropout": 0.1,
    "model.dtype": "bfloat16",
    "model.remat": "block",
    "model.scan": 1,
    "data.image_size": 40,
    "data.mean": (0.4,),
    "data.std": (0.4,),
    "data.num_workers": 3,
    "data.num_threads": 3,
    "augment.crop": "random_resized",
    "augment.crop_scale": (0.5, 1.0),
    "augment.crop_ratio": (0.5, 1.0),
    "augment.interpolations": ("bilinear",),
    "augment.flip_probability": 0.5,
    "augment.randaugment": "rand-m9-mstd0.5-inc1",
    "augment.three_augment": True,
    "augment.color_jitter": 0.4,
    "augment.max_shift": 1,
    "mixing.mixup_alpha": 0.8,
    "mixing.cutmix_alpha": 0.8,
    "mixing.switch_probability": 0.3,
    "mixing.probability": 0.5,
    "mixing.group_size": 16,
    "erasing_probability": 0.25,
    "eval_crop_fraction": 0.9,
    "eval_interpolation": "bilinear",
    "optimizer.name": "lamb",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.schedule_by": "epoch",
    "optimizer.warmup_epochs": 1.0,
    "optimizer.warmup_learning_rate": 1e-4,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.eps": 0.1,
    "optimizer.weight_decay": 0.5,
    "optimizer.max_grad_norm": 0.1,
    "optimizer.layer_decay": 0.5,
    "optimizer.head_only": True,
    "ema.decay": 0.9,
    "ema.warmup": True,
    "mesh.fsdp": 2,
}
# What must change along with a field, for the config to make sense or the field to count.
TOGETHER = {
    "ema.warmup": {"ema.decay": 0.9},
}
# These are read where they are used; tests of the training, the weights and the settings show it.
ELSEWHERE = {
    "checkpoint.every_epochs",
    "checkpoint.keep",
    "data.max_bad_fraction",
    "data.name",
    "data.root",
    "eval_every_epochs",
    "log_every_steps",
    "max_skipped_updates",
    "mesh.data",
    "model.class_map",
    "model.fresh_head",
    "model.name",
    "model.pretrained",
    "on_nonfinite",
    "profile_steps",
    "wandb.project",
}


def _config(**changes):
    config = recipes.digits()
    config.update(epochs=2.0, batch_size=128)
    config.model.update(depths=(1, 1, 1, 1), dims=(8, 16, 32, 32), drop_path_rate=0.05)
    config.model.family = "poolformerv2"
    config.optimizer.warmup_epochs = 0.5
    config.mixing.group_size = 4
    config.update_from_flattened_dict(changes)
    return config


def _fingerprint(config):
    """All that a run was built to, as text."""
    run = Run(config)
    engine, model = run.engine, run.engine.model
    params = engine._trained(
        jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.5, np.float32), engine.abstract_state.params
        )
    )
    state, updates = engine._optimizer.init(params), params
    # Two updates: the first hides both decay rates.
    for size in (1.0, 3.0):
        gradients = jax.tree.map(lambda leaf, size=size: size * np.ones_like(leaf), params)
        updates, state = engine._optimizer.update(gradients, state, params)
    blocks = [block for blocks in model.stages for block in blocks]
    return {
        "transforms": [str(run.train_transform), str(run.eval_transform), str(engine._transform)],
        "workers": str(run.workers),
        "steps": [run.total_steps, run.steps_per_epoch, run.eval_batch_size],
        "rates": np.asarray([run.schedule(step) for step in range(run.total_steps)]).tolist(),
        "updates": [float(leaf.sum()) for leaf in jax.tree.leaves(updates)],
        "model": [
            str(model.dtype),
            model.remat,
            model.scan,
            model.image_size,
            str(model.head.dropout),
        ],
        "blocks": [
            [type(block.token_mixer).__name__, str(getattr(block.drop_path1, "rate", None))]
            for block in blocks
        ],
        "shapes": str(engine.abstract_state.params),
        "engine": [engine._seed, engine._num_micro_batches, str(engine._average)],
        "average": bool(engine.abstract_state.ema),
        "mesh": dict(engine.mesh.shape),
    }


@pytest.fixture(scope="module")
def base():
    return json.dumps(_fingerprint(_config()))


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_the_run(field, base):
    together = TOGETHER.get(field, {})
    without = json.dumps(_fingerprint(_config(**together))) if together else base
    assert json.dumps(_fingerprint(_config(**{field: CHANGES[field]}, **together))) != without


def test_every_field_is_looked_at():
    assert set(settings.flatten(recipes.base_config())) == set(CHANGES) | ELSEWHERE
    assert not set(CHANGES) & ELSEWHERE


def test_the_transform_on_the_device_is_the_configs():
    config = _config(**{"mixing.mixup_alpha": 0.7, "mixing.group_size": 8})
    transform = dataclasses.asdict(Run(config).engine._transform)
    assert transform == {
        "num_classes": 10,
        "mean": (0.305,),
        "std": (0.376,),
        "label_smoothing": 0.1,
        "mixup_alpha": 0.7,
        "cutmix_alpha": 0.0,
        "switch_probability": 0.5,
        "mixing_probability": 1.0,
        "mixing_group_size": 8,
        "erasing_probability": 0.0,
    }


@pytest.mark.parametrize("name", ["caformer_s18_in21k", "convformer_b36_384_in21kft1k"])
def test_weights_are_fetched_by_any_published_name(name, monkeypatch):
    def fetch(given):
        raise DownloadError(given)

    monkeypatch.setattr(hub, "converted_file", fetch)
    with pytest.raises(DownloadError, match=f"^{name}$"):
        Run(_config(**{"model.pretrained": name})).pretrained_variables()
