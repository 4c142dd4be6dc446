import itertools

import numpy as np
import pytest

from metaformer_jax.data import loader


class Numbers:
    """Example i is an image of one pixel of value i."""

    class_names = ("number",)

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": np.full((1, 1, 1), index, np.uint8), "label": index}


def _noisy(example, rng):
    return {"image": rng.integers(0, 256, (4, 4, 1), np.uint8), "label": example["label"]}


def _training(start_step=0, steps=8, **kwargs):
    arguments = {"batch_size": 4, "seed": 3, "start_step": start_step, **kwargs}
    batches = loader.training_batches(Numbers(10), _noisy, **arguments)
    return list(itertools.islice(batches, steps))


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for key in ("image", "label", "mask"):
            np.testing.assert_array_equal(one[key], other[key])


def test_each_epoch_holds_every_example_once_in_another_order():
    labels = np.concatenate([batch["label"] for batch in _training(steps=5)])
    first, second = labels[:10], labels[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_augmentation_differs_between_epochs_and_examples():
    images = np.concatenate([batch["image"] for batch in _training(steps=10)])
    assert len({image.tobytes() for image in images}) == 40


def test_a_resumed_run_sees_the_batches_it_would_have_seen():
    _assert_equal(_training(start_step=5, steps=3), _training()[5:])


def test_threads_do_not_change_the_batches():
    _assert_equal(_training(num_threads=1), _training(num_threads=8))


def test_two_processes_share_the_global_batch_of_one():
    shares = [_training(process_index=index, num_processes=2) for index in range(2)]
    for whole, *parts in zip(_training(), *shares, strict=True):
        assert [len(part["label"]) for part in parts] == [2, 2]
        for key in ("image", "label"):
            together = sorted(row.tobytes() for part in parts for row in part[key])
            assert together == sorted(row.tobytes() for row in whole[key])


def test_another_seed_gives_another_order():
    assert _training()[0]["label"].tolist() != _training(seed=4)[0]["label"].tolist()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_evaluation_counts_every_example_once_on_any_number_of_processes(num_processes):
    batches = [
        batch
        for index in range(num_processes)
        for batch in loader.evaluation_batches(
            Numbers(10),
            lambda example: example,
            batch_size=8,
            process_index=index,
            num_processes=num_processes,
        )
    ]
    # Every process runs as many steps, of one shape, or the last would wait for ever.
    assert len(batches) == 2 * num_processes
    assert {batch["image"].shape for batch in batches} == {(8 // num_processes, 1, 1, 1)}
    seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("batches", [loader.training_batches, loader.evaluation_batches])
def test_batches_that_do_not_divide_are_refused(batches):
    arguments = {"seed": 0} if batches is loader.training_batches else {}
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
        next(batches(Numbers(10), _noisy, batch_size=4, num_processes=3, **arguments))
