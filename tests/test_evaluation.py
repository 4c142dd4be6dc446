"""What is evaluated, and the figures of it, from what the devices tell of each example."""

import contextlib
import io
import json
import os
import shutil
import types

import numpy as np
import pytest
import small_run
from flax import nnx
from PIL import Image
from rich.console import Console

from metaformer_jax.data.loader import Batches, DataError
from metaformer_jax.inference import load_classifier
from metaformer_jax.training import evaluation, recipes, settings
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.claim import claimed_workdir
from metaformer_jax.training.evaluation import evaluate, evaluate_state
from metaformer_jax.training.provenance import (
    check_same_classes,
    check_same_network,
    write_provenance,
)
from metaformer_jax.training.run import Run
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.workdir import saved_steps


def test_only_what_is_there_counts_and_five_ranks_are_the_top():
    ranks = np.array([0, 1, 4, 5, 9, 0, 0, 0], np.int32)
    # The last three only fill up.
    mask = np.arange(8) < 5
    outputs = {
        "rank": ranks,
        "mask": mask,
        "loss": np.where(mask, 1.0, 100.0) * [1, 2, 3, 4, 5, 1, 1, 1],
        "prediction": ranks,
        "probability": ranks / 10,
        "label": np.arange(8),
        "index": np.minimum(np.arange(8), 4),
    }
    halves = [{key: column[part] for key, column in outputs.items()} for part in np.s_[:4, 4:]]
    run = types.SimpleNamespace(
        config=recipes.digits(),
        eval_source=range(5),
        eval_transform=None,
        eval_batch_size=4,
        evaluation_batches=lambda: contextlib.nullcontext(halves),
        engine=types.SimpleNamespace(eval_step=lambda state, batch: batch),
    )
    evaluation = evaluate_state(run, None)
    assert evaluation.accuracy == pytest.approx(1 / 5)
    assert evaluation.top5_accuracy == pytest.approx(3 / 5)
    assert evaluation.loss == pytest.approx(3.0)
    assert evaluation.indices.tolist() == [0, 1, 2, 3, 4]
    assert str(evaluation) == "accuracy 20.00% (1 of 5)  top-5 60.00% (3 of 5)  loss 3.0000"


