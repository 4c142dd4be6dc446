"""The key tables name each tensor of each published checkpoint once, with its shape."""

import math

import pytest
import reference
from flax import nnx

import metaformer_jax
from metaformer_jax.models import Frozen
from metaformer_jax.weights import hub
from metaformer_jax.weights.layouts import key_table

SAIL = reference.checkpoint_table()
TIMM = reference.timm_table()


def shapes_by_path(name, **kwargs):
    model = nnx.eval_shape(lambda: metaformer_jax.create_model(name, **kwargs, rngs=nnx.Rngs(0)))
    variables = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
    return {path: tuple(variable.shape) for path, variable in variables}


def shapes_by_key(shapes, layout):
    """Every (key, shape) of the layout: a list, so that a key named twice shows."""
    return [
        (key, transform.shape_in_torch(shapes[path]))
        for path, (key, transform) in key_table(shapes, layout).items()
    ]


@pytest.mark.parametrize("architecture", SAIL["architectures"])
def test_the_sail_table_covers_each_published_key_once_with_its_shape(architecture):
    expected = {k: tuple(shape) for k, shape in SAIL["architectures"][architecture].items()}
    actual = shapes_by_key(shapes_by_path(architecture), "sail")
    assert sorted(actual) == sorted(expected.items())


@pytest.mark.parametrize("architecture", TIMM["architectures"])
def test_the_timm_table_covers_each_published_key_once_with_its_shape(architecture):
    entries = TIMM["architectures"][architecture]
    shapes = shapes_by_path(architecture)
    actual = shapes_by_key(shapes, "timm")
    assert sorted(actual) == sorted((key, tuple(shape)) for key, (shape, _) in entries.items())
    # The same parameter stands behind a timm key and the sail key that it is known to hold.
    sail, timm = key_table(shapes, "sail"), key_table(shapes, "timm")
    assert {timm[path][0]: sail[path][0] for path in shapes} == {
        key: sail_key for key, (_, sail_key) in entries.items()
    }


@pytest.mark.parametrize("architecture", ["convformer_s18", "caformer_b36"])
@pytest.mark.parametrize("layout", ["sail", "timm"])
def test_an_imagenet_21k_name_differs_in_the_last_layer_alone(architecture, layout):
    small = dict(shapes_by_key(shapes_by_path(architecture), layout))
    large = dict(shapes_by_key(shapes_by_path(f"{architecture}_in21k"), layout))
    assert set(small) == set(large)
    changed = {key: shape for key, shape in large.items() if shape != small[key]}
    last = "head.fc2" if layout == "sail" else "head.fc.fc2"
    assert set(changed) == {f"{last}.weight", f"{last}.bias"}
    assert {shape[0] for shape in changed.values()} == {21841}


def test_all_55_names_have_the_published_keys_and_counts():
    """A name is an architecture, a number of classes and an image size; tables cover the first."""
    names = metaformer_jax.list_models()
    # The published table spells one name wrongly.
    assert len(names) == len(SAIL["checkpoints"]) == 55
    assert set(names) == set(SAIL["checkpoints"])
    for name in names:
        published = SAIL["checkpoints"][name]
        info = metaformer_jax.model_info(name)
        assert info.architecture == published["architecture"]
        assert info.num_classes == published["num_classes"]
        keys = SAIL["architectures"][info.architecture]
        count = sum(math.prod(shape) for key, shape in keys.items() if "random_matrix" not in key)
        if published["num_classes"] != 1000:
            extra = published["num_classes"] - 1000
            count += extra * (keys["head.fc2.weight"][1] + 1)
        assert count == published["trainable_params"]


def test_the_45_timm_ids_are_those_of_the_names_that_timm_has():
    sources = {name: hub.timm_source(name) for name in metaformer_jax.list_models()}
    ids = {source.repo_id: name for name, source in sources.items() if source is not None}
    published = {entry["hub_id"]: entry for entry in TIMM["checkpoints"].values()}
    assert set(ids) == set(published)
    assert len(ids) == 45
    for repo_id, name in ids.items():
        info = metaformer_jax.model_info(name)
        entry = published[repo_id]
        assert (info.architecture, info.num_classes, info.image_size) == (
            entry["architecture"],
            entry["num_classes"],
            entry["image_size"],
        )


def test_an_unknown_layout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`layout` must be one of sail, timm, flax, got 'keras'"):
        key_table([], "keras")
