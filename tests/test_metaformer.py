import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import metaformer_jax
from metaformer_jax.models import (
    FAMILIES,
    Attention,
    ConvGeometry,
    IdentityMixing,
    ImageKeys,
    LinearHead,
    MetaFormer,
    MetaFormerBlock,
    MetaFormerSpec,
    MlpHead,
    Pooling,
    SepConv,
    image_layer_norm,
)
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.stages import run_blocks

# Kernels of 3x3 compile in a fraction of the time of 7x7.
SPEC = MetaFormerSpec(
    depths=(2, 2),
    dims=(8, 16),
    token_mixers=(Pooling, functools.partial(SepConv, kernel_size=3)),
    res_scale_init=(None, 1.0),
)


def _model(spec=SPEC, **kwargs):
    arguments = {"num_classes": 5, "image_size": 32, "rngs": nnx.Rngs(0), **kwargs}
    return MetaFormer(spec, **arguments)


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(0), (2, 32, 32, 3))


def test_logits_features_and_pooled_feature_have_their_shapes(images):
    model = _model()
    assert model(images).shape == (2, 5)
    assert [stage.shape for stage in model.features(images)] == [(2, 8, 8, 8), (2, 4, 4, 16)]
    pooled = _model(num_classes=0)(images)
    assert pooled.shape == (2, 16)
    np.testing.assert_allclose(pooled.mean(-1), 0, atol=1e-5)


def test_the_call_is_head_of_pool_of_features(images):
    model = _model()
    expected = model.head(model.pool(model.features(images)[-1]))
    np.testing.assert_array_equal(model(images), expected)


def test_a_mixer_of_ones_own_fits_in(images):
    class Roll(nnx.Module):
        def __init__(self, dim, *, resolution, dtype, rngs, shift):
            self.resolutions_seen = resolution
            self.shift = shift

        def __call__(self, x):
            return jnp.roll(x, self.shift, axis=1)

    spec = MetaFormerSpec(
        depths=(1, 1),
        dims=(8, 16),
        token_mixers=(functools.partial(Roll, shift=1), Attention),
        res_scale_init=(None, None),
        head=MlpHead,
        stem=ConvGeometry(kernel_size=3, stride=1, padding=1),
    )
    model = _model(spec)
    assert model(images).shape == (2, 5)
    assert model.stages[0][0].token_mixer.resolutions_seen == (32, 32)


def test_a_mixer_may_keep_its_resolution_as_a_list(images):
    class Listed(IdentityMixing):
        def __init__(self, dim, *, resolution, dtype, rngs):
            self.resolution = list(resolution)

    model = _model(dataclasses.replace(SPEC, token_mixers=(Listed, Listed)))
    assert model(images).shape == (2, 5)
    with pytest.raises(ValueError, match="that this model's Listed was built for"):
        model(jnp.zeros((2, 64, 64, 3)))


def test_evaluation_is_deterministic_and_training_is_not(images):
    model = _model(drop_path_rate=0.9)
    model.train()
    assert not bool(jnp.all(model(images) == model(images)))
    model.eval()
    np.testing.assert_array_equal(model(images), model(images))


def test_keys_given_to_the_call_decide_every_mask(images):
    model = _model(drop_path_rate=0.9)
    first = model(images, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(first, model(images, rngs=nnx.Rngs(dropout=1)))
    assert not bool(jnp.all(first == model(images, rngs=nnx.Rngs(dropout=2))))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_with_a_key_of_its_own_an_image_drops_the_same_in_any_batch(images, implementation):
    model = _model(drop_path_rate=0.5, head_dropout=0.5)
    key = jax.random.key(0, impl=implementation)
    images, keys = jnp.tile(images, (4, 1, 1, 1)), jax.random.split(key, 8)
    answer = jax.jit(lambda images, keys: model(images, rngs=ImageKeys(keys)))
    whole = answer(images, keys)
    parts = [answer(images[i : i + 2], keys[i : i + 2]) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)
    # The same image stands there four times.
    assert len(np.unique(whole[::2, 0].round(6))) == 4


@pytest.mark.parametrize("rngs", [ImageKeys, nnx.Rngs])
def test_recomputing_changes_memory_only(images, rngs):
    def loss(params, remat):
        model = nnx.merge(graphdef, params, rest)
        model.remat = remat
        keys = jax.random.split(jax.random.key(0))
        drawn = ImageKeys(keys) if rngs is ImageKeys else nnx.Rngs(dropout=0)
        return jnp.square(model(images, rngs=drawn)).sum()

    rate = 0.5 if rngs is ImageKeys else 0.0
    graphdef, params, rest = nnx.split(_model(drop_path_rate=rate), nnx.Param, ...)
    kept, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat))).lower(params).compile()
        for remat in (True, False)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        kept(params),
        expected(params),
    )
    recomputed = jax.make_jaxpr(jax.grad(functools.partial(loss, remat=True)))(params)
    assert str(recomputed).count("remat") == sum(SPEC.depths)


