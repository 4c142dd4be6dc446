"""Runs of several processes, and of other devices after each start."""

import json
import re
import signal
import socket

import jax
import numpy as np
import pytest
import trainings
from PIL import Image

from metaformer_jax.exit_codes import PREEMPTED, TRAINING_FAILED, USAGE_ERROR


def test_two_processes_train_as_one_and_stop_as_one_and_one_goes_on(undisturbed, tmp_path):
    processes = trainings.start_two(tmp_path)
    with trainings.ended(*processes):
        trainings.wait_for_step(tmp_path, 14, processes)
        # Told to one of them; they agree on a step.
        processes[1].send_signal(signal.SIGTERM)
        codes, outputs, _ = zip(*map(trainings.end, processes), strict=True)
    assert codes == (PREEMPTED, PREEMPTED)
    assert "4 x cpu in 2 processes" in outputs[0]
    # Only one speaks; Gloo reports its connections by itself, and not line by line.
    assert not re.search("step|model|workdir|compil", outputs[1])
    assert "continuing after step" in trainings.finish(trainings.start(tmp_path))
    rows, expected = trainings.rows(tmp_path), trainings.rows(undisturbed)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


def test_two_processes_that_go_on_stop_when_told_before_their_first_step(tmp_path):
    first = trainings.start_two(tmp_path, tampers=[{"die": ["step", 30, 0.0]}] * 2)
    with trainings.ended(*first):
        assert -signal.SIGKILL in [trainings.end(process)[0] for process in first]
    saved = trainings.saved_steps(tmp_path)[-1]
    processes = trainings.start_two(tmp_path)
    with trainings.ended(*processes):
        for line in processes[0].stdout:
            if f"continuing after step {saved}" in line:
                break
        processes[1].send_signal(signal.SIGTERM)
        codes = [trainings.end(process)[0] for process in processes]
    assert codes == [PREEMPTED, PREEMPTED]
    assert saved < trainings.saved_steps(tmp_path)[-1] < trainings.LAST_STEP


def _noted(*paths):
    """The examples of each step, as those who share it noted them."""
    noted = {}
    for path in paths:
        for line in path.read_text().splitlines():
            note = json.loads(line)
            noted.setdefault(note["step"], []).extend(note["indices"])
    return noted


def _largest_difference(actual, expected):
    """`max|a - b| / max|b|` over all arrays."""
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), actual, expected)
    return max(jax.tree.leaves(differences)) / max(
        np.abs(leaf).max() for leaf in trainings.leaves(expected)
    )


