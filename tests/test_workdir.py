"""A training run's weights are read as converted ones are."""

import json
import shutil

import jax
import numpy as np
import pytest
import reference
import small_run
from flax import nnx
from small_run import save
from test_convert_torch_weights import load_program

from metaformer_jax import create_model
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.weights import CheckpointError, read_record
from metaformer_jax.weights import workdir as weights_workdir
from metaformer_jax.weights.convert import to_variables, variables_of
from metaformer_jax.weights.files import read_tensors
from metaformer_jax.weights.pretrained import build_abstract

NAME = "randformer_s12"


@pytest.fixture(scope="module")
def variables():
    return to_variables(reference.state_dict(NAME, "sail"), build_abstract(NAME))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, variables):
    """Two checkpoints, of which the newer has the weights of reference."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps({"model.name": NAME}))
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, scale in ((9, np.float32(2)), (10, np.float32(1))):
            halves = [
                nnx.traversals.unflatten_mapping(
                    {
                        path: scale * value
                        for path, value in variables.items()
                        if frozen == is_frozen(path)
                    }
                )
                for frozen in (False, True)
            ]
            save(checkpoints, step, *halves)
    return folder


def is_frozen(path):
    return path[-1] == "random_matrix"


def test_a_model_takes_the_newest_weights(workdir, variables):
    model = create_model(NAME, pretrained=workdir, rngs=nnx.Rngs(0))
    for path, variable in variables_of(model).items():
        np.testing.assert_array_equal(variable[...], variables[path])


def test_a_checkpoint_in_a_run_is_taken_by_its_folder(workdir, variables, tmp_path, capsys):
    older = workdir / "checkpoints" / "9"
    model = create_model(NAME, pretrained=older, rngs=nnx.Rngs(0))
    for path, variable in variables_of(model).items():
        np.testing.assert_array_equal(variable[...], 2 * variables[path])
    arguments = [str(older), "--output", str(tmp_path / "out")]
    assert load_program().main(arguments) == 0
    record = read_record(tmp_path / "out")
    assert (record.model, record.source_entry) == (NAME, "params of step 9")
    (elsewhere := tmp_path / "9").mkdir()
    with pytest.raises(CheckpointError, match=r"has no metaformer.json"):
        create_model(NAME, pretrained=elsewhere, rngs=nnx.Rngs(0))


def test_a_network_without_a_published_name_is_not_converted(tmp_path, capsys):
    small_run.make(tmp_path / "run")
    assert load_program().main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert f"got {tmp_path / 'run'}, the workdir of a network that has no published name." in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_of_a_run_that_averages_the_average_is_taken(variables, tmp_path):
    params, frozen = (
        nnx.traversals.unflatten_mapping(
            {path: value for path, value in variables.items() if of_kind == is_frozen(path)}
        )
        for of_kind in (False, True)
    )
    (tmp_path / "config.json").write_text(json.dumps({"model.name": NAME}))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        twice = jax.tree.map(lambda value: 2 * value, params)
        save(checkpoints, 1, twice, frozen, ema=params)
    model = create_model(NAME, pretrained=tmp_path, rngs=nnx.Rngs(0))
    for path, variable in variables_of(model).items():
        np.testing.assert_array_equal(variable[...], variables[path])


def test_a_run_goes_back_to_pytorch_under_its_own_name(workdir, tmp_path, capsys):
    output = tmp_path / "back.pth"
    assert load_program().main([str(workdir), "--reverse", "--output", str(output)]) == 0
    assert f"{output}: {NAME}" in capsys.readouterr().out
    tensors, _ = read_tensors(output)
    expected = reference.state_dict(NAME, "sail")
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)


def test_a_run_of_a_published_size_is_read_by_that_name_alone(tmp_path):
    """IdentityFormer has the keys and shapes of PoolFormerV2."""
    small_run.make(tmp_path, family="poolformerv2", size="s12")
    settings = {"pretrained": tmp_path, "num_classes": 10, "in_channels": 1}
    create_model("poolformerv2_s12", **settings, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=r"called poolformerv2_s12: .* Take that model"):
        create_model("identityformer_s12", **settings, rngs=nnx.Rngs(0))


def test_a_conversion_keeps_the_sizes_that_the_run_trained_with(tmp_path, capsys):
    # Of the digits: one channel, 32 pixels, and ten classes where the run kept their names.
    small_run.make(tmp_path / "run", family="poolformerv2", size="s12")
    (tmp_path / "run" / "class_names.json").write_text(json.dumps([f"{n}" for n in range(10)]))
    convert = [str(tmp_path / "run"), "--model", "poolformerv2_s12", "--output"]
    assert load_program().main([*convert, str(tmp_path / "converted")]) == 0
    record = read_record(tmp_path / "converted")
    assert (record.num_classes, record.in_channels) == (10, 1)
    assert tuple(record.image_size) == (32, 32)
    assert load_program().main([*convert, str(tmp_path / "other"), "--image-size", "64"]) == 2
    assert "--image-size must be what the checkpoint has, (32, 32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("data.mean", 3), ("data.mean", None), ("data.mean", "grey"), ("data.image_size", "32")],
)
def test_a_run_whose_config_has_no_sizes_is_not_converted(field, value, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model.name": NAME, field: value}))
    assert load_program().main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'config.json'} must be the config that the run wrote" in line
    assert repr(value) in line


def test_where_the_run_deletes_what_is_read_the_next_is_read(
    workdir, variables, tmp_path, monkeypatch
):
    checkpoints = shutil.copytree(workdir, tmp_path / "copy") / "checkpoints"
    newer = shutil.move(checkpoints / "10", tmp_path / "newer")
    verify = weights_workdir.verify_checkpoint

    def while_the_run_goes_on(folder):
        if newer.exists():
            newer.rename(checkpoints / "10")
            # Files vanish one by one.
            shutil.rmtree(checkpoints / "9" / "state")
        verify(folder)

    monkeypatch.setattr(weights_workdir, "verify_checkpoint", while_the_run_goes_on)
    model = create_model(NAME, pretrained=checkpoints.parent, rngs=nnx.Rngs(0))
    for path, variable in variables_of(model).items():
        np.testing.assert_array_equal(variable[...], variables[path])


@pytest.mark.parametrize("damage", ["nothing saved", "uncommitted", "garbled"])
def test_a_run_without_a_whole_checkpoint_is_refused(workdir, damage, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    checkpoints = copy / "checkpoints"
    if damage == "nothing saved":
        shutil.rmtree(checkpoints)
        checkpoints.mkdir()
    elif damage == "uncommitted":
        for path in checkpoints.glob("*/_CHECKPOINT_METADATA"):
            path.unlink()
    else:
        (checkpoints / "10" / "state" / "_METADATA").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match=r"`path` must be a run with|must be a whole check"):
        create_model(NAME, pretrained=copy, rngs=nnx.Rngs(0))