@pytest.mark.parametrize("source", ["of its own", "given to the call"])
def test_no_two_branches_share_a_mask(source):
    model = _model(drop_path_rate=0.9)
    rngs = nnx.Rngs(dropout=0) if source == "given to the call" else None
    ones = jnp.ones((64, 1, 1, 1))
    masks = []
    for blocks in model.stages:
        for block in blocks:
            for drop_path in (block.drop_path1, block.drop_path2):
                if drop_path is not None:
                    masks.append(tuple((drop_path(ones, rngs=rngs) > 0).ravel().tolist()))
    assert len(masks) == 6
    assert len(set(masks)) == 6


def test_drop_path_grows_linearly_from_zero_over_all_blocks():
    model = _model(drop_path_rate=0.3)
    rates = [
        block.drop_path1.rate if block.drop_path1 is not None else 0.0
        for blocks in model.stages
        for block in blocks
    ]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


def test_a_model_without_rates_holds_parameters_only():
    state = nnx.state(_model())
    assert {type(variable) for _, variable in nnx.to_flat_state(state)} == {nnx.Param}


def test_sizes_that_do_not_divide_work_as_strided_convolutions_do():
    stages = _model().features(jnp.zeros((1, 45, 30, 3)))
    assert [stage.shape[1:3] for stage in stages] == [(11, 7), (6, 4)]


def test_jit_gives_what_the_plain_call_gives(images):
    model = _model()
    jitted = nnx.jit(lambda model, images: model(images))(model, images)
    np.testing.assert_allclose(jitted, model(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32, 3), r"4 axes.*got shape \(32, 32, 3\).*images\[None\]"),
        ((2, 32, 32, 1), r"3 channels.*got shape \(2, 32, 32, 1\).*in_channels"),
        ((2, 3, 32, 32), r"channels-first.*transpose\(0, 2, 3, 1\)"),
        ((2, 2, 2, 3), "large enough.*got 2x2 pixels: stage 1"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_compiling(shape, message):
    with pytest.raises(ValueError, match=message):
        _model()(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (np.zeros((2, 32, 32, 3), np.uint8), "uint8"),
        (np.zeros((2, 32, 32, 3), np.complex64), "complex64"),
        ([np.zeros((32, 32, 3), np.float32)], "list"),
        (torch.zeros((2, 32, 32, 3)), "Tensor"),
    ],
)
def test_images_that_are_no_array_of_floats_are_refused(images, kind):
    with pytest.raises(ValueError, match=rf"floating-point numbers, normalised, got {kind}\."):
        _model()(images)


