"""The kernels for GPUs: what they compute, run on a CPU by Pallas; and that they lower for GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models import without_kernels
from metaformer_jax.models.block import MetaFormerBlock
from metaformer_jax.models.layers import Mlp
from metaformer_jax.models.lowering import (
    attention,
    depthwise,
    depthwise_triton,
    normalization_triton,
    star_relu,
    star_relu_depthwise,
    triton,
)
from metaformer_jax.models.lowering.normalization import normalize
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.mixers import IdentityMixing, SepConv
from metaformer_jax.models.normalization import LayerNorm

# Image and kernel: whole strips, strips that reach beyond a row, odd numbers of rows and channels.
SHAPES = [
    ((2, 5, 7, 4), (7, 7)),
    ((1, 5, 12, 6), (3, 5)),
    ((1, 3, 33, 2), (3, 3)),
    ((1, 3, 2, 130), (3, 3)),
    ((1, 1, 1, 2), (3, 3)),
]


@pytest.fixture
def has_gpu():
    with compiled_for("gpu"):
        yield


def _normal(number, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(number), shape, dtype)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_a_convolution_is_that_of_other_platforms(shape, size):
    x, kernel = _normal(0, shape), _normal(1, (*size, shape[-1]))
    actual = depthwise_triton.convolve(x, kernel, interpret=True)
    np.testing.assert_allclose(actual, depthwise._shifted(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "size"), SHAPES[:2])
def test_a_convolution_squares_adds_and_multiplies(shape, size):
    x, kernel = _normal(0, shape), _normal(1, (*size, shape[-1]))
    offset, factor = _normal(2, shape[1:]), _normal(3, shape)
    actual = depthwise_triton.convolve(
        x, kernel, squares=True, offset=offset, factor=factor, interpret=True
    )
    expected = (depthwise._shifted(jnp.square(x), kernel) + offset) * factor
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "size", "squares"), [(*case, number % 2 == 1) for number, case in enumerate(SHAPES)]
)
def test_a_kernel_gradient_is_that_of_other_platforms(shape, size, squares):
    x, cotangent = _normal(0, shape), _normal(1, shape)
    actual = depthwise_triton.kernel_gradient(x, cotangent, size, squares=squares, interpret=True)
    expected = depthwise._kernel_gradient_by_blocks(
        jnp.square(x) if squares else x, cotangent, jnp.zeros((*size, shape[-1]))
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_a_convolution_of_bfloat16_is_summed_in_float32():
    x, kernel = _normal(0, (1, 9, 9, 8), jnp.bfloat16), _normal(1, (7, 7, 8))
    actual = depthwise_triton.convolve(x, kernel, interpret=True)
    expected = depthwise._shifted(x.astype(jnp.float32), kernel).astype(jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7)


@pytest.mark.parametrize("shape", [(2, 3, 3, 64), (3, 5, 320), (7, 40), (2, 1024), (1, 1, 6)])
def test_a_norm_and_its_gradients_are_those_of_other_platforms(shape):
    x, cotangent, beside = 1 + 2 * _normal(0, shape), _normal(1, shape), _normal(2, shape)
    scale = 1 + _normal(3, shape[-1:])
    expected, vjp = jax.vjp(lambda x, scale: normalize(x, scale, (len(shape) - 1,), 1e-6), x, scale)
    actual = normalization_triton.normalize(x, scale, epsilon=1e-6, dtype=x.dtype, interpret=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    by_x, by_scale = normalization_triton.gradients(
        x, scale, cotangent, beside, epsilon=1e-6, interpret=True
    )
    expected_by_x, expected_by_scale = vjp(cotangent)
    np.testing.assert_allclose(by_x, expected_by_x + beside, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_scale, expected_by_scale, rtol=1e-4, atol=1e-4)
    narrow = scale.astype(jnp.bfloat16)
    _, by_narrow = normalization_triton.gradients(
        x, narrow, cotangent, beside, epsilon=1e-6, interpret=True
    )
    assert by_narrow.dtype == narrow.dtype


def test_many_rows_share_the_blocks_of_a_backward_pass(monkeypatch):
    x, cotangent, scale = _normal(0, (500, 8)), _normal(1, (500, 8)), 1 + _normal(2, (8,))
    expected = normalization_triton.gradients(x, scale, cotangent, x, epsilon=0.1, interpret=True)
    monkeypatch.setattr(normalization_triton, "_MOST_BLOCKS", 3)
    actual = normalization_triton.gradients(x, scale, cotangent, x, epsilon=0.1, interpret=True)
    for few, many in zip(actual, expected, strict=True):
        np.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-5)


def test_a_kernel_has_the_gradients_of_what_it_stands_for():
    x, kernel = _normal(0, (1, 5, 6, 4)), _normal(1, (3, 3, 4))
    offset, factor = _normal(2, x.shape[1:]), _normal(3, x.shape)

    def kernel_of_ours(x, kernel, offset, factor):
        return depthwise_triton.convolve(
            x, kernel, squares=True, offset=offset, factor=factor, interpret=True
        )

    def formula(x, kernel, offset, factor):
        return (depthwise.depthwise_conv2d(jnp.square(x), kernel) + offset) * factor

    arrays = (x, kernel, offset, factor)
    actual = jax.vjp(kernel_of_ours, *arrays)[1](x)
    for ours, expected in zip(actual, jax.vjp(formula, *arrays)[1](x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scale_and_bias_may_be_applied_to_a_matrix(dtype):
    x, kernel = _normal(0, (2, 4, 4, 12), dtype), _normal(1, (12, 5), dtype)
    cotangent, scale, bias = _normal(2, (2, 4, 4, 5), dtype), jnp.array([0.9]), jnp.array([-0.4])
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    expected, kept = jax.jit(star_relu._multiply_activated)(x, scale, bias, kernel)
    actual, positive = jax.jit(star_relu._multiply_squares)(x, scale, bias, kernel)
    _assert_close(actual, expected, tolerance)
    expected = jax.jit(star_relu._gradients_of_activated)(kept, scale, kernel, cotangent)
    actual = jax.jit(star_relu._gradients_of_squares)(positive, scale, kernel, cotangent)
    for ours, theirs in zip(actual, expected, strict=True):
        _assert_close(ours, theirs, tolerance)


def test_scale_and_bias_may_be_applied_to_a_depthwise_kernel():
    x, kernel = _normal(0, (2, 4, 5, 6)), _normal(1, (3, 5, 6))
    cotangent, scale, bias = _normal(2, x.shape), jnp.array([0.9]), jnp.array([-0.4])
    by_kernels = functools.partial(jax.jit, static_argnames="interpret")
    expected, kept = jax.jit(star_relu_depthwise._convolve_activated)(x, scale, bias, kernel)
    convolve = by_kernels(star_relu_depthwise._convolve_squares)
    actual, positive = convolve(x, scale, bias, kernel, interpret=True)
    _assert_close(actual, expected, 1e-5)
    expected = jax.jit(star_relu_depthwise._gradients_of_convolved)(
        kept, scale, bias, kernel, cotangent
    )
    gradients = by_kernels(star_relu_depthwise._gradients_of_convolved_squares)
    actual = gradients(positive, scale, bias, kernel, cotangent, interpret=True)
    for ours, theirs in zip(actual, expected, strict=True):
        _assert_close(ours, theirs, 1e-5)


def _assert_close(actual, expected, tolerance):
    assert actual.dtype == expected.dtype
    actual, expected = (np.asarray(array, np.float32) for array in (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def test_kernels_take_what_they_are_exact_for(has_gpu):
    assert triton.has_kernels(jnp.zeros(3), jnp.zeros(3, jnp.bfloat16))
    assert not triton.has_kernels(jax.ShapeDtypeStruct((3,), jnp.float64))
    assert not triton.has_kernels(jax.ShapeDtypeStruct((2**31,), jnp.float32))
    (batch,) = jax.export.symbolic_shape("batch")
    assert not triton.has_kernels(jax.ShapeDtypeStruct((batch, 3), jnp.float32))


def test_what_is_traced_without_kernels_has_none(has_gpu):
    x, kernel = jnp.zeros((1, 5, 5, 2)), jnp.zeros((3, 3, 2))

    convolve = jax.jit(depthwise.depthwise_conv2d)

    def lowered():
        with _on_abstract_gpu():
            return convolve.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()

    assert "stablehlo.convolution" not in lowered()
    with without_kernels():
        assert "stablehlo.convolution" in lowered()
    assert "stablehlo.convolution" not in lowered()


def test_there_are_none_but_for_gpus():
    x = jnp.zeros((2, 4))
    for platform, expected in (("cpu", False), ("gpu", True), ("tpu", False)):
        with compiled_for(platform):
            assert triton.has_kernels(x) == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2, 196, 4, 32), jnp.bfloat16, True),
        ((2, 196, 4, 32), jnp.float32, False),
        ((2, 49, 4, 32), jnp.bfloat16, False),
        ((2, 196, 4, 12), jnp.bfloat16, False),
        ((2, 196, 4, 136), jnp.bfloat16, False),
    ],
)
def test_cudnn_attends_where_it_has_gradients(has_gpu, shape, dtype, expected):
    assert attention._is_for_cudnn(jax.ShapeDtypeStruct(shape, dtype)) == expected


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (SepConv, jnp.float32),
        (SepConv, jnp.bfloat16),
        (Mlp, jnp.bfloat16),
        (LayerNorm, jnp.bfloat16),
    ],
)
def test_layers_and_their_gradients_lower_for_gpus(has_gpu, layer, dtype):
    options = {"use_bias": False} if layer is LayerNorm else {}
    graphdef, state = nnx.split(layer(24, dtype=dtype, **options, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 9, 7, 24), dtype)

    @jax.jit
    def gradients(state, x):
        value, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return value, vjp(x)

    with _on_abstract_gpu():
        lowered = gradients.trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
    kernels = {SepConv: 3, Mlp: 0, LayerNorm: 2}[layer]
    assert lowered.count("stablehlo.custom_call") >= kernels
    assert "stablehlo.convolution" not in lowered


def _on_abstract_gpu():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_on_other_platforms_what_was_traced_for_gpus_is_the_same(has_gpu):
    layer = SepConv(8, rngs=nnx.Rngs(0))
    norm = LayerNorm(8, use_bias=False, rngs=nnx.Rngs(0))
    x = _normal(0, (1, 6, 5, 8))

    def gradients():
        def output(x):
            x, normalized = norm.beside(x)
            return x + layer(normalized)

        value, vjp = jax.vjp(jax.jit(output), x)
        return value, *vjp(x)

    actual = gradients()
    with without_kernels():
        expected = gradients()
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_is_of_the_kind_of_its_forward_pass(has_gpu, monkeypatch):
    """What the one keeps is nothing to the other."""

    def refuse(*arrays):
        raise AssertionError

    monkeypatch.setattr(attention, "_gradients_by_cudnn", refuse)
    monkeypatch.setattr(star_relu_depthwise, "_gradients_of_convolved_squares", refuse)
    x = _normal(0, (1, 4, 2, 8), jnp.bfloat16)

    def output(x):
        mixed = attention.dot_product_attention(x, x, x)
        return star_relu_depthwise.star_relu_depthwise_conv2d(
            mixed, jnp.ones(1), jnp.zeros(1), x[0, :3, :1]
        )

    with without_kernels():
        _, vjp = jax.vjp(output, x)
    vjp(x)


def test_large_kernels_and_empty_batches_have_none(has_gpu):
    x = jnp.zeros((1, 9, 9, 2))
    assert depthwise_triton.takes(x, jnp.zeros((7, 7, 2)))
    assert not depthwise_triton.takes(x, jnp.zeros((9, 9, 2)))
    assert not depthwise_triton.takes(x[:0], jnp.zeros((7, 7, 2)))


def test_a_batch_may_be_empty():
    layer = Mlp(4, rngs=nnx.Rngs(0))
    assert jax.jit(lambda x: layer(x))(jnp.zeros((0, 2, 2, 4))).shape == (0, 2, 2, 4)


def test_a_norm_that_inherits_is_asked_itself():
    class Doubled(LayerNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    block = MetaFormerBlock(
        3,
        token_mixer=IdentityMixing,
        norm=functools.partial(Doubled, use_bias=False),
        resolution=(2, 2),
        rngs=nnx.Rngs(0),
    )
    x = _normal(0, (1, 2, 2, 3))
    np.testing.assert_array_equal(block.mix_tokens(x), x + block.norm1(x))


def test_what_cudnn_gives_may_be_differentiated(has_gpu, monkeypatch):
    """Once is what JAX's own rule for it does; what has none stands for it here."""

    def run(function, *arrays):
        return jax.pure_callback(function, jax.eval_shape(function, *arrays), *arrays)

    plain = jax.nn.dot_product_attention
    cudnn = jax.custom_vjp(lambda *arrays: run(plain, *arrays))
    cudnn.defvjp(
        lambda *arrays: (run(plain, *arrays), arrays),
        lambda arrays, cotangent: run(
            lambda *arrays: jax.vjp(plain, *arrays[:3])[1](arrays[3]), *arrays, cotangent
        ),
    )
    monkeypatch.setattr(attention, "_cudnn_attention", cudnn)
    query, key, value = (_normal(i, (1, 4, 2, 8), jnp.bfloat16) for i in range(3))

    def loss(query):
        return jnp.sum(attention.dot_product_attention(query, key, value).astype(jnp.float32) ** 2)

    def size_of_gradient(query):
        return jnp.sum(jax.grad(loss)(query).astype(jnp.float32) ** 2)

    actual = jax.grad(size_of_gradient)(query)
    with without_kernels():
        expected = jax.grad(size_of_gradient)(query)
    _assert_close(actual, expected, 0.02)
