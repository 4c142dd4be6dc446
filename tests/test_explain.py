"""What Grad-CAM and attention maps are said to be, they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaformer_jax import explain
from metaformer_jax.models import Attention, IdentityMixing, MetaFormer, MetaFormerSpec

SPEC = MetaFormerSpec(
    depths=(1, 2),
    dims=(8, 48),
    token_mixers=(IdentityMixing, Attention),
    res_scale_init=(None, 1.0),
)
grad_cam = nnx.jit(explain.grad_cam, static_argnums=3)
attention_maps = nnx.jit(explain.attention_maps, static_argnums=2)
features_of = nnx.jit(lambda model, images: model.features(images))
logits_of = nnx.jit(lambda model, images: model(images))


def images_of(batch, size, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    model = MetaFormer(SPEC, num_classes=7, image_size=32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...] + 0.2 * rng.standard_normal(variable.shape, np.float32))
    model.eval()
    return model


class MeanPooled(MetaFormer):
    """Without the norm before the head: the logits are linear in the last stage's output."""

    def pool(self, x):
        return jnp.mean(x, axis=(1, 2))


def test_of_a_linear_head_on_the_mean_it_is_the_weighted_sum_of_channels():
    model = MeanPooled(SPEC, num_classes=7, image_size=32, rngs=nnx.Rngs(0))
    model.eval()
    images, classes = images_of(2, 32), np.array([6, 0])
    cam = grad_cam(model, images, classes, -1)
    features = np.asarray(features_of(model, images)[-1])
    weights = np.asarray(model.head.fc.kernel[...])[:, classes]
    expected = (
        np.maximum(np.einsum("bhwc,cb->bhw", features, weights), 0) / features[0, ..., 0].size
    )
    assert expected.max() > 0
    np.testing.assert_allclose(cam, expected, rtol=1e-4, atol=1e-7)


def test_it_is_highest_at_the_one_place_that_the_head_looks_for():
    spec = MetaFormerSpec(
        depths=(1,), dims=(16,), token_mixers=(IdentityMixing,), res_scale_init=(None,)
    )
    model = MeanPooled(spec, num_classes=2, image_size=32, rngs=nnx.Rngs(0))
    model.eval()
    images = np.zeros((1, 32, 32, 3), np.float32)
    images[:, 20:24, 8:12] = 3
    features = np.asarray(features_of(model, images)[-1])[0]
    place = features[5, 2] - features[0, 0]
    model.head.fc.kernel.set_value(jnp.stack([-place, place], axis=1))
    cam = np.asarray(grad_cam(model, images, np.array([1]), -1))[0]
    assert np.unravel_index(cam.argmax(), cam.shape) == (5, 2)
    # What speaks for one class of two speaks against the other.
    other = np.asarray(grad_cam(model, images, np.array([0]), -1))[0]
    assert other[5, 2] == 0


class ShiftedMlp(nnx.Module):
    """The last thing that is added to a stage's output, and a shift of every place."""

    def __init__(self, mlp, shift):
        self.mlp, self.shift = mlp, shift

    def __call__(self, x):
        return self.mlp(x) + self.shift


def test_at_any_stage_channels_weigh_as_the_logit_changes_with_them(model):
    images = images_of(2, 32)
    classes = np.asarray(logits_of(model, images)).argmin(-1)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def slopes_of_logit(shifts, image, label):
        shifted = nnx.merge(graphdef, state)
        for blocks, shift in zip(shifted.stages, shifts, strict=True):
            blocks[-1].mlp = ShiftedMlp(blocks[-1].mlp, nnx.data(shift))
        return shifted(image[None])[0, label]

    no_shifts = [np.zeros(dim, np.float32) for dim in SPEC.dims]
    slopes = [
        slopes_of_logit(no_shifts, image, label)
        for image, label in zip(images, classes, strict=True)
    ]
    for stage, features in enumerate(features_of(model, images)):
        num_places = features.shape[1] * features.shape[2]
        cam = grad_cam(model, images, classes, stage)
        for feature, slope, found in zip(np.asarray(features), slopes, cam, strict=True):
            expected = np.maximum(feature @ np.asarray(slope[stage]), 0) / num_places
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_without_classes_it_explains_the_predicted_ones(model):
    images = images_of(2, 32)
    predicted = np.asarray(logits_of(model, images)).argmax(-1)
    expected = grad_cam(model, images, predicted, -1)
    found = nnx.jit(explain.grad_cam)(model, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_images_of_a_batch_do_not_know_of_each_other(model):
    images, classes = images_of(2, 32), np.array([1, 4])
    before = grad_cam(model, images, classes, 1)
    after = grad_cam(model, np.stack([images[1], 2 * images[0]]), classes[[1, 0]], 1)
    np.testing.assert_allclose(before[1], after[0], rtol=1e-4, atol=1e-6)


def test_attention_maps_are_the_softmax_of_queries_times_keys(model):
    images = images_of(2, 32)
    maps = np.asarray(attention_maps(model, images, 1))
    assert maps.shape == (2, 2, 1, 16, 16)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
    x = model.downsample_layers[1](features_of(model, images)[0])
    for index, block in enumerate(model.stages[1]):
        tokens = np.asarray(block.norm1(x)).reshape(2, 16, 48)
        query, key, _ = np.split(tokens @ np.asarray(block.token_mixer.qkv.kernel[...]), 3, axis=-1)
        scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(32))
        expected = scores / scores.sum(-1, keepdims=True)
        np.testing.assert_allclose(maps[:, index, 0], expected, rtol=1e-4)
        x = block(x)