def test_random_mixing_names_its_image_size_and_the_remedy():
    spec = FAMILIES["randformer"].spec(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    model = _model(spec, image_size=64)

    def answered(model, height, width):
        return nnx.eval_shape(model, jnp.zeros((1, height, width, 3))).shape

    assert answered(model, 64, 64) == (1, 5)
    with pytest.raises(ValueError, match=r"64x64 pixels.*got 96x96.*image_size=96"):
        answered(model, 96, 96)
    with pytest.raises(ValueError, match=r"got 64x96.*image_size=\(64, 96\)"):
        answered(model, 64, 96)
    assert answered(_model(spec, image_size=(64, 96)), 64, 96) == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_path_rate": -0.1}, r"`drop_path_rate` must be in \[0, 1\), got -0.1"),
        ({"drop_path_rate": "0.1"}, r"`drop_path_rate` must be in \[0, 1\), got '0.1'"),
        ({"head_dropout": 1.0}, r"`head_dropout` must be in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "`num_classes` .* at least 0, got -1"),
        ({"in_channels": 0}, "`in_channels` .* at least 1, got 0"),
        ({"image_size": 0}, "`image_size` must be a positive whole number.*got 0"),
        ({"image_size": (224,)}, r"`image_size` .*got \(224,\)"),
        ({"image_size": 2}, "large enough"),
        ({"image_size": "32"}, "`image_size` .*got '32'"),
        ({"num_classes": 5.0}, "`num_classes` .* at least 0, got 5.0"),
        ({"dtype": jnp.int32}, "`dtype` must be a floating-point type"),
        ({"dtype": "float31"}, "`dtype` must be a floating-point type"),
        ({"dtype": None}, "`dtype` must be a floating-point type"),
        ({"rngs": 0}, "`rngs` must be nnx.Rngs, got int"),
        ({"rngs": nnx.Rngs(dropout=0)}, "streams params, got none called params"),
        (
            {"rngs": nnx.Rngs(params=0), "drop_path_rate": 0.1},
            "streams params and dropout, got none called dropout",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _model(**arguments)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, jnp.int32])
def test_whole_numbers_may_be_numpys_or_jaxs(integer, images):
    numbers = {"num_classes": integer(5), "in_channels": integer(3), "image_size": integer(32)}
    spec = dataclasses.replace(SPEC, depths=tuple(map(integer, (1, 1))), dims=(integer(8), 16))
    model = _model(spec, **numbers, scan=integer(1))
    assert model(images).shape == (2, 5)
    assert model.image_size == (32, 32)
    assert spec == dataclasses.replace(SPEC, depths=(1, 1), dims=(8, 16))
    of_model = (model.num_classes, model.in_channels, *model.image_size, model.scan, *spec.depths)
    assert {type(number) for number in of_model} == {int}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (lambda key: jax.random.split(key, 3), r"a key for each of the 2 images, got 3"),
        (lambda key: key, r"one for each image, got key<fry>\[\]"),
        (lambda _: jnp.arange(2), r"one for each image, got int32\[2\]"),
        (lambda _: jnp.zeros((2, 3), jnp.uint32), r"one for each image, got uint32\[2, 3\]"),
        (lambda _: 0, "one for each image, got int"),
        (lambda _: nnx.Rngs(0), "one for each image, got Rngs"),
    ],
)
def test_keys_of_another_number_than_the_images_are_refused(keys, message, images):
    for rates in ({"drop_path_rate": 0.5}, {"head_dropout": 0.5}):
        model = _model(**rates)
        with pytest.raises(ValueError, match=message):
            model(images, rngs=ImageKeys(keys(jax.random.key(0))))


def test_a_mixer_may_fork_and_split_the_keys_that_it_is_given():
    class Forking(nnx.Module):
        def __init__(self, dim, *, rngs, **_):
            assert rngs.fork().params() != rngs.fork().params()
            assert rngs.split(2).params.key[...].shape == (2,)

        def __call__(self, x):
            return x

    spec = MetaFormerSpec(depths=(1,), dims=(8,), token_mixers=(Forking,), res_scale_init=(None,))
    MetaFormer(spec, image_size=32, rngs=nnx.Rngs(0))


def test_a_function_may_take_the_place_of_an_activation(images):
    model = _model()
    model.stages[0][0].mlp.act = nnx.relu
    replaced = model(images)
    model.stages[0][0].mlp.act = nnx.static(nnx.relu)
    np.testing.assert_array_equal(replaced, model(images))


def test_a_stage_may_lose_all_its_blocks(images):
    model = _model()
    while len(model.stages[1]):
        del model.stages[1][0]
    assert model(images).shape == (len(images), model.num_classes)


