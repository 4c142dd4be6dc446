"""A checkpoint that is not what was written is noticed, named, set aside and never used."""

import shutil

import numpy as np
import pytest
import trainings

from metaformer_jax import weights
from metaformer_jax.exit_codes import USAGE_ERROR
from metaformer_jax.weights.workdir import ORBAX_STEP_FILES, newest_whole, read_workdir

RNG = np.random.default_rng(0)


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _largest(folder):
    return max(_files(folder), key=lambda path: path.stat().st_size)


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[RNG.integers(len(content))] ^= 1 << RNG.integers(8)
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: RNG.integers(path.stat().st_size)])


def _delete_half(folder):
    for path in _files(folder)[::2]:
        path.unlink()


DAMAGES = {
    "truncated": lambda folder: _truncate(_largest(folder)),
    "a bit flipped": lambda folder: _flip_a_bit(_largest(folder)),
    "half deleted": _delete_half,
}


@pytest.fixture
def copy(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_is_set_aside_and_the_one_before_it_used(damage, copy, undisturbed):
    *_, before, newest = trainings.saved_steps(copy)
    DAMAGES[damage](copy / "checkpoints" / str(newest))
    damaged = _files(copy / "checkpoints" / str(newest))
    output = trainings.finish(trainings.start(copy))
    place = copy / "damaged" / str(newest)
    assert f"step {newest} is damaged and was moved to {place}; that of step {before}" in output
    assert f"continuing after step {before}" in output
    assert len(_files(place)) == len(damaged)
    trainings.assert_same_run(copy, undisturbed)


def test_where_none_is_whole_nothing_is_touched_and_no_training_starts(copy):
    for step in trainings.saved_steps(copy):
        _flip_a_bit(_largest(copy / "checkpoints" / str(step)))
    before = {path: path.read_bytes() for path in _files(copy)}
    code, output, errors = trainings.end(trainings.start(copy))
    assert code == USAGE_ERROR
    assert "must hold a whole checkpoint, but none is:" in trainings.error_line(errors)
    assert all(f"checkpoints/{step}/" in errors for step in trainings.saved_steps(copy))
    assert "compiling" not in output
    after = {path: path.read_bytes() for path in _files(copy)}
    before.pop(copy / "run.lock")
    after.pop(copy / "run.lock")
    assert after == before


def test_every_change_to_a_file_is_noticed(undisturbed, tmp_path):
    *_, before, newest = trainings.saved_steps(undisturbed)
    original, checkpoints = undisturbed / "checkpoints", tmp_path / "checkpoints"
    num_damaged = 0
    for file in _files(original / str(newest)):
        damages = [lambda path: path.unlink()]
        # Orbax adds the time of the commit to these; what they hold is not read.
        if file.name not in ORBAX_STEP_FILES and file.stat().st_size:
            damages += [_truncate, *[_flip_a_bit] * 5]
        for damage in damages:
            shutil.copytree(original, checkpoints)
            damage(checkpoints / file.relative_to(original))
            step, damaged = newest_whole(tmp_path)
            shutil.rmtree(checkpoints)
            assert (step, list(damaged)) == (before, [newest]), (file, damage)
            assert str(checkpoints / str(newest)) in str(damaged[newest])
            num_damaged += 1
    assert num_damaged > 100


def test_damaged_weights_of_a_run_are_not_read(copy):
    newest = trainings.saved_steps(copy)[-1]
    _flip_a_bit(_largest(copy / "checkpoints" / str(newest)))
    with pytest.raises(weights.CheckpointError, match=rf"{newest} must be a whole checkpoint of"):
        read_workdir(copy)
    code, _, errors = trainings.end(trainings.start(copy, "--mode=eval"))
    assert code == USAGE_ERROR
    assert f"checkpoints/{newest} must be a whole checkpoint" in trainings.error_line(errors)


def test_what_a_killed_first_save_leaves_is_no_checkpoint(undisturbed, tmp_path):
    """Pretrained weights are taken as if nothing had been saved, and no reader trips over it."""
    process = trainings.start(tmp_path / "run", tamper={"die": ["commit", 1]})
    assert trainings.end(process)[0] < 0
    assert list((tmp_path / "run" / "checkpoints").glob("*tmp*"))
    with pytest.raises(weights.CheckpointError, match="which has none yet"):
        read_workdir(tmp_path / "run")
    fields = ["--accept_config_changes", f"--config.model.pretrained={undisturbed}"]
    output = trainings.finish(trainings.start(tmp_path / "run", *fields))
    assert f"starting from {undisturbed}" in output
    # What it learnt before shows after the first steps.
    first = next(row for row in trainings.rows(tmp_path / "run") if "eval/loss" in row)
    untrained = next(row for row in trainings.rows(undisturbed) if "eval/loss" in row)
    assert first["eval/loss"] < untrained["eval/loss"] - 0.5
