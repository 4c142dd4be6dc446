import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models import mixers
from metaformer_jax.models.layers import Frozen

MIXERS = [
    mixers.IdentityMixing,
    mixers.RandomMixing,
    mixers.Pooling,
    mixers.SepConv,
    mixers.Attention,
]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 4, 6, 64))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_mixer_keeps_shape_and_dtype(mixer, dtype, x):
    module = mixer(64, resolution=(4, 6), dtype=dtype, rngs=nnx.Rngs(0))
    mixed = module(x.astype(dtype))
    assert (mixed.shape, mixed.dtype) == (x.shape, dtype)


def test_random_mixing_computes_in_its_own_dtype(x):
    mixer = mixers.RandomMixing(64, resolution=(4, 6), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert mixer(x).dtype == jnp.bfloat16


def test_random_mixing_rows_sum_to_one_and_are_frozen():
    module = mixers.RandomMixing(8, resolution=(4, 6), rngs=nnx.Rngs(0))
    assert isinstance(module.random_matrix, Frozen)
    assert not isinstance(module.random_matrix, nnx.Param)
    matrix = module.random_matrix[...]
    assert matrix.shape == (24, 24)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    # Softmax of uniform numbers: in a row no weight is e times as large as another.
    assert float((matrix.max(axis=1) / matrix.min(axis=1)).max()) < np.e


def test_random_mixing_refuses_another_number_of_tokens(x):
    module = mixers.RandomMixing(64, resolution=(7, 7), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"7x7.*got 4x6.*resolution=\(4, 6\)"):
        module(x)


def test_random_mixing_takes_its_resolution_as_a_list_too(x):
    listed, paired = (
        mixers.RandomMixing(64, resolution=resolution, rngs=nnx.Rngs(0))(x)
        for resolution in ([4, 6], (4, 6))
    )
    np.testing.assert_array_equal(listed, paired)


@pytest.mark.parametrize(
    ("mixer", "arguments", "message"),
    [
        (mixers.SepConv, {"kernel_size": 4}, "`kernel_size` must be odd, got 4"),
        (mixers.SepConv, {"kernel_size": 0}, "`kernel_size` .* at least 1, got 0"),
        (mixers.SepConv, {"expansion_ratio": 0.01}, "`expansion_ratio` .* for 64 .*got 0.01"),
        (mixers.Attention, {"head_dim": 0}, "`head_dim` .* at least 1, got 0"),
        (mixers.Pooling, {"pool_size": 0}, "`pool_size` .* at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(mixer, arguments, message):
    with pytest.raises(ValueError, match=message):
        mixer(64, resolution=(4, 6), rngs=nnx.Rngs(0), **arguments)


def test_pooling_averages_without_the_padding(x):
    mixed = mixers.Pooling(64, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(
        mixed[:, 0, 0], x[:, :2, :2].mean(axis=(1, 2)) - x[:, 0, 0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        mixed[:, 2, 3], x[:, 1:4, 2:5].mean(axis=(1, 2)) - x[:, 2, 3], rtol=1e-4, atol=1e-5
    )


def test_pooling_of_a_constant_is_zero_even_in_bfloat16():
    constant = jnp.full((1, 5, 5, 3), 1.7, jnp.bfloat16)
    mixed = mixers.Pooling(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(constant)
    np.testing.assert_allclose(np.asarray(mixed, np.float32), 0, atol=1e-6)


def test_attention_is_its_formula(x):
    module = mixers.Attention(64, rngs=nnx.Rngs(0))
    tokens = np.asarray(x, np.float64).reshape(2, 24, 64)
    qkv = tokens @ np.asarray(module.qkv.kernel[...], np.float64)
    query, key, value = qkv.reshape(2, 24, 3, 2, 32).transpose(2, 0, 3, 1, 4)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(32)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    mixed = (weights @ value).transpose(0, 2, 1, 3).reshape(2, 4, 6, 64)
    expected = mixed @ np.asarray(module.proj.kernel[...], np.float64)
    np.testing.assert_allclose(module(x), expected, rtol=1e-3, atol=1e-6)


def test_attention_permutes_with_its_tokens(x):
    module = mixers.Attention(64, rngs=nnx.Rngs(0))
    flipped = module(x[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(flipped, module(x), rtol=1e-4, atol=1e-6)


def test_attention_narrower_than_a_head_has_one_head():
    module = mixers.Attention(16, rngs=nnx.Rngs(0))
    assert module.num_heads == 1
    assert module.qkv.kernel.shape == (16, 96)


def test_sep_conv_reaches_as_far_as_its_kernel():
    module = mixers.SepConv(8, kernel_size=5, rngs=nnx.Rngs(0))
    image = jnp.zeros((1, 9, 9, 8)).at[0, 4, 4].set(1.0)
    reached = jnp.any(module(image) != module(jnp.zeros_like(image)), axis=(0, 3))
    expected = np.zeros((9, 9), bool)
    expected[2:7, 2:7] = True
    np.testing.assert_array_equal(reached, expected)
