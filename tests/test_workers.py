"""Laws of worker processes: order, errors, and an end in every case."""

import collections
import contextlib
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from metaformer_jax.data.workers import (
    Chunk,
    LocalChunks,
    WorkerDiedError,
    WorkerPool,
    sigterm_waiting,
)


class Counted:
    """Chunk i is two images of value i."""

    def __init__(self, length=7, shape=(3, 2, 1), dtype=np.uint8):
        self.length, self.shape, self.dtype = length, shape, dtype

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Chunk([np.full(self.shape, index, self.dtype)] * 2, {"index": index})


def pool(chunks, num_workers=2, num_threads=1):
    return contextlib.closing(WorkerPool(chunks, num_workers=num_workers, num_threads=num_threads))


@pytest.mark.parametrize(("num_workers", "num_threads"), [(1, 0), (2, 3), (3, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_chunks_come_in_order_and_end(num_workers, num_threads, dtype):
    with (
        pool(Counted(6, dtype=dtype), num_workers, num_threads) as chunks,
        contextlib.closing(LocalChunks(Counted(6, dtype=dtype), num_threads=0)) as expected,
    ):
        for first in (0, 2, 4):
            images, about = chunks.take(2)
            assert about == [{"index": first}, {"index": first + 1}]
            np.testing.assert_array_equal(images, expected.take(2)[0], strict=True)
        for ended in (chunks, expected):
            with pytest.raises(StopIteration):
                ended.take(2)
    assert not multiprocessing.active_children()


class Failing(Counted):
    """Has no chunk 3."""

    def __init__(self, error, *arguments):
        super().__init__()
        self.error, self.arguments = error, arguments

    def __getitem__(self, index):
        if index == 3:
            raise self.error(*self.arguments)
        return super().__getitem__(index)


def test_an_error_arrives_as_it_was_raised_with_the_workers_traceback():
    with pool(Failing(KeyError, "no such label")) as chunks:
        chunks.take(3)
        with pytest.raises(KeyError, match="no such label") as error:
            chunks.take(1)
        assert "raise self.error(" in "".join(error.value.__notes__)
        with pytest.raises(StopIteration):
            chunks.take(1)
    assert not multiprocessing.active_children()


class TwoPartsError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_an_error_that_does_not_travel_arrives_in_words():
    with (
        pool(Failing(TwoPartsError, "this", "that")) as chunks,
        pytest.raises(RuntimeError, match="TwoPartsError: this and that"),
    ):
        chunks.take(4)


class Growing(Counted):
    """The images of each chunk are larger than those before."""

    def __getitem__(self, index):
        return Chunk([np.zeros((index + 1, 2, 1), np.uint8)], {})


def test_images_of_one_batch_have_one_shape():
    with (
        pool(Growing()) as chunks,
        pytest.raises(ValueError, match=r"one shape and type, got \(1, 2, 1\) .* \(2, 2, 1\) "),
    ):
        chunks.take(2)


class Endless(Counted):
    """Chunk 1 is never made."""

    def __getitem__(self, index):
        if index == 1:
            threading.Event().wait()
        return super().__getitem__(index)


@pytest.mark.parametrize("end", ["close", "leave"])
def test_workers_end_when_they_are_closed_whatever_they_are_doing(end):
    chunks = WorkerPool(Endless(), num_workers=2, num_threads=1)
    chunks.take(1)
    assert len(multiprocessing.active_children()) == 2
    if end == "close":
        chunks.close()
    del chunks
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("taken", [0, 2])
def test_a_killed_worker_is_noticed_with_its_signal(taken):
    with pool(Counted(1000, shape=(64, 64, 3))) as chunks:
        if taken:
            chunks.take(taken)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        taken_after = (chunks.take(2) for _ in range(100))
        with pytest.raises(WorkerDiedError, match=r"input worker \d, exit code -9"):
            collections.deque(taken_after, maxlen=0)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/maps").exists(), reason="Linux tells what is mapped"
)
def test_workers_have_nothing_in_common_with_this_process_that_has_a_name():
    def named(pid):
        maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
        return set(re.findall("/dev/shm/.*", maps))

    before = named(os.getpid())
    with pool(Counted(1000, shape=(64, 64, 3))) as chunks:
        chunks.take(4)
        pids = [worker.pid for worker in multiprocessing.active_children()]
        assert len(pids) == 2
        assert [named(pid) for pid in pids] == [set(), set()]
        assert named(os.getpid()) == before


def test_what_is_started_hears_sigterm_only_when_it_can_answer():
    code = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with sigterm_waiting():
        started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert started.stdout == "True\n"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    # A worker at work has a handler, and is open to it.
    with pool(Counted(100), 1) as chunks:
        chunks.take(1)
        (worker,) = multiprocessing.active_children()
        status = pathlib.Path(f"/proc/{worker.pid}/status").read_text()
        masks = dict(re.findall(r"(Sig\w+):\s+(\w+)", status))
        bit = 1 << signal.SIGTERM - 1
        assert not int(masks["SigBlk"], 16) & bit
        assert int(masks["SigCgt"], 16) & bit
