import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models.normalization import LayerNorm

SETTINGS = [
    {"reduction_axes": -1, "use_bias": False},
    {"reduction_axes": -1, "use_bias": True, "epsilon": 1e-5},
    {"reduction_axes": (1, 2, 3), "use_bias": False},
]


def _norms(settings):
    """Ours and Flax's, with the same values."""
    norms = [kind(6, **settings, rngs=nnx.Rngs(0)) for kind in (LayerNorm, nnx.LayerNorm)]
    for norm in norms:
        norm.scale[...] = jnp.linspace(0.5, 2, 6)
        if norm.bias is not None:
            norm.bias[...] = jnp.linspace(-1, 1, 6)
    return norms


@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_are_those_of_flax(settings):
    x = 1 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    results = []
    for norm in _norms(settings):
        graphdef, state = nnx.split(norm)
        value, vjp = jax.vjp(
            lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x), state, x
        )
        gradients = vjp(cotangent)
        results.append([value, gradients[1], *jax.tree.leaves(gradients[0])])
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_precision():
    norm = LayerNorm(64, use_bias=False, rngs=nnx.Rngs(0))
    x = 1000 + jax.random.normal(jax.random.key(0), (8, 64))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(norm(x), expected, atol=1e-3)


def test_in_bfloat16_statistics_are_float32():
    norm = LayerNorm(4096, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4096), jnp.bfloat16)
    actual, vjp = jax.vjp(norm, x)
    assert actual.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-4)
    (gradient,) = vjp(jnp.ones_like(actual))
    assert gradient.dtype == jnp.bfloat16
    # All outputs alike: nothing that the input does changes their sum.
    assert np.abs(np.asarray(gradient, np.float32)).max() < 1e-3


def test_second_derivatives_work():
    x = jax.random.normal(jax.random.key(0), (3, 6))

    def norm_of_gradient(norm, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(norm(x) ** 3))(x) ** 2)

    actual, expected = (
        jax.grad(norm_of_gradient, argnums=1)(norm, x) for norm in _norms(SETTINGS[0])
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
