import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models import layers


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, 4, 5, 6)) * 2 + 1


def test_star_relu_is_its_formula(x):
    star_relu = layers.StarReLU(rngs=nnx.Rngs(0))
    star_relu.scale[...] = jnp.array([0.5])
    star_relu.bias[...] = jnp.array([-0.25])
    np.testing.assert_allclose(star_relu(x), 0.5 * np.maximum(x, 0) ** 2 - 0.25, rtol=1e-6)


def test_star_relu_starts_as_squared_relu(x):
    np.testing.assert_array_equal(layers.StarReLU(rngs=nnx.Rngs(0))(x), layers.squared_relu(x))


@pytest.mark.parametrize(
    ("norm", "axes"), [(layers.layer_norm, (-1,)), (layers.image_layer_norm, (1, 2, 3))]
)
def test_norms_are_their_formula_over_their_axes(norm, axes, x):
    wide = np.asarray(x, np.float64)
    deviation = np.sqrt(wide.var(axes, keepdims=True) + 1e-6)
    expected = (wide - wide.mean(axes, keepdims=True)) / deviation
    np.testing.assert_allclose(norm(6, rngs=nnx.Rngs(0))(x), expected, rtol=1e-4, atol=1e-5)


def test_norm_statistics_are_float32_under_bfloat16():
    # The mean of 256 and 257 is no bfloat16 number: rounded to one, the signs come out wrong.
    x = jnp.tile(jnp.array([256.0, 258.0], jnp.bfloat16), 32)[None]
    normalised = layers.layer_norm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normalised[0, :2], jnp.array([-1, 1], jnp.bfloat16))


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    drop_path = layers.DropPath(0.25, rngs=nnx.Rngs(0))
    dropped = drop_path(jnp.ones((4000, 2, 2, 3)))
    per_sample = dropped.reshape(4000, -1)
    assert bool(jnp.all(per_sample == per_sample[:, :1]))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75])
    # Four standard deviations of a mean of 4000.
    assert abs(float(dropped.mean()) - 1) < 4 * np.sqrt(0.25 / 0.75 / 4000)


def test_drop_path_draws_anew_at_each_call():
    drop_path = layers.DropPath(0.5, rngs=nnx.Rngs(0))
    ones = jnp.ones((64, 1, 1, 1))
    assert not bool(jnp.all(drop_path(ones) == drop_path(ones)))


def test_res_scale_multiplies_each_channel(x):
    res_scale = layers.ResScale(6, init_value=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(res_scale(x), 0.5 * x)


@pytest.mark.parametrize("head", [layers.LinearHead, layers.MlpHead])
def test_head_dropout_acts_in_training_only(head):
    module = head(6, 10, dropout=0.5, rngs=nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(0), (4, 6))
    module.train()
    assert not bool(jnp.all(module(features) == module(features)))
    module.eval()
    np.testing.assert_array_equal(module(features), module(features))


def test_kernels_start_with_the_published_width():
    kernel = layers.Linear(400, 400, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.01)


@pytest.mark.parametrize("dims", [(3, 8), (8, 3), (4, 4)])
def test_a_linear_layer_has_the_gradients_of_a_matrix_product(dims):
    layer = layers.Linear(*dims, rngs=nnx.Rngs(0))
    kernel = layer.kernel[...]
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, dims[0]))
    cotangent = jax.random.normal(jax.random.key(1), (2, 3, 5, dims[1]))
    graphdef, state = nnx.split(layer)
    value, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    by_state, by_x = vjp(cotangent)
    np.testing.assert_allclose(value, np.einsum("bhwc,cd->bhwd", x, kernel), rtol=1e-5, atol=1e-6)
    (by_kernel,) = jax.tree.leaves(by_state)
    expected = np.einsum("bhwc,bhwd->cd", x, cotangent)
    np.testing.assert_allclose(by_kernel, expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum("bhwd,cd->bhwc", cotangent, kernel)
    np.testing.assert_allclose(by_x, expected, rtol=1e-5, atol=1e-6)


def test_the_squared_relu_lets_what_is_not_a_number_through():
    x = jnp.array([-2.0, 0.0, 3.0, jnp.nan, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(layers.squared_relu(x), [0, 0, 9, np.nan, 0, np.inf])
    gradient = jax.vmap(jax.grad(layers.squared_relu))(x)
    np.testing.assert_array_equal(gradient[:4], [0, 0, 6, np.nan])
