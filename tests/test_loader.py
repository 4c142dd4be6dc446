import collections
import io
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from metaformer_jax.data import loader
from metaformer_jax.data.loader import DataError, Share, Workers
from metaformer_jax.data.transforms import BadImageError, decode


def _encode(value):
    file = io.BytesIO()
    Image.new("L", (1, 1), value).save(file, "PNG")
    return file.getvalue()


class Numbers:
    """Example i is an image of one pixel of value i; some of them are no image."""

    class_names = ("number",)
    channels = 1

    def __init__(self, length, bad=()):
        self._images = [b"no image" if i in bad else _encode(i) for i in range(length)]

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return {"image": self._images[index], "label": index}

    def describe(self, index):
        return f"number {index}"


def _noisy(data, rng):
    value = np.asarray(decode(data, channels=1))[0, 0]
    return np.append(rng.integers(0, 256, 15, np.uint8), value).reshape(4, 4, 1)


def _pixels(data):
    return np.atleast_3d(decode(data, channels=1))


def _training(
    steps=8, source=None, start_step=0, workers=None, max_bad_fraction=0.0, seed=3, **share
):
    with loader.training_batches(
        source or Numbers(10),
        _noisy,
        share=Share(**{"batch_size": 4, **share}),
        seed=seed,
        start_step=start_step,
        workers=workers,
        max_bad_fraction=max_bad_fraction,
    ) as batches:
        return list(itertools.islice(batches, steps))


def _evaluation(source=None, max_bad_fraction=0.0, **share):
    with loader.evaluation_batches(
        source or Numbers(10),
        _pixels,
        share=Share(**share),
        max_bad_fraction=max_bad_fraction,
    ) as batches:
        return list(batches)


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_each_epoch_holds_every_example_once_in_another_order():
    batches = _training(steps=5)
    labels = np.concatenate([batch["label"] for batch in batches])
    first, second = labels[:10], labels[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches]), labels)
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images[:, 3, 3, 0], labels)


def test_augmentation_differs_between_epochs_and_examples():
    images = np.concatenate([batch["image"] for batch in _training(steps=10)])
    assert len({image.tobytes() for image in images}) == 40


def test_a_resumed_run_sees_the_batches_it_would_have_seen():
    _assert_equal(_training(start_step=5, steps=3), _training()[5:])


@pytest.mark.parametrize("workers", [Workers(num_threads=1), Workers(num_threads=8)])
def test_threads_do_not_change_the_batches(workers):
    _assert_equal(_training(workers=workers), _training())


def test_workers_do_not_change_the_batches():
    workers = Workers(num_workers=3, num_threads=1)
    expected = _training(batch_size=48, source=Numbers(100))
    _assert_equal(_training(batch_size=48, source=Numbers(100), workers=workers), expected)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_together_hold_the_global_batch_of_one_in_its_order(num_processes):
    shares = [
        _training(process_index=index, num_processes=num_processes, batch_size=8)
        for index in range(num_processes)
    ]
    together = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    _assert_equal(together, _training(batch_size=8))


def test_a_step_far_away_is_reached_without_reading_what_is_before():
    class Counting(Numbers):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    workers = Workers(num_threads=1)
    _training(source=Counting(10), start_step=10**9, steps=1, workers=workers)
    assert Counting.reads < 40


def test_another_seed_gives_another_order():
    assert _training()[0]["label"].tolist() != _training(seed=4)[0]["label"].tolist()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_evaluation_counts_every_example_once_on_any_number_of_processes(num_processes):
    batches = [
        batch
        for index in range(num_processes)
        for batch in _evaluation(batch_size=8, process_index=index, num_processes=num_processes)
    ]
    # Every process runs as many steps, of one shape, or the last would wait for ever.
    assert len(batches) == 2 * num_processes
    assert {batch["image"].shape for batch in batches} == {(8 // num_processes, 1, 1, 1)}
    seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "remedy"),
    [(4, 3, "Use 3 or 6"), (2, 3, "Use 3"), (0, 1, "Use 1")],
)
def test_batches_that_do_not_divide_are_refused(batch_size, num_processes, remedy):
    with pytest.raises(
        ValueError, match=rf"of the {num_processes} processes, got {batch_size}. {remedy}\."
    ):
        Share(batch_size=batch_size, num_processes=num_processes)


