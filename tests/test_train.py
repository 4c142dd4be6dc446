"""A run from a config: what it leaves behind, and that an interrupted one becomes the same."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil
import signal
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from metaformer_jax.data.device import normalize
from metaformer_jax.data.loader import DataError
from metaformer_jax.models import MetaFormer
from metaformer_jax.training import evaluation, loop, preview, recipes, train
from metaformer_jax.training.checkpoint import Checkpoints, SaveError
from metaformer_jax.training.failure import TrainingError
from metaformer_jax.training.feeding import PlacedBatches
from metaformer_jax.training.guard import NonFiniteError
from metaformer_jax.training.metrics import MetricWriter, read_metrics
from metaformer_jax.training.preemption import PreemptedError
from metaformer_jax.training.run import Run
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.pretrained import build_abstract, fill
from metaformer_jax.weights.workdir import saved_steps
from metaformer_jax.weights.write import write_variables


def _config(**changes):
    """Two short epochs of the smallest network on the digits; eight devices."""
    config = recipes.digits()
    config.update(epochs=2.0, batch_size=128, eval_batch_size=128, log_every_steps=4)
    config.model.update(family="poolformerv2", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16))
    config.optimizer.update(warmup_epochs=0.5, learning_rate=1e-2)
    config.checkpoint.every_epochs = 1.0
    config.update_from_flattened_dict(changes)
    return config


def _train(workdir, config=None, **kwargs):
    output = io.StringIO()
    trained = train.train(
        config or _config(), workdir, console=Console(file=output, width=120), **kwargs
    )
    return trained, output.getvalue()


def _restore(workdir, config):
    with Checkpoints(workdir, keep=1) as checkpoints:
        return jax.device_get(checkpoints.restore(Run(config).engine.abstract_state, config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    trained, output = _train(workdir)
    return workdir, trained, output


def test_it_learns_and_says_so(finished):
    _, trained, output = finished
    assert trained.accuracy > 0.5
    assert f"accuracy {trained.accuracy:.2%}" in output
    assert "355 for evaluation" in output


def test_the_workdir_holds_checkpoints_metrics_events_and_pictures(finished):
    workdir, trained, _ = finished
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [12, 23]
    assert json.loads((workdir / "config.json").read_text())["model.family"] == "poolformerv2"
    assert json.loads((workdir / "class_names.json").read_text()) == [*"0123456789"]
    numbers = json.loads((workdir / "num_examples.json").read_text())
    assert numbers == {"training": 1442, "evaluation": 355}
    rows = read_metrics(workdir)
    train_steps = [row["step"] for row in rows if "train/loss" in row]
    assert train_steps == [4, 8, 12, 16, 20, 23]
    assert [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1] == (
        trained.accuracy
    )
    for picture in ("curves.png", "misclassified.png"):
        with Image.open(workdir / picture) as image:
            assert image.width > 300
            assert image.convert("L").getextrema()[0] < 128


def test_tensorboard_gets_what_the_metrics_file_gets(finished):
    workdir, _, _ = finished
    (path,) = (workdir / "tensorboard").iterdir()
    data, events = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            if value.HasField("image"):
                assert (event.step, value.tag) == (0, "train/batch")
                assert value.image.width > 1000
            else:
                events[event.step, value.tag] = value.simple_value
        data = data[12 + length + 4 :]
    rows = {
        (row["step"], tag): value
        for row in read_metrics(workdir)
        for tag, value in row.items()
        if tag != "step"
    }
    assert events.keys() == rows.keys()
    for key, value in rows.items():
        assert events[key] == np.float32(value)


def test_running_it_again_says_that_it_is_finished(finished):
    workdir, trained, _ = finished
    rows = read_metrics(workdir)
    again, output = _train(workdir)
    assert "finished: 23 steps are done" in output
    assert "compiling the training step" not in output
    assert again.accuracy == trained.accuracy
    assert read_metrics(workdir) == rows


def test_where_compiled_programs_are_kept_instead_is_said(finished, monkeypatch):
    workdir, _, _ = finished
    for module in (train, evaluation):
        monkeypatch.setattr(module, "share_compiled_programs", lambda folder: f"kept in {folder}.")
    output = io.StringIO()
    evaluation.evaluate(_config(), workdir, console=Console(file=output, width=120))
    for said in (output.getvalue(), _train(workdir)[1]):
        assert f"kept in {workdir / 'compiled'}.\n" in said


def test_evaluating_gives_the_accuracy_of_the_training(finished):
    workdir, trained, _ = finished
    again = evaluation.evaluate(_config(), workdir, console=Console(file=io.StringIO()))
    assert (again.accuracy, again.loss) == (trained.accuracy, trained.loss)


def test_pretrained_weights_are_evaluated_without_a_workdir(finished):
    workdir, trained, _ = finished
    config = _config(**{"model.pretrained": str(workdir)})
    again = evaluation.evaluate(config, console=Console(file=io.StringIO()))
    assert (again.accuracy, again.loss) == (trained.accuracy, trained.loss)


def test_a_converted_folder_is_evaluated_as_its_model_answers(tmp_path):
    name = "identityformer_s12"
    settings = {"num_classes": 10, "in_channels": 1, "image_size": 32}
    model = build_abstract(name, **settings)
    noise = np.random.default_rng(0)
    variables = {
        path: 0.05 * noise.standard_normal(variable.shape, np.float32)
        for path, variable in variables_of(model).items()
    }
    write_variables(variables, tmp_path / "converted", name=name, model=model)
    fill(model, variables)
    config = recipes.digits()
    config.eval_batch_size = 360
    config.model.update(family="", name=name, pretrained=str(tmp_path / "converted"))
    evaluated = evaluation.evaluate(config, console=Console(file=io.StringIO()))
    run = Run(config)
    records = [run.eval_source[index] for index in range(355)]
    images = np.stack([run.eval_transform(record["image"]) for record in records])
    labels = np.array([record["label"] for record in records])
    model.eval()
    images = normalize(images, mean=config.data.mean, std=config.data.std)
    logits = nnx.jit(lambda model, images: model(images))(model, images)
    log_probabilities = jax.nn.log_softmax(logits)
    loss = -jnp.mean(log_probabilities[np.arange(355), labels])
    assert evaluated.loss == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_array_equal(evaluated.predictions, logits.argmax(-1))


def test_fine_tuning_starts_from_the_weights_and_a_fresh_head(finished):
    workdir, _, _ = finished
    trained = _restore(workdir, _config())
    run = Run(_config(**{"model.pretrained": str(workdir), "model.fresh_head": True}))
    initial = run.engine.initial_state()
    state = run.engine.with_weights(initial, run.pretrained_variables())
    for part in initial.params:
        same_as = initial.params if part == "head" else trained.params
        jax.tree.map(np.testing.assert_array_equal, state.params[part], same_as[part])
    places = jax.tree.map(lambda array: array.sharding, state.params)
    assert places == jax.tree.map(lambda array: array.sharding, initial.params)


def test_another_number_of_classes_asks_for_another_head(finished):
    run = Run(_config(**{"model.pretrained": str(finished[0])}))
    spec = run.engine.model.spec
    run.engine.model = nnx.eval_shape(
        lambda: MetaFormer(spec, num_classes=7, in_channels=1, image_size=32, rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match=r"(?s)has 10 .* 7: .*fresh_head=True, or map"):
        run.pretrained_variables()


def test_fine_tuning_goes_on_from_where_the_training_ended(finished, tmp_path):
    workdir, trained, _ = finished
    config = _config(epochs=0.3, **{"model.pretrained": str(workdir)})
    config.optimizer.update(learning_rate=1e-4, warmup_epochs=0.0)
    tuned, output = _train(tmp_path / "tuned", config)
    assert f"starting from {workdir}" in output
    assert tuned.accuracy >= trained.accuracy - 0.02
    # Continued, it does not start from them again: they may be gone.
    config.model.pretrained = str(tmp_path / "gone")
    again, output = _train(tmp_path / "tuned", config, accept_config_changes=True)
    assert "finished" in output
    assert again.accuracy == tuned.accuracy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dims": (8, 16, 16, 32)}, "model.dims: .* -> "),
        ({"model.pretrained": "nowhere"}, "must be an existing checkpoint, got nowhere"),
        ({"model.pretrained": "published"}, "must be a path unless config.model.name is set"),
        ({"model.class_map": "map.json"}, "`class_map` must be left out unless the model has 1000"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_a_workdir_is_made(
    finished, changes, message, tmp_path
):
    config = _config(**{"model.pretrained": str(finished[0]), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_evaluating_without_weights_is_refused():
    with pytest.raises(ValueError, match="Either `workdir` must be given, or"):
        evaluation.evaluate(_config())


def _without_speed(rows):
    """What a run on another day gives as well."""
    return [
        {name: value for name, value in row.items() if not name.startswith("speed/")}
        for row in rows
    ]


def _assert_same_run(workdir, expected, config):
    assert _without_speed(read_metrics(workdir)) == _without_speed(read_metrics(expected))
    jax.tree.map(
        np.testing.assert_array_equal, _restore(workdir, config), _restore(expected, config)
    )


def test_a_run_that_died_ends_bit_for_bit_as_one_that_did_not(finished, tmp_path, monkeypatch):
    class PowerCutError(Exception):
        pass

    steps_left = iter(range(15))
    next_batch = PlacedBatches.__next__

    def dies_after_fifteen_steps(self):
        # An evaluation's batches do not count.
        if "mask" not in self._fields and next(steps_left, None) is None:
            raise PowerCutError
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(PlacedBatches, "__next__", dies_after_fifteen_steps)
        with pytest.raises(PowerCutError):
            _train(tmp_path)
    _, output = _train(tmp_path)
    assert "continuing after step 12" in output
    _assert_same_run(tmp_path, finished[0], _config())


@pytest.mark.parametrize(("num_steps", "expected"), [(0, FileNotFoundError), (5, TrainingError)])
def test_what_would_refuse_a_start_is_a_failure_after_the_first_step(
    num_steps, expected, tmp_path, monkeypatch
):
    steps_left = iter(range(num_steps))
    next_batch = PlacedBatches.__next__

    def loses_sight_of_a_file(self):
        if next(steps_left, None) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/bucket/shard")
        return next_batch(self)

    monkeypatch.setattr(PlacedBatches, "__next__", loses_sight_of_a_file)
    with pytest.raises(expected, match="/bucket/shard") as raised:
        _train(tmp_path / "run")
    # Whoever loops until the training is done tells the two apart.
    assert isinstance(raised.value.__cause__ or raised.value, FileNotFoundError)


def _worker_dies_after(num_steps, monkeypatch):
    steps_left = iter(range(num_steps))
    next_batch = PlacedBatches.__next__

    def read(self):
        # Evaluations go on.
        if "mask" not in self._fields and next(steps_left, None) is None:
            raise DataError("A worker that reads data has died")
        return next_batch(self)

    monkeypatch.setattr(PlacedBatches, "__next__", read)


@pytest.mark.parametrize("num_steps", [5, 12])
def test_a_run_whose_data_fails_saves_what_it_has_trained(num_steps, tmp_path, monkeypatch):
    """Also right after a step that is saved anyway."""
    with monkeypatch.context() as patch:
        _worker_dies_after(num_steps, patch)
        with pytest.raises(DataError, match="has died"):
            _train(tmp_path)
    assert saved_steps(tmp_path) == [num_steps]
    # And a start at which it fails anew saves nothing.
    _worker_dies_after(0, monkeypatch)
    with pytest.raises(DataError, match="has died"):
        _train(tmp_path)
    assert saved_steps(tmp_path) == [num_steps]


def test_gradients_are_cut_from_where_a_run_stopped_on(finished, tmp_path):
    """As the message about a loss that is no number advises."""
    workdir, _, _ = finished
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    config = _config(epochs=2.2, **{"optimizer.max_grad_norm": 1.0, "optimizer.layer_decay": 0.9})
    _, output = _train(copied, config, accept_config_changes=True)
    assert "continuing after step 23" in output


def test_what_is_accepted_is_kept_where_only_an_evaluation_is_left(finished, tmp_path):
    workdir, _, _ = finished
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    metrics = copied / "metrics.jsonl"
    rows = metrics.read_text().splitlines()
    assert "eval/loss" in rows[-1]
    metrics.write_text("\n".join(rows[:-1]) + "\n")
    _train(copied, _config(eval_batch_size=64), accept_config_changes=True)
    assert json.loads((copied / "config.json").read_text())["eval_batch_size"] == 64


def test_no_batch_is_read_that_no_step_needs():
    run = Run(_config())
    with run.training_batches(run.total_steps - 1) as batches:
        next(batches)
        assert next(batches, None) is None


def test_a_run_told_to_end_saves_and_goes_on_bit_for_bit(finished, tmp_path, monkeypatch):
    steps = iter(range(1, 100))
    next_batch = PlacedBatches.__next__

    def told_to_end_in_the_tenth_step(self):
        if "mask" not in self._fields and next(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(PlacedBatches, "__next__", told_to_end_in_the_tenth_step)
        with pytest.raises(PreemptedError, match="step 10 of 23 is saved"):
            _train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    # The row of step 12 is the mean over steps of both lives.
    _, output = _train(tmp_path)
    assert "continuing after step 10" in output
    _assert_same_run(tmp_path, finished[0], _config())


@pytest.mark.parametrize("times", [1, 1000])
def test_a_checkpoint_that_could_not_be_written_is_noticed_and_saved_again_if_possible(
    times, finished, tmp_path, monkeypatch
):
    rename, check, left = os.rename, Checkpoints.check, [times]

    def without_space(source, target):
        if os.path.basename(target).isdecimal() and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", target)
        rename(source, target)

    def check_what_is_done(checkpoints):
        while checkpoints._manager.is_saving_in_progress():
            os.sched_yield()
        check(checkpoints)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", without_space)
        patched.setattr(Checkpoints, "check", check_what_is_done)
        with pytest.raises(SaveError, match="No space left on device") as raised:
            _train(tmp_path)
    # The checkpoint of step 12 failed, and the next one was due after step 23.
    assert [row["step"] for row in read_metrics(tmp_path) if "train/loss" in row][-1] == 16
    saved = saved_steps(tmp_path)
    if times == 1:
        assert str(raised.value).endswith("continues. Step 16 could be saved after that.")
        assert saved == [16]
        _train(tmp_path)
        mine, expected = (_restore(workdir, _config()) for workdir in (tmp_path, finished[0]))
        jax.tree.map(np.testing.assert_array_equal, mine, expected)
    else:
        assert not saved


def test_the_best_stays_though_its_evaluation_was_broken_off(tmp_path, monkeypatch):
    evaluate_state = loop.evaluate_state
    accuracies = iter([None, 0.9, 0.1, 0.2, 0.3])

    def evaluated(*args, **kwargs):
        accuracy = next(accuracies)
        if accuracy is None:
            raise evaluation.StoppedError
        return dataclasses.replace(evaluate_state(*args, **kwargs), accuracy=accuracy)

    monkeypatch.setattr(loop, "evaluate_state", evaluated)
    config = _config(**{"checkpoint.keep": 1})
    with pytest.raises(PreemptedError, match="step 12 of 23 is saved"):
        _train(tmp_path, config)
    _train(tmp_path, config)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(saved) == [12, 23]
    # The next start knows of it by the metrics.
    config.epochs = 3.0
    _train(tmp_path, config, accept_config_changes=True)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(saved) == [12, 34]


def test_a_checkpoint_is_read_on_another_mesh(finished):
    workdir, _, _ = finished
    split = _restore(workdir, _config(**{"mesh.fsdp": 4}))
    whole = _restore(workdir, _config())
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_another_config_is_refused_with_the_difference(finished):
    workdir, _, _ = finished
    with pytest.raises(ValueError, match=r"optimizer.weight_decay: 0.05 -> 0.1") as error:
        _train(workdir, _config(**{"optimizer.weight_decay": 0.1}))
    assert "epochs" not in str(error.value)


def test_another_config_is_accepted_on_request(finished, tmp_path):
    workdir, _, _ = finished
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    _, output = _train(copied, _config(epochs=2.2), accept_config_changes=True)
    assert "step 23 is epoch 2.04 of 2.2:\n  epochs: 2.0 -> 2.2\n" in output
    assert "continuing after step 23" in output
    assert [row["step"] for row in read_metrics(copied) if "train/loss" in row][-3:] == [23, 24, 25]


def test_another_number_of_examples_is_refused_or_accepted_on_request(finished, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(finished[0], copied)
    kept = copied / "num_examples.json"
    kept.write_text('{"training": 1500, "evaluation": 355}')
    change = "\n  training examples: 1500 -> 1442\n"
    with pytest.raises(ValueError, match=f"same data, but .*{change}Use another --workdir"):
        _train(copied)
    kept.write_text('{"training": 15')
    with pytest.raises(ValueError, match=r"num_examples.json must be the JSON that a run wrote"):
        _train(copied)
    kept.write_text('{"training": 1500, "evaluation": 355}')
    _, output = _train(copied, accept_config_changes=True)
    assert f"step 23 is epoch 2.04 of 2:{change}" in output
    assert kept.read_bytes() == (finished[0] / "num_examples.json").read_bytes()


def test_a_run_that_kept_no_numbers_of_examples_goes_on_and_keeps_them(finished, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(finished[0], copied)
    (copied / "num_examples.json").unlink()
    assert "finished: 23 steps are done" in _train(copied)[1]
    assert (copied / "num_examples.json").exists()


def test_a_start_that_is_refused_leaves_the_config_that_it_found(finished, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(finished[0], copied)
    with pytest.raises(ValueError, match="saved by a run with other values"):
        _train(copied, _config(**{"ema.decay": 0.9}), accept_config_changes=True)
    assert (copied / "config.json").read_bytes() == (finished[0] / "config.json").read_bytes()
    assert "finished: 23 steps are done" in _train(copied)[1]


def test_without_a_checkpoint_a_workdir_takes_any_config(tmp_path):
    with pytest.raises(NonFiniteError):
        _train(tmp_path, _overflowing(log_every_steps=1))
    assert (tmp_path / "config.json").exists()
    _train(tmp_path, _config(epochs=0.6))
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 0.6
    assert [row["step"] for row in read_metrics(tmp_path) if "train/loss" in row] == [4, 7]


def test_weights_and_biases_is_looked_for_before_a_workdir_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
        train.train(_config(**{"wandb.project": "birds"}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _overflowing(**changes):
    # Nothing but the rate makes such a loss, of which each update leaves the parameters at once.
    return _config(**{"optimizer.learning_rate": 1e30, "optimizer.warmup_epochs": 0.0, **changes})


def test_what_a_checkpoint_cannot_be_continued_with_is_named(finished, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(finished[0], copied)
    config = _config(epochs=2.2, **{"ema.decay": 0.9})
    with pytest.raises(
        ValueError, match=r"saved by a run with other values.*\n  ema.decay: 0.0 ->"
    ):
        _train(copied, config, accept_config_changes=True)


def test_a_trace_is_taken_of_the_steps_asked_for(finished, tmp_path):
    _, output = _train(tmp_path, _config(profile_steps=(3, 4), epochs=0.6))
    assert f"profiler trace: {tmp_path / 'profile'}" in output.replace("\n", "")
    assert list(tmp_path.rglob("profile/**/*.xplane.pb"))


def test_of_steps_that_are_done_no_trace_is_taken_and_of_the_others_the_rest(finished, tmp_path):
    for last, is_traced in ((23, False), (24, True)):
        copied = tmp_path / str(last)
        shutil.copytree(finished[0], copied)
        config = _config(epochs=2.2, profile_steps=(22, last))
        _, output = _train(copied, config, accept_config_changes=True)
        assert ("profiler trace" in output) == is_traced
        assert bool(list(copied.rglob("profile/**/*.xplane.pb"))) == is_traced


def test_an_average_is_evaluated_beside_the_last_parameters(tmp_path):
    config = _config(epochs=1.0, **{"ema.decay": 0.5})
    trained, _ = _train(tmp_path, config)
    (row,) = [row for row in read_metrics(tmp_path) if "eval/accuracy" in row]
    assert row["eval_ema/accuracy"] == trained.accuracy
    assert row["eval_ema/loss"] != row["eval/loss"]
    # Evaluating does not ask how the checkpoint was trained.
    output = io.StringIO()
    again = evaluation.evaluate(_config(), tmp_path, console=Console(file=output, width=120))
    assert again.loss == pytest.approx(trained.loss, rel=1e-6)
    step, last, average = output.getvalue().splitlines()
    assert step.startswith("evaluating step 11 of ")
    assert last.startswith("last parameters  accuracy")
    assert average.startswith("their average    accuracy")
    assert f"{row['eval/accuracy']:.2%}" in last


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_examples(tmp_path):
    with pytest.raises(NonFiniteError, match=r"loss of step 2 is (nan|inf)"):
        _train(tmp_path, _overflowing())
    assert not read_metrics(tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 2
    with Run(_overflowing()).training_batches(1) as batches:
        next(batches)
        assert report["indices"] == batches.indices.tolist()
    assert report["examples"][0] == f"example {report['indices'][0]} of the digits' train split"


def test_updates_with_such_a_loss_are_skipped_on_request_up_to_a_number(tmp_path):
    config = _overflowing(on_nonfinite="skip", max_skipped_updates=5)
    with pytest.raises(NonFiniteError, match=r"loss of step 7 .*: 6 such .*_updates \(now 5\)"):
        _train(tmp_path, config)
    config = _overflowing(on_nonfinite="skip", max_skipped_updates=50)
    _train(tmp_path / "patient", config)
    rows = [row for row in read_metrics(tmp_path / "patient") if "train/loss" in row]
    assert [row["train/skipped_updates"] for row in rows] == [3, 4, 4, 4, 4, 3]


def test_evaluating_without_a_checkpoint_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "new"
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        evaluation.evaluate(_config(), workdir)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2000}, r"`config.batch_size` must be at most the 1,442.*got 2000"),
        ({"batch_size": 100}, r"the 8 devices x 1 accumulation steps, got 100. Use 104"),
        ({"accumulation_steps": 3}, r"the 8 devices x 3 accumulation steps, got 128. Use 144"),
        ({"optimizer.name": "sgd"}, r"`config.optimizer.name` must be 'adamw' or 'lamb', got 'sgd"),
        ({"optimizer.schedule": "linear"}, r"must be 'cosine' or 'constant', got 'linear'"),
        ({"ema.decay": 1.0}, r"`config.ema.decay` must be in \[0, 1\), got 1.0"),
        ({"on_nonfinite": "pray"}, r"`config.on_nonfinite` must be 'stop' or 'skip', got 'pray'"),
        ({"profile_steps": (5,)}, r"the first and the last step of a trace, or \(\), got \(5,\)"),
        (
            {"optimizer.head_only": True, "optimizer.layer_decay": 0.7},
            r"`config.optimizer.layer_decay` must be 1 where .* got 0.7",
        ),
        ({"batch_size": 0}, r"`config.batch_size` must be positive, got 0"),
        ({"seed": -1}, r"`config.seed` must be at least 0, got -1"),
        ({"label_smoothing": 1.0}, r"`config.label_smoothing` must be in \[0, 1\), got 1.0"),
        ({"optimizer.warmup_epochs": 2.0}, r"warmup_epochs` must be less than the 2 epochs"),
        ({"model.family": "cafomer"}, r"`config.model.family` must be one of.*got 'cafomer'"),
        ({"model.name": "caformer_s18"}, r"One of `config.model.name` and `config.model.family`"),
        (
            {"model.depths": (1, 1)},
            r"`config.model.dims` must have one entry for each of the 2 stages",
        ),
        (
            {"model.drop_path_rate": -0.5},
            r"`config.model.drop_path_rate` must be in \[0, 1\), got -0.5",
        ),
        ({"model.dtype": "float16"}, r"`config.model.dtype` .*got 'float16'"),
        ({"data.name": "nothing", "data.root": "nowhere"}, r"nothing.*nowhere"),
        ({"data.name": "folder"}, r"`data.root` must be the folder"),
        ({"data.num_workers": -2}, r"`config.data.num_workers` must be a number of processes"),
        (
            {"augment.crop": "middle"},
            r"`config.augment.crop` must be one of random_resized, .*got 'middle'",
        ),
        ({"augment.randaugment": "rand"}, r"`config.augment.randaugment` must be of the form"),
        (
            {"augment.interpolations": ("cubic",)},
            r"`config.augment.interpolations` must be one .*got 'cubic'",
        ),
        ({"mixing.mixup_alpha": 0.8}, r"16 of 128 images, got 128. Use 16, or a batch of 1024"),
        ({"mixing.probability": 1.5}, r"`config.mixing.probability` must be in \[0, 1\], got 1.5"),
        ({"eval_crop_fraction": 0.0}, r"`config.eval_crop_fraction` must be in \(0, 1\], got 0.0"),
        ({"data.mean": (0.5,) * 3}, r"`config.data.mean` must have one value for each of the 1"),
        ({"data.std": (0.0,)}, r"`config.data.std` must be positive"),
        ({"mesh.data": 3}, r"the 8 devices present, got 3 x 1"),
        ({"checkpoint.keep": 0}, r"`config.checkpoint.keep` must be positive, got 0"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_made(changes, message, tmp_path):
    workdir = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        train.train(_config(**changes), workdir)
    assert not workdir.exists()


def test_a_training_without_compilation_is_refused(tmp_path):
    with jax.disable_jit(), pytest.raises(ValueError, match="JAX_DISABLE_JIT must be off"):
        train.train(_config(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_fields_that_no_run_reads_or_that_are_missing_are_refused(tmp_path):
    config = _config().unlock()
    config.optimizer.lerning_rate = 1.0
    with pytest.raises(ValueError, match=r"`config.optimizer.lerning_rate`.*Did you mean opt"):
        train.train(config, tmp_path)
    config = _config().unlock()
    del config.batch_size
    with pytest.raises(ValueError, match=r"`config.batch_size` is missing"):
        train.train(config, tmp_path)


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`workdir` must be a folder that can be written to"):
        train.train(_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "damaged", [b'{"step": 2, "tr\0', b'{"train/loss": 1}', b"\xff", b"[]", b""]
)
def test_a_damaged_line_of_the_metrics_is_named(damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=f"Line 2 of {path} must be the JSON of a step, got"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_the_first_draws_the_batch_and_says_so(index, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "is_first_process", lambda: index == 0)
    output = io.StringIO()
    preview.preview(_config(), tmp_path / "batch.png", console=Console(file=output, width=200))
    assert (tmp_path / "batch.png").exists() == (index == 0)
    assert bool(output.getvalue()) == (index == 0)
    with pytest.raises(ValueError, match=r"`--output` must end in .png, got batch.jpg"):
        preview.preview(_config(), pathlib.Path("batch.jpg"))


def test_resumed_metrics_have_no_step_twice_and_lose_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, train={"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricWriter(tmp_path, start_step=2) as writer:
        writer.write(3, train={"loss": 30.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 30.0},
    ]
