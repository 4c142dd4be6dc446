"""The engine's laws: any mesh gives the same training, and a step is a pure function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from metaformer_jax.data.device import DeviceTransform
from metaformer_jax.models import (
    Attention,
    IdentityMixing,
    MetaFormer,
    MetaFormerSpec,
    MlpHead,
    RandomMixing,
    SepConv,
    image_layer_norm,
)
from metaformer_jax.training import optim, sharding
from metaformer_jax.training.step import Engine

# As little as shows everything: a depthwise convolution, attention, and in the other a frozen
# matrix. Kernels of 3x3 compile in a fraction of the time of 7x7.
SPECS = {
    "conv and attention": MetaFormerSpec(
        depths=(1, 1),
        dims=(8, 32),
        token_mixers=(functools.partial(SepConv, kernel_size=3), Attention),
        res_scale_init=(None, 1.0),
        head=MlpHead,
    ),
    "random": MetaFormerSpec(
        depths=(1, 1),
        dims=(8, 8),
        token_mixers=(IdentityMixing, RandomMixing),
        res_scale_init=(None, 1.0),
        norm=image_layer_norm,
    ),
}


def _engine(mesh, spec="conv and attention", seed=0):
    return Engine(
        lambda rngs: MetaFormer(
            SPECS[spec], num_classes=4, image_size=16, drop_path_rate=0.5, rngs=rngs
        ),
        optim.adamw(lambda _: 1e-3),
        mesh=mesh,
        transform=DeviceTransform(
            num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, label_smoothing=0.1
        ),
        seed=seed,
    )


def _mesh(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, sharding.AXES)


def _batch(mesh, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 4, 16).astype(np.int32),
        "mask": np.ones(16, bool),
        "index": np.arange(16, dtype=np.int32),
    }
    return sharding.shard_batch(batch, mesh)


def _train(engine, steps=3):
    state = engine.initial_state()
    losses = []
    for step in range(steps):
        state, metrics = engine.train_step(state, _batch(engine.mesh, step))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def on_one_device():
    return _train(_engine(_mesh(1, 1)))


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_train_as_one_does(data, fsdp, on_one_device):
    state, losses = _train(_engine(_mesh(data, fsdp)))
    expected_state, expected_losses = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    # Adam divides by the root of a gradient's square: where a gradient is noise around zero,
    # so is its update, of at most the learning rate at each step.
    for actual, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


def test_parameters_and_moments_are_split_over_fsdp_and_only_there():
    engine = _engine(_mesh(2, 4))
    state = engine.initial_state()
    kernel = state.params["stages"][1][0]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (32, 32)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(moment.sharding.spec == PartitionSpec(None, "fsdp") for moment in moments)
    star_relu = state.params["stages"][1][0]["mlp"]["act"]["scale"]
    assert star_relu.sharding.is_fully_replicated


def test_a_step_depends_on_state_and_batch_alone_and_compiles_once():
    engine = _engine(_mesh(1, 1))
    first, _ = _train(engine)
    second, _ = _train(engine)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert engine.train_step._cache_size() == 1


def test_dropped_paths_differ_between_steps():
    engine = _engine(_mesh(1, 1))
    state = engine.initial_state()
    copied = jax.tree.map(jnp.copy, state)
    at_another_step = dataclasses.replace(copied, step=jnp.int32(7))
    batch = _batch(engine.mesh)
    _, metrics = engine.train_step(state, batch)
    _, other_metrics = engine.train_step(at_another_step, batch)
    assert float(metrics["loss"]) != float(other_metrics["loss"])


def test_frozen_matrices_stay_and_everything_else_moves():
    engine = _engine(_mesh(1, 1), spec="random")
    initial = jax.device_get(engine.initial_state())
    state, _ = _train(engine)
    assert jax.tree.leaves(initial.frozen)
    jax.tree.map(np.testing.assert_array_equal, initial.frozen, state.frozen)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), initial.params, state.params)
    assert all(jax.tree.leaves(moved))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert not shapes & {leaf.shape for leaf in jax.tree.leaves(initial.frozen)}


def test_evaluation_drops_nothing_and_keeps_the_order():
    engine = _engine(_mesh(8, 1))
    state = engine.initial_state()
    batch = _batch(engine.mesh)
    first, second = engine.eval_step(state, batch), engine.eval_step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_array_equal(first["label"], batch["label"])
    assert first["prediction"].shape == first["loss"].shape == (16,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": 3}, "the 8 devices present, got 3 x 1"),
        ({"fsdp": 16}, "got -1 x 16"),
        ({"fsdp": 0}, "got -1 x 0"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharding.create_mesh(**arguments)


def test_a_mesh_takes_all_devices_by_default():
    assert dict(sharding.create_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.create_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
