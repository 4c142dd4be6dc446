"""A run whose folder is moved, removed or made read-only says so at its next save, and stops."""

import shutil
import subprocess
import time

import pytest
import trainings

from metaformer_jax.exit_codes import TRAINING_FAILED
from metaformer_jax.weights.workdir import verify_checkpoint


def _start_until_saved(workdir):
    process = trainings.start(workdir)
    trainings.until(lambda: trainings.saved_steps(workdir), [process])
    return process


def test_a_moved_run_stops_with_its_last_step_saved_and_continues_where_it_is(
    undisturbed, tmp_path
):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    process = _start_until_saved(workdir)
    workdir.rename(moved)
    code, _, errors = trainings.end(process)
    assert code == TRAINING_FAILED, errors
    (step,) = trainings.saved_steps(workdir)
    message = trainings.error_line(errors)
    assert f"{workdir} was moved or removed" in message
    assert f"Step {step} is saved in a new folder" in message
    verify_checkpoint(workdir / "checkpoints" / str(step))
    for name in ("config.json", "class_names.json", "num_examples.json"):
        assert (workdir / name).read_bytes() == (moved / name).read_bytes()
    assert trainings.saved_steps(moved)[-1] < step
    trainings.finish(trainings.start(moved))
    trainings.assert_same_run(moved, undisturbed)


def test_what_a_removed_run_has_trained_is_saved_again(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = _start_until_saved(workdir)
    shutil.rmtree(workdir)
    code, _, errors = trainings.end(process)
    assert code == TRAINING_FAILED, errors
    (step,) = trainings.saved_steps(workdir)
    output = trainings.finish(trainings.start(workdir))
    assert f"continuing after step {step}" in output
    for ours, theirs in zip(
        trainings.leaves(trainings.state(workdir)),
        trainings.leaves(trainings.state(undisturbed)),
        strict=True,
    ):
        assert (ours == theirs).all()


def test_a_run_that_may_no_longer_write_ends_at_once(tmp_path):
    workdir = tmp_path / "run"
    process = _start_until_saved(workdir)
    checkpoints = workdir / "checkpoints"
    if not _mount("--bind", checkpoints, checkpoints):
        process.kill()
        process.communicate()
        pytest.skip("to make a folder read-only for everyone takes the right to mount it")
    try:
        assert _mount("-o", "remount,ro,bind", checkpoints)
        started = time.monotonic()
        code, _, errors = trainings.end(process)
        took = time.monotonic() - started
    finally:
        subprocess.run(["umount", "-l", checkpoints], check=True)
    assert code == TRAINING_FAILED, errors
    assert "Read-only file system" in trainings.error_line(errors)
    # Five minutes is how long the threads of Orbax wait for a folder that is never created.
    assert took < 120
    assert len(trainings.saved_steps(workdir)) == 1


def _mount(*arguments):
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
