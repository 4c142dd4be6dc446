"""Attention's kernels for TPUs: what they compute, run on a CPU by Pallas; and where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import on_tpus
import pytest
from flax import nnx

from metaformer_jax.models import (
    Attention,
    MetaFormerBlock,
    layer_norm,
    without_kernels,
)
from metaformer_jax.models.lowering import attention, attention_mosaic
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.lowering.recomputation import PRODUCT
from metaformer_jax.models.stages import run_blocks

# Images, tokens, heads, channels of a head: one head, fewer than are looked ahead, and more; many
# tokens.
SHAPES = [(2, 9, 1, 16), (1, 130, 2, 32), (2, 17, 7, 48), (1, 300, 3, 16)]


def _arrays(shape, dtype=jnp.float32):
    images, tokens, heads, channels = shape
    keys = jax.random.split(jax.random.key(0))
    packed = jax.random.normal(keys[0], (images, tokens, 3 * heads * channels), dtype)
    return packed, jax.random.normal(keys[1], (images, tokens, heads * channels), dtype)


def _expected(packed, heads):
    images, tokens, _ = packed.shape
    parts = (x.reshape(images, tokens, heads, -1) for x in jnp.split(packed, 3, axis=-1))
    return jax.nn.dot_product_attention(*parts).reshape(images, tokens, -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_jax(shape):
    heads = shape[2]
    packed, cotangent = _arrays(shape)
    expected, vjp = jax.vjp(functools.partial(_expected, heads=heads), packed)
    mixed = attention_mosaic.attend(packed, heads, interpret=True)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    gradient = attention_mosaic.gradients(packed, mixed, cotangent, heads, interpret=True)
    np.testing.assert_allclose(gradient, vjp(cotangent)[0], rtol=1e-5, atol=2e-6)


def test_in_bfloat16_sums_are_float32():
    packed, cotangent = _arrays((1, 256, 2, 32), jnp.bfloat16)
    wide = packed.astype(jnp.float32)
    expected, vjp = jax.vjp(functools.partial(_expected, heads=2), wide)
    mixed = attention_mosaic.attend(packed, 2, interpret=True)
    gradient = attention_mosaic.gradients(packed, mixed, cotangent, 2, interpret=True)
    pairs = (mixed, expected), (gradient, vjp(cotangent.astype(jnp.float32))[0])
    for narrow, exact in pairs:
        assert narrow.dtype == jnp.bfloat16
        # Eight bits: of the weights, and of the result.
        error = np.abs(np.asarray(narrow, np.float32) - exact)
        assert error.max() <= 2**-7 * np.abs(exact).max()


def test_scores_beyond_the_range_of_exp_pick_their_largest():
    packed, _ = _arrays((1, 9, 1, 16))
    mixed = attention_mosaic.attend(
        packed * jnp.repeat(jnp.array([1e3, 1e3, 1]), 16), 1, interpret=True
    )
    query, key, value = jnp.split(packed[0], 3, axis=-1)
    np.testing.assert_allclose(mixed[0], value[(query @ key.T).argmax(-1)], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2, 196, 10, 32), jnp.bfloat16, True),
        ((2, 256, 16, 32), jnp.bfloat16, True),
        ((2, 196, 10, 32), jnp.float32, False),
        ((2, 196, 10, 32), jnp.float16, False),
        ((2, 49, 16, 32), jnp.bfloat16, False),
        ((2, 320, 2, 32), jnp.bfloat16, True),
        # Too much for the vector memory of a chip that is not known.
        ((2, 576, 10, 32), jnp.bfloat16, False),
        ((2, 256, 64, 16), jnp.bfloat16, False),
        ((2, 196, 10, 24), jnp.bfloat16, False),
        ((2, 196, 200, 32), jnp.bfloat16, False),
        ((0, 196, 10, 32), jnp.bfloat16, False),
    ],
)
def test_kernels_are_for_shapes_that_gain(shape, dtype, expected):
    images, tokens, heads, channels = shape
    packed = jax.ShapeDtypeStruct((images, tokens, 3 * heads * channels), dtype)
    with compiled_for("tpu"):
        assert attention_mosaic.has_kernels(packed, heads) == expected
        with without_kernels():
            assert not attention_mosaic.has_kernels(packed, heads)
    assert not attention_mosaic.has_kernels(packed, heads)


@pytest.mark.parametrize(
    ("chip", "most_tokens"),
    # The matrix units of v3 take no bfloat16. Of 16, 128 and 64 MiB, for 16 heads of 32 channels.
    [("TPU v3", 0), ("TPU v4", 256), ("TPU v5 lite", 784), ("TPU v5p", 752), ("TPU v6 lite", 784)],
)
def test_kernels_are_for_chips_that_can_hold_them(chip, most_tokens):
    with on_tpus.traced_for(chip):
        numbers = [
            num_tokens
            for num_tokens in range(128, 900, 16)
            if attention_mosaic.has_kernels(
                jax.ShapeDtypeStruct((2, num_tokens, 3 * 512), jnp.bfloat16), 16
            )
        ]
    assert max(numbers, default=0) == most_tokens


def test_places_of_blocks_have_32_bits_whatever_the_default():
    packed, cotangent = _arrays((2, 130, 2, 16), jnp.bfloat16)

    def both(packed):
        mixed = attention_mosaic.attend(packed, 2)
        return attention_mosaic.gradients(packed, mixed, cotangent, 2)

    on_tpus.assert_places_have_32_bits(both, packed, num_kernels=2)


def test_images_of_unknown_number_have_none():
    (batch,) = jax.export.symbolic_shape("batch")
    with compiled_for("tpu"):
        packed = jax.ShapeDtypeStruct((batch, 196, 960), jnp.bfloat16)
        assert not attention_mosaic.has_kernels(packed, 10)


def _loss(packed):
    images, tokens, channels = packed.shape
    mixed = attention.self_attention(packed.reshape(images, 2, tokens // 2, channels), 2)
    return jnp.sum(mixed.astype(jnp.float32) ** 2)


def _size_of_gradient(packed):
    return jnp.sum(jax.grad(_loss)(packed).astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("function", "num_kernels"),
    # The last: also the pass back through what the first backward pass was given to keep.
    [(_loss, 1), (jax.grad(_loss), 2), (jax.grad(_size_of_gradient), 3)],
)
def test_programs_for_tpus_have_kernels(function, num_kernels):
    packed = jax.ShapeDtypeStruct((2, 196, 192), jnp.bfloat16)

    def lowered(platform):
        with on_tpus.traced_for("TPU v5 lite"):
            traced = jax.jit(function).trace(packed)
            return traced.lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu").count("tpu_custom_call") == num_kernels
    assert "kernel_cycles" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("cpu")


@pytest.mark.parametrize(("remat", "num_calls"), [("none", 1), ("products", 1), ("block", 2)])
def test_what_attention_gives_is_kept_with_the_results_of_other_layers(remat, num_calls):
    block = MetaFormerBlock(
        64,
        token_mixer=Attention,
        norm=layer_norm,
        resolution=(12, 12),
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )

    def loss(x):
        return jnp.sum(run_blocks([block], x, rngs=None, remat=remat).astype(jnp.float32))

    x = jnp.ones((2, 12, 12, 64), jnp.bfloat16)
    with on_tpus.traced_for("TPU v5 lite"):
        gradient = jax.make_jaxpr(jax.grad(loss))(x)
    assert str(gradient).count("name=attention_attend") == num_calls


def test_without_kernels_the_product_with_the_values_is_kept_too():
    packed = jnp.ones((2, 4, 4, 48))

    def num_products(*kept):
        policy = jax.checkpoint_policies.save_only_these_names(*kept)

        @functools.partial(jax.checkpoint, policy=policy)
        def loss(packed):
            return jnp.sum(jnp.sin(attention.self_attention(packed, 2)))

        return str(jax.make_jaxpr(jax.grad(loss))(packed)).count("dot_general")

    assert num_products(PRODUCT) < num_products()


def test_on_other_platforms_what_was_traced_for_tpus_is_the_same():
    packed, _ = _arrays((1, 130, 2, 16), jnp.bfloat16)
    results = []
    for platform in ("tpu", "cpu"):
        with compiled_for(platform):
            gradients = jax.grad(_loss)(packed), jax.grad(_size_of_gradient)(packed)
        results.append([np.asarray(gradient, np.float32) for gradient in gradients])
    for traced_for_tpus, expected in zip(*results, strict=True):
        np.testing.assert_allclose(
            traced_for_tpus, expected, rtol=0.02, atol=0.02 * np.abs(expected).max()
        )