def test_bad_images_count_together_whichever_process_met_them(birds, monkeypatch):
    workdir, config, data = birds
    for bird in ("bird3", "bird8"):
        (data / bird / "a.png").write_bytes(b"")
    config.data.max_bad_fraction = 0.1
    # As if each of them was the only one in the share of its process.
    monkeypatch.setattr(Batches, "_note_bad", lambda *_: None)
    with pytest.raises(DataError, match=r"(?s)At most 1 of 10 .*got 2:\n.*bird3.*\n.*bird8"):
        _evaluate(config, workdir)
    config.data.max_bad_fraction = 0.2
    assert "of 8)" in _evaluate(config, workdir)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run without a published name, and its config."""
    workdir = tmp_path_factory.mktemp("run")
    _, config = small_run.make(workdir, family="poolformerv2")
    return workdir, config


def _changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def _evaluate(config, workdir=None):
    output = io.StringIO()
    return evaluate(config, workdir, console=Console(file=output, width=120)), output.getvalue()


OTHER_NETWORKS = [
    # Its parameters have the same names and shapes.
    ({"model.family": "identityformer"}, r"\n  model.family: poolformerv2 -> identityformer\n"),
    ({"model.depths": (1, 1, 2, 1)}, r"\n  model.depths: \[1, 1, 1, 1\] -> \[1, 1, 2, 1\]\n"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER_NETWORKS)
def test_a_run_is_not_evaluated_as_another_network(run, changes, message):
    workdir, config = run
    with pytest.raises(ValueError, match=rf"must be used with the network that .*{message}"):
        _evaluate(_changed(config, **changes), workdir)


@pytest.mark.parametrize(("changes", "message"), OTHER_NETWORKS)
def test_no_other_network_starts_from_the_weights_of_a_run(run, changes, message, monkeypatch):
    workdir, config = run
    monkeypatch.setenv("HOME", str(workdir.parent))
    for path in (str(workdir), f"~/{workdir.name}"):
        other = _changed(config, **changes, **{"model.pretrained": path})
        with pytest.raises(ValueError, match=rf"must be used with the network that .*{message}"):
            Run(other).pretrained_variables()


def test_a_network_may_be_described_by_its_name_or_its_size(tmp_path):
    _, config = small_run.make(tmp_path, family="poolformerv2", size="s12")
    named = {"model.name": "poolformerv2_s12", "model.family": "", "model.depths": ()}
    run = Run(_changed(config, **named))
    check_same_network(tmp_path, run.config, run.engine.model.spec)


def test_a_network_of_an_unknown_family_is_told_by_that(run, tmp_path):
    """As where the program that adds it is another."""
    _, config = run
    theirs = settings.as_json(config) | {"model.family": "fourier"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match=r"\n  model.family: fourier -> poolformerv2\n"):
        check_same_network(tmp_path, config, Run(config).engine.model.spec)


def test_images_are_normalised_as_the_run_learnt_it_or_not_evaluated(run):
    workdir, config = run
    with pytest.raises(
        ValueError, match=r"the normalisation .*\n  data.std: \[0.376\] -> \[0.5\]\n"
    ):
        _evaluate(_changed(config, **{"data.std": (0.5,)}), workdir)


def test_another_size_and_crop_of_the_images_may_be_tried(run):
    workdir, config = run
    as_trained, _ = _evaluate(config, workdir)
    larger = {"data.image_size": 40, "eval_crop_fraction": 0.9, "eval_interpolation": "bilinear"}
    evaluated, _ = _evaluate(_changed(config, **larger), workdir)
    assert evaluated.loss != as_trained.loss


def test_a_garbled_config_of_a_run_is_refused_by_its_name(run, tmp_path):
    workdir, config = run
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_bytes(b'{"model.family"')
    with pytest.raises(ValueError, match=r"copy/config.json must be the JSON that a run wrote"):
        _evaluate(config, tmp_path / "copy")


@pytest.fixture
def live(tmp_path):
    """A run with an average, its config, and what saves a step of it and deletes the one before."""
    model, config = small_run.make(tmp_path)
    flat = {path: np.asarray(variable[...]) for path, variable in variables_of(model).items()}

    def save(step):
        params, ema = (
            nnx.traversals.unflatten_mapping({path: size * flat[path] for path in flat})
            for size in (np.float32(step), np.float32(10 * step))
        )
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            small_run.save(checkpoints, step, params, {}, ema=ema)

    save(2)
    for older in saved_steps(tmp_path)[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / str(older))
    return tmp_path, config, flat, save


def test_parameters_and_average_are_those_of_one_step_though_the_run_goes_on(live, monkeypatch):
    workdir, config, flat, save = live
    evaluated = []

    def while_the_run_goes_on(run, state, **_):
        if not evaluated:
            save(3)
        evaluated.append(np.asarray(state.params["norm"]["scale"]))
        return "an evaluation"

    monkeypatch.setattr(evaluation, "evaluate_state", while_the_run_goes_on)
    _, output = _evaluate(config, workdir)
    scale = flat["norm", "scale"]
    np.testing.assert_array_equal(evaluated, [2 * scale, 20 * scale])
    assert output.startswith(f"evaluating step 2 of {workdir}\n")


def test_a_step_that_the_run_deletes_while_it_is_read_gives_way_to_the_next(live, monkeypatch):
    workdir, config, flat, save = live
    read_step, evaluated = evaluation.read_step, []

    def while_the_run_goes_on(path, step):
        if step == 2:
            save(3)
            shutil.rmtree(path / "checkpoints" / "2", ignore_errors=True)
        return read_step(path, step)

    monkeypatch.setattr(evaluation, "read_step", while_the_run_goes_on)
    monkeypatch.setattr(
        evaluation, "evaluate_state", lambda _, state, **__: evaluated.append(state)
    )
    _, output = _evaluate(config, workdir)
    assert output.startswith(f"evaluating step 3 of {workdir}\n")
    scale = flat["norm", "scale"]
    last, average = (np.asarray(state.params["norm"]["scale"]) for state in evaluated)
    np.testing.assert_array_equal([last, average], [3 * scale, 30 * scale])


def test_weights_of_a_run_are_not_evaluated_on_images_with_another_normalisation(tmp_path):
    _, config = small_run.make(tmp_path / "run")
    config.model.pretrained = str(tmp_path / "run")
    _evaluate(config, None)
    config.data.std = (0.5,)
    with pytest.raises(ValueError, match=r"(?s)with the normalisation of images .*data\.std"):
        _evaluate(config, None)
    # A training may begin with others.
    assert Run(config).pretrained_variables()


_NUMBERS = {"evaluation": 10}


@pytest.fixture
def birds(tmp_path):
    """A run on class folders that keeps their names, and its config."""
    _, config = small_run.make(
        tmp_path / "run", name="folder", root=str(tmp_path), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    for index in range(10):
        folder = tmp_path / "val" / f"bird{index}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * index,) * 3).save(folder / "a.png")
    write_provenance(tmp_path / "run", config, Run(config, trains=False).class_names, _NUMBERS)
    return tmp_path / "run", config, tmp_path / "val"


def test_classes_of_other_names_are_refused_with_the_first_differences(birds):
    workdir, config, data = birds
    _evaluate(config, workdir)
    (data / "bird3").rename(data / "aardvark")
    differences = r"\n  0: bird0 -> aardvark\n  1: bird1 -> bird0\n  2: bird2 -> bird1\n  3: "
    with pytest.raises(ValueError, match=differences):
        _evaluate(config, workdir)
    names = Run(config, trains=False).class_names
    with (
        pytest.raises(ValueError, match=differences),
        claimed_workdir(workdir, config, names, _NUMBERS),
    ):
        raise AssertionError
    with claimed_workdir(workdir, config, names, _NUMBERS, accept_changes=True) as changes:
        assert any("1: bird1 -> bird0" in change for change in changes)
        write_provenance(workdir, config, names, _NUMBERS)
    _evaluate(config, workdir)


def test_names_that_are_no_text_are_kept(birds, tmp_path):
    _, config, data = birds
    (data / "bird3").rename(data / os.fsdecode(b"\xff"))
    names = Run(config, trains=False).class_names
    write_provenance(tmp_path, config, names, _NUMBERS)
    check_same_classes(tmp_path, names)


def test_a_run_that_kept_no_names_goes_on_and_keeps_them(birds):
    workdir, config, data = birds
    (workdir / "class_names.json").unlink()
    (data / "bird3").rename(data / "aardvark")
    _evaluate(config, workdir)
    names = Run(config, trains=False).class_names
    with claimed_workdir(workdir, config, names, _NUMBERS):
        write_provenance(workdir, config, names, _NUMBERS)
        assert json.loads((workdir / "class_names.json").read_text())[0] == "aardvark"


def test_garbled_names_are_refused_by_their_file(birds):
    workdir, config, _ = birds
    (workdir / "class_names.json").write_text('["bird')
    with pytest.raises(ValueError, match=r"class_names.json must be the JSON that a run wrote"):
        _evaluate(config, workdir)


def test_predictions_have_the_names_that_the_run_kept(birds):
    workdir, _, data = birds
    (data / "bird3").rename(data / "aardvark")
    assert load_classifier(weights=workdir).class_names[3] == "bird3"
