import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.models.lowering import depthwise, depthwise_banded
from metaformer_jax.models.lowering.depthwise import depthwise_conv2d

SHAPES = [
    ((2, 9, 9, 4), (7, 7, 4)),
    ((1, 5, 8, 3), (3, 5, 3)),
    ((2, 3, 2, 5), (7, 7, 5)),  # smaller than the kernel
    ((1, 1, 1, 2), (3, 3, 2)),
]


def _arrays(x_shape, kernel_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], x_shape, dtype)
    return x, jax.random.normal(keys[1], kernel_shape, dtype), jax.random.normal(keys[2], x_shape)


def _plain(x, kernel):
    """The definition: each output is the kernel's sum over its window."""
    kh, kw, _ = kernel.shape
    padded = np.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(1, 2))
    return np.einsum("bhwcij,ijc->bhwc", windows, kernel)


@pytest.mark.parametrize(("x_shape", "kernel_shape"), SHAPES)
@pytest.mark.parametrize("lowering", ["depthwise_conv2d", "_shifted", "_grouped", "_banded"])
def test_every_lowering_is_the_definition(lowering, x_shape, kernel_shape):
    x, kernel, _ = _arrays(x_shape, kernel_shape)
    actual = getattr(depthwise, lowering)(x, kernel)
    expected = _plain(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# On a side are 3, 1, 4 and 1 rows.
BANDED = [
    ((128, 9, 9, 2), (7, 7, 2)),
    ((128, 5, 70, 2), (7, 3, 2)),
    ((128, 4, 3, 2), (7, 7, 2)),
    ((128, 1, 1, 2), (3, 3, 2)),
]


@pytest.mark.parametrize(("x_shape", "kernel_shape"), BANDED)
def test_bands_for_images_are_the_definition(x_shape, kernel_shape):
    x, kernel, _ = _arrays(x_shape, kernel_shape)
    actual = depthwise_banded.convolve_images(x, kernel)
    expected = _plain(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _convolve_rows(x, kernel):
    rows = depthwise_banded.fold(x)
    return depthwise_banded.convolve_rows(rows, kernel, width=x.shape[2]).reshape(x.shape)


# Blocks of 4, 2 and 1 rows, of which 1, 2 and 3 on each side are in reach; and those above.
ROWS = [((1, 20, 28, 2), (7, 7, 2)), ((2, 6, 48, 2), (7, 3, 2)), ((1, 4, 100, 3), (7, 5, 3))]


@pytest.mark.parametrize(("x_shape", "kernel_shape"), SHAPES + ROWS)
def test_bands_for_rows_are_the_definition(x_shape, kernel_shape):
    x, kernel, cotangent = _arrays(x_shape, kernel_shape)
    expected = _plain(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    np.testing.assert_allclose(_convolve_rows(x, kernel), expected, rtol=1e-5, atol=1e-5)
    gradient = depthwise._kernel_gradient_of_rows(x, cotangent, kernel)
    expected = depthwise._kernel_gradient_of_grouped(x, cotangent, kernel)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x_shape", "form"),
    [
        ((256, 56, 56, 4), "convolve_images"),
        ((128, 7, 7, 4), "convolve_images"),
        ((64, 56, 56, 4), "convolve_rows"),
        ((16, 28, 28, 4), "convolve_rows"),
        ((8, 28, 28, 4), "_grouped"),  # too few for their matrices
        ((60, 28, 28, 4), "_grouped"),  # do not fill the sublanes
        ((64, 14, 14, 4), "_grouped"),  # two blocks, and three in reach
        ((64, 70, 70, 4), "_grouped"),  # leave almost half of the lanes empty
        ((128, 130, 130, 4), "_grouped"),  # more than the lanes
        ((64, 130, 130, 4), "_grouped"),
        (jax.export.symbolic_shape("8*b, 56, 56, 4"), "_grouped"),
    ],
)
def test_the_shape_decides_what_tpus_run(x_shape, form, monkeypatch):
    called = []
    for module, name in [
        (depthwise_banded, "convolve_images"),
        (depthwise_banded, "convolve_rows"),
        (depthwise, "_grouped"),
    ]:
        stub = lambda x, *_, name=name, **__: called.append(name) or x  # noqa: E731
        monkeypatch.setattr(module, name, stub)
    x = jax.ShapeDtypeStruct(x_shape, jnp.bfloat16)
    jax.eval_shape(depthwise._banded, x, jax.ShapeDtypeStruct((7, 7, 4), jnp.bfloat16))
    assert called == [form]


@pytest.mark.parametrize(("x_shape", "kernel_shape"), SHAPES)
def test_both_gradients_are_those_of_the_grouped_convolution(x_shape, kernel_shape):
    x, kernel, cotangent = _arrays(x_shape, kernel_shape)
    _, vjp = jax.vjp(depthwise_conv2d, x, kernel)
    _, plain_vjp = jax.vjp(depthwise._grouped, x, kernel)
    for actual, expected in zip(vjp(cotangent), plain_vjp(cotangent), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["_kernel_gradient_by_blocks", "_kernel_gradient_of_grouped"])
# The whole image, blocks of rows and columns, single rows; channels in parts, and not to be parted.
@pytest.mark.parametrize(
    ("h", "w", "c"), [(6, 5, 3), (16, 8, 3), (3, 37, 3), (8, 12, 256), (2, 2, 131)]
)
def test_every_kernel_gradient_is_the_definition(gradient, h, w, c):
    x, kernel, cotangent = _arrays((2, h, w, c), (3, 5, c))
    actual = getattr(depthwise, gradient)(x, cotangent, kernel)
    expected = np.zeros(kernel.shape)
    for index in np.ndindex(3, 5):
        tap = np.zeros(kernel.shape)
        tap[index] = 1
        expected[index] = np.sum(_plain(np.asarray(x), tap) * cotangent, axis=(0, 1, 2))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_accumulated_in_float32():
    x, kernel, _ = _arrays((2, 14, 14, 8), (7, 7, 8), jnp.bfloat16)
    actual = depthwise_conv2d(x, kernel)
    assert actual.dtype == jnp.bfloat16
    expected = _plain(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    # One rounding of the result to eight bits, and none of the 49 sums before it.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_second_derivatives_work():
    x, kernel, _ = _arrays((1, 4, 4, 2), (3, 3, 2))

    def loss(function, kernel):
        return jnp.sum(function(x, kernel) ** 3)

    def sum_of_gradient(function, kernel):
        return jnp.sum(jax.grad(loss, argnums=1)(function, kernel) ** 2)

    actual = jax.grad(sum_of_gradient, argnums=1)(depthwise_conv2d, kernel)
    expected = jax.grad(sum_of_gradient, argnums=1)(depthwise._grouped, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel_shape", "message"),
    [((2, 3, 4), r"odd.*\(2, 3\)"), ((3, 3, 5), "4 channels.*got 5")],
)
def test_kernels_that_do_not_fit_are_refused(kernel_shape, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(jnp.zeros((1, 8, 8, 4)), jnp.zeros(kernel_shape))