def test_devices_and_processes_may_be_others_after_every_start(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    sequence = {}
    for num_devices, dies_in in ((8, 30), (2, 30)):
        note = tmp_path / f"{num_devices} devices"
        tamper = {"die": ["step", dies_in, 0.0], "note": str(note)}
        code, _, errors = trainings.end(
            trainings.start(workdir, num_devices=num_devices, tamper=tamper)
        )
        assert code == -signal.SIGKILL, errors
        sequence |= _noted(note)
    notes = [tmp_path / f"process {index} of 2" for index in range(2)]
    tampers = [{"die": ["step", 30, 0.0], "note": str(note)} for note in notes]
    two = trainings.start_two(workdir, tampers=tampers)
    with trainings.ended(*two):
        assert -signal.SIGKILL in [trainings.end(process)[0] for process in two]
    sequence |= _noted(*notes)
    tamper = {"note": str(tmp_path / "one again")}
    assert "continuing after step" in trainings.finish(trainings.start(workdir, tamper=tamper))
    sequence |= _noted(tmp_path / "one again")
    assert sequence == _noted(undisturbed / "examples.jsonl")
    params, expected = (trainings.state(folder)["params"] for folder in (workdir, undisturbed))
    assert _largest_difference(params, expected) <= 1e-5


@pytest.mark.parametrize("dying", [0, 1])
def test_when_one_of_two_processes_dies_the_other_ends_with_an_error(dying, tmp_path):
    processes = trainings.start_two(tmp_path)
    with trainings.ended(*processes):
        trainings.wait_for_step(tmp_path, 26, processes)
        processes[dying].kill()
        code, _, errors = trainings.end(processes[1 - dying], seconds=60)
    # By an error of the devices, or by JAX itself, whichever notices first.
    assert code in (TRAINING_FAILED, -signal.SIGABRT)
    assert "died" in errors or "crashed" in errors
    if dying == 1:
        # The one left may have saved on its own; it is whole or not there.
        assert "continuing after step" in trainings.finish(trainings.start(tmp_path))
        assert trainings.rows(tmp_path)[-1]["step"] == trainings.LAST_STEP


def test_an_error_of_one_of_two_processes_ends_both(tmp_path):
    processes = trainings.start_two(
        tmp_path, "--config.data.num_workers=1", tampers=(None, {"die": ["worker", 9]})
    )
    with trainings.ended(*processes):
        code, _, errors = trainings.end(processes[1])
        assert code == TRAINING_FAILED
        assert "A worker that reads data has died" in trainings.error_line(errors)
        code, _, errors = trainings.end(processes[0], seconds=60)
    assert code in (TRAINING_FAILED, -signal.SIGABRT)


def test_an_error_that_nobody_foresaw_ends_both(tmp_path):
    processes = trainings.start_two(tmp_path, tampers=(None, {"fail": 8}))
    with trainings.ended(*processes):
        code, _, errors = trainings.end(processes[1])
        assert code == TRAINING_FAILED
        assert "RuntimeError: nobody foresaw this" in errors
        code, _, errors = trainings.end(processes[0], seconds=60)
    assert code in (TRAINING_FAILED, -signal.SIGABRT)


def test_an_evaluation_by_two_processes_ends_when_told(undisturbed):
    tamper = {"die": ["evaluation", 1], "by": "SIGTERM"}
    processes = trainings.start_two(undisturbed, "--mode=eval", tampers=(None, tamper))
    with trainings.ended(*processes):
        assert trainings.end(processes[1], seconds=120)[0] == PREEMPTED


def test_two_processes_with_a_workdir_each_both_end_at_the_start(tmp_path):
    processes = trainings.start_two(tmp_path / "first", second_workdir=tmp_path / "second")
    with trainings.ended(*processes):
        codes, _, errors = zip(
            *(trainings.end(process, seconds=60) for process in processes), strict=True
        )
    assert codes == (USAGE_ERROR, USAGE_ERROR)
    host = socket.gethostname()
    for index, name in enumerate(("first", "second")):
        message = trainings.error_line(errors[index])
        workdir = str(tmp_path / name)
        assert f"got {workdir!r} for process {index} on {host}" in message
        assert f"does not show for process 1 on {host}. Use a folder that all" in message
        assert "Traceback" not in errors[index]
    assert {path.name for path in tmp_path.glob("*/*")} == {"run.lock"}


def test_two_processes_with_other_data_and_configs_both_end_at_the_start(tmp_path):
    for index, num_training in enumerate((8, 7)):
        for split, number in (("train", num_training), ("val", 2)):
            folder = tmp_path / str(index) / split / "class"
            folder.mkdir(parents=True)
            for image in range(number):
                Image.new("L", (8, 8), 10 * image).save(folder / f"{image}.png")
    data = {"data.name": "folder", "data.mean": "(0.5,0.5,0.5)", "data.std": "(0.5,0.5,0.5)"}
    few = {"batch_size": 4, "accumulation_steps": 1, "mixing.group_size": 1, "data.num_workers": 0}
    processes = trainings.start_two(
        tmp_path / "run",
        f"--config.data.root={tmp_path / '0'}",
        second_flags=(
            f"--config.data.root={tmp_path / '1'}",
            "--config.data.num_workers=1",
            "--config.seed=7",
        ),
        arguments=trainings.ARGUMENTS | data | few,
    )
    with trainings.ended(*processes):
        codes, _, errors = zip(
            *(trainings.end(process, seconds=60) for process in processes), strict=True
        )
    assert codes == (USAGE_ERROR, USAGE_ERROR), errors
    host = socket.gethostname()
    for error in errors:
        assert f"some have others than process 0 on {host}:\nprocess 1 on {host}:\n" in error
        assert f"{host}:\n  seed: 0 -> 7\n  training examples: 8 -> 7\nStart all" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num_processes=2"], {}, "must be given together"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            {},
            "`--process_id` must be in [0, 2), got 2",
        ),
        (["--distributed"], {}, "A cluster must be found in the environment with --distributed"),
        # As sbatch sets it; the variables of a step come from srun.
        ([], {"SLURM_NTASKS": "4"}, "with SLURM_NTASKS=4, got none that JAX knows (coordinator_"),
        ([], {"SLURM_NTASKS": "4x"}, "`SLURM_NTASKS` must be a number in the environment, got"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(flags, environment, message, tmp_path):
    code, _, errors = trainings.end(trainings.start(tmp_path / "new", *flags, **environment))
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()
