import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models.lowering import pooling

# Nothing here runs long: compiling soon is what counts.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CASES = [((2, 7, 6, 3), 3), ((1, 5, 8, 2), 5), ((2, 4, 4, 1), 2), ((1, 2, 1, 2), 3)]


def _flax(x, size):
    return nnx.avg_pool(
        x, window_shape=(size, size), strides=(1, 1), padding="SAME", count_include_pad=False
    )


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_values_and_gradients_are_those_of_flax(shape, size):
    x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape))

    def value_and_gradient(pool):
        value, vjp = jax.vjp(lambda x: pool(x, size), x)
        return value, vjp(cotangent)[0]

    pairs = zip(
        _jit(lambda: value_and_gradient(pooling.average_pool))(),
        _jit(lambda: value_and_gradient(_flax))(),
        strict=True,
    )
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (0, 1), (1, 0), (2, 2)])
def test_all_platforms_sum_the_same_windows(before, after):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    actual, expected = (
        _jit(functools.partial(form, before=before, after=after))(x)
        for form in (pooling._shifted, pooling._windowed)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_work():
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 2))

    def norm_of_gradient(pool, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(pool(x, 3) ** 3))(x) ** 2)

    actual, expected = (
        _jit(jax.grad(functools.partial(norm_of_gradient, pool)))(x)
        for pool in (pooling.average_pool, _flax)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
