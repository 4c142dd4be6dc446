"""A training run's workdir with a small network of random weights, without a training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metaformer_jax.models import FAMILIES, MetaFormer
from metaformer_jax.training import recipes, settings
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.pretrained import fill

DEPTHS, DIMS = (1, 1, 1, 1), (8, 16, 32, 32)


def make(folder, *, family="identityformer", size=None, **data):
    """Writes the run, and gives its model; `size` is a published one in place of the smallest."""
    depths, dims = DEPTHS, DIMS
    if size is not None:
        depths, dims = dataclasses.astuple(FAMILIES[family].sizes[size])
    config = recipes.digits()
    config.model.update(family=family, depths=depths, dims=dims)
    config.data.update(data)
    model = MetaFormer(
        FAMILIES[family].spec(depths=depths, dims=dims),
        num_classes=10,
        in_channels=len(config.data.mean),
        image_size=config.data.image_size,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    variables = {
        path: np.asarray(
            rng.standard_normal(variable.shape) / 3 + (variable[...].mean() > 0.5)
        ).astype(np.float32)
        for path, variable in variables_of(model).items()
    }
    fill(model, variables)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings.as_json(config)))
    with Checkpoints(folder, keep=1) as checkpoints:
        save(checkpoints, 1, nnx.traversals.unflatten_mapping(variables), {})
    model.eval()
    return model, config


def save(checkpoints, step, params, frozen, ema=None):
    state = TrainState(
        step=np.int32(step),
        params=params,
        frozen=frozen,
        opt_state={"mu": np.ones(3, np.float32)},
        ema=ema or {},
        num_skipped=np.int32(0),
    )
    checkpoints.save(jax.tree.map(jnp.asarray, state), [], recipes.digits())
