import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.models.lowering import attention
from metaformer_jax.models.lowering.attention import dot_product_attention

# Query and key tokens, heads, channels of a head.
SHAPES = [(7, 7, 2, 4), (5, 9, 3, 8), (1, 1, 1, 2), (6, 6, 2, 32)]


# Nothing here runs long: compiling soon is what counts.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _value_and_gradients(function, arguments, cotangent):
    @_jit
    def both(arguments, cotangent):
        value, vjp = jax.vjp(function, *arguments)
        return value, vjp(cotangent)

    return both(arguments, cotangent)


def _arrays(shape, dtype=jnp.float32):
    num_queries, num_keys, heads, channels = shape
    keys = jax.random.split(jax.random.key(0), 4)
    query, cotangent = (
        jax.random.normal(key, (2, num_queries, heads, channels), dtype) for key in keys[:2]
    )
    key, value = (jax.random.normal(key, (2, num_keys, heads, channels), dtype) for key in keys[2:])
    return query, key, value, cotangent


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_jax(shape):
    *arguments, cotangent = _arrays(shape)
    actual, gradients = _value_and_gradients(dot_product_attention, arguments, cotangent)
    expected, plain = _value_and_gradients(jax.nn.dot_product_attention, arguments, cotangent)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=2e-6)


def test_parts_of_a_batch_give_what_the_whole_gives(monkeypatch):
    *arguments, cotangent = _arrays((5, 9, 3, 8))
    num_pairs = 2 * 3 * 5 * 9

    def attended(many_pairs):
        monkeypatch.setattr(attention, "_MANY_PAIRS", many_pairs)
        # Not the function itself, of which JAX remembers what it was.
        attend = functools.partial(lambda *arrays: dot_product_attention(*arrays))
        programs = (
            attend,
            lambda *arrays: jax.vjp(attend, *arrays)[0],
            lambda *arrays: jax.vjp(attend, *arrays)[1](cotangent),
        )
        num_products = [
            jax.jit(program).lower(*arguments).as_text().count("dot_general")
            for program in programs
        ]
        return num_products, _value_and_gradients(attend, arguments, cotangent)

    (of_whole, expected), (of_parts, actual) = attended(num_pairs + 1), attended(num_pairs)
    # Only where it is differentiated: there both passes.
    assert of_parts == [of_whole[0], 2 * of_whole[1], 2 * of_whole[2]]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_platforms_compute_the_same(shape, dtype):
    *arguments, cotangent = _arrays(shape, dtype)
    tolerance = (
        {"rtol": 1e-5, "atol": 2e-6} if dtype == jnp.float32 else {"rtol": 0.03, "atol": 0.03}
    )
    results = _jit(attention._attend)(*arguments)
    nothing, *by_head = _jit(attention._attend_by_head)(*arguments)
    assert (nothing.shape, nothing.dtype) == (results[0].shape, results[0].dtype)
    assert not nothing.any()
    for actual, expected in zip(by_head, results[1:], strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, **tolerance)
    residuals = (*arguments, *results, cotangent)
    pairs = zip(
        _jit(attention._gradients_by_head)(*arguments, nothing, *by_head, cotangent),
        _jit(attention._gradients)(*residuals),
        strict=True,
    )
    for actual, expected in pairs:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, **tolerance)


def test_on_cpus_a_backward_pass_has_the_weights_of_no_more_than_a_layer_at_a_time():
    query, key, value, cotangent = _arrays((128, 128, 4, 8))

    def loss(query, key, value):
        for _ in range(12):
            value = dot_product_attention(query + value, key, value)
        return jnp.vdot(value, cotangent)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value).compile()
    weights = 2 * 4 * 128 * 128 * 4
    # Scores, exponentials and their gradients of one layer; the tokens of all are less than one.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * weights


def test_scores_beyond_the_range_of_exp_pick_their_largest():
    query, key, value, _ = _arrays((5, 5, 1, 4))
    mixed = dot_product_attention(1e3 * query, 1e3 * key, value)
    scores = np.einsum("btnd,bsnd->bnts", query, key)
    expected = np.take_along_axis(value[:, :, 0], scores.argmax(-1)[:, 0, :, None], axis=1)
    np.testing.assert_allclose(mixed[:, :, 0], expected, rtol=1e-6)


def test_in_bfloat16_sums_are_float32():
    arguments = _arrays((64, 512, 2, 32), jnp.bfloat16)
    *wide, wide_cotangent = (array.astype(jnp.float32) for array in arguments)
    actual, gradients = _value_and_gradients(dot_product_attention, arguments[:3], arguments[3])
    expected, plain = _value_and_gradients(jax.nn.dot_product_attention, wide, wide_cotangent)
    assert actual.dtype == jnp.bfloat16
    # Eight bits: of the weights, and of the result. A sum in bfloat16 is off by tens of percent.
    pairs = zip((actual, *gradients), (expected, *plain), strict=True)
    for narrow, wide in pairs:
        error = np.abs(np.asarray(narrow, np.float32) - wide)
        assert error.max() <= 2**-7 * np.abs(wide).max()


def test_second_derivatives_work():
    arguments = _arrays((4, 5, 1, 3))[:3]

    def norm_of_gradients(function, *arguments):
        gradients = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), argnums=(0, 1, 2))(*arguments)
        return sum(jnp.sum(gradient**2) for gradient in gradients)

    actuals, expecteds = (
        _jit(jax.grad(functools.partial(norm_of_gradients, function), argnums=(0, 1, 2)))(
            *arguments
        )
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    for actual, expected in zip(actuals, expecteds, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