def test_attention_maps_are_the_weights_that_the_model_mixes_with():
    mixer = Attention(64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 64)).astype(np.float32)
    # Only the values pass through the weights: identity in, identity out.
    maps = np.asarray(mixer.weights(x))
    assert maps.shape == (2, 2, 15, 15)
    values = np.asarray(mixer.qkv(x))[..., 128:].reshape(2, 15, 2, 32)
    mixed = np.einsum("bkts,bskd->btkd", maps, values).reshape(2, 3, 5, 64)
    expected = mixed @ np.asarray(mixer.proj.kernel[...])
    np.testing.assert_allclose(mixer(x), expected, rtol=1e-4, atol=1e-6)


def test_received_attention_is_a_share_for_each_place(model):
    images = images_of(2, 32)
    received_attention = nnx.jit(explain.received_attention, static_argnums=2)
    received = np.asarray(received_attention(model, images, 1))
    assert received.shape == (2, 4, 4)
    np.testing.assert_allclose(received.sum((1, 2)), 1, rtol=1e-5)
    last = np.asarray(attention_maps(model, images, 1))[:, -1]
    assert received[1, 2, 3] == pytest.approx(last[1, :, :, 2 * 4 + 3].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: explain.grad_cam(m, x, stage=2), r"`stage` must be in \[0, 2\).*got 2"),
        (lambda m, x: explain.grad_cam(m, x, stage=-3), "`stage` must be in"),
        (lambda m, x: explain.grad_cam(m, x, np.array([1])), r"shape \(2,\), one for each image"),
        (lambda m, x: explain.grad_cam(m, x, np.array([6, 7])), r"numbers in \[0, 7\), got \[7\]"),
        (
            lambda m, x: explain.grad_cam(m, x, np.array([-1, 0])),
            r"numbers in \[0, 7\), got \[-1\]",
        ),
        (
            lambda m, x: explain.grad_cam(m, x, np.array([1.0, 2.0])),
            r"numbers in \[0, 7\), got float64",
        ),
        (lambda m, x: explain.grad_cam(m, x, stage=1.0), "`stage` must be in .*got 1.0"),
        (
            lambda m, x: explain.grad_cam(nnx.eval_shape(lambda: nnx.clone(m)), x),
            "must have values to be explained",
        ),
        (lambda m, x: explain.attention_maps(m, x, 0), "with attention, got 0.*in 1\\."),
        (lambda m, x: explain.attention_maps(m, x.astype(np.uint8), 1), "got uint8"),
    ],
)
def test_what_cannot_be_explained_is_said(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, images_of(2, 32))


@pytest.mark.parametrize("rate", ["drop_path_rate", "head_dropout"])
@pytest.mark.parametrize("function", [explain.grad_cam, explain.attention_maps])
def test_what_drops_at_random_is_not_explained(rate, function):
    model = MetaFormer(SPEC, num_classes=7, image_size=32, **{rate: 0.5}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"evaluation mode.*Call model\.eval"):
        function(model, images_of(1, 32))


def test_images_of_a_first_stage_with_attention_are_checked():
    spec = MetaFormerSpec(depths=(1,), dims=(8,), token_mixers=(Attention,), res_scale_init=(None,))
    model = MetaFormer(spec, num_classes=7, image_size=32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="normalised, got uint8"):
        explain.attention_maps(model, np.zeros((1, 32, 32, 3), np.uint8), 0)


def test_a_model_without_a_head_has_no_class_to_explain():
    model = MetaFormer(SPEC, num_classes=0, image_size=32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have a head"):
        explain.grad_cam(model, images_of(1, 32))


def test_images_that_the_model_does_not_take_are_what_is_refused(model):
    with pytest.raises(ValueError, match="`images` must have 4 axes"):
        grad_cam(model, images_of(1, 32)[0], np.array([1]))


def test_a_stage_without_blocks_has_no_attention():
    model = MetaFormer(SPEC, num_classes=7, image_size=32, rngs=nnx.Rngs(0))
    model.stages[1] = nnx.List([])
    assert not explain.has_attention(model, 1)