def test_a_bad_example_is_replaced_by_the_next_good_one_and_counted():
    source = Numbers(10, bad=(4, 9, 0))
    batches = _training(source=source, steps=5, max_bad_fraction=0.3)
    labels, index, bad = (
        np.concatenate([batch[key] for batch in batches]) for key in ("label", "index", "bad")
    )
    replaced = {4: 5, 9: 1, 0: 1}
    np.testing.assert_array_equal(labels, [replaced.get(i, i) for i in index])
    np.testing.assert_array_equal(bad, [i if i in replaced else -1 for i in index])
    _assert_equal(_training(source=source, steps=5, max_bad_fraction=0.3), batches)


def test_more_bad_examples_than_allowed_stop_the_run_and_are_named():
    with pytest.raises(DataError, match=r"At most 2 of 10 .*got 3:") as error:
        _training(source=Numbers(10, bad=(2, 4, 7)), steps=5, max_bad_fraction=0.2)
    for index in (2, 4, 7):
        assert f"number {index}: " in str(error.value)
    with pytest.raises(DataError, match="got 100 in a row that are not, from number"):
        _training(source=Numbers(10, bad=range(10)), max_bad_fraction=1.0)


def test_a_bad_example_does_not_count_in_an_evaluation():
    batches = _evaluation(source=Numbers(10, bad=(3,)), batch_size=4, max_bad_fraction=0.1)
    seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert seen.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def _wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_worker_ends_the_run_with_an_error():
    workers = Workers(num_workers=2, num_threads=1)
    with loader.training_batches(
        Numbers(64), _noisy, share=Share(batch_size=32), seed=0, workers=workers
    ) as batches:
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="A worker that reads data has died"):
            collections.deque(batches, maxlen=0)
    assert not multiprocessing.active_children()


def large(data, rng):
    """So large that a worker is still sending one batch when it is killed."""
    decode(data, channels=1)
    return rng.integers(0, 256, (64, 64, 3), np.uint8)


def _run(program, tmp_path):
    """Ends as the program does; it begins with two workers and their batches."""
    start = """
        import multiprocessing, os, pathlib, re, signal, sys
        sys.path.insert(0, TESTS)
        from test_loader import Numbers, large
        from metaformer_jax.data import loader

        def batches(bad=()):
            return loader.training_batches(
                Numbers(64, bad),
                large,
                share=loader.Share(batch_size=16),
                seed=0,
                workers=loader.Workers(num_workers=2, num_threads=1),
            )
    """
    tests = repr(str(pathlib.Path(__file__).parent))
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(start).replace("TESTS", tests) + textwrap.dedent(program))
    # What outlives the program keeps its output open.
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)


