"""The kernels for TPUs of a block's second half: what they compute, run on a CPU; and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import on_tpus
import pytest
from flax import nnx

from metaformer_jax.models import (
    Attention,
    ImageKeys,
    MetaFormerBlock,
    SepConv,
    create_model,
    layer_norm,
    mlp_kernels,
    without_kernels,
)
from metaformer_jax.models.layers import Linear, Mlp, image_layer_norm
from metaformer_jax.models.lowering import mlp_mosaic
from metaformer_jax.models.lowering.mlp_forms import ChannelsAlongLanes, ImagesAlongLanes, Norm
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.lowering.residual_mlp import residual_mlp
from metaformer_jax.models.mixers import IdentityMixing, Pooling
from metaformer_jax.models.stages import AUTO, run_blocks

EPSILON = 1e-3
OVER_CHANNELS, OVER_IMAGES = Norm(EPSILON), Norm(EPSILON, is_over_images=True)


def _shape(form):
    """That of the images."""
    if isinstance(form, ChannelsAlongLanes):
        return form.shape
    n, c, b = form.shape
    return b, 1, n, c


def _arrays(shape, num_hidden, dtype=jnp.float32, *, has_shortcut=True):
    b, *_, c = shape
    keys = jax.random.split(jax.random.key(0), 7)
    return (
        jax.random.normal(keys[0], shape, dtype) * 2 + 1,
        jnp.arange(b) / b,
        jax.random.normal(keys[1], (c,)) if has_shortcut else None,
        jax.random.normal(keys[2], (c, num_hidden)) / c**0.5,
        jax.random.normal(keys[3], (num_hidden, c)) / num_hidden**0.5,
        jax.random.normal(keys[4], (c,)),
    ), jax.random.normal(keys[5], shape, dtype)


def _expected(x, keep, shortcut, up, down, offset, *, norm):
    axes = (1, 2, 3) if norm.is_over_images else -1
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    hidden = (x - mean) / jnp.sqrt(variance + EPSILON) @ up
    branch = jnp.maximum(hidden, 0) ** 2 @ down + offset
    return (x if shortcut is None else shortcut * x) + keep[:, None, None, None] * branch


def _by_kernels(form, arrays, cotangent, norm):
    """The result, and the gradients of all arrays but the factors of images."""
    x, *others = arrays
    run = functools.partial(mlp_mosaic.transform, norm=norm, interpret=True)
    run_back = functools.partial(mlp_mosaic.gradients, norm=norm, interpret=True)

    def left(array):
        return form.leave(array).reshape(x.shape)

    result = run(form, form.enter(x), *others)
    by_x, by_keep, *others = run_back(form, form.enter(x), *others, form.enter(cotangent))
    assert not by_keep.any()
    return left(result), (left(by_x), *others)


def _assert_close(actual, expected, tolerance):
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert actual.shape == expected.shape
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("form", "grid", "has_shortcut", "norm"),
    [
        # Several rows in a step, one row in several products, several steps, tokens that do not
        # fill tiles, and images that the cores of a chip can or cannot share.
        (ChannelsAlongLanes((3, 4, 48, 16), 48), (1, 3, 1, 1), True, OVER_CHANNELS),
        (ChannelsAlongLanes((3, 1, 416, 16), 48), (1, 3, 1, 1), False, OVER_CHANNELS),
        (ChannelsAlongLanes((2, 2, 864, 8), 24), (2, 1, 2, 2), True, OVER_CHANNELS),
        (ChannelsAlongLanes((4, 2, 864, 8), 24), (2, 2, 2, 2), True, OVER_IMAGES),
        (ChannelsAlongLanes((4, 1, 133, 24), 72), (2, 2, 1, 1), False, OVER_CHANNELS),
        (ChannelsAlongLanes((4, 1, 133, 24), 72), (2, 2, 1, 1), False, OVER_IMAGES),
        # Several pixels in a product, several steps, and more images than lanes.
        (ImagesAlongLanes((6, 16, 128), 48), (1, 1, 1), True, OVER_CHANNELS),
        (ImagesAlongLanes((66, 8, 256), 24), (1, 2, 11), False, OVER_CHANNELS),
        (ImagesAlongLanes((66, 8, 256), 24), (1, 2, 11), True, OVER_IMAGES),
        (ImagesAlongLanes((8, 8, 128), 2048), (2, 1, 1), True, OVER_CHANNELS),
        (ImagesAlongLanes((8, 8, 128), 2048), (2, 1, 1), False, OVER_IMAGES),
    ],
)
def test_values_and_gradients_are_those_of_autodiff(form, grid, has_shortcut, norm, monkeypatch):
    monkeypatch.setattr(mlp_mosaic, "num_cores_of_chip", lambda: 2)
    assert form.grid(2) == grid
    arrays, cotangent = _arrays(_shape(form), form.num_hidden, has_shortcut=has_shortcut)
    expected, vjp = jax.vjp(functools.partial(_expected, norm=norm), *arrays)
    by_x, _, *others = vjp(cotangent)
    result, gradients = _by_kernels(form, arrays, cotangent, norm)
    _assert_close(result, expected, 1e-6)
    for actual, gradient in zip(gradients, (by_x, *others), strict=True):
        _assert_close(actual, gradient, 5e-6)


@pytest.mark.parametrize("norm", [OVER_CHANNELS, OVER_IMAGES])
def test_in_bfloat16_only_what_is_multiplied_is_rounded(norm):
    arrays, cotangent = _arrays((4, 8, 112, 16), 64, jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in arrays]
    expected, vjp = jax.vjp(functools.partial(_expected, norm=norm), *wide)
    by_x, _, *others = vjp(cotangent.astype(jnp.float32))
    result, gradients = _by_kernels(
        ChannelsAlongLanes((4, 8, 112, 16), 64), arrays, cotangent, norm
    )
    assert result.dtype == gradients[0].dtype == jnp.bfloat16
    assert all(gradient.dtype == jnp.float32 for gradient in gradients[1:])
    # Eight bits: of what is multiplied, and of the result. Over 3,584 tokens no error adds up.
    pairs = zip((result, *gradients), (expected, by_x, *others), strict=True)
    for actual, wide_one in pairs:
        _assert_close(actual, wide_one, 2**-7)


@pytest.mark.parametrize("norm", [OVER_CHANNELS, OVER_IMAGES])
@pytest.mark.parametrize(
    "form", [ChannelsAlongLanes((4, 1, 42, 16), 64), ImagesAlongLanes((42, 16, 4), 64)]
)
def test_without_kernels_the_function_is_the_same(form, norm):
    arrays, cotangent = _arrays((4, 6, 7, 16), 64)
    expected, vjp = jax.vjp(functools.partial(_expected, norm=norm), *arrays)
    result, own_vjp = jax.vjp(functools.partial(residual_mlp, form, norm=norm), *arrays)
    _assert_close(result, expected, 1e-6)
    for position, (actual, gradient) in enumerate(
        zip(own_vjp(cotangent), vjp(cotangent), strict=True)
    ):
        # The factors of images are constants.
        _assert_close(actual, 0 * gradient if position == 1 else gradient, 5e-6)


def _form_of(x, *, takes_any_form=True):
    return mlp_mosaic.form_of(x, 4 * x.shape[-1], norm=OVER_CHANNELS, takes_any_form=takes_any_form)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((64, 28, 112, 128), jnp.bfloat16, ChannelsAlongLanes((64, 28, 112, 128), 512)),
        ((64, 14, 14, 512), jnp.bfloat16, ChannelsAlongLanes((64, 1, 196, 512), 2048)),
        ((64, 28, 28, 128), jnp.bfloat16, ChannelsAlongLanes((64, 1, 784, 128), 512)),
        ((8, 24, 24, 512), jnp.bfloat16, ChannelsAlongLanes((8, 1, 576, 512), 2048)),
        # Images fill the lanes.
        ((128, 56, 56, 64), jnp.bfloat16, ImagesAlongLanes((3136, 64, 128), 256)),
        ((256, 28, 28, 128), jnp.bfloat16, ImagesAlongLanes((784, 128, 256), 512)),
        ((128, 7, 7, 512), jnp.bfloat16, ImagesAlongLanes((49, 512, 128), 2048)),
        ((64, 14, 14, 512), jnp.float32, None),
        ((64, 14, 14, 512), jnp.float16, None),
        # Channels that do not fill the lanes, as long as images do not.
        ((64, 14, 14, 320), jnp.bfloat16, None),
        # Few tokens, a number of them that no tiles divide, and tiles that are half empty.
        ((64, 7, 7, 768), jnp.bfloat16, None),
        ((64, 15, 15, 512), jnp.bfloat16, None),
        ((128, 13, 13, 24), jnp.bfloat16, None),
        ((128, 13, 13, 64), jnp.bfloat16, None),
        ((0, 14, 14, 512), jnp.bfloat16, None),
        # Weights that fill the vector memory.
        ((64, 14, 14, 2048), jnp.bfloat16, None),
    ],
)
def test_kernels_are_for_shapes_that_gain(shape, dtype, expected):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with on_tpus.traced_for("TPU v5 lite"):
        assert _form_of(x) == expected
        in_rows = _form_of(x, takes_any_form=False)
        assert not isinstance(in_rows, ImagesAlongLanes)
        assert in_rows == expected or shape[0] >= 128
        with without_kernels():
            assert _form_of(x) is None
    assert _form_of(x) is None


@pytest.mark.parametrize(
    ("chip", "most_channels"),
    [("TPU v4", 256), ("TPU v5p", 768), ("TPU v6 lite", 1152), ("", 256)],
)
def test_weights_and_their_gradients_fit_into_the_vector_memory(chip, most_channels):
    with on_tpus.traced_for(chip):
        forms = [
            _form_of(jax.ShapeDtypeStruct((8, 14, 14, c), jnp.bfloat16), takes_any_form=False)
            for c in (most_channels, most_channels + 128)
        ]
    assert [form is not None for form in forms] == [True, False]


def test_the_matrix_units_of_early_chips_take_no_bfloat16():
    x = jax.ShapeDtypeStruct((2, 14, 14, 128), jnp.bfloat16)
    for chip, has_kernels in (("TPU v2", False), ("TPU v3", False), ("TPU v4", True)):
        with on_tpus.traced_for(chip):
            assert (_form_of(x, takes_any_form=False) is not None) == has_kernels


@pytest.mark.parametrize(
    ("name", "num_images", "expected"),
    [
        # In the stages of attention 320 channels leave lanes empty, and 49 tokens are few.
        ("caformer_s18", 128, [ImagesAlongLanes, ImagesAlongLanes, None, None]),
        ("caformer_b36", 64, [ChannelsAlongLanes, ChannelsAlongLanes, ChannelsAlongLanes, None]),
        (
            "convformer_s18",
            128,
            [ImagesAlongLanes, ImagesAlongLanes, ImagesAlongLanes, ImagesAlongLanes],
        ),
        # After norms over images, hidden layers that fit into the vector memory have none.
        ("poolformerv2_s12", 128, [ImagesAlongLanes, ImagesAlongLanes, ImagesAlongLanes, None]),
        (
            "identityformer_s12",
            256,
            [ImagesAlongLanes, ImagesAlongLanes, ImagesAlongLanes, ImagesAlongLanes],
        ),
        ("randformer_s12", 32, [None, None, None, None]),
        ("poolformerv2_m36", 64, [None, None, None, None]),
    ],
)
def test_stages_of_published_models_that_have_kernels(name, num_images, expected):
    model = nnx.eval_shape(lambda: create_model(name, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    sizes = model.spec.stage_resolutions(224)
    forms = []
    with on_tpus.traced_for("TPU v5 lite"):
        for blocks, size, dim in zip(model.stages, sizes, model.spec.dims, strict=True):
            x = jax.ShapeDtypeStruct((num_images, *size, dim), jnp.bfloat16)
            rows = jax.eval_shape(blocks[0].fold, x)
            forms.append(mlp_kernels.form_for(blocks[0], rows))
    assert [None if form is None else type(form) for form in forms] == expected


def test_images_of_unknown_number_have_none():
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 28, 28, 128), jnp.bfloat16)
    with compiled_for("tpu"):
        assert _form_of(x) is None


def _block(mixer=Attention, dim=128, *, resolution=12, dtype=jnp.bfloat16, **options):
    options = {"norm": layer_norm, "drop_path_rate": 0.5, "res_scale_init": 1.0} | options
    block = MetaFormerBlock(
        dim,
        token_mixer=mixer,
        resolution=(resolution, resolution),
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    # Values that training would give them.
    params = nnx.state(block, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    changed = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    nnx.update(block, jax.tree.unflatten(structure, changed))
    return block


def _loss(block, x, *, remat="none", scan=0):
    keys = ImageKeys(jax.random.split(jax.random.key(2), x.shape[0]))
    out = run_blocks([block, block], x, rngs=keys, remat=remat, scan=scan)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("mixer", "options", "how"),
    [
        (Attention, {}, {}),
        (IdentityMixing, {"drop_path_rate": 0.0}, {"remat": "block", "scan": 1}),
        (Pooling, {"res_scale_init": None}, {}),
        (Pooling, {"norm": image_layer_norm}, {}),
        (IdentityMixing, {"norm": image_layer_norm, "res_scale_init": None}, {"remat": "mlp"}),
        (SepConv, {"res_scale_init": None}, {"remat": "mlp"}),
    ],
)
def test_a_block_is_the_same_with_and_without(mixer, options, how, monkeypatch):
    block = _block(mixer, 16, dtype=jnp.float32, **options)
    x = jax.random.normal(jax.random.key(3), (4, 12, 12, 16))
    value_and_grad = nnx.value_and_grad(functools.partial(_loss, **how), argnums=(0, 1))
    expected = value_and_grad(block, x)
    calls = []

    def form_of(x, num_hidden, *, norm, takes_any_form):
        """Whatever the limits of the kernels: what they compute is run in their place."""
        calls.append(x.shape)
        b, h, w, c = x.shape
        along_images = ImagesAlongLanes((h * w, c, b), num_hidden)
        return along_images if takes_any_form else ChannelsAlongLanes((b, 1, h * w, c), num_hidden)

    monkeypatch.setattr(mlp_mosaic, "form_of", form_of)
    actual = value_and_grad(block, x)
    assert calls[-1] == ((4, 1, 144, 16) if mixer is Attention else (4, 12, 12, 16))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    pairs = zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True)
    for one, other in pairs:
        _assert_close(one, other, 2e-5)


class _OwnMlp(Mlp):
    pass


def test_changed_layers_have_no_kernels():
    def has_kernels(block):
        with on_tpus.traced_for("TPU v5 lite"):
            x = jax.ShapeDtypeStruct((8, 12, 12, 128), jnp.bfloat16)
            return mlp_kernels.form_for(block, x) is not None

    def changed(*path, part):
        block = _block()
        *parents, name = path
        setattr(functools.reduce(getattr, parents, block), name, nnx.data(part))
        return block

    assert has_kernels(_block())
    assert has_kernels(_block(drop_path_rate=0.0, res_scale_init=None))
    rngs = nnx.Rngs(0)
    blocks = [
        _block(dtype=jnp.float32),
        _block(norm=functools.partial(layer_norm, axes=(1, 2))),
        _block(norm=functools.partial(layer_norm, use_bias=True)),
        changed("mlp", part=_OwnMlp(128, dtype=jnp.bfloat16, rngs=rngs)),
        changed("mlp", "act", part=nnx.Dropout(0.5)),
        changed("mlp", "fc2", part=nnx.Linear(512, 128, dtype=jnp.bfloat16, rngs=rngs)),
        changed("mlp", "fc1", part=Linear(128, 512, rngs=rngs)),
        changed("norm2", part=nnx.LayerNorm(128, rngs=rngs)),
        changed("res_scale2", part=nnx.Linear(128, 128, rngs=rngs)),
        changed("drop_path2", part=nnx.Dropout(0.5, rngs=rngs)),
    ]
    assert not any(map(has_kernels, blocks))


@pytest.mark.parametrize(
    ("mixer", "dim", "resolution", "expected"),
    [
        (SepConv, 128, 12, 0),
        (SepConv, 64, 12, 2),
        (Attention, 128, 12, 0),
        (Attention, 128, 8, 2),
    ],
)
def test_by_default_nothing_is_recomputed_for_kernels(mixer, dim, resolution, expected):
    block = _block(mixer, dim, resolution=resolution)
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)
    x = jnp.zeros((2, resolution, resolution, dim), jnp.bfloat16)

    def loss(params):
        return _loss(nnx.merge(graphdef, params, rest), x, remat=AUTO)

    with on_tpus.traced_for("TPU v5 lite"):
        assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("remat") == expected


def _lowered(function, x, platform="tpu"):
    with on_tpus.traced_for("TPU v5 lite"):
        return jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("norm", [OVER_CHANNELS, OVER_IMAGES])
@pytest.mark.parametrize("has_images_along_lanes", [False, True])
def test_everything_may_be_mapped(has_images_along_lanes, norm):
    form = (
        ImagesAlongLanes((8, 64, 128), 256)
        if has_images_along_lanes
        else ChannelsAlongLanes((2, 1, 144, 128), 256)
    )

    def gradients(x, keep, up, down, offset):
        shortcut = jnp.ones_like(offset)

        def loss(x, up):
            y = residual_mlp(form, x, keep, shortcut, up, down, offset, norm=norm)
            return jnp.sum(y.astype(jnp.float32))

        return jax.value_and_grad(loss, (0, 1))(x, up)

    (b, *_, c), d = _shape(form), form.num_hidden
    x = jax.ShapeDtypeStruct((3, *_shape(form)), jnp.bfloat16)
    sizes = (b,), (c, d), (d, c), (c,)
    others = [jax.ShapeDtypeStruct((3, *size), jnp.float32) for size in sizes]
    with on_tpus.traced_for("TPU v5 lite"):
        lowered = jax.jit(jax.vmap(gradients)).trace(x, *others).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("norm", [OVER_CHANNELS, OVER_IMAGES])
def test_places_of_blocks_have_32_bits_whatever_the_default(norm):
    for form in (ChannelsAlongLanes((2, 1, 144, 128), 256), ImagesAlongLanes((8, 64, 128), 256)):
        arrays, cotangent = _arrays(_shape(form), form.num_hidden, jnp.bfloat16)

        def both(x, *others, form=form, cotangent=cotangent):
            y = mlp_mosaic.transform(form, form.enter(x), *others, norm=norm)
            given = form.enter(cotangent)
            return y, mlp_mosaic.gradients(form, form.enter(x), *others, given, norm=norm)

        on_tpus.assert_places_have_32_bits(both, *arrays, num_kernels=2)


def test_programs_for_tpus_have_kernels():
    block = _block(IdentityMixing)
    x = jax.ShapeDtypeStruct((2, 12, 12, 128), jnp.bfloat16)

    def loss(x):
        return _loss(block, x)

    def size_of_gradient(x):
        return jnp.sum(jax.grad(loss)(x).astype(jnp.float32) ** 2)

    # In two blocks. The last: also the passes back through what the first backward pass was given.
    for function, num_kernels in ((loss, 2), (jax.grad(loss), 4), (jax.grad(size_of_gradient), 6)):
        text = _lowered(function, x)
        assert text.count("tpu_custom_call") == num_kernels
        assert "kernel_cycles" in text
        assert "tpu_custom_call" not in _lowered(function, x, "cpu")