def test_keys_without_a_type_are_keys_too(images):
    model = _model(drop_path_rate=0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    expected = model(images, rngs=ImageKeys(keys))
    raw = ImageKeys(jax.random.key_data(keys))
    np.testing.assert_array_equal(model(images, rngs=raw), expected)


def test_one_key_for_all_layers_is_refused(images):
    with pytest.raises(ValueError, match=r"`rngs` must be nnx.Rngs or ImageKeys.*drop alike"):
        _model(drop_path_rate=0.5)(images, rngs=jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": ()}, "`depths` must name at least one stage"),
        ({"dims": (8,)}, "`dims` must have one entry for each of the 2 stages.*got 1"),
        ({"token_mixers": (Pooling,)}, "`token_mixers` must have one entry"),
        ({"res_scale_init": (None,) * 4}, "`res_scale_init` must have one entry.*got 4"),
        ({"depths": 2}, "`depths` must have one entry for each stage, got 2"),
        ({"dims": None}, "`dims` must have one entry for each stage, got None"),
        ({"token_mixers": Pooling}, "`token_mixers` must have one entry .*got <class .*Pooling"),
        ({"res_scale_init": 1.0}, "`res_scale_init` must have one entry for each stage, got 1.0"),
        ({"res_scale_init": (None, "1")}, "`res_scale_init` must be None or a finite .*got .*'1'"),
        ({"res_scale_init": (None, float("nan"))}, "`res_scale_init` must be .*got .*nan"),
        ({"res_scale_init": (True, None)}, "`res_scale_init` must be .*got .*True"),
        ({"depths": (1, 0)}, r"`depths` must be positive whole numbers, got \(1, 0\)"),
        ({"dims": (8, 1.5)}, "`dims` must be positive whole numbers"),
        ({"mlp_ratio": float("nan")}, "`mlp_ratio` must be a number .* channel for 8 .*got nan"),
        ({"mlp_ratio": float("inf")}, "`mlp_ratio` must be a number .*got inf"),
        ({"mlp_ratio": 0}, "`mlp_ratio` must be a number .*got 0"),
        ({"mlp_ratio": 0.1}, "`mlp_ratio` must be a number .*got 0.1"),
        ({"mlp_ratio": "4"}, "`mlp_ratio` must be a number .*got '4'"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(fields, message):
    valid = {"depths": (1, 1), "dims": (8, 8), "token_mixers": (Pooling, Pooling)}
    with pytest.raises(ValueError, match=message):
        MetaFormerSpec(**{"res_scale_init": (None, None), **valid, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 0}, "`kernel_size` must be a whole number of at least 1, got 0"),
        ({"stride": 0}, "`stride` must be a whole number of at least 1, got 0"),
        ({"padding": -1}, "`padding` must be a whole number of at least 0, got -1"),
        ({"padding": "SAME"}, "`padding` .*got 'SAME'"),
    ],
)
def test_convolutions_that_there_are_not_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry(**{"kernel_size": 3, "stride": 2, "padding": 1, **fields})


@pytest.mark.parametrize("replaced", ["norm1", "norm2", "mlp", "mlp.act"])
def test_layers_of_ones_own_get_feature_maps_where_rows_lie_side_by_side(replaced):
    block = MetaFormerBlock(
        2,
        token_mixer=functools.partial(SepConv, kernel_size=3),
        norm=image_layer_norm,
        resolution=(28, 28),
        rngs=nnx.Rngs(0),
    )
    seen = []

    class Flip(nnx.Module):
        def __call__(self, x):
            seen.append(x.shape[:3])
            return jnp.flip(x, axis=2)

    *inside, name = replaced.split(".")
    x = jnp.ones((16, 28, 28, 2))
    with compiled_for("tpu"):
        assert block.fold(x).shape[1:3] == (7, 112)
        setattr(block.mlp if inside else block, name, Flip())
        jax.eval_shape(lambda x: run_blocks([block], x, rngs=None), x)
    assert set(seen) == {(16, 28, 28)}


@pytest.mark.parametrize(("remat", "scan"), [("none", 0), ("mlp", 0), ("block", 1)])
def test_rows_side_by_side_change_nothing(remat, scan):
    blocks = nnx.List(
        MetaFormerBlock(
            2,
            token_mixer=functools.partial(SepConv, kernel_size=3),
            norm=image_layer_norm,
            resolution=(28, 28),
            drop_path_rate=0.5,
            res_scale_init=0.9,
            rngs=nnx.Rngs(seed),
        )
        for seed in range(2)
    )
    x = jax.random.normal(jax.random.key(0), (16, 28, 28, 2))
    keys = jax.random.split(jax.random.key(1), len(x))
    graphdef, params, rest = nnx.split(blocks, nnx.Param, ...)

    def loss(params, x):
        blocks = nnx.merge(graphdef, params, rest)
        x = run_blocks(blocks, x, rngs=ImageKeys(keys), remat=remat, scan=scan)
        return jnp.sum(jnp.sin(x))

    def value_and_gradients():
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, x)
        return str(traced.jaxpr), traced.lower().compile()(params, x)

    # Where TPUs run it; and nowhere else.
    with compiled_for("tpu"):
        program, actual = value_and_gradients()
    assert "16,7,112,2" in program
    program, expected = value_and_gradients()
    assert "16,7,112,2" not in program
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected
    )


