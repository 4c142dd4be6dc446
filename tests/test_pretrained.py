"""A model with weights answers as the checkpoint's own model; what differs was asked for."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from flax import nnx

import metaformer_jax
from metaformer_jax import create_model, load_weights, save_weights
from metaformer_jax.models import MetaFormer, MetaFormerSpec, SepConv, layers, model_spec
from metaformer_jax.weights import (
    CheckpointError,
    change_in_channels,
    map_head_to_imagenet_1k,
    read_record,
)
from metaformer_jax.weights.convert import check_name, to_variables, variables_of
from metaformer_jax.weights.files import write_tensors
from metaformer_jax.weights.pretrained import build_abstract, fill
from metaformer_jax.weights.read import read_checkpoint
from metaformer_jax.weights.write import check_destination, write_variables

pytestmark = pytest.mark.optimized

FORWARD = np.load(reference.DATA / "forward.npz")
SMALL = "identityformer_s12"


@functools.cache
def cached_weights(architecture, layout):
    return reference.state_dict(architecture, layout)


def write_checkpoint(path, architecture=SMALL, layout="sail", **replaced):
    write_tensors(path, cached_weights(architecture, layout) | replaced, {"format": "pt"})
    return path


def write_folder(path, architecture=SMALL, **settings):
    model = build_abstract(architecture, **settings)
    variables = to_variables(dict(cached_weights(architecture, "sail")), model)
    write_variables(variables, path, name=architecture, model=model)
    return path


def values(model, *, head=True):
    variables = variables_of(model).items()
    return {path: np.asarray(v[...]) for path, v in variables if head or path[0] != "head"}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for path, array in expected.items():
        assert np.array_equal(actual[path], array), path


@pytest.mark.parametrize(
    ("name", "layout", "suffix"),
    [
        ("caformer_s18", "timm", ".safetensors"),
        ("poolformerv2_s12", "timm", ".pth"),
        ("randformer_s12", "sail", ".pth"),
        ("identityformer_s12", "sail", ".safetensors"),
    ],
)
def test_a_loaded_model_gives_the_published_logits(name, layout, suffix, tmp_path):
    path = write_checkpoint(tmp_path / f"weights{suffix}", name, layout)
    model = create_model(name, pretrained=path, rngs=nnx.Rngs(0))
    model.eval()
    logits = model(reference.images(2, 224, 224))
    assert reference.relative_error(logits, FORWARD[f"{name}@224/logits"]) <= 1e-4


def test_folder_portable_file_and_pytorch_files_hold_the_same_weights(tmp_path):
    name = "randformer_s12"
    file = write_checkpoint(tmp_path / "original.pth", name)
    model = create_model(name, pretrained=file, rngs=nnx.Rngs(0))
    expected = values(model)
    for output in ("folder", "portable.safetensors", "back.pth"):
        save_weights(model, tmp_path / output, name=name)
        loaded = create_model(name, pretrained=tmp_path / output, rngs=nnx.Rngs(1))
        assert_same(values(loaded), expected)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(loaded)))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    original = torch.load(file, weights_only=True)
    assert set(back) == set(original)
    assert all(torch.equal(back[key], original[key]) for key in original)
    record = read_record(tmp_path / "folder")
    published = reference.checkpoint_table()["checkpoints"][name]
    assert (record.params, record.frozen_params) == (
        published["trainable_params"],
        published["frozen_params"],
    )
    portable = read_record(tmp_path / "portable.safetensors")
    assert dataclasses.replace(portable, date=record.date) == record


def test_without_weights_it_is_the_models_own_function():
    def paths_and_shapes(create):
        model = nnx.eval_shape(
            lambda: create(SMALL, num_classes=3, drop_path_rate=0.1, rngs=nnx.Rngs(0))
        )
        return jax.tree.map(lambda leaf: leaf.shape, nnx.state(model))

    assert paths_and_shapes(create_model) == paths_and_shapes(metaformer_jax.models.create_model)


def test_loading_leaves_the_randomness_as_building_would():
    """Masks of stochastic depth and dropout do not depend on where the weights come from."""
    kwargs = {"drop_path_rate": 0.2, "head_dropout": 0.5}

    def keys(model):
        streams = nnx.to_flat_state(nnx.state(model, nnx.RngKey))
        return {path: jax.random.key_data(variable[...]).tolist() for path, variable in streams}

    def build_keys():
        model = metaformer_jax.models.create_model(SMALL, **kwargs, rngs=nnx.Rngs(7))
        return {
            path: jax.random.key_data(variable[...])
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.RngKey))
        }

    built = jax.jit(lambda: {str(k): v for k, v in build_keys().items()})()
    model = create_model(SMALL, pretrained=folder_once(), **kwargs, rngs=nnx.Rngs(7))
    loaded = {str(path): key for path, key in keys(model).items()}
    # The first block drops nothing.
    assert len(loaded) == 2 * 11 + 1
    assert loaded == {path: key.tolist() for path, key in built.items()}
    counts = jax.tree.leaves(nnx.state(model, nnx.RngCount))
    assert all(int(count) == 0 for count in counts)


@functools.cache
def folder_once():
    import atexit
    import pathlib
    import shutil
    import tempfile

    root = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return write_folder(root / "folder")


def test_another_number_of_classes_is_a_fresh_head_and_nothing_else():
    original = create_model(SMALL, pretrained=folder_once(), rngs=nnx.Rngs(0))
    model = create_model(
        SMALL, pretrained=folder_once(), num_classes=10, head_dropout=0.5, rngs=nnx.Rngs(1)
    )
    assert model.num_classes == 10
    assert model.head.fc.kernel.shape == (512, 10)
    assert model.head.dropout.rate == 0.5
    assert_same(values(model, head=False), values(original, head=False))
    same = create_model(SMALL, pretrained=folder_once(), num_classes=1000, rngs=nnx.Rngs(1))
    assert_same(values(same), values(original))
    headless = create_model(SMALL, pretrained=folder_once(), num_classes=0, rngs=nnx.Rngs(1))
    assert headless.head is None
    assert_same(values(headless), values(original, head=False))


def test_classes_of_a_fine_tuned_checkpoint_have_to_be_named(tmp_path):
    head = {"head.weight": np.ones((10, 512), np.float32), "head.bias": np.ones(10, np.float32)}
    path = write_checkpoint(tmp_path / "ten.safetensors", **head)
    with pytest.raises(CheckpointError, match="has 10 classes, the model's 1000"):
        create_model(SMALL, pretrained=path, rngs=nnx.Rngs(0))
    model = create_model(SMALL, pretrained=path, num_classes=10, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.head.fc.kernel[...], np.ones((512, 10)))


def test_other_channels_than_the_checkpoints_have_to_be_named_and_change_the_stem_alone(tmp_path):
    original = create_model(SMALL, pretrained=folder_once(), rngs=nnx.Rngs(0))
    model = create_model(SMALL, pretrained=folder_once(), in_channels=4, rngs=nnx.Rngs(0))
    kernel = values(model).pop(("downsample_layers", 0, "conv", "kernel"))
    rgb = np.asarray(original.downsample_layers[0].conv.kernel[...])
    np.testing.assert_array_equal(kernel, np.pad(rgb, ((0, 0), (0, 0), (0, 1), (0, 0))))
    save_weights(model, tmp_path / "four", name=SMALL)
    again = create_model(SMALL, pretrained=tmp_path / "four", in_channels=4, rngs=nnx.Rngs(0))
    assert_same(values(again), values(model))
    with pytest.raises(CheckpointError, match="images have 4 channels, the model's 3"):
        create_model(SMALL, pretrained=tmp_path / "four", rngs=nnx.Rngs(0))
    back = create_model(SMALL, pretrained=tmp_path / "four", in_channels=3, rngs=nnx.Rngs(0))
    assert back.in_channels == 3
    stem = ("downsample_layers", 0, "conv", "kernel")
    kept, expected = values(back), values(original)
    assert kept.pop(stem).shape == expected.pop(stem).shape
    assert_same(kept, expected)


def test_randformer_at_another_size_is_refused_with_the_way_to_resample(tmp_path):
    path = write_checkpoint(tmp_path / "weights.pth", "randformer_s12")
    with pytest.raises(CheckpointError, match=r"random_matrix must be .*(?s:.*)set_image_size"):
        create_model("randformer_s12", pretrained=path, image_size=256, rngs=nnx.Rngs(0))


def test_what_keys_cannot_tell_apart_the_name_does(tmp_path):
    path = write_checkpoint(tmp_path / "poolformerv2_s12.pth")
    with pytest.raises(CheckpointError, match="looks like poolformerv2_s12"):
        create_model(SMALL, pretrained=path, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="looks like identityformer_s12"):
        create_model("poolformerv2_s12", pretrained=folder_once(), rngs=nnx.Rngs(0))
    # A portable file tells by its record, whatever it is called.
    portable = tmp_path / "weights.safetensors"
    model = create_model("poolformerv2_s12", rngs=nnx.Rngs(0))
    save_weights(model, portable, name="poolformerv2_s12")
    with pytest.raises(CheckpointError, match="looks like poolformerv2_s12"):
        create_model(SMALL, pretrained=portable, rngs=nnx.Rngs(0))
    # A model that is there already tells which it is.
    for weights in (path, portable):
        with pytest.raises(CheckpointError, match="looks like poolformerv2_s12"):
            load_weights(abstract_model(), weights)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "converted")
    model = create_model(SMALL, pretrained="~/converted", rngs=nnx.Rngs(0))
    assert read_record("~/converted").model == SMALL
    save_weights(model, "~/saved.safetensors", name=SMALL)
    load_weights(model, "~/saved.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "saved.safetensors"]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing"):
        map_head_to_imagenet_1k(build_abstract(SMALL, num_classes=21841), "~/nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None}, "`pretrained` must be True, False or a path, got None"),
        ({"pretrained": 1}, "`pretrained` must be True, False or a path, got 1"),
        ({"rngs": 0}, "`rngs` must be nnx.Rngs, got int"),
        (
            {"rngs": nnx.Rngs(params=0), "drop_path_rate": 0.1},
            "streams params and dropout, got none called dropout",
        ),
        ({"in_channels": 0}, "`in_channels` must be a whole number of at least 1, got 0"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_read(arguments, message):
    valid = {"pretrained": "nothing", "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message):
        create_model(SMALL, **{**valid, **arguments})


def test_a_path_to_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        create_model(SMALL, pretrained=tmp_path / "nothing", rngs=nnx.Rngs(0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no metaformer\.json.*convert"):
        create_model(SMALL, pretrained=tmp_path / "empty", rngs=nnx.Rngs(0))
    for name in ("README.md", "model.safetensors"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(CheckpointError, match=r"no metaformer\.json.* such as .*model\.safeten"):
        create_model(SMALL, pretrained=tmp_path / "empty", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("damage", ["json", "format", "counts", "truncated", "missing", "garbled"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder = write_folder(tmp_path / "folder")
    record = folder / "metaformer.json"
    fields = json.loads(record.read_text())
    if damage == "json":
        record.write_text(record.read_text()[:40])
    elif damage == "format":
        record.write_text(json.dumps(fields | {"format": 99}))
    elif damage == "counts":
        record.write_text(json.dumps(fields | {"params": 5}))
    elif damage == "truncated":
        for data in (folder / "variables" / "ocdbt.process_0" / "d").iterdir():
            data.write_bytes(data.read_bytes()[:1000])
    elif damage == "garbled":
        metadata = folder / "variables" / "_METADATA"
        metadata.write_bytes(b"x" * metadata.stat().st_size)
    else:
        (folder / "variables" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"must (be|hold|have)"):
        create_model(SMALL, pretrained=folder, rngs=nnx.Rngs(0))


def abstract_model(**kwargs):
    return nnx.eval_shape(lambda: create_model(SMALL, **kwargs, rngs=nnx.Rngs(0)))


def test_load_weights_fills_any_model_and_keeps_its_head_on_request_only(tmp_path):
    original = create_model(SMALL, pretrained=folder_once(), rngs=nnx.Rngs(0))
    model = abstract_model()
    load_weights(model, folder_once())
    assert_same(values(model), values(original))
    path = write_checkpoint(tmp_path / "weights.pth")
    ten = create_model(SMALL, pretrained=path, num_classes=10, rngs=nnx.Rngs(3))
    for variable in variables_of(ten).values():
        variable.set_value(variable[...] + 1)
    shifted = values(ten)
    with pytest.raises(CheckpointError, match="has 1000 classes, the model's 10"):
        load_weights(ten, folder_once())
    assert_same(values(ten), shifted)
    load_weights(ten, folder_once(), keep_head=True)
    assert_same(values(ten, head=False), values(original, head=False))
    assert_same(values(ten), {**shifted, **values(original, head=False)})


@pytest.mark.parametrize("layout", ["sail", "timm"])
def test_a_head_of_ones_own_is_kept_whatever_the_checkpoints_is(layout, tmp_path):
    """CAFormer's own head is an MLP."""
    spec = dataclasses.replace(model_spec("caformer_s18"), head=layers.LinearHead)
    model = nnx.eval_shape(lambda: MetaFormer(spec, num_classes=3, rngs=nnx.Rngs(0)))
    fill(model, {p: np.full(v.shape, 7, np.float32) for p, v in variables_of(model).items()})
    path = write_checkpoint(tmp_path / "weights.pth", "caformer_s18", layout)
    load_weights(model, path, keep_head=True)
    published = build_abstract("caformer_s18")
    expected = to_variables(dict(cached_weights("caformer_s18", layout)), published)
    for where, array in values(model).items():
        assert np.array_equal(array, 7 + 0 * array if where[0] == "head" else expected[where])


