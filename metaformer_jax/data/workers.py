"""Processes that make chunks of examples, and the way from them to this process.

Each is tied to this one by a pair of connected sockets, and by nothing else. These have no name:
whichever process is killed, and when, the system takes them back. Shared memory and semaphores have
one, and stay for ever if a process is killed between making them and telling of it.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import cloudpickle
import grain
import numpy as np

# How long workers go on that are told to end.
_GRACE_SECONDS = 60.0
# How long one may take to end whose connection has.
_END_SECONDS = 25.0
_LENGTH = struct.Struct("!Q")


class WorkerDiedError(RuntimeError):
    """A worker ended by itself."""


class Chunk(NamedTuple):
    """What is handed over at a time.

    Attributes:
        images: arrays of one shape and type.
        about: what goes with them, in few bytes.
    """

    images: Sequence[np.ndarray]
    about: Any


class Chunks(Protocol):
    """Every chunk by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Chunk: ...


class LocalChunks:
    """All chunks in order, made by threads of this process.

    Args:
        chunks: what is asked for.
        num_threads: none makes each chunk when it is taken.
        part: of the chunks; by default all.
    """

    def __init__(self, chunks: Chunks, *, num_threads: int, part: slice = slice(None)):
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=2 * max(1, num_threads)
        )
        source: Any = chunks
        self._iterator: Iterator[Chunk] = iter(
            grain.MapDataset.source(source)[part].to_iter_dataset(options)
        )

    def __iter__(self) -> Iterator[Chunk]:
        return self._iterator

    def close(self) -> None:
        """Ends the threads, and with them the chunks."""
        closed: Any = self._iterator
        self._iterator = iter(())
        if hasattr(closed, "close"):
            closed.close()

    def take(self, count: int) -> tuple[np.ndarray, list[Any]]:
        """See `WorkerPool.take`."""
        chunks = [next(self._iterator) for _ in range(count)]
        images = np.stack([image for chunk in chunks for image in chunk.images])
        return images, [chunk.about for chunk in chunks]


class WorkerPool:
    """All chunks in order, made by processes in turn.

    Args:
        chunks: goes to each worker, by cloudpickle.
        num_workers: processes.
        num_threads: in each of them; one at least.
    """

    def __init__(self, chunks: Chunks, *, num_workers: int, num_threads: int):
        self._next, self._length = 0, len(chunks)
        self._sockets: list[socket.socket] = []
        self._processes: list[Any] = []
        # At exit multiprocessing tells workers to end, who would take their grace; this is first.
        self._close = multiprocessing.util.Finalize(
            self, _close, args=(self._sockets, self._processes), exitpriority=1
        )
        for index in range(num_workers):
            here, there = socket.socketpair()
            self._sockets.append(here)
            process = multiprocessing.get_context("spawn").Process(
                target=_work,
                args=(there, slice(index, None, num_workers), max(1, num_threads)),
                name=f"input worker {index}",
                daemon=True,
            )
            # Only the worker's may stay open, or its end would not be seen.
            with there, sigterm_waiting():
                process.start()
            self._processes.append(process)
        # As an argument each worker would have to take it before the next one starts.
        for connection in self._sockets:
            with contextlib.suppress(ConnectionError):
                _send(connection, chunks)

    def close(self) -> None:
        """Ends the workers, and with them the chunks."""
        self._close()

    def take(self, count: int) -> tuple[np.ndarray, list[Any]]:
        """The images of the next chunks in one array, and what goes with each of these.

        Raises:
            StopIteration: there are no more.
            WorkerDiedError: a worker ended by itself.
            Exception: whatever making a chunk raised.
        """
        if self._next >= self._length or not self._close.still_active():
            raise StopIteration
        try:
            return self._take(count)
        except BaseException:
            self.close()
            raise

    def _take(self, count: int) -> tuple[np.ndarray, list[Any]]:
        images, abouts = np.empty(0), []
        for number in range(count):
            worker = self._next % len(self._sockets)
            head = self._answer(worker, _receive)
            if isinstance(head, Exception):
                raise head
            shape, dtype, about = head
            if not number:
                images = np.empty((count, *shape), dtype)
            if (images.shape[1:], images.dtype) != (shape, dtype):
                raise ValueError(
                    f"All images of a batch must have one shape and type, got {images.shape[2:]} "
                    f"{images.dtype} and {shape[1:]} {dtype}. Let the transform give such."
                )
            self._answer(worker, _receive_into, memoryview(images[number]).cast("B"))
            abouts.append(about)
            self._next += 1
        return images.reshape(-1, *images.shape[2:]), abouts

    def _answer(self, worker: int, receive: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return receive(self._sockets[worker], *arguments)
        except ConnectionError as error:
            process = self._processes[worker]
            process.join(_END_SECONDS)
            raise WorkerDiedError(f"{process.name}, exit code {process.exitcode}") from error


def _close(sockets: list[socket.socket], processes: list[Any]) -> None:
    # Without asking: they may still be starting, or waiting for a file, and leave nothing.
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
    for connection in sockets:
        connection.close()


@contextlib.contextmanager
def sigterm_waiting() -> Iterator[None]:
    """What is started within hears SIGTERM when it has a handler for it, not before."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: socket.socket, part: slice, num_threads: int) -> None:
    # The main process decides what an interrupt means, and has time to save when the whole group
    # of processes is told to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _leave_after(_GRACE_SECONDS))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        chunks = _receive(connection)
        threading.Thread(target=_leave_with_parent, args=(connection,), daemon=True).start()
        for images, about in LocalChunks(chunks, num_threads=num_threads, part=part):
            _send(connection, ((len(images), *images[0].shape), images[0].dtype, about))
            for image in images:
                connection.sendall(np.ascontiguousarray(image).data)
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            _send(connection, _portable(error))


def _leave_with_parent(connection: socket.socket) -> None:
    # A killed parent ends nobody, but its connections; nothing else ever comes.
    with contextlib.suppress(ConnectionError):
        connection.recv(1)
    os._exit(1)


def _leave_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def _portable(error: Exception) -> Exception:
    """With the worker's traceback, which does not travel; in words, if the error does not."""
    told = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker:\n{told}")
    try:
        return pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(told)


def _send(connection: socket.socket, message: Any) -> None:
    data = cloudpickle.dumps(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    length = memoryview(bytearray(_LENGTH.size))
    _receive_into(connection, length)
    data = memoryview(bytearray(*_LENGTH.unpack(length)))
    _receive_into(connection, data)
    return pickle.loads(data)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionResetError("the other process is gone")
        view = view[received:]