def test_an_image_that_is_not_finite_spoils_its_own_gradient_alone(images):
    model = _model()
    spoilt = jnp.asarray(images).at[0, 0, 0].set(jnp.nan)
    gradient = jax.grad(lambda images: model(images).sum())(spoilt)
    assert jnp.isnan(gradient[0]).any()
    np.testing.assert_allclose(
        gradient[1:], jax.grad(lambda images: model(images).sum())(images)[1:], rtol=1e-4, atol=1e-6
    )


def test_no_images_are_a_batch(images):
    model = _model()
    assert model(images[:0]).shape == (0, model.num_classes)
    assert jax.grad(lambda images: model(images).sum())(images[:0]).shape == images[:0].shape


def test_evaluation_needs_no_stream_of_masks(images):
    model = _model(drop_path_rate=0.5, remat="mlp")
    model.eval()
    np.testing.assert_array_equal(model(images, rngs=nnx.Rngs(params=0)), model(images))


def test_parameters_are_float32_whatever_jax_makes_of_numbers():
    with jax.enable_x64(True):
        models = [_model(), metaformer_jax.create_model("randformer_s12", rngs=nnx.Rngs(0))]
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(models))} == {np.dtype("float32")}


def test_rates_may_be_numbers_of_jax(images):
    model = _model(head_dropout=jnp.float32(0.5), drop_path_rate=jnp.float32(0.5))
    expected = _model(head_dropout=0.5, drop_path_rate=0.5)
    assert nnx.graphdef(model) == nnx.graphdef(expected)
    model.eval()
    assert nnx.jit(lambda model, x: model(x))(model, images).shape == (2, 5)


@pytest.mark.parametrize("rate", [-0.5, 1.0, 1.5, float("nan"), None])
def test_layers_refuse_rates_that_are_none(rate):
    rngs = nnx.Rngs(0)
    for build in (
        lambda: LinearHead(8, 3, dropout=rate, rngs=rngs),
        lambda: MlpHead(8, 3, dropout=rate, rngs=rngs),
        lambda: MetaFormerBlock(
            8,
            token_mixer=Pooling,
            norm=image_layer_norm,
            resolution=(4, 4),
            drop_path_rate=rate,
            rngs=rngs,
        ),
    ):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
            build()


class _Wide(nnx.Module):
    """A mixer that knows nothing of dtypes."""

    def __init__(self, dim, *, resolution, dtype, rngs):
        pass

    def __call__(self, x):
        return x.astype(jnp.float32) * 2


@pytest.mark.parametrize("scan", [0, 1])
def test_a_mixer_of_another_dtype_does_not_change_that_of_the_features(scan, images):
    spec = dataclasses.replace(SPEC, token_mixers=(Pooling, _Wide))
    model = _model(spec, dtype=jnp.bfloat16, scan=scan)
    assert {stage.dtype for stage in model.features(images)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": (7, 4, 2)}, r"`stem` must be a ConvGeometry, got \(7, 4, 2\)"),
        ({"downsampling": 3}, "`downsampling` must be a ConvGeometry, got 3"),
        (
            {"token_mixers": (Pooling, Pooling(8, resolution=(4, 4), rngs=nnx.Rngs(0)))},
            "`token_mixers` must be classes or functions that build a mixer, got a Pooling",
        ),
    ],
)
def test_parts_that_are_of_another_kind_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


def test_a_name_is_no_architecture():
    with pytest.raises(
        ValueError, match=r"`spec` must be a MetaFormerSpec, got 'caformer_s18'.*cre"
    ):
        MetaFormer("caformer_s18", rngs=nnx.Rngs(0))
