"""Trainings as real processes, and what they leave."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from metaformer_jax.training.metrics import read_metrics
from metaformer_jax.weights.converted import orbax_handler

REPOSITORY = pathlib.Path(__file__).parents[2]
# Of the smallest network, with all that draws random numbers or keeps a state. It is compiled once
# for all tests: 135 steps on digits, with six checkpoints.
ARGUMENTS = {
    "epochs": 6,
    "batch_size": 64,
    "log_every_steps": 2,
    "model.family": "poolformerv2",
    "model.depths": "(1,1,1,1)",
    "model.dims": "(8,16,16,16)",
    "model.drop_path_rate": 0.3,
    "optimizer.warmup_epochs": 0.25,
    # The pooling of a single token is nothing, and so is the gradient of the norm before it. By the
    # usual 1e-8 Adam would make whole steps of what rounding leaves of it.
    "optimizer.eps": 1e-4,
    "ema.decay": 0.9,
    "accumulation_steps": 2,
    "mixing.mixup_alpha": 0.8,
    "mixing.group_size": 4,
    "erasing_probability": 0.25,
    "mesh.fsdp": 2,
    "checkpoint.every_epochs": 1,
    "eval_every_epochs": 1,
}
LAST_STEP = 135


def start(workdir, *flags, num_devices=4, tamper=None, arguments=None, **environment):
    """Starts the training program on virtual devices, tampered with as `tampered.py` says."""
    program = ["-m", "metaformer_jax.main"]
    if tamper:
        program = [str(pathlib.Path(__file__).parent / "tampered.py")]
        environment |= {"TAMPER": json.dumps(tamper), "PYTHONPATH": str(REPOSITORY)}
    fields = [f"--config.{field}={value}" for field, value in (arguments or ARGUMENTS).items()]
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    return subprocess.Popen(
        [
            *(sys.executable, *program, "--config=configs/digits.py"),
            *(f"--workdir={workdir}", *fields, *flags),
        ],
        cwd=REPOSITORY,
        env=os.environ | devices | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process, *, seconds=240):
    """Exit code, output and errors of a process that ends by itself."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"still running after {seconds} s: {output}{errors}") from None
    return process.returncode, output, errors


def finish(process):
    """The output of a training that reaches its end."""
    code, output, errors = end(process)
    assert code == 0, errors
    return output


def error_line(errors):
    """The one line that is for the user; threads of Orbax, TensorStore and Gloo have their say
    besides, even while it is written."""
    (line,) = re.findall(r"\berror: .*", errors)
    return line


def wait_for_step(workdir, step, processes):
    """Until the metrics tell of a step."""
    until(lambda: any(row["step"] >= step for row in read_metrics(workdir)), processes)


def until(condition, processes):
    """Until something is the case, while the processes run."""
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def saved_steps(workdir):
    """Of all checkpoints that have their name."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def state(workdir, step=None):
    """All arrays of a checkpoint, by default the newest, whatever mesh they were saved from."""
    step = step or saved_steps(workdir)[-1]
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    handler = orbax_handler()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def leaves(tree):
    """The arrays of a state or a part of it."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def read_json(path):
    return json.loads(path.read_text())


def rows(workdir):
    """The metrics, without the speed, which is another each time."""
    return [
        {name: value for name, value in row.items() if not name.startswith("speed/")}
        for row in read_metrics(workdir)
    ]


def assert_same_run(workdir, expected):
    """Every bit of parameters, moments, average and metrics."""
    assert rows(workdir) == rows(expected)
    jax.tree.map(np.testing.assert_array_equal, state(workdir), state(expected))


def start_two(
    workdir,
    *flags,
    second_workdir=None,
    second_flags=(),
    num_devices=2,
    tampers=(None, None),
    **kwargs,
):
    """One training as two processes that speak on the loopback interface only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = [f"--coordinator_address={address}", "--num_processes=2"]
    return [
        start(
            second_workdir if index and second_workdir else workdir,
            *(*together, f"--process_id={index}", *flags, *(second_flags if index else ())),
            num_devices=num_devices,
            tamper={"keep": True} | (tamper or {}),
            # By default the first process would listen on every network.
            JAX_COORDINATOR_BIND_ADDRESS=address,
            **kwargs,
        )
        for index, tamper in enumerate(tampers)
    ]


@contextlib.contextmanager
def ended(*processes):
    """Kills what a failing test would leave running."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
