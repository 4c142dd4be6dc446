import jax.numpy as jnp
import numpy as np

from metaformer_jax.training import recipes
from metaformer_jax.training.checkpoint import Checkpoints
from metaformer_jax.training.step import TrainState


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
            # A run that is told to end has no time to evaluate.
            figures = None if accuracy is None else {"accuracy": accuracy}
            checkpoints.save(_state(step), figures, [{"loss": step}], recipes.digits())
        checkpoints.wait()
        assert {int(path.name) for path in tmp_path.iterdir()} == {2, 4, 5}
        assert checkpoints.pending_metrics() == [{"loss": 5}]
        restored = checkpoints.restore(_state(0), recipes.digits())
    np.testing.assert_array_equal(restored.params["head"], 5)
