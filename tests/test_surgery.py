"""Each change before fine-tuning does what its law says and leaves the rest alone."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from metaformer_jax.models import IdentityMixing, MetaFormer, RandomMixing, layers
from metaformer_jax.models.metaformer import MetaFormerSpec
from metaformer_jax.weights import CheckpointError, load_weights
from metaformer_jax.weights.convert import to_tensors, variables_of
from metaformer_jax.weights.files import write_tensors
from metaformer_jax.weights.pretrained import fill
from metaformer_jax.weights.surgery import (
    change_in_channels,
    map_head_to_imagenet_1k,
    replace_head,
    set_image_size,
)

CLASSES_21K = 21841


def small(head=layers.LinearHead, mixers=(IdentityMixing, IdentityMixing), **kwargs):
    spec = MetaFormerSpec(
        depths=(1, 1), dims=(4, 8), token_mixers=mixers, res_scale_init=(None, 1.0), head=head
    )
    settings = {"num_classes": 5, "image_size": 32} | kwargs
    # Filled, not drawn: drawing compiles for each shape.
    model = nnx.eval_shape(lambda: MetaFormer(spec, rngs=nnx.Rngs(0), **settings))
    noise = np.random.default_rng(0)
    filled = {}
    for path, variable in variables_of(model).items():
        array = noise.standard_normal(variable.shape, np.float32)
        if path[-1] == "random_matrix":
            array = np.exp(array) / np.exp(array).sum(axis=-1, keepdims=True)
        filled[path] = array
    fill(model, filled)
    model.eval()
    return model


def images(channels=3, size=32):
    return jax.random.normal(jax.random.key(1), (2, size, size, channels))


def values(model, *, but=()):
    return {
        path: np.array(variable[...])
        for path, variable in variables_of(model).items()
        if not any(path[: len(prefix)] == prefix for prefix in but)
    }


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array)


def write_map(path, **lists):
    path.write_text(json.dumps(lists))
    return path


def class_map(path):
    """Backwards through the 21841, without a counterpart of class 850."""
    known = [index for index in range(1000) if index != 850]
    return write_map(path, in1k_idx=known, in21k_idx=[CLASSES_21K - 1 - index for index in known])


@pytest.mark.parametrize("head", [layers.LinearHead, layers.MlpHead])
def test_a_new_head_is_random_and_the_rest_stays(head):
    model = small(head, head_dropout=0.3, num_classes=5)
    before = values(model, but=[("head",)])
    replace_head(model, 7, rngs=nnx.Rngs(1))
    assert model(images()).shape == (2, 7)
    assert model.num_classes == 7
    assert model.head.dropout.rate == 0.3
    assert_same(values(model, but=[("head",)]), before)
    kernels = [a for path, a in values(model).items() if path[0] == "head" and a.ndim == 2]
    assert all(0.01 < kernel.std() < 0.04 for kernel in kernels)
    replace_head(model, 0, rngs=nnx.Rngs(1))
    assert model(images()).shape == (2, 8)
    with pytest.raises(ValueError, match="`num_classes`"):
        replace_head(model, -1, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="`head_dropout`"):
        replace_head(model, 7, head_dropout=1.5, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="streams params and dropout, got none called dropout"):
        replace_head(model, 7, head_dropout=0.3, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"`rngs` must be nnx\.Rngs, got int"):
        replace_head(model, 7, rngs=1)


def test_a_new_head_is_trained_or_evaluated_as_the_rest():
    model = small(layers.LinearHead, head_dropout=0.5)
    replace_head(model, 7, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(images()), model(images()))
    model.train()
    replace_head(model, 7, rngs=nnx.Rngs(1))
    assert (np.array(model(images())) != model(images())).any()


@pytest.mark.parametrize("head", [layers.LinearHead, layers.MlpHead])
def test_imagenet_21k_logits_are_picked_class_by_class_and_850_is_their_mean(head, tmp_path):
    model = small(head, num_classes=CLASSES_21K)
    last = ("head", "fc2" if head is layers.MlpHead else "fc")
    before = values(model, but=[last])
    logits = model(images())
    map_head_to_imagenet_1k(model, class_map(tmp_path / "map.json"))
    mapped = model(images())
    assert mapped.shape == (2, 1000)
    assert model.num_classes == 1000
    assert_same(values(model, but=[last]), before)
    expected = np.array(logits[:, ::-1][:, :1000])
    expected[:, 850] = logits.mean(axis=1)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-6)


def test_a_class_map_that_does_not_fit_is_refused(tmp_path):
    model = small(num_classes=CLASSES_21K)
    path = tmp_path / "map.json"
    known = [index for index in range(1000) if index != 850]
    shifted = [index + 5 for index in known]
    for lists, message in (
        ({"in1k_idx": known}, "in21k_idx"),
        ({"in1k_idx": known, "in21k_idx": shifted[1:]}, "the same length"),
        ({"in1k_idx": known, "in21k_idx": [*shifted[1:], CLASSES_21K]}, "from 0 to 21840"),
        ({"in1k_idx": [*known[1:], -1], "in21k_idx": shifted}, "from 0 to 999"),
        ({"in1k_idx": [*known[1:], 998], "in21k_idx": shifted}, r"once in in1k_idx.*998"),
        ({"in1k_idx": known[3:], "in21k_idx": shifted[3:]}, r"\[0, 1, 2\] \(3 in all\)"),
        ({"in1k_idx": known, "in21k_idx": [0.5] * 999}, "whole numbers"),
        ({"in1k_idx": [], "in21k_idx": []}, "the same length"),
        ({"in1k_idx": list(map(str, known)), "in21k_idx": shifted}, "in in1k_idx, got '0'"),
        ({"in1k_idx": known, "in21k_idx": [*shifted[1:], None]}, "in in21k_idx, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            map_head_to_imagenet_1k(model, write_map(path, **lists))
    for text in ("[1, 2]", "{", "null", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="`class_map` must be a JSON file"):
            map_head_to_imagenet_1k(model, path)
    assert model.num_classes == CLASSES_21K
    with pytest.raises(ValueError, match="21841 classes"):
        map_head_to_imagenet_1k(small(), class_map(path))


def test_added_channels_change_no_answer():
    model = small()
    expected = model(images())
    change_in_channels(model, 5)
    extra = 100 * jax.random.normal(jax.random.key(2), (2, 32, 32, 2))
    actual = model(np.concatenate([images(), extra], axis=-1))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_channels_answer_grey_images_as_before(channels):
    model = small()
    grey = images(1)
    expected = model(np.repeat(grey, 3, axis=-1))
    before = values(model, but=[("downsample_layers", 0, "conv", "kernel")])
    change_in_channels(model, channels)
    np.testing.assert_allclose(
        model(np.repeat(grey, channels, axis=-1)), expected, rtol=1e-4, atol=1e-6
    )
    assert_same(values(model, but=[("downsample_layers", 0, "conv", "kernel")]), before)
    with pytest.raises(ValueError, match="`in_channels`"):
        change_in_channels(model, 0)


def test_another_image_size_is_refused_unless_random_matrices_may_be_resampled():
    model = small(mixers=(IdentityMixing, RandomMixing))
    before = values(model)
    with pytest.raises(ValueError, match=r"`image_size` must be \(32, 32\).*resample=True"):
        set_image_size(model, 64)
    assert_same(values(model), before)
    assert model.image_size == (32, 32)
    set_image_size(model, (64, 96), resample=True)
    matrix = model.stages[1][0].token_mixer.random_matrix[...]
    assert matrix.shape == (8 * 12, 8 * 12)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, rtol=1e-5)
    assert (matrix >= 0).all()
    assert model(jax.numpy.zeros((1, 64, 96, 3))).shape == (1, 5)
    path = ("stages", 1, 0, "token_mixer", "random_matrix")
    assert_same(values(model, but=[path]), {k: v for k, v in before.items() if k != path})


def test_resampling_keeps_what_a_matrix_does_to_smooth_images():
    model = small(mixers=(IdentityMixing, RandomMixing))
    mixer = model.stages[1][0].token_mixer
    constant = np.ones((1, 4, 4, 2), np.float32)
    np.testing.assert_allclose(mixer(constant), constant, rtol=1e-5)
    old = mixer.random_matrix[...]
    set_image_size(model, 32, resample=True)
    np.testing.assert_array_equal(mixer.random_matrix[...], old)
    set_image_size(model, 64, resample=True)
    # A token of the larger image mixes the same places: those of the nearest token before.
    weight_left = mixer.random_matrix[...].reshape(8, 8, 8, 8)[:, :, :, :4].sum(axis=(2, 3))
    old_left = old.reshape(4, 4, 4, 4)[:, :, :, :2].sum(axis=(2, 3))
    assert np.corrcoef(weight_left[::2, ::2].ravel(), old_left.ravel())[0, 1] > 0.7


def test_models_without_random_matrices_take_any_size_as_they_are():
    model = small()
    before = values(model)
    for size in (64, np.int64(64)):
        set_image_size(model, size)
        assert model.image_size == (64, 64)
    assert_same(values(model), before)
    with pytest.raises(ValueError, match="large enough"):
        set_image_size(model, 2)


def test_loading_maps_the_head_and_fits_the_channels_on_request(tmp_path):
    mixers = (IdentityMixing, IdentityMixing)
    settings = {"mixers": mixers, "head": layers.MlpHead}
    checkpoint = small(**settings, num_classes=CLASSES_21K)
    tensors = to_tensors(values(checkpoint), "flax")
    write_tensors(tmp_path / "in21k.safetensors", tensors, {})
    model = small(**settings, num_classes=1000, in_channels=1)
    load_weights(
        model,
        tmp_path / "in21k.safetensors",
        class_map=class_map(tmp_path / "map.json"),
        fit_channels=True,
    )
    map_head_to_imagenet_1k(checkpoint, tmp_path / "map.json")
    change_in_channels(checkpoint, 1)
    assert_same(values(model), values(checkpoint))
    with pytest.raises(ValueError, match=r"`class_map` must be left out where the model keeps"):
        load_weights(model, "anything", class_map="map.json", keep_head=True)
    with pytest.raises(CheckpointError, match="images have 3 channels, the model's 1"):
        load_weights(model, tmp_path / "in21k.safetensors", class_map=tmp_path / "map.json")


def test_a_class_map_for_a_checkpoint_without_those_classes_changes_nothing(tmp_path):
    model, path = small(num_classes=1000), tmp_path / "weights.pth"
    write_tensors(path, to_tensors(variables_of(small(num_classes=1000)), "sail"), {})
    for variable in variables_of(model).values():
        variable.set_value(variable[...] + 1)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"`class_map` must .* 21841 .* got .* with 1000"):
        load_weights(model, path, class_map="never read")
    assert_same(values(model), before)


class BoundMixing(IdentityMixing):
    """Is built for one size, as any mixer that keeps its `resolution`."""

    def __init__(self, *args, resolution, **kwargs):
        super().__init__(*args, resolution=resolution, **kwargs)
        # As a list: what JSON makes of it.
        self.resolution = nnx.static(list(resolution))


def test_a_mixer_of_ones_own_that_is_bound_to_a_size_is_not_taken_for_another():
    model = small(mixers=(IdentityMixing, BoundMixing))
    set_image_size(model, 32)
    for resample in (False, True):
        with pytest.raises(
            ValueError, match=r"the model's BoundMixing was built for, got \(64, 64"
        ):
            set_image_size(model, 64, resample=resample)
    assert model.image_size == (32, 32)
    assert model(images()).shape == (2, 5)
