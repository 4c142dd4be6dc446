"""Schedules and optimisers: the published figures, and the laws of each argument."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from metaformer_jax.models import Attention, MetaFormer, MetaFormerSpec, Pooling
from metaformer_jax.training import optim

pytestmark = pytest.mark.optimized

SCHEDULES = np.load(reference.DATA / "schedules.npz")
STEPS = np.load(reference.DATA / "optimizer_steps.npz")


@pytest.mark.parametrize(("peak", "warmup"), [(4e-3, 5), (4e-3, 20), (8e-3, 20)])
def test_rates_are_the_published_ones_in_every_epoch(peak, warmup):
    expected = SCHEDULES[f"cosine_lr{peak:g}_warmup{warmup}"]
    schedule = optim.epoch_schedule("cosine", peak=peak, epochs=300, warmup_epochs=warmup)
    np.testing.assert_allclose(schedule(np.arange(310)), expected, rtol=1e-12)
    steps_per_epoch = 1_281_167 / 4096
    total_steps = round(310 * steps_per_epoch)
    rate = optim.by_step(
        schedule, steps_per_epoch=steps_per_epoch, total_steps=total_steps, per_epoch=True
    )
    steps = np.arange(total_steps)
    np.testing.assert_array_equal(
        jax.jit(rate)(steps), expected.astype(np.float32)[(steps // steps_per_epoch).astype(int)]
    )


def test_a_rate_for_each_step_runs_through_those_for_each_epoch():
    schedule = optim.epoch_schedule("cosine", peak=4e-3, epochs=300, warmup_epochs=5)
    rate = optim.by_step(schedule, steps_per_epoch=312, total_steps=310 * 312, per_epoch=False)
    every_epoch = rate(np.arange(310) * 312)
    np.testing.assert_allclose(every_epoch, SCHEDULES["cosine_lr0.004_warmup5"], rtol=1e-4)
    within = rate(np.arange(100 * 312, 101 * 312))
    assert bool(jnp.all(jnp.diff(within) <= 0))
    assert len(np.unique(within)) > 100


@pytest.mark.parametrize(("examples", "batch"), [(50_000, 48), (50_000, 96), (14_197_122, 49)])
def test_an_epoch_of_whole_steps_begins_at_its_first(examples, batch):
    """15 epochs of 50,000 / 48 steps are 15,625; rounded quotients give slightly more."""
    per_epoch, epochs = fractions.Fraction(examples, batch), np.arange(300)
    rate = optim.by_step(
        lambda epoch: epoch,
        steps_per_epoch=examples / batch,
        total_steps=round(300 * per_epoch),
        per_epoch=True,
    )
    first = np.array([math.ceil(int(epoch) * per_epoch) for epoch in epochs])
    np.testing.assert_array_equal(rate(first), epochs)
    np.testing.assert_array_equal(rate(first[1:] - 1), epochs[:-1])


def test_a_constant_rate_stays_after_its_warmup():
    schedule = optim.epoch_schedule("constant", peak=5e-5, epochs=30, warmup_epochs=2)
    np.testing.assert_allclose(schedule(np.array([0, 1, 2, 29, 40])), [1e-6, 2.55e-5, *[5e-5] * 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "linear"}, "one of cosine, constant, got 'linear'"),
        ({"warmup_epochs": 10}, "less than the 10 epochs of the training, got 10"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, message):
    arguments = {"name": "cosine", "peak": 1.0, "epochs": 10, "warmup_epochs": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        optim.epoch_schedule(**arguments)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("model", "name", "arguments"),
    [
        ("convformer_s18", "adamw", {"learning_rate": 4e-3}),
        ("caformer_s18", "lamb", {"learning_rate": 8e-3, "eps": 1e-6, "max_grad_norm": 1.0}),
    ],
)
def test_five_steps_give_the_published_losses_and_parameters(model, name, arguments, dtype):
    arguments = dict(arguments)
    rate = arguments.pop("learning_rate")
    optimizer = optim.make_optimizer(name, lambda _: rate, **arguments)
    labels = np.arange(0, 800, 100)
    with jax.enable_x64(dtype == jnp.float64):
        images = jnp.asarray(reference.images(8, 64, 64, seed=2), dtype)
        graphdef, params, rest = nnx.split(
            reference.model(model, image_size=64, dtype=dtype), nnx.Param, ...
        )

        def loss_fn(params):
            logits = nnx.merge(graphdef, params, rest)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(params, opt_state):
            loss, gradients = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        params = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.to_pure_dict(params))
        opt_state, losses = optimizer.init(params), []
        for _ in range(5):
            params, opt_state, loss = step(params, opt_state)
            losses.append(float(loss))
    # Single numbers are StarReLU's scales and biases, whose gradients are sums that nearly cancel.
    of_losses, of_arrays, of_scalars = (
        (1e-4, 2e-5, 5e-4) if dtype == jnp.float32 else (1e-6, 1e-6, 1e-6)
    )
    np.testing.assert_allclose(losses, STEPS[f"{model}/{name}/losses"], rtol=of_losses)
    state = nnx.from_flat_state(
        [(path, nnx.Param(leaf)) for path, leaf in nnx.traversals.flatten_mapping(params).items()]
    )
    for key, tensor in reference.to_torch(state).items():
        figures = STEPS[f"{model}/{name}/{key}"]
        norm = np.linalg.norm(tensor.astype(np.float64))
        # In each model one of 220 parameters, a scalar, is on its way through zero: a hundredth of
        # what it was, so that its own size says nothing about rounding.
        before = np.linalg.norm(reference.weight(key, tensor.shape))
        tolerance = of_scalars if tensor.size == 1 else of_arrays
        assert abs(norm - figures[0]) <= tolerance * max(figures[0], before), key


def _updates(params, gradients, name="adamw", rate=1.0, **arguments):
    optimizer = optim.make_optimizer(name, lambda _: rate, **arguments)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_weight_decay_spares_one_dimensional_parameters(name):
    params = {"kernel": jnp.ones((2, 2)), "dwconv": jnp.ones((3, 3, 2)), "scale": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = _updates(params, zeros, name, rate=0.1, weight_decay=0.5)
    # LAMB scales an update to its parameter's norm, that of the decay as well.
    expected = -0.05 if name == "adamw" else -0.1
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["dwconv"], expected, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_lamb_moves_each_decayed_parameter_by_the_rate_times_its_norm():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.float32(rng.normal(size=(5, 4))), "scale": jnp.ones(4)}
    gradients = {"kernel": jnp.float32(1e-3 * rng.normal(size=(5, 4))), "scale": 1e-3 * jnp.ones(4)}
    updates = _updates(params, gradients, "lamb", rate=0.1)
    np.testing.assert_allclose(
        np.linalg.norm(updates["kernel"]), 0.1 * np.linalg.norm(params["kernel"]), rtol=1e-4
    )
    np.testing.assert_allclose(updates["scale"], -0.1, rtol=1e-3)


def test_lamb_scales_nothing_without_weight_decay():
    # As published: the trust ratio is for parameters with weight decay.
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.float32(rng.normal(size=(5, 4))), "scale": jnp.ones(4)}
    gradients = jax.tree.map(jnp.cos, params)
    lamb, adam = (_updates(params, gradients, name, weight_decay=0) for name in ("lamb", "adamw"))
    jax.tree.map(np.testing.assert_array_equal, lamb, adam)


def test_gradients_are_cut_to_the_global_norm():
    # With eps as large as it is here, an Adam step shows the gradient's size.
    params = {"a": jnp.zeros((3, 3)), "b": jnp.zeros(16)}
    gradients = {"a": jnp.ones((3, 3)), "b": jnp.ones(16)}
    sizes = {
        max_norm: float(
            optax.tree.norm(_updates(params, gradients, eps=1e3, max_grad_norm=max_norm))
        )
        for max_norm in (None, 0.5, 100.0)
    }
    assert sizes[100.0] == sizes[None]
    np.testing.assert_allclose(sizes[0.5] / sizes[None], 0.5 / 5, rtol=1e-2)


@pytest.fixture(scope="module")
def params():
    spec = MetaFormerSpec(
        depths=(1, 2), dims=(4, 32), token_mixers=(Pooling, Attention), res_scale_init=(None, 1.0)
    )
    model = MetaFormer(spec, num_classes=3, image_size=16, rngs=nnx.Rngs(0))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_layer_decay_slows_each_layer_by_its_distance_from_the_head(params):
    ones = jax.tree.map(jnp.ones_like, params)
    plain, slowed = (_updates(params, ones, layer_decay=decay) for decay in (1.0, 0.5))
    ratio = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), slowed, plain)
    expected = {
        ("head",): 1.0,
        ("norm",): 1.0,
        ("stages", 1, 1): 1 / 2,
        ("stages", 1, 0): 1 / 4,
        ("downsample_layers", 1): 1 / 4,
        ("stages", 0, 0): 1 / 8,
        ("downsample_layers", 0): 1 / 16,
    }
    seen = 0
    for path, value in nnx.traversals.flatten_mapping(ratio).items():
        (matching,) = (scale for start, scale in expected.items() if path[: len(start)] == start)
        np.testing.assert_allclose(value, matching, rtol=1e-5, err_msg=str(path))
        seen += 1
    assert seen == len(jax.tree.leaves(params))


def test_what_is_switched_on_later_finds_its_place_in_the_state(params):
    def places(name="adamw", **arguments):
        state = optim.make_optimizer(name, lambda _: 1.0, **arguments).init(params)
        return jax.tree.structure(state)

    options = {"max_grad_norm": 1.0, "layer_decay": 0.9, "weight_decay": 0.0}
    for name in ("adamw", "lamb"):
        for option, value in options.items():
            assert places(name, **{option: value}) == places()


def test_rates_by_epoch_reach_the_last_step_that_there_can_be():
    total = 2**31 - 1
    schedule = optim.by_step(
        lambda epoch: np.asarray(epoch), steps_per_epoch=1e9, total_steps=total, per_epoch=True
    )
    assert [float(schedule(step)) for step in (0, 10**9, total - 1)] == [0.0, 1.0, 2.0]


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="one of adamw, lamb, got 'sgd'"):
        optim.make_optimizer("sgd", lambda _: 1.0)