def test_what_the_weights_do_not_fill_must_not_be_abstract(tmp_path):
    """Or the model would be refused where it is used, by an error that does not say why."""
    for model, keep_head in (
        (abstract_model(drop_path_rate=0.1), False),
        (abstract_model(head_dropout=0.1), False),
        (abstract_model(), True),
    ):
        with pytest.raises(ValueError, match=r"`model` must have values.*eval_shape"):
            load_weights(model, "never read", keep_head=keep_head)
    with pytest.raises(ValueError, match="`model` must have values"):
        save_weights(abstract_model(), tmp_path / "folder", name=SMALL)
    with pytest.raises(ValueError, match="`model` must have values"):
        change_in_channels(abstract_model(), 4)


def test_loaded_arrays_are_placed_as_those_that_they_replace():
    mesh = jax.make_mesh((1,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    model = create_model(SMALL, pretrained=folder_once(), rngs=nnx.Rngs(0))
    expected = values(model)
    for variable in variables_of(model).values():
        variable.set_value(jax.device_put(jnp.zeros(variable.shape), sharding))
    load_weights(model, folder_once())
    assert {variable[...].sharding for variable in variables_of(model).values()} == {sharding}
    assert_same(values(model), expected)


def test_loaded_arrays_have_the_dtype_of_those_that_they_replace():
    model = create_model(SMALL, pretrained=folder_once(), rngs=nnx.Rngs(0))
    expected = {path: array.astype(jnp.bfloat16) for path, array in values(model).items()}
    for variable in variables_of(model).values():
        variable.set_value(jnp.zeros(variable.shape, jnp.bfloat16))
    load_weights(model, folder_once())
    assert {variable.dtype for variable in variables_of(model).values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert_same(values(model), expected)


def test_saving_refuses_what_a_file_cannot_hold(tmp_path):
    model = abstract_model()
    for output, layout, message in (
        ("a.pth", "flax", "sail or timm"),
        ("a.pth", "timm", "timm has no model"),
        ("folder", "sail", "left out for a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            write_variables({}, tmp_path / output, name=SMALL, model=model, layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["a.npz", "a.H5", "a.pth.gz", "s18.v2"])
def test_saving_makes_no_folder_with_the_suffix_of_another_format(output, tmp_path):
    with pytest.raises(ValueError, match=rf"end in \.safetensors, \.pth, .* got '.*{output}'"):
        write_variables({}, tmp_path / output, name=SMALL, model=abstract_model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["s18_lr0.1", "s18.2", ".hidden", "a.b/s18", "ends."])
def test_a_folder_may_have_a_point_in_its_name(output, tmp_path):
    assert check_destination(tmp_path / output, name=SMALL, layout=None, force=False) == "flax"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_saved_as_it_is_and_read_exactly(dtype, tmp_path):
    model = create_model(SMALL, num_classes=2, rngs=nnx.Rngs(0))
    halved = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model, nnx.Param))
    nnx.update(model, halved)
    expected = {path: array.astype(np.float32) for path, array in values(model).items()}
    for output in ("folder", "a.safetensors", "b.safetensors", "a.pth"):
        layout = "sail" if output == "b.safetensors" else None
        save_weights(model, tmp_path / output, name=SMALL, layout=layout)
        back = create_model(SMALL, pretrained=tmp_path / output, num_classes=2, rngs=nnx.Rngs(1))
        assert_same(values(back), expected)
        written = read_checkpoint(tmp_path / output).tensors
        assert {tensor.dtype for tensor in written.values()} == {jnp.dtype(dtype)}
    state_dict = torch.load(tmp_path / "a.pth", weights_only=True)
    wanted = {jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}[dtype]
    assert {tensor.dtype for tensor in state_dict.values()} == {wanted}


@pytest.mark.parametrize("output", ["folder", "a.safetensors", "a.pth"])
def test_saving_refuses_types_that_reading_does(output, tmp_path):
    model = abstract_model()
    variables = {path: np.zeros(v.shape, np.float64) for path, v in variables_of(model).items()}
    with pytest.raises(ValueError, match=r"must have parameters in float32, .* got float64 for"):
        write_variables(variables, tmp_path / output, name=SMALL, model=model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["folder", "a.safetensors", "a.pth"])
def test_saving_refuses_a_name_that_is_none_or_another_models(output, tmp_path):
    model = abstract_model()
    for name, message in (
        ("identityformer_s13", "identityformer_s12"),
        ("identityformer_s24", "must be identityformer_s12"),
        ("poolformerv2_s12", "must be identityformer_s12"),
    ):
        with pytest.raises(ValueError, match=message):
            write_variables({}, tmp_path / output, name=name, model=model)
    assert list(tmp_path.iterdir()) == []


def test_loading_refuses_a_name_that_is_none_or_another_models():
    for name in ("identityformer_s13", "identityformer_s24", "poolformerv2_s12"):
        with pytest.raises(ValueError, match="`name` must be"):
            load_weights(abstract_model(), folder_once(), name=name)


def test_a_network_of_ones_own_goes_by_the_name_that_its_blocks_are_of():
    spec = model_spec("convformer_s18")
    small_kernels = (functools.partial(SepConv, kernel_size=5),) * 4
    changed = dataclasses.replace(spec, token_mixers=small_kernels)
    shallow = dataclasses.replace(spec, depths=(1, 1, 1, 1))
    changed, shallow = (
        nnx.eval_shape(lambda spec=spec: MetaFormer(spec, rngs=nnx.Rngs(0)))
        for spec in (changed, shallow)
    )
    check_name("convformer_s18_384", changed)
    with pytest.raises(ValueError, match="must be convformer_s18"):
        check_name("convformer_s36", changed)
    check_name("convformer_s36", shallow)


def test_neither_the_import_nor_a_folder_needs_torch_and_the_import_is_light():
    program = f"""
        import sys
        import metaformer_jax
        heavy = ("torch", "orbax", "huggingface_hub", "safetensors", "timm")
        assert not [name for name in heavy if name in sys.modules], sys.modules
        sys.modules["torch"] = sys.modules["huggingface_hub"] = None
        from flax import nnx
        metaformer_jax.create_model({SMALL!r}, pretrained={str(folder_once())!r}, rngs=nnx.Rngs(0))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


class _Affine(nnx.Module):
    """A norm of one's own, whose parameter has the name that PyTorch gives to others."""

    def __init__(self, dim, *, dtype, rngs):
        del dtype, rngs
        self.weight = nnx.Param(jnp.ones(dim))

    def __call__(self, x):
        return x * self.weight[...]


class _Nothing(nnx.Module):
    def __init__(self, dim, *, dtype, rngs):
        del dim, dtype, rngs

    def __call__(self, x):
        return x


@pytest.mark.parametrize("norm", [_Affine, _Nothing])
@pytest.mark.parametrize("place", ["folder", "file.safetensors"])
def test_networks_with_norms_of_ones_own_are_kept_and_read(norm, place, tmp_path):
    spec = MetaFormerSpec(
        depths=(1, 1),
        dims=(8, 16),
        token_mixers=(SepConv,) * 2,
        res_scale_init=(None,) * 2,
        norm=norm,
    )
    first, second = (
        MetaFormer(spec, num_classes=3, image_size=32, rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    save_weights(first, tmp_path / place, name="convformer_s18")
    load_weights(second, tmp_path / place)
    assert_same(values(second), values(first))
