import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from metaformer_jax.training import recipes, sharding
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.guard import Guard
from metaformer_jax.training.metrics import PendingMetrics
from metaformer_jax.training.step import TrainState
from metaformer_jax.weights.workdir import saved_steps


def _state(step):
    return TrainState(
        step=jnp.int32(step),
        params={"head": jnp.full(2, step, jnp.float32)},
        frozen={},
        opt_state={},
        ema={},
        num_skipped=jnp.int32(0),
    )


def test_the_latest_and_the_best_stay(tmp_path):
    accuracies = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(_state(step), [{"loss": step}], recipes.digits())
            # A run that is told to end has no time to evaluate.
            if accuracy is not None:
                checkpoints.evaluated(step, accuracy)
        checkpoints.wait()
        assert saved_steps(tmp_path) == [5, 4, 2]
        assert checkpoints.pending_metrics() == [{"loss": 5}]
        restored = checkpoints.restore(_state(0), recipes.digits())
    np.testing.assert_array_equal(restored.params["head"], 5)


def test_the_best_stays_that_was_evaluated_after_it_was_saved_and_opened_again(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(_state(1), [], recipes.digits())
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.evaluated(1, 0.9)
        for step, accuracy in {2: 0.1, 3: 0.2}.items():
            checkpoints.save(_state(step), [], recipes.digits())
            checkpoints.evaluated(step, accuracy)
        checkpoints.wait()
        assert saved_steps(tmp_path) == [3, 1]


@pytest.mark.parametrize("fsdp", [1, 2])
def test_on_several_devices_saving_compiles_nothing_and_restores_each_array(tmp_path, fsdp):
    mesh = sharding.create_mesh(fsdp=fsdp)
    # Of a shape that no other test has compiled a program for.
    params = {"head": jnp.arange(8 * 24 * 3, dtype=jnp.float32).reshape(8 * 24, 3)}
    shardings = sharding.placed(sharding.parameter_specs(params, mesh), mesh)
    state = dataclasses.replace(_state(1), params=jax.device_put(params, shardings))
    compiled = []

    def record(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(state, [], recipes.digits())
            checkpoints.wait()
            assert not compiled
            restored = checkpoints.restore(state, recipes.digits())
        jax.jit(lambda x: x + len(compiled))(jnp.zeros((7, 5)))
        assert compiled, "nothing is recorded"
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    np.testing.assert_array_equal(restored.params["head"], params["head"])
    assert restored.params["head"].sharding == state.params["head"].sharding


def test_figures_of_steps_after_a_save_do_not_get_into_its_checkpoint(tmp_path):
    pending = PendingMetrics(Guard(tmp_path, [], max_skipped=0))

    def add(step):
        pending._guard.expect(step, np.zeros(1, np.int32))
        figures = {"loss": step, "accuracy": 0.0, "grad_norm": 1.0, "num_skipped": 0}
        pending.add(step, figures, num_replaced=0)

    add(1)
    # A checkpoint is written in the background: its figures may be read much later.
    saved = pending.to_host()
    add(2)
    assert pending.take()["loss"] == 1.5
    assert [figures["loss"] for figures in saved] == [1]


def test_steps_are_not_sent_far_ahead_of_the_devices(tmp_path):
    class Loss:
        is_done = False

        def block_until_ready(self):
            self.is_done = True

    pending = PendingMetrics(Guard(tmp_path, [], max_skipped=0))
    losses = [Loss() for _ in range(5)]
    for step, loss in enumerate(losses, start=1):
        pending.add(step, {"loss": loss}, num_replaced=0)
    assert [loss.is_done for loss in losses] == [True, True, True, False, False]


def test_where_the_shapes_differ_the_parameters_are_named_and_nothing_is_called_damaged(tmp_path):
    def state(**params):
        arrays = {name: jnp.zeros(shape) for name, shape in params.items()}
        return dataclasses.replace(_state(1), params={"head": arrays})

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(bias=(2,), kernel=(3, 2)), [], recipes.digits())
        checkpoints.wait()
        with pytest.raises(ValueError, match="of this run's network, got others:") as caught:
            checkpoints.restore(state(kernel=(3, 4), scale=(1,)), recipes.digits())
    assert str(caught.value).splitlines()[1:4] == [
        "  head.bias: (2,) -> absent",
        "  head.kernel: (3, 2) -> (3, 4)",
        "  head.scale: absent -> (1,)",
    ]
    assert "fresh_head=True" in str(caught.value)


def test_orbax_does_not_ask_whether_the_run_should_end(tmp_path, monkeypatch):
    """It would ask for a step that is long past, and JAX would take the process to be there."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(_state(1), [], recipes.digits())
    assert not asked
    # What it would have done.
    ocp.CheckpointManager.reached_preemption(checkpoints._manager, 1)
    assert asked == [1]
