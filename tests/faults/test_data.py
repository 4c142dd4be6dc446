"""Data that is bad, or goes bad while a run reads it."""

import shutil

import numpy as np
import pytest
import trainings
from fake_imagenet import CLASSES, example, write_dataset
from PIL import Image

from metaformer_jax.exit_codes import TRAINING_FAILED

NUM_IMAGES, BATCH_SIZE = 96, 16
STEPS_PER_EPOCH = NUM_IMAGES // BATCH_SIZE
ARGUMENTS = {
    "epochs": 4,
    "batch_size": BATCH_SIZE,
    "log_every_steps": 1,
    "model.family": "poolformerv2",
    "model.depths": "(1,1,1,1)",
    "model.dims": "(8,16,16,16)",
    "optimizer.warmup_epochs": 0.5,
    "augment.max_shift": 0,
    "data.mean": "(0.5,0.5,0.5)",
    "data.std": "(0.25,0.25,0.25)",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of small pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", NUM_IMAGES), ("val", 12)):
        for index in range(number):
            folder = root / split / CLASSES[index % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture
def root(pictures, tmp_path):
    return shutil.copytree(pictures, tmp_path / "pictures")


def _start(workdir, root, *flags, **kwargs):
    arguments = ARGUMENTS | {"data.name": "folder", "data.root": root}
    return trainings.start(workdir, *flags, arguments=arguments, num_devices=1, **kwargs)


def _train_rows(workdir):
    return [row for row in trainings.rows(workdir) if "train/loss" in row]


def _spoil(root):
    """An empty file, half a picture, and a text; returns their paths."""
    files = sorted((root / "train").rglob("*.png"))
    spoilt = [files[3], files[40], files[70]]
    spoilt[0].write_bytes(b"")
    spoilt[1].write_bytes(spoilt[1].read_bytes()[:200])
    spoilt[2].write_text("a picture of a cat")
    return spoilt


def test_bad_images_up_to_the_limit_are_replaced_and_counted(root, tmp_path):
    _spoil(root)
    trainings.finish(_start(tmp_path / "run", root, "--config.data.max_bad_fraction=0.04"))
    replaced = [row["train/replaced_examples"] for row in _train_rows(tmp_path / "run")]
    assert len(replaced) == 4 * STEPS_PER_EPOCH
    # Each of the three once an epoch.
    assert [sum(epoch) for epoch in np.split(np.array(replaced), 4)] == [3] * 4


def test_bad_images_above_the_limit_stop_the_run_and_are_named(root, tmp_path):
    spoilt = _spoil(root)
    flags = ["--config.data.max_bad_fraction=0.03", "--config.data.num_workers=1"]
    code, _, errors = trainings.end(_start(tmp_path / "run", root, *flags))
    assert code == TRAINING_FAILED
    assert "At most 2 of 96 examples may be bad" in trainings.error_line(errors)
    assert all(str(path) in errors for path in spoilt)


@pytest.mark.parametrize("every_epochs", [1, 4])
def test_bad_images_of_an_evaluation_cost_no_training_step(every_epochs, root, tmp_path):
    """Whether a checkpoint was due after that step or not."""
    spoilt = sorted((root / "val").rglob("*.png"))[5]
    whole = spoilt.read_bytes()
    spoilt.write_bytes(b"")
    flag = f"--config.checkpoint.every_epochs={every_epochs}"
    for start in ("compiling", "continuing after step 6"):
        code, output, errors = trainings.end(_start(tmp_path / "run", root, flag))
        assert code == TRAINING_FAILED
        assert "At most 0 of 12 examples may be bad" in trainings.error_line(errors)
        assert str(spoilt) in errors
        assert start in output
        assert trainings.saved_steps(tmp_path / "run") == [STEPS_PER_EPOCH]
    # It does not train on before it has evaluated.
    assert "compiling" not in output
    spoilt.write_bytes(whole)
    trainings.finish(_start(tmp_path / "run", root, flag))
    rows = trainings.rows(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12, 18, 24]
    assert [row["step"] for row in rows if "train/loss" in row] == [*range(1, 25)]


def test_files_that_vanish_during_a_run_are_bad_images(root, tmp_path):
    gone = root / "train" / CLASSES[1]
    process = _start(tmp_path / "run", root, tamper={"damage": [3, str(gone), 0]})
    code, _, errors = trainings.end(process)
    assert code == TRAINING_FAILED
    assert "examples may be bad" in trainings.error_line(errors)
    assert str(gone) in errors
    assert 3 <= len(_train_rows(tmp_path / "run")) < 2 * STEPS_PER_EPOCH


def test_a_shard_that_is_cut_during_a_run_stops_it_and_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "cache"))
    records = {
        name: [
            example(path.read_bytes(), CLASSES.index(path.parent.name), file_name=b"")
            for path in sorted((root / split).rglob("*.png"))
        ]
        for name, split in (("train", "train"), ("validation", "val"))
    }
    folder = write_dataset(tmp_path / "tfds", "tfrecord", records=records, num_shards={"train": 4})
    shard = sorted(folder.glob("*-train.tfrecord-*"))[1]
    process = _start(
        tmp_path / "run",
        tmp_path / "tfds",
        "--config.data.name=imagenet2012",
        tamper={"damage": [3, str(shard), 100]},
    )
    code, _, errors = trainings.end(process)
    assert code == TRAINING_FAILED
    assert "examples may be bad" in trainings.error_line(errors)
    assert str(shard) in errors
    assert len(_train_rows(tmp_path / "run")) < 2 * STEPS_PER_EPOCH


@pytest.fixture
def poisoned(root):
    """Among the pictures is a plain one, which the tampered program makes not finite."""
    path = sorted((root / "train").rglob("*.png"))[50]
    Image.new("RGB", (32, 32), "white").save(path)
    return root, path


def test_a_step_that_is_not_finite_stops_the_run_and_its_images_are_named(poisoned, tmp_path):
    root, path = poisoned
    process = _start(tmp_path / "run", root, tamper={"poison": True})
    code, _, errors = trainings.end(process)
    assert code == TRAINING_FAILED
    report = trainings.read_json(tmp_path / "run" / "nonfinite.json")
    assert f"The loss of step {report['step']} is nan" in trainings.error_line(errors)
    assert str(path) in report["examples"]
    assert len(report["examples"]) == BATCH_SIZE
    assert 1 <= report["step"] <= STEPS_PER_EPOCH
    # The steps before it are logged, that one is not.
    assert [row["step"] for row in _train_rows(tmp_path / "run")] == [*range(1, report["step"])]


def test_a_step_that_is_not_finite_is_skipped_on_request(poisoned, tmp_path):
    root, _ = poisoned
    process = _start(tmp_path / "run", root, "--config.on_nonfinite=skip", tamper={"poison": True})
    trainings.finish(process)
    skipped = [row["train/skipped_updates"] for row in _train_rows(tmp_path / "run")]
    assert [sum(epoch) for epoch in np.split(np.array(skipped), 4)] == [1] * 4
    state = trainings.state(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in trainings.leaves(state["params"]))
    assert not (tmp_path / "run" / "nonfinite.json").exists()
