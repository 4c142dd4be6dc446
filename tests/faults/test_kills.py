"""A run that is killed again and again ends with the bits of one that was left in peace."""

import os
import random
import signal
import time

import pytest
import trainings

from metaformer_jax.exit_codes import TRAINING_FAILED

ARGUMENTS = trainings.ARGUMENTS | {"checkpoint.every_epochs": 0.25, "eval_every_epochs": 0.25}
# Of each moment so many kills; a run of 24 checkpoints is not finished before all are done.
KILLS = {
    "start": 2,
    "step": 5,
    "save": 5,
    "commit": 2,
    "committed": 2,
    "evaluation": 2,
    "metrics": 2,
    "deletion": 1,
    "worker": 2,
}
# Another one tries other moments: METAFORMER_JAX_FAULT_SEED=1 make test ARGS=tests/faults
SEED = int(os.environ.get("METAFORMER_JAX_FAULT_SEED", 0))


def _drawn_kills():
    """Moments in a random order, each with random times."""
    draw = random.Random(SEED)
    moments = [moment for moment, count in KILLS.items() for _ in range(count)]
    draw.shuffle(moments)
    for moment in moments:
        if moment == "start":
            yield moment, draw.uniform(0, 8)
        elif moment == "step":
            yield moment, draw.randint(1, 7), draw.uniform(0, 0.03)
        elif moment == "save":
            yield moment, 1, draw.uniform(0, 0.15)
        elif moment in ("metrics", "evaluation", "worker"):
            yield moment, draw.randint(1, 6)
        else:
            yield moment, 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    trainings.finish(trainings.start(workdir, arguments=ARGUMENTS))
    return workdir


def test_a_run_killed_at_least_20_times_ends_bit_for_bit_as_the_undisturbed(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    num_kills = num_half_saved = 0
    for moment, *arguments in _drawn_kills():
        flags = ["--accept_config_changes", "--config.data.num_workers=1"]
        process = trainings.start(
            workdir,
            *(flags if moment == "worker" else flags[:1]),
            arguments=ARGUMENTS,
            tamper=None if moment == "start" else {"die": [moment, *arguments]},
        )
        if moment == "start":
            time.sleep(*arguments)
            process.kill()
        code, output, errors = trainings.end(process)
        expected = TRAINING_FAILED if moment == "worker" else -signal.SIGKILL
        assert code == expected, (moment, arguments, output, errors)
        if moment == "worker":
            assert "A worker that reads data has died" in trainings.error_line(errors)
        num_kills += 1
        num_half_saved += any(workdir.glob("checkpoints/*tmp*"))
    assert num_kills >= 20
    # Those that died with a checkpoint half written.
    assert num_half_saved >= KILLS["commit"]
    output = trainings.finish(
        trainings.start(workdir, "--accept_config_changes", arguments=ARGUMENTS)
    )
    # The last of all these lives had something left to do.
    assert "continuing after step" in output
    trainings.assert_same_run(workdir, undisturbed)
    steps = [row["step"] for row in trainings.rows(workdir) if "train/loss" in row]
    assert steps == [*range(2, 135, 2), 135]
    assert not list(workdir.glob("damaged/*"))
