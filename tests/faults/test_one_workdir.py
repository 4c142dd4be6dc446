"""A workdir has one run at a time."""

import shutil
import signal

import trainings

from metaformer_jax.exit_codes import USAGE_ERROR


def test_of_two_runs_in_one_workdir_the_second_is_refused(undisturbed, tmp_path):
    first = trainings.start(tmp_path)
    with trainings.ended(first):
        trainings.wait_for_step(tmp_path, 2, [first])
        code, _, errors = trainings.end(trainings.start(tmp_path, "--accept_config_changes"))
        assert code == USAGE_ERROR
        message = trainings.error_line(errors)
        assert "`workdir` must not be in use" in message
        assert f"process {first.pid} on " in message
        # And the first has not noticed.
        trainings.finish(first)
    trainings.assert_same_run(tmp_path, undisturbed)


def test_a_killed_run_leaves_its_workdir_free_though_others_read_it(undisturbed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    for step in trainings.saved_steps(copy)[1:]:
        shutil.rmtree(copy / "checkpoints" / str(step))
    first = trainings.start(copy, "--config.data.num_workers=1", "--accept_config_changes")
    with trainings.ended(first):
        step = trainings.saved_steps(copy)[0]
        trainings.until(lambda: trainings.saved_steps(copy)[-1] > step, [first])
        # An evaluation of the last checkpoint takes nothing from the run.
        evaluated = trainings.start(copy, "--mode=eval")
        assert "their average" in trainings.finish(evaluated)
        first.send_signal(signal.SIGKILL)
        trainings.end(first)
    trainings.finish(trainings.start(copy, "--accept_config_changes"))
    trainings.assert_same_run(copy, undisturbed)
