"""What fits is converted bit by bit; anything that does not fit is named, all of it at once."""

import functools

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from flax import nnx

from metaformer_jax import list_models
from metaformer_jax.weights import CheckpointError, recognise
from metaformer_jax.weights.convert import check_layout_has, to_tensors, to_variables, variables_of
from metaformer_jax.weights.files import read_tensors, write_tensors
from metaformer_jax.weights.layouts import sail_key
from metaformer_jax.weights.pretrained import build_abstract

SAIL = reference.checkpoint_table()["architectures"]
TIMM = reference.timm_table()["architectures"]
SMALL = "identityformer_s12"


@functools.cache
def cached_weights(architecture, layout):
    return reference.state_dict(architecture, layout)


def weights(architecture=SMALL, layout="sail"):
    return dict(cached_weights(architecture, layout))


@functools.cache
def abstract(name=SMALL):
    return build_abstract(name)


def as_timm_names_them(architecture, sail):
    entries = TIMM[architecture]
    return {key: sail[sail_key].reshape(shape) for key, (shape, sail_key) in entries.items()}


def assert_identical(actual, expected):
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert np.array_equal(actual[key], tensor), key


@pytest.mark.parametrize("architecture", SAIL)
def test_real_files_of_both_layouts_give_the_reference_variables_bit_by_bit(architecture, tmp_path):
    """`test_parity.py` holds the very same variables to the published logits."""
    sail = reference.state_dict(architecture)
    model = build_abstract(architecture)
    expected = {}
    for path in variables_of(model):
        key, transform = sail_key(path)
        expected[path] = transform.from_torch(sail[key])
    files = {"sail": (tmp_path / "sail.pth", sail)}
    if architecture in TIMM:
        timm = as_timm_names_them(architecture, sail)
        files["timm"] = (tmp_path / "timm.safetensors", timm)
    for layout, (file, tensors) in files.items():
        if layout == "sail":
            torch.save({key: torch.from_numpy(tensor) for key, tensor in tensors.items()}, file)
        else:
            write_tensors(file, tensors, {"format": "pt"})
        loaded, _ = read_tensors(file)
        assert recognise(loaded).layout == layout
        variables = to_variables(loaded, model)
        assert not loaded
        assert_identical(variables, expected)
        assert_identical(to_tensors(variables, layout), tensors)


@pytest.mark.parametrize("layout", ["sail", "timm"])
def test_there_and_back_through_files_is_bit_identical(layout, tmp_path):
    original = weights("convformer_s18", layout)
    variables = to_variables(weights("convformer_s18", layout), abstract("convformer_s18"))
    for name in ("back.pth", "back.safetensors"):
        write_tensors(tmp_path / name, to_tensors(variables, layout), {})
        back, _ = read_tensors(tmp_path / name)
        assert_identical(back, original)
    with_torch = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_identical({key: tensor.numpy() for key, tensor in with_torch.items()}, original)


@pytest.mark.parametrize("architecture", SAIL)
def test_keys_and_shapes_tell_the_architecture(architecture):
    shapes = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in SAIL[architecture].items()
    }
    info = recognise(shapes)
    family, size = architecture.split("_")
    twins = {"identityformer": "poolformerv2", "poolformerv2": "identityformer"}
    assert set(info.architectures) == {architecture, f"{twins.get(family, family)}_{size}"}
    assert (info.layout, info.num_classes, info.in_channels) == ("sail", 1000, 3)
    if architecture in TIMM:
        entries = TIMM[architecture].items()
        shapes = {key: np.broadcast_to(np.float32(0), shape) for key, (shape, _) in entries}
        info = recognise(shapes)
        assert info.architectures == (architecture,)
        assert (info.layout, info.num_classes, info.in_channels) == ("timm", 1000, 3)


@pytest.mark.parametrize("layout", ["sail", "timm"])
def test_another_architecture_is_recognised_by_name(layout):
    tensors = weights("convformer_s18", layout)
    with pytest.raises(CheckpointError, match=r"this looks like convformer_s18 \("):
        to_variables(tensors, abstract("caformer_s18"))


