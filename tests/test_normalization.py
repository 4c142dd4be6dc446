import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models.lowering.normalization import _moments_in_one_pass, moments
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


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("use_bias", [False, True])
def test_results_have_the_dtype_of_flax(dtype, param_dtype, x_dtype, use_bias):
    settings = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": use_bias}
    norms = [kind(6, **settings, rngs=nnx.Rngs(0)) for kind in (LayerNorm, nnx.LayerNorm)]
    ours, of_flax = (norm(jnp.ones((2, 3, 6), x_dtype)).dtype for norm in norms)
    assert ours == of_flax


def test_settings_of_flax_that_it_does_not_keep_are_refused():
    with pytest.raises(TypeError, match="use_scale"):
        LayerNorm(6, use_scale=False, rngs=nnx.Rngs(0))


def test_axes_that_there_are_not_are_refused():
    norm = LayerNorm(4, use_bias=False, reduction_axes=(1, 2, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"axes \(1, 2, 3\) .* got shape \(2, 9, 4\)"):
        norm(jnp.ones((2, 9, 4)))


def test_a_mean_far_from_zero_costs_no_precision():
    norm = LayerNorm(64, use_bias=False, rngs=nnx.Rngs(0))
    x = 1000 + jax.random.normal(jax.random.key(0), (8, 64))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(norm(x), expected, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["as ever", "far from zero", "the first rows far from the others", "constant"]
)
def test_moments_of_images_lose_no_precision_in_one_pass(name):
    x = np.random.default_rng(0).normal(size=(3, 32, 5, 6))
    x += {"far from zero": 1000}.get(name, 0)
    x[:, :2] += {"the first rows far from the others": 1000}.get(name, 0)
    x = np.asarray(0 * x + 0.1 if name == "constant" else x, np.float32)
    axes = (1, 2, 3)
    mean, variance = _moments_in_one_pass(jnp.asarray(x), axes=axes)
    wide = x.astype(np.float64)
    largest = np.abs(wide).max()
    np.testing.assert_allclose(mean, wide.mean(axes, keepdims=True), rtol=0, atol=1e-6 * largest)
    # Up to sixteen times the rounding of a sum: the first rows are a sixteenth of the images.
    np.testing.assert_allclose(variance, wide.var(axes, keepdims=True), rtol=2e-5, atol=1e-15)


def test_derivatives_of_moments_are_those_in_two_passes():
    x = 3 + jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    weights = jax.random.normal(jax.random.key(1), (2, 2, 1, 1, 1))

    def derivatives(function):
        def loss(x):
            both = jnp.stack(function(x, axes=(1, 2, 3)))
            return jnp.sum(weights * both**2)

        return jax.grad(loss)(x), jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 3))(x)

    pairs = zip(derivatives(_moments_in_one_pass), derivatives(moments), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


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
