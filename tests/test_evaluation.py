"""The figures of an evaluation, from what the devices tell of each example."""

import contextlib
import types

import numpy as np
import pytest

from metaformer_jax.training.evaluation import evaluate_state


def test_only_what_is_there_counts_and_five_ranks_are_the_top():
    ranks = np.array([0, 1, 4, 5, 9, 0, 0, 0], np.int32)
    # The last three only fill up.
    mask = np.arange(8) < 5
    outputs = {
        "rank": ranks,
        "mask": mask,
        "loss": np.where(mask, 1.0, 100.0) * [1, 2, 3, 4, 5, 1, 1, 1],
        "prediction": ranks,
        "probability": ranks / 10,
        "label": np.arange(8),
        "index": np.arange(8) + 10,
    }
    halves = [{key: column[part] for key, column in outputs.items()} for part in np.s_[:4, 4:]]
    run = types.SimpleNamespace(
        eval_source=range(5),
        eval_batch_size=4,
        evaluation_batches=lambda: contextlib.nullcontext(halves),
        engine=types.SimpleNamespace(eval_step=lambda state, batch: batch),
    )
    evaluation = evaluate_state(run, None)
    assert evaluation.accuracy == pytest.approx(1 / 5)
    assert evaluation.top5_accuracy == pytest.approx(3 / 5)
    assert evaluation.loss == pytest.approx(3.0)
    assert evaluation.indices.tolist() == [10, 11, 12, 13, 14]
    assert str(evaluation) == "accuracy 20.00% (1 of 5)  top-5 60.00% (3 of 5)  loss 3.0000"
