"""A run that is told to end saves once, says so by its exit code, and goes on where it was."""

import contextlib
import os
import signal
import socket
import subprocess

import pytest
import trainings

from metaformer_jax.exit_codes import (
    INTERRUPTED,
    PREEMPTED,
    USAGE_ERROR,
    end_at_once,
)
from metaformer_jax.training.preemption import PreemptedError, Preemption


def _read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended before {text!r}: {process.stderr.read()}")


def test_told_again_and_again_it_saves_one_checkpoint_and_goes_on(undisturbed, tmp_path):
    process = trainings.start(tmp_path, "--config.data.num_workers=1")
    with trainings.ended(process):
        trainings.wait_for_step(tmp_path, 30, [process])
        # As clusters do it: all processes are told, those that read the data as well; and then
        # again, while it saves.
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        code, output, errors = trainings.end(process)
    assert (code, errors) == (PREEMPTED, "")
    saved = trainings.saved_steps(tmp_path)[-1]
    assert saved >= 30
    assert f"step {saved} of {trainings.LAST_STEP} is saved" in output
    continued = trainings.start(tmp_path, "--accept_config_changes")
    assert f"continuing after step {saved}" in trainings.finish(continued)
    trainings.assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("module", ["absl", "jax", "jaxlib._jax", "metaformer_jax.training.train"])
def test_interrupted_while_it_starts_it_ends_with_one_line(module, tmp_path):
    tamper = {"die": ["import", module], "by": "SIGINT"}
    code, output, errors = trainings.end(trainings.start(tmp_path / "new", tamper=tamper))
    assert (code, output) == (INTERRUPTED, "")
    assert errors == "error: stopped: there was nothing to save yet.\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", PREEMPTED), ("SIGINT", INTERRUPTED)])
def test_told_while_it_waits_for_others_to_join_it_ends_at_once(name, code, tmp_path):
    # Nobody listens there; it would be tried for minutes.
    others = ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
    tamper = {"die": ["join", 0.5], "by": name}
    process = trainings.start(tmp_path / "new", *others, tamper=tamper)
    with trainings.ended(process):
        assert trainings.end(process, seconds=60)[0] == code
    assert not (tmp_path / "new").exists()


def test_a_background_job_ignores_ctrl_c_from_its_start_on(tmp_path):
    tamper = {"die": ["import", "jax"], "by": "SIGINT"}
    # What a shell does: the new process inherits it.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = trainings.start(tmp_path / "new", "--config.batch_size=0", tamper=tamper)
    finally:
        signal.signal(signal.SIGINT, previous)
    code, _, errors = trainings.end(process)
    assert code == USAGE_ERROR
    assert "`config.batch_size` must be positive" in trainings.error_line(errors)


def test_told_while_it_opens_its_data_a_process_alone_ends_however_it_was_started(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = [f"--coordinator_address={address}", "--num_processes=1", "--process_id=0"]
    process = trainings.start(
        tmp_path / "new", *alone, tamper={"slow": 60}, JAX_COORDINATOR_BIND_ADDRESS=address
    )
    with trainings.ended(process):
        _read_until(process, "opening slowly")
        process.send_signal(signal.SIGTERM)
        assert trainings.end(process, seconds=30)[0] == PREEMPTED
    assert not (tmp_path / "new").exists()


def test_told_while_it_compiles_it_ends_at_once(tmp_path):
    # Without what was compiled before it takes many seconds.
    process = trainings.start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    with trainings.ended(process):
        _read_until(process, "compiling the training step")
        process.send_signal(signal.SIGTERM)
        code, output, errors = trainings.end(process)
    assert (code, errors) == (PREEMPTED, "")
    assert output == "told to end: there was nothing to save yet.\n"
    assert not trainings.saved_steps(tmp_path)


def test_told_in_an_evaluation_it_makes_up_for_it(undisturbed, tmp_path):
    # The fifth of six batches is one of the average's evaluation.
    process = trainings.start(tmp_path, tamper={"die": ["evaluation", 5], "by": "SIGTERM"})
    code, output, errors = trainings.end(process)
    assert (code, errors) == (PREEMPTED, "")
    (saved,) = trainings.saved_steps(tmp_path)
    assert f"step {saved} of {trainings.LAST_STEP} is saved" in output
    assert not any("eval/loss" in row for row in trainings.rows(tmp_path))
    trainings.finish(trainings.start(tmp_path))
    trainings.assert_same_run(tmp_path, undisturbed)


def test_told_in_the_last_evaluation_it_makes_up_for_that_too(undisturbed, tmp_path):
    last = 6 * len([row for row in trainings.rows(undisturbed) if "eval/loss" in row])
    process = trainings.start(tmp_path, tamper={"die": ["evaluation", last], "by": "SIGTERM"})
    assert trainings.end(process)[0] == PREEMPTED
    assert trainings.saved_steps(tmp_path)[-1] == trainings.LAST_STEP
    assert "compiling" not in trainings.finish(trainings.start(tmp_path))
    trainings.assert_same_run(tmp_path, undisturbed)


def test_told_again_after_it_saved_a_program_still_says_so():
    previous = signal.signal(signal.SIGTERM, end_at_once)
    try:
        with contextlib.suppress(PreemptedError), Preemption():
            raise PreemptedError("step 3 of 9 is saved")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, end_at_once)
        with contextlib.suppress(KeyError), Preemption():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is end_at_once
    finally:
        signal.signal(signal.SIGTERM, previous)
