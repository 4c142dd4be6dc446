"""A run that has no room to save says so, and loses nothing that was saved."""

import re
import subprocess

import pytest
import trainings

from metaformer_jax.exit_codes import TRAINING_FAILED


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for some of the six checkpoints of 0.8 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    try:
        result = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount` to make a small file system with")
    if result.returncode:
        pytest.skip("a small file system takes the right to mount one, as root has")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_on_a_full_disk_a_run_stops_and_with_room_ends_as_the_undisturbed(undisturbed, small_disk):
    workdir = small_disk / "run"
    code, _, errors = trainings.end(trainings.start(workdir, "--config.checkpoint.keep=100"))
    assert code == TRAINING_FAILED, errors
    message = trainings.error_line(errors)
    assert "A checkpoint could not be written" in message or "No space left" in message
    # No later than with the next save: it is not trained on without.
    steps = [row["step"] for row in trainings.rows(workdir) if "eval/loss" in row]
    saved = trainings.saved_steps(workdir)
    assert steps.index(saved[-1]) >= len(steps) - 3
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    output = trainings.finish(trainings.start(workdir, "--config.checkpoint.keep=100"))
    assert re.search(f"continuing after step {saved[-1]}", output)
    trainings.assert_same_run(workdir, undisturbed)
