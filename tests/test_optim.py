import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaformer_jax.training import optim


def test_the_schedule_warms_up_linearly_and_joins_an_unshifted_cosine():
    schedule = optim.warmup_cosine(peak=4e-3, warmup_steps=20, total_steps=300)
    steps = np.arange(310)
    warmup = 1e-6 + (4e-3 - 1e-6) * steps / 20
    cosine = 1e-5 + (4e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * steps / 300))
    expected = np.where(steps < 20, warmup, np.where(steps < 300, cosine, 1e-5))
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-4)


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match=r"less than the 10 steps.*got 10"):
        optim.warmup_cosine(peak=1.0, warmup_steps=10, total_steps=10)


def test_weight_decay_spares_one_dimensional_parameters():
    params = {"kernel": jnp.ones((2, 2)), "dwconv": jnp.ones((3, 3, 2)), "scale": jnp.ones(2)}
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.5)
    gradients = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(new["dwconv"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(new["scale"], 1.0)


def test_gradients_are_cut_to_the_global_norm():
    # With eps as large as it is here, an Adam step shows the gradient's size.
    params = {"a": jnp.zeros((3, 3)), "b": jnp.zeros(16)}
    gradients = {"a": jnp.ones((3, 3)), "b": jnp.ones(16)}
    sizes = {}
    for max_norm in (None, 0.5, 100.0):
        optimizer = optim.adamw(lambda _: 1.0, eps=1e3, max_grad_norm=max_norm)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        sizes[max_norm] = float(optax.tree.norm(updates))
    assert sizes[100.0] == sizes[None]
    np.testing.assert_allclose(sizes[0.5] / sizes[None], 0.5 / 5, rtol=1e-2)
