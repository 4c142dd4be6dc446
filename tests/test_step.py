"""The engine's laws: any mesh gives the same training, and a step is a pure function."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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
from metaformer_jax.training.step import Average, Engine

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


PLAIN = DeviceTransform(num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, label_smoothing=0.1)
# Takes a while to compile.
MIXING = dataclasses.replace(
    PLAIN,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    mixing_group_size=2,
    erasing_probability=0.5,
)


def _engine(
    mesh,
    spec="conv and attention",
    optimizer="adamw",
    dtype=jnp.float32,
    transform=PLAIN,
    **arguments,
):
    return Engine(
        lambda rngs: MetaFormer(
            SPECS[spec],
            num_classes=4,
            image_size=16,
            drop_path_rate=0.5,
            head_dropout=0.2,
            dtype=dtype,
            rngs=rngs,
        ),
        optim.make_optimizer(optimizer, lambda _: 1e-3),
        mesh=mesh,
        transform=transform,
        **arguments,
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


AVERAGE = Average(decay=0.9, warmup=True)


TRAININGS = {
    "adamw": {"optimizer": "adamw", "transform": MIXING},
    "lamb": {"optimizer": "lamb", "average": AVERAGE},
}


@pytest.fixture(scope="module")
def on_one_device():
    return {name: _train(_engine(_mesh(1, 1), **TRAININGS[name])) for name in TRAININGS}


def _assert_same_training(actual, expected):
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
    # Adam divides by the root of a gradient's square: where a gradient is noise around zero,
    # so is its update, of at most the learning rate at each step.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5),
        (actual[0].params, actual[0].ema),
        (expected[0].params, expected[0].ema),
    )


@pytest.mark.parametrize(
    ("data", "fsdp", "num_micro_batches", "training"),
    [(8, 1, 1, "lamb"), (1, 8, 1, "lamb"), (2, 2, 4, "adamw"), (1, 1, 8, "lamb")],
)
def test_any_mesh_and_any_micro_batches_train_as_one_device_does(
    data, fsdp, num_micro_batches, training, on_one_device
):
    engine = _engine(_mesh(data, fsdp), num_micro_batches=num_micro_batches, **TRAININGS[training])
    _assert_same_training(_train(engine), on_one_device[training])


def _collectives(engine):
    """Names and elements of the compiled step's collectives, and those inside its loops."""
    state, batch = engine.abstract_state, _batch(engine.mesh)
    text = engine.train_step.lower(state, batch).compile().as_text()
    entry = text[text.index("ENTRY ") :]
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
    found = []
    for part, where in ((entry, "entry"), (text.replace(entry, ""), "elsewhere")):
        for shapes, name in re.findall(pattern, part):
            sizes = [
                math.prod(int(n) for n in shape.split(",") if n)
                for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
            ]
            found.append((where, name, sum(sizes)))
    return found


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_data_parallel_devices_talk_once_about_each_gradient_and_of_nothing_else(
    num_micro_batches,
):
    engine = _engine(_mesh(4, 1), num_micro_batches=num_micro_batches)
    collectives = _collectives(engine)
    assert {(where, name) for where, name, _ in collectives} == {("entry", "all-reduce")}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(engine.abstract_state.params))
    # Besides the gradients, loss and accuracy.
    assert sum(size for *_, size in collectives) == num_params + 2


def test_devices_that_share_parameters_gather_them_once_and_scatter_the_gradients_sum():
    engine = _engine(_mesh(1, 4), num_micro_batches=4)
    collectives = _collectives(engine)
    assert {where for where, *_ in collectives} == {"entry"}
    totals = collections.Counter()
    for _, name, size in collectives:
        totals[name] += size
    leaves = jax.tree.leaves(engine.abstract_state.params)
    split = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    assert totals["all-gather"] == split
    assert totals["reduce-scatter"] == split // 4
    assert set(totals) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_a_step_takes_images_that_are_transformed_apart_on_each_device_as_on_one():
    one = _engine(_mesh(1, 1), transform=MIXING)
    expected = one.training_inputs(_batch(one.mesh), 3)
    engine = _engine(_mesh(4, 2), transform=MIXING)
    batch = _batch(engine.mesh)
    text = engine.training_inputs.lower(batch, 3).compile().as_text()
    assert not re.search("all-(gather|reduce|to-all)|collective-permute", text)
    for actual, wanted in zip(engine.training_inputs(batch, 3), expected, strict=True):
        assert actual.sharding.shard_shape(actual.shape)[0] == 2
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-6)
    images, targets = expected
    assert not np.allclose(images, PLAIN.evaluation(_batch(one.mesh)["image"]))
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)