def test_workers_end_with_a_killed_parent_and_share_nothing_that_could_stay(tmp_path):
    program = """
        if __name__ == "__main__":
            running = batches()
            next(running)
            pids = [child.pid for child in multiprocessing.active_children()]
            maps = [pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in (*pids, os.getpid())]
            print(*pids)
            print(*re.findall("/dev/shm/.*", "".join(maps)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = _run(program, tmp_path)
    assert result.returncode == -signal.SIGKILL
    pids, memory = (line.split() for line in result.stdout.splitlines())
    assert len(pids) == 2
    assert not memory
    _wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}/cmdline").exists() for pid in pids))


def test_a_batch_that_is_kept_holds_none_of_the_workers_memory(tmp_path):
    program = """
        if __name__ == "__main__":
            with batches() as running:
                kept = [next(running) for _ in range(3)]
            print(sum(batch["image"].size for batch in kept))
    """
    result = _run(program, tmp_path)
    # What is left behind is told at the end.
    assert (result.stdout, result.stderr) == (f"{3 * 16 * 64 * 64 * 3}\n", "")


def test_a_program_that_ends_with_an_error_leaves_nothing_but_the_error(tmp_path):
    program = """
        if __name__ == "__main__":
            try:
                with batches(bad=(5,)) as running:
                    for _ in range(4):
                        next(running)
            except loader.DataError as error:
                print(error, file=sys.stderr)
                # And with it all that stood in its frames.
                kept = error
    """
    result = _run(program, tmp_path)
    first, *named = result.stderr.splitlines()
    assert first == "At most 0 of 64 examples may be bad (`config.data.max_bad_fraction`), got 1:"
    assert len(named) == 1


class Unreachable(Numbers):
    """Example 4 lies where nothing can be read."""

    def __getitem__(self, index):
        if index == 4:
            raise OSError("stale file handle")
        return super().__getitem__(index)


def test_an_example_that_cannot_be_reached_is_bad_as_a_broken_one_is():
    batches = _training(source=Unreachable(10), steps=5, max_bad_fraction=0.1)
    labels, index = (
        np.concatenate([batch[key] for batch in batches]) for key in ("label", "index")
    )
    np.testing.assert_array_equal(labels, np.where(index == 4, 5, index))
    with pytest.raises(DataError, match="got 1:\n  number 4: stale file handle"):
        _training(source=Unreachable(10), steps=5)


def test_the_first_example_counts_as_any_other_when_it_is_bad():
    with pytest.raises(DataError, match="got 1:\n  number 0: "):
        _training(source=Numbers(10, bad=(0,)), steps=5)


def test_a_training_takes_what_stands_in_for_a_bad_example():
    batches = _training(source=Numbers(10, bad=(3,)), steps=5, max_bad_fraction=0.1)
    assert all(batch["mask"].all() for batch in batches)


def test_an_evaluation_stops_at_bad_examples_too():
    source = Numbers(10, bad=(3,))
    with pytest.raises(DataError, match=r"At most 0 of 10 .*got 1:\n  number 3: "):
        _evaluation(source=source, batch_size=4)
    with (
        loader.evaluation_batches(source, _pixels, share=Share(batch_size=4)) as batches,
        pytest.raises(DataError, match="got 1:"),
    ):
        list(batches)


def test_what_ails_an_image_is_told_though_it_can_be_decoded():
    def transform(data):
        if (pixels := _pixels(data)) == 2:
            raise BadImageError("1x3000 pixels")
        return pixels

    with (
        loader.evaluation_batches(Numbers(4), transform, share=Share(batch_size=4)) as batches,
        pytest.raises(DataError, match=r"got 1:\n  number 2: 1x3000 pixels$"),
    ):
        list(batches)


def test_an_interrupt_is_left_to_the_main_process():
    workers = Workers(num_workers=2, num_threads=1)
    with loader.training_batches(
        Numbers(64), _noisy, share=Share(batch_size=32), seed=0, workers=workers
    ) as batches:
        before = next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        # More than the workers had ready.
        after = [next(batches) for _ in range(40)]
    assert not multiprocessing.active_children()
    expected = _training(batch_size=32, source=Numbers(64), steps=41, seed=0)
    _assert_equal([before, *after], expected)


@pytest.mark.parametrize("batch_size", [48, 34, 17])
def test_batches_of_any_size_hold_every_example_once(batch_size):
    # More than a worker hands over at a time, and sizes that do not divide well.
    seen = [
        batch["label"][batch["mask"]]
        for batch in _evaluation(source=Numbers(100), batch_size=batch_size)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), range(100))
    epoch = _training(source=Numbers(2 * batch_size), batch_size=batch_size, steps=2)
    labels = np.concatenate([batch["label"] for batch in epoch])
    assert sorted(labels) == list(range(2 * batch_size))
