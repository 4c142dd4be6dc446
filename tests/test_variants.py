import functools

import pytest
import reference
from flax import nnx

import metaformer_jax
from metaformer_jax.models import FAMILIES, count, is_published
from metaformer_jax.weights.layouts import sail_key

TABLE = reference.checkpoint_table()
NAMES = metaformer_jax.list_models()
BASIC = ("identityformer", "randformer", "poolformerv2")
# Settings of which the 55 names are made; two checkpoints of one setting count alike.
SETTINGS = sorted(
    {
        (row["architecture"], row["image_size"], row["num_classes"])
        for row in TABLE["checkpoints"].values()
    }
)


def _build(architecture, image_size, num_classes):
    return metaformer_jax.create_model(
        architecture, image_size=image_size, num_classes=num_classes, rngs=nnx.Rngs(0)
    )


def test_the_55_published_names_are_there():
    assert len(NAMES) == 55
    assert set(NAMES) == set(TABLE["checkpoints"])


@pytest.mark.parametrize(("architecture", "image_size", "num_classes"), SETTINGS)
def test_parameters_and_multiply_adds_are_the_published_ones(architecture, image_size, num_classes):
    counts = count(functools.partial(_build, architecture, image_size, num_classes))
    rows = [
        (name, row)
        for name, row in TABLE["checkpoints"].items()
        if (row["architecture"], row["image_size"], row["num_classes"])
        == (architecture, image_size, num_classes)
    ]
    assert rows
    for name, row in rows:
        assert counts.params == row["trainable_params"]
        assert counts.frozen_params == row["frozen_params"]
        info = metaformer_jax.model_info(name)
        if info.published_gmacs is not None:
            assert f"{counts.macs / 1e9:.1f}" == f"{info.published_gmacs:.1f}"
        if info.published_params_millions is not None:
            # The tables give tenths for the families with basic mixers, whole millions for others.
            digits = 1 if architecture.split("_")[0] in BASIC else 0
            assert round(counts.params / 1e6, digits) == info.published_params_millions
        if info.published_frozen_params_millions is not None:
            assert round(counts.frozen_params / 1e6, 1) == info.published_frozen_params_millions


def test_models_count_as_what_makes_them_does_and_stay_as_they_were():
    def build():
        return metaformer_jax.create_model("randformer_s12", head_dropout=0.5, rngs=nnx.Rngs(0))

    expected = count(build)
    for model in (build(), nnx.eval_shape(build)):
        model.train()
        assert count(model) == expected
        assert not model.head.dropout.deterministic


def test_every_row_that_publishes_multiply_adds_is_held_to_them():
    with_macs = [n for n in NAMES if metaformer_jax.model_info(n).published_gmacs is not None]
    assert len(with_macs) == 47
    assert {name for name in NAMES if name not in with_macs} == set(
        metaformer_jax.list_models("*_in21k")
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_published_metadata_is_there(name):
    info = metaformer_jax.model_info(name)
    row = TABLE["checkpoints"][name]
    assert (info.name, info.architecture) == (name, row["architecture"])
    assert (info.image_size, info.num_classes) == (row["image_size"], row["num_classes"])
    assert info.url == row["url"]
    assert (info.crop_pct, info.interpolation) == (1.0, "bicubic")
    assert info.mean == (0.485, 0.456, 0.406)
    assert info.std == (0.229, 0.224, 0.225)
    assert (info.published_top1 is None) == name.endswith("in21k")


@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("identityformer_s12", 74.6),
        ("identityformer_m48", 80.4),
        ("randformer_s12", 76.6),
        ("randformer_s24", 78.2),
        ("randformer_s36", 79.5),
        ("randformer_m36", 81.2),
        ("randformer_m48", 81.4),
        ("poolformerv2_s36", 81.6),
        ("convformer_b36", 84.8),
        ("convformer_b36_384_in21ft1k", 87.6),
        ("caformer_b36", 85.5),
        ("caformer_s18_384", 85.0),
        ("caformer_m36_in21ft1k", 86.6),
        ("caformer_b36_384_in21ft1k", 88.1),
    ],
)
def test_accuracies_stand_beside_the_right_names(name, top1):
    assert metaformer_jax.model_info(name).published_top1 == top1


@pytest.mark.parametrize("architecture", sorted(TABLE["architectures"]))
def test_every_key_of_a_checkpoint_is_one_parameter(architecture):
    model = nnx.eval_shape(lambda: metaformer_jax.create_model(architecture, rngs=nnx.Rngs(0)))
    keys = [sail_key(path)[0] for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(TABLE["architectures"][architecture])


def test_names_are_found_by_pattern():
    assert metaformer_jax.list_models("randformer_*") == [
        f"randformer_{size}" for size in FAMILIES["randformer"].sizes
    ]
    assert metaformer_jax.list_models("resnet*") == []


def test_the_publications_other_spelling_is_an_alias():
    alias = metaformer_jax.model_info("convformer_b36_384_in21kft1k")
    assert alias == metaformer_jax.model_info("convformer_b36_384_in21ft1k")
    assert "convformer_b36_384_in21kft1k" not in NAMES
    assert is_published("convformer_b36_384_in21kft1k")
    assert not is_published("caformer_s19")


def test_an_unknown_name_offers_the_close_ones():
    with pytest.raises(ValueError, match=r"got 'caformer_s19'.*caformer_s18"):
        metaformer_jax.create_model("caformer_s19", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'vgg'.*list_models"):
        metaformer_jax.model_info("vgg")


def test_a_name_brings_its_classes_and_size():
    model = nnx.eval_shape(
        lambda: metaformer_jax.create_model("caformer_s18_384", rngs=nnx.Rngs(0))
    )
    assert (model.image_size, model.num_classes) == ((384, 384), 1000)
    model = nnx.eval_shape(
        lambda: metaformer_jax.create_model(
            "caformer_m36_in21k", image_size=96, in_channels=1, rngs=nnx.Rngs(0)
        )
    )
    assert (model.image_size, model.num_classes, model.in_channels) == ((96, 96), 21841, 1)