def test_mixing_groups_that_would_lie_on_two_devices_are_refused():
    transform = dataclasses.replace(MIXING, mixing_group_size=4)
    engine = _engine(_mesh(8, 1), transform=transform)
    with pytest.raises(ValueError, match=r"2 of 16 images, got 4. Use 2, or a batch of 32"):
        engine.training_inputs(_batch(engine.mesh), 0)


def _state_and_batch(engine, poison=False):
    state = engine.initial_state()
    if poison:
        head = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params["head"])
        state = dataclasses.replace(state, params=state.params | {"head": head})
    return state, _batch(engine.mesh)


def test_an_update_that_is_not_finite_changes_the_counts_only():
    engine = _engine(_mesh(2, 1), average=AVERAGE)
    for expected in (1, 2):
        if expected == 1:
            state, batch = _state_and_batch(engine, poison=True)
        before = jax.device_get(state)
        state, metrics = engine.train_step(state, batch)
        assert not np.isfinite(metrics["loss"])
        assert (int(state.step), int(state.num_skipped)) == (expected, expected)
        for name in ("params", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
        *moments, schedule = state.opt_state
        jax.tree.map(np.testing.assert_array_equal, tuple(moments), before.opt_state[:-1])
        # The learning rate does not fall behind.
        assert schedule.count == expected
    head = jax.tree.map(jnp.nan_to_num, state.params["head"])
    state = dataclasses.replace(state, params=state.params | {"head": head})
    state, metrics = engine.train_step(state, batch)
    assert np.isfinite(metrics["loss"])
    assert int(state.num_skipped) == 0


def test_the_average_is_that_of_all_parameters_so_far():
    engine = _engine(_mesh(1, 1), average=Average(decay=0.75))
    state = engine.initial_state()
    expected = jax.device_get(state.params)
    for step in range(3):
        state, _ = engine.train_step(state, _batch(engine.mesh, step))
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.asarray(p), expected, state.params
        )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), state.ema, expected
    )
    averaged = engine.averaged(state)
    jax.tree.map(np.testing.assert_array_equal, averaged.params, state.ema)


def test_a_slow_average_takes_exactly_its_share_of_what_is_new():
    # In float32 1 - 0.9999 is 1.7e-4 too much.
    average = Average(decay=0.9999)
    value = average({"x": jnp.zeros(())}, {"x": jnp.ones(())}, jnp.int32(0))["x"]
    np.testing.assert_allclose(value, 1e-4, rtol=1e-6)


def test_a_warmed_up_average_follows_closely_at_first():
    average = Average(decay=0.999, warmup=True)
    for step, kept in ((0, 0.1), (10, 0.55), (10**6, 0.999)):
        value = average({"x": jnp.ones(())}, {"x": jnp.zeros(())}, jnp.int32(step))["x"]
        np.testing.assert_allclose(value, kept, rtol=1e-3)


def test_with_the_head_alone_the_trunk_stays_and_has_no_moments():
    engine = _engine(_mesh(1, 2), head_only=True)
    initial = jax.device_get(engine.initial_state())
    state, _ = _train(engine)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), initial.params, state.params)
    assert all(jax.tree.leaves(moved.pop("head")))
    assert not any(jax.tree.leaves(moved))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params["head"]))


def test_bfloat16_computes_nearly_the_same_and_keeps_float32():
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        state, losses[dtype] = _train(_engine(_mesh(2, 2), dtype=dtype))
        kept = (state.params, state.opt_state)
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(kept))
    assert losses[jnp.float32] != losses[jnp.bfloat16]
    np.testing.assert_allclose(losses[jnp.float32], losses[jnp.bfloat16], rtol=1e-2)


def test_parameters_and_moments_are_split_over_fsdp_and_only_there():
    engine = _engine(_mesh(2, 4), average=AVERAGE)
    state = engine.initial_state()
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state.ema, state.params)]
    assert places[0] == places[1]
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


def test_each_image_and_each_step_has_keys_of_its_own():
    engine = _engine(_mesh(1, 1), transform=MIXING)
    keys = [
        tuple(np.ravel(jax.random.key_data(key)).tolist())
        for step in range(3)
        for kind in engine._keys(jnp.int32(step), 16)
        for key in kind
    ]
    # Of the eight groups, and twice of the sixteen images.
    assert len(set(keys)) == len(keys) == 3 * (8 + 16 + 16)


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


def test_a_model_whose_norms_keep_running_means_is_refused():
    spec = dataclasses.replace(SPECS["random"], norm=nnx.BatchNorm)
    with pytest.raises(
        ValueError,
        match=r"must be nnx.Param or Frozen, got others at stages.0.0.norm1.mean, ",
    ):
        Engine(
            lambda rngs: MetaFormer(spec, num_classes=4, image_size=16, rngs=rngs),
            optim.make_optimizer("adamw", lambda _: 1e-3),
            mesh=_mesh(1, 1),
            transform=PLAIN,
        )
