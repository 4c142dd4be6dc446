import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models.layers import Mlp
from metaformer_jax.models.lowering import star_relu, star_relu_depthwise
from metaformer_jax.models.lowering.recomputation import run_after
from metaformer_jax.models.mixers import SepConv

# Nothing here runs long: compiling soon is what counts.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SCALE, BIAS = jnp.array([0.7]), jnp.array([-0.3])


def _matmul(x, scale, bias, kernel):
    return _plain(x, scale, bias) @ kernel


def _depthwise(x, scale, bias, kernel):
    return jax.lax.conv_general_dilated(
        _plain(x, scale, bias),
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _plain(x, scale, bias):
    return scale * jnp.maximum(x, 0) ** 2 + bias


@jax.custom_vjp
def _in_rows(x, scale, bias, kernel):
    """What TPUs run where rows fill their lanes."""
    return star_relu_depthwise._convolve_activated_rows(x, scale, bias, kernel)[0]


def _in_rows_forward(x, scale, bias, kernel):
    convolved, kept = star_relu_depthwise._convolve_activated_rows(x, scale, bias, kernel)
    return convolved, (kept, scale, bias, kernel)


_in_rows.defvjp(
    _in_rows_forward,
    lambda residuals, cotangent: star_relu_depthwise._gradients_of_convolved_rows(
        *residuals, cotangent
    ),
)

# Ours, the formula, and the shape of the kernel.
LAYERS = [
    (star_relu.star_relu_matmul, _matmul, (6, 9)),
    (star_relu.star_relu_matmul, _matmul, (6, 2)),
    (star_relu_depthwise.star_relu_depthwise_conv2d, _depthwise, (3, 5, 6)),
    (_in_rows, _depthwise, (3, 5, 6)),
]


def _arguments(kernel_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 5, 4, 6), dtype)
    return x, SCALE, BIAS, jax.random.normal(keys[1], kernel_shape, dtype)


def _value_and_gradients(function, arguments, cotangent):
    @_jit
    def both(arguments, cotangent):
        value, vjp = jax.vjp(function, *arguments)
        return value, vjp(cotangent)

    return both(arguments, cotangent)


@pytest.mark.parametrize(("layer", "formula", "kernel_shape"), LAYERS)
def test_values_and_all_gradients_are_those_of_the_formula(layer, formula, kernel_shape):
    arguments = _arguments(kernel_shape)
    cotangent = jax.random.normal(jax.random.key(1), (*arguments[0].shape[:-1], kernel_shape[-1]))
    value, gradients = _value_and_gradients(layer, arguments, cotangent)
    expected_value, expected_gradients = _value_and_gradients(formula, arguments, cotangent)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-5)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_any_scale_has_its_gradient(scale):
    x, _, bias, kernel = _arguments((6, 9))
    scale = jnp.array([scale])
    actual, expected = (
        _jit(jax.grad(lambda scale, f=f: jnp.sum(jnp.sin(f(x, scale, bias, kernel)))))(scale)
        for f in (star_relu.star_relu_matmul, _matmul)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize(("layer", "formula", "kernel_shape"), LAYERS)
def test_second_derivatives_are_those_of_the_formula(layer, formula, kernel_shape):
    def norm_of_gradients(function, *arguments):
        of = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), argnums=(0, 1, 2, 3))(*arguments)
        return sum(jnp.sum(gradient**2) for gradient in of)

    arguments = _arguments(kernel_shape)
    actuals, expecteds = (
        _jit(jax.grad(functools.partial(norm_of_gradients, f), argnums=(0, 1, 2, 3)))(*arguments)
        for f in (layer, formula)
    )
    for actual, expected in zip(actuals, expecteds, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("layer", "formula", "kernel_shape"), LAYERS)
def test_in_bfloat16_gradients_of_scale_and_bias_are_summed_in_float32(
    layer, formula, kernel_shape
):
    arguments = _arguments(kernel_shape, jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in arguments]
    shape = (*arguments[0].shape[:-1], kernel_shape[-1])
    cotangent = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    value, gradients = _value_and_gradients(layer, arguments, cotangent)
    assert value.dtype == jnp.bfloat16
    _, plain = _value_and_gradients(formula, wide, cotangent.astype(jnp.float32))
    for actual, expected in zip(gradients, plain, strict=True):
        error = np.abs(np.asarray(actual, np.float32) - expected)
        assert error.max() <= 2**-6 * np.abs(expected).max()


@pytest.mark.parametrize("build", [Mlp, SepConv])
def test_a_module_computes_what_its_layers_compute(build):
    module = build(6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 6))
    if build is Mlp:
        expected = module.fc2(module.act(module.fc1(x)))
    else:
        expected = module.pwconv2(module.dwconv(module.act1(module.pwconv1(x))))
    np.testing.assert_allclose(module(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("replaced", ["act", "fc2"])
def test_layers_of_ones_own_take_the_place_of_these(replaced):
    mlp = Mlp(6, rngs=nnx.Rngs(0))
    setattr(mlp, replaced, lambda x: 2 * x)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 6))
    np.testing.assert_allclose(mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))), rtol=1e-6)


@pytest.mark.parametrize(("build", "name"), [(Mlp, "fc2"), (SepConv, "dwconv")])
def test_a_layer_that_inherits_from_these_keeps_its_own_call(build, name):
    module = build(6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 6))
    before = module(x)
    layer = getattr(module, name)

    class Negated(type(layer)):
        def __call__(self, x):
            return -super().__call__(x)

    layer.__class__ = Negated
    # What follows them, if anything, is linear.
    np.testing.assert_allclose(module(x), -before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "formula", "kernel_shape"),
    [(LAYERS[0][0], _matmul, (64, 64)), (LAYERS[2][0], _depthwise, (3, 3, 64))],
)
def test_the_backward_pass_keeps_the_inputs_of_activations_alone(layer, formula, kernel_shape):
    # On a CPU, whose compiler would compute everything else in the forward pass and keep it.
    depth, x = 12, jnp.ones((4, 32, 32, 64))
    kernels = jnp.ones((64, 64)), jnp.ones(kernel_shape)

    def temporaries(apply):
        def loss(x, kernels):
            for _ in range(depth):
                x = apply(x @ kernels[0], SCALE, BIAS, kernels[1])
            return jnp.sum(x**2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / x.nbytes / depth

    # The inputs of both layers, and something to work with, where it was twice that.
    assert temporaries(layer) < 3
    assert temporaries(formula) > 4


def test_what_runs_after_is_the_same():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    np.testing.assert_array_equal(run_after(x, jnp.ones((2, 2))), x)
    assert run_after(x.astype(jnp.bfloat16), jnp.ones((2, 2))).dtype == jnp.bfloat16