def test_identityformer_in_timm_layout_is_poolformerv2():
    tensors = weights("poolformerv2_s12", "timm")
    with pytest.raises(CheckpointError, match="this looks like poolformerv2_s12"):
        to_variables(tensors, abstract("identityformer_s12"))


def test_everything_that_does_not_fit_stands_in_one_error():
    tensors = weights()
    del tensors["norm.bias"], tensors["stages.0.0.mlp.act.scale"]
    tensors["stages.0.9.extra"] = np.zeros(3, np.float32)
    tensors["num_batches_tracked"] = np.zeros((), np.int64)
    tensors["head.bias"] = np.zeros(7, np.float32)
    tensors["downsample_layers.1.conv.weight"] = np.zeros((128, 64), np.float32)
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.float64)
    nan = tensors["stages.3.1.mlp.fc2.weight"].copy()
    nan[5, 7], nan[6, 8] = np.nan, -np.inf
    tensors["stages.3.1.mlp.fc2.weight"] = nan
    before = dict(tensors)
    with pytest.raises(CheckpointError) as caught:
        to_variables(tensors, abstract())
    assert set(tensors) == set(before)
    assert all(tensors[key] is before[key] for key in before)
    message = str(caught.value)
    assert "2 missing, 2 unexpected, 2 mis-shaped, 1 of another type, 1 NaN or infinite" in message
    for line in (
        "  missing: norm.bias [512]",
        "  missing: stages.0.0.mlp.act.scale [1]",
        "  unexpected: stages.0.9.extra [3]",
        "  unexpected: num_batches_tracked []",
        "  mis-shaped: head.bias must be [1000], got [7]",
        "  mis-shaped: downsample_layers.1.conv.weight must be [128, 64, 3, 3], got [128, 64]",
        "  of another type: norm.weight must be float32, float16 or bfloat16, got float64",
        "  NaN or infinite: stages.3.1.mlp.fc2.weight: 2 of 1048576 values",
    ):
        assert line in message.splitlines()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["norm.bias", "head.weight", "stages.2.3.mlp.act.bias"])
def test_a_single_value_that_is_not_finite_is_refused(value, key):
    tensors = weights()
    tensors[key] = tensors[key].copy()
    tensors[key].flat[-1] = value
    with pytest.raises(CheckpointError, match=f"NaN or infinite: {key}: 1 of"):
        to_variables(tensors, abstract())


def test_a_head_of_another_size_is_refused_with_the_name_that_has_it():
    tensors = weights("caformer_s18")
    tensors["head.fc2.weight"] = np.zeros((21841, 2048), np.float32)
    tensors["head.fc2.bias"] = np.zeros(21841, np.float32)
    with pytest.raises(CheckpointError, match=r"21841 classes, .* such as caformer_s18_in21k"):
        to_variables(tensors, abstract("caformer_s18"))


def test_what_is_no_metaformer_is_said_to_be_none():
    with pytest.raises(CheckpointError, match=r"got 1 tensors: layer1\.0\.weight"):
        to_variables({"layer1.0.weight": np.zeros(3, np.float32)}, abstract())
    with pytest.raises(CheckpointError, match="no tensor at all"):
        to_variables({}, abstract())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly(dtype):
    half = {key: tensor.astype(dtype) for key, tensor in weights().items()}
    variables = to_variables(dict(half), abstract())
    assert {array.dtype for array in variables.values()} == {np.dtype(np.float32)}
    for key, tensor in to_tensors(variables, "sail").items():
        np.testing.assert_array_equal(tensor.astype(dtype), half[key])


def test_timm_checkpoints_are_not_written_for_families_that_timm_lacks():
    for name in list_models():
        if name.startswith(("identityformer", "randformer")):
            with pytest.raises(ValueError, match="timm has no model"):
                check_layout_has("timm", name)
        else:
            check_layout_has("timm", name)
        check_layout_has("sail", name)


def test_variables_are_parameters_and_frozen_matrices_and_nothing_else():
    model = nnx.eval_shape(
        lambda: reference.metaformer_jax.create_model(
            "randformer_s12", drop_path_rate=0.1, rngs=nnx.Rngs(0)
        )
    )
    names = {path[-1] for path in variables_of(model)}
    assert names == {"kernel", "bias", "scale", "random_matrix"}
