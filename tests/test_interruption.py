"""Runs as real processes: killed, told to end, and two that are one."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from metaformer_jax.main import PREEMPTED, TRAINING_FAILED
from metaformer_jax.training.metrics import read_metrics
from metaformer_jax.weights.converted import orbax_handler

REPOSITORY = pathlib.Path(__file__).parent.parent
# Of the smallest network: four epochs, 45 steps.
ARGUMENTS = {
    "epochs": 4,
    "batch_size": 128,
    "log_every_steps": 2,
    "model.family": "poolformerv2",
    "model.depths": "(1,1,1,1)",
    "model.dims": "(8,16,16,16)",
    "model.drop_path_rate": 0.3,
    "optimizer.warmup_epochs": 0.5,
    "ema.decay": 0.9,
    "accumulation_steps": 2,
    "mesh.fsdp": 2,
    "checkpoint.every_epochs": 1,
}
LAST_STEP = 45


def _start(workdir, *flags, num_devices=8, **environment):
    arguments = [f"--config.{field}={value}" for field, value in ARGUMENTS.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "metaformer_jax.main", "--config=configs/digits.py"),
            *(f"--workdir={workdir}", *arguments, *flags),
        ],
        cwd=REPOSITORY,
        env=os.environ
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def _start_two(workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    # By default the first process would listen on every network.
    loopback = {"JAX_COORDINATOR_BIND_ADDRESS": address}
    return [
        _start(workdir, *flags, f"--process_id={i}", num_devices=4, **loopback) for i in range(2)
    ]


def _wait_for_step(workdir, step, processes):
    end = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_metrics(workdir)):
        assert time.monotonic() < end
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def _state(workdir):
    """All arrays of the last checkpoint, whatever mesh they were saved from."""
    path = (workdir / "checkpoints" / str(LAST_STEP) / "state").absolute()
    handler = orbax_handler()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _rows(workdir):
    """Without the speed, which is another each time."""
    return [
        {name: value for name, value in row.items() if not name.startswith("speed/")}
        for row in read_metrics(workdir)
    ]


def _assert_same_run(workdir, expected):
    assert _rows(workdir) == _rows(expected)
    jax.tree.map(np.testing.assert_array_equal, _state(workdir), _state(expected))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    _finish(_start(workdir))
    return workdir


def test_a_killed_run_ends_bit_for_bit_as_the_undisturbed(undisturbed, tmp_path):
    process = _start(tmp_path)
    _wait_for_step(tmp_path, 26, [process])
    process.kill()
    process.communicate()
    # Which of the checkpoints was whole by then is a matter of chance.
    output = _finish(_start(tmp_path))
    assert "compiling the training step" in output
    _assert_same_run(tmp_path, undisturbed)


def test_a_run_told_to_end_says_so_by_its_exit_code_and_goes_on(undisturbed, tmp_path):
    process = _start(tmp_path, "--config.data.num_workers=1")
    _wait_for_step(tmp_path, 14, [process])
    # As clusters do it: all processes are told, those that read the data as well.
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (PREEMPTED, "")
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"step {saved} of 45 is saved" in output
    continued = _start(tmp_path, "--accept_config_changes")
    assert f"continuing after step {saved}" in _finish(continued)
    _assert_same_run(tmp_path, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for about two checkpoints."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", tmp_path]
    try:
        result = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount` to make a small file system with")
    if result.returncode:
        pytest.skip("a small file system takes the right to mount one, as root has")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_on_a_full_disk_a_run_stops_and_with_room_ends_as_the_undisturbed(undisturbed, small_disk):
    process = _start(small_disk / "run", "--config.checkpoint.keep=10")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == TRAINING_FAILED, errors
    # Orbax's threads have their say besides.
    (message,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "A checkpoint could not be written" in message or "No space left" in message
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    output = _finish(_start(small_disk / "run", "--config.checkpoint.keep=10"))
    assert re.search("continuing after step (12|23|34)", output)
    _assert_same_run(small_disk / "run", undisturbed)


def test_two_processes_train_as_one_and_stop_as_one_and_one_goes_on(undisturbed, tmp_path):
    processes = _start_two(tmp_path)
    _wait_for_step(tmp_path, 14, processes)
    # Told to one of them; they agree on a step.
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [PREEMPTED] * 2
    assert "8 x cpu in 2 processes" in outputs[0]
    # Only one speaks; Gloo reports its connections by itself, and not line by line.
    assert not re.search("step|model|workdir|compil", outputs[1])
    assert "continuing after step" in _finish(_start(tmp_path, num_devices=4))
    rows, expected = _rows(tmp_path), _rows(undisturbed)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


def test_a_report_of_versions_and_config_lies_in_each_checkpoint(undisturbed):
    about = json.loads(
        (undisturbed / "checkpoints" / str(LAST_STEP) / "about" / "metadata").read_text()
    )
    assert about["versions"]["jax"] == jax.__version__
    assert about["config"]["ema.decay"] == 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "must be given together"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "`--process_id` must be in [0, 2), got 2",
        ),
        (["--distributed"], "`--distributed` must be left out where no cluster is found"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(flags, message, tmp_path):
    process = _start(tmp_path / "new", *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()
