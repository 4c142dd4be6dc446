"""However a stage is run, it is the same function of the same parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax import models
from metaformer_jax.models import ImageKeys, MetaFormer, MetaFormerSpec, stages
from metaformer_jax.models.lowering.platform import compiled_for

# A small kernel compiles sooner.
SEP_CONV = functools.partial(models.SepConv, kernel_size=3)
# So does what is not optimised.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEYS = jax.random.split(jax.random.key(2), 4)


def _model(*token_mixers, dims=(8, 16), drop_path_rate=0.3, **settings):
    spec = MetaFormerSpec(
        depths=(4, 2),
        dims=dims,
        token_mixers=token_mixers or (SEP_CONV, models.Attention),
        res_scale_init=(None, 1.0),
    )
    settings = {"num_classes": 5, "image_size": 16, "drop_path_rate": drop_path_rate, **settings}
    return MetaFormer(spec, **settings, rngs=nnx.Rngs(0))


def _images():
    return jax.random.normal(jax.random.key(1), (4, 16, 16, 3))


def _outputs(model):
    return _jit(lambda images: model(images))(_images())


def _loss_and_gradients(model, rngs=lambda: ImageKeys(KEYS)):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest)(_images(), rngs=rngs())
        return jnp.square(logits).sum()

    traced = _jit(jax.value_and_grad(loss)).trace(params)
    return *traced.lower().compile()(params), str(traced.jaxpr)


@pytest.fixture(scope="module")
def written_out():
    return _loss_and_gradients(_model())


@pytest.mark.parametrize(
    ("remat", "scan"),
    [("none", 1), ("none", 2), ("mlp", 0), ("mlp", 1), ("products", 0), ("block", 1)],
)
def test_loss_and_gradients_are_those_of_blocks_written_out(written_out, remat, scan):
    loss, gradients, _ = _loss_and_gradients(_model(remat=remat, scan=scan))
    expected_loss, expected, _ = written_out
    # Masks included: one that differs moves the loss by more than a hundredth.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    difference, norm = (
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
        for tree in (jax.tree.map(jnp.subtract, gradients, expected), expected)
    )
    assert difference < 1e-6 * norm


@pytest.mark.parametrize("remat", ["none", "mlp", "block"])
@pytest.mark.parametrize("scan", [0, 1])
def test_draws_made_before_may_be_counted_on_the_device(remat, scan):
    model = _model(remat=remat, scan=scan)
    logits = [
        model(_images(), rngs=ImageKeys(KEYS, num_draws=num_draws))
        for num_draws in (3, jnp.int32(3), 4)
    ]
    np.testing.assert_array_equal(logits[1], logits[0])
    assert np.abs(logits[2] - logits[0]).max() > 1e-3


def test_a_loop_holds_all_blocks_that_are_alike(written_out):
    _, _, looped = _loss_and_gradients(_model(scan=1))
    # The first block drops nothing and so stands alone; forward and backward are a loop each.
    assert looped.count("scan[") - written_out[2].count("scan[") == 2 * 2


def test_blocks_that_were_changed_are_not_taken_for_alike():
    looped, written = (_model(models.Pooling, models.Pooling, scan=scan) for scan in (1, 0))
    for model in (looped, written):
        model.eval()
        model.stages[0][2].token_mixer.pool_size = 5
    np.testing.assert_allclose(_outputs(looped), _outputs(written), rtol=1e-5, atol=1e-6)


def test_what_a_mixer_keeps_to_itself_counts_too():
    class Shift(nnx.Module):
        def __init__(self, dim, *, resolution, dtype, rngs, calls):
            self._by = next(calls)

        def __call__(self, x):
            return jnp.roll(x, self._by, 1)

    mixers = [functools.partial(Shift, calls=itertools.count()) for _ in range(2)]
    looped, written = (_model(mixers[scan], models.Pooling, scan=scan) for scan in (1, 0))
    for model in (looped, written):
        model.eval()
    np.testing.assert_allclose(_outputs(looped), _outputs(written), rtol=1e-5, atol=1e-6)


def test_arrays_that_a_mixer_holds_are_stacked_too():
    class Weigh(nnx.Module):
        def __init__(self, dim, *, resolution, dtype, rngs, calls):
            weights = np.linspace(-1, 1, dim, dtype=np.float32) * next(calls)
            self.numpys, self.jaxs = weights, jnp.sin(weights)
            self.contained = nnx.data({"weights": np.cos(weights)})

        def __call__(self, x):
            return x * self.numpys + self.jaxs - self.contained["weights"]

    mixers = [functools.partial(Weigh, calls=itertools.count(1)) for _ in range(2)]
    looped, written = (_model(mixers[scan], models.Pooling, scan=scan) for scan in (1, 0))
    for model in (looped, written):
        model.eval()
    assert str(jax.make_jaxpr(looped)(_images())).count("scan[") == 2
    np.testing.assert_allclose(_outputs(looped), _outputs(written), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", models.stages.REMAT[1:])
def test_what_is_computed_anew_draws_masks_from_a_models_own_streams(remat):
    model = _model(remat=remat, scan=0)
    assert jnp.abs(model(_images()) - model(_images())).max() > 1e-3

    def loss(images, graphdef, state):
        return jnp.square(nnx.merge(graphdef, state, copy=True)(images)).sum()

    graphdef, state = nnx.split(model)
    gradient = jax.grad(loss)(_images(), graphdef, state)
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).any()


@pytest.mark.parametrize(("remat", "scan"), [("block", 0), ("mlp", 1)])
def test_evaluation_takes_a_batch_of_any_size(remat, scan):
    model = _model(remat=remat, scan=scan)
    model.eval()
    (size,) = jax.export.symbolic_shape("size")
    images = jax.ShapeDtypeStruct((size, 16, 16, 3), jnp.float32)
    assert jax.eval_shape(model, images).shape == (size, 5)


def test_evaluation_needs_no_keys_and_frozen_matrices_are_stacked_too():
    mixers = (models.IdentityMixing, models.RandomMixing)
    looped, written = (_model(*mixers, scan=scan) for scan in (1, 0))
    for model in (looped, written):
        model.eval()
    np.testing.assert_allclose(_outputs(looped), _outputs(written), rtol=1e-5, atol=1e-6)


def test_masks_from_streams_of_a_models_own_leave_its_blocks_written_out():
    looped, written = _model(scan=1), _model()
    np.testing.assert_array_equal(looped(_images()), written(_images()))


@pytest.mark.parametrize("remat", stages.REMAT[1:])
def test_less_is_kept_for_the_backward_pass(remat):
    def kept(remat):
        # Of eight channels the two numbers that norms keep of a token would be a fourth; and of a
        # few pixels everything is less than the parameters.
        model = _model(dims=(64, 128), remat=remat)
        images = jnp.zeros((len(KEYS), 128, 128, 3))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def forward(params, x):
            return nnx.merge(graphdef, params, rest)(x, rngs=ImageKeys(KEYS))

        _, backward = jax.eval_shape(functools.partial(jax.vjp, forward), params, images)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept(remat) < 0.8 * kept("none")


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="`remat` must be one of 'auto', 'none', 'mlp', 'products'"
    ):
        _model(remat="some")
    assert stages.remat_name(True) == "block"


def test_what_is_computed_anew_may_be_left_to_the_platform():
    assert stages.remat_here("auto") == "none"
    with compiled_for("tpu"):
        assert stages.remat_here("auto") == "auto"
        assert [stages.remat_here(remat) for remat in stages.REMAT] == list(stages.REMAT)
        graphdef, params, rest = nnx.split(_model(remat="auto", drop_path_rate=0.0), nnx.Param, ...)
        program = jax.make_jaxpr(
            jax.grad(lambda params: nnx.merge(graphdef, params, rest)(_images()).sum())
        )(params)
    assert str(program).count("remat") == 6


def test_blocks_that_change_variables_of_their_own_are_written_out():
    spec = MetaFormerSpec(
        depths=(3,),
        dims=(8,),
        token_mixers=(models.IdentityMixing,),
        res_scale_init=(None,),
        norm=nnx.BatchNorm,
    )
    means = []
    for scan in (0, 1):
        model = MetaFormer(spec, num_classes=5, image_size=16, scan=scan, rngs=nnx.Rngs(0))
        model(_images())
        means.append(
            [nnx.state(block, nnx.BatchStat)["norm1"]["mean"][...] for block in model.stages[0]]
        )
    assert all(np.any(mean != 0) for mean in means[0])
    np.testing.assert_array_equal(means[0], means[1])
