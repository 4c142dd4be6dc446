"""Every fault is real, and leaves nothing behind."""

import pathlib
import signal
import time
import uuid

import filelock
import leftovers
import pytest
import trainings

_HERE = pathlib.Path(__file__).parent
_MARK = "METAFORMER_JAX_FAULT_TEST"

# A background job ignores SIGINT, and so would every program that these tests start from one.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


def _processes_of(mark):
    """Command lines of the processes that inherited the mark."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"{_MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        # It has just ended, or is another user's.
        except OSError:
            continue
    # One that ended and was not waited for has no command line.
    return [command for command in found if command]


def _remains(look):
    """What is still there after the time that the system needs to clear up."""
    end = time.monotonic() + 20
    while (remains := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return remains


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch, tmp_path_factory):
    """No process, no temporary file, no shared memory and no semaphore."""
    if not pathlib.Path("/proc/self/environ").exists():
        yield
        return
    mark = uuid.uuid4().hex
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv(_MARK, mark)
    monkeypatch.setenv("TMPDIR", str(temporary))
    memory = leftovers.shared_memory()
    yield
    assert not _remains(lambda: _processes_of(mark))
    assert not list(temporary.iterdir())
    # Its name is all there is of it, so what comes from elsewhere has the time to be taken.
    left = leftovers.shared_memory() - memory
    assert not _remains(lambda: left & leftovers.shared_memory())


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, worker_id):
    """The workdir of a finished run that nothing happened to, one for all workers."""
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent
    workdir, finished = root / "undisturbed", root / "undisturbed finished"
    with filelock.FileLock(root / "undisturbed lock"):
        if not finished.exists():
            trainings.finish(
                trainings.start(workdir, tamper={"note": str(root / "examples.jsonl")})
            )
            (root / "examples.jsonl").rename(workdir / "examples.jsonl")
            finished.touch()
    return workdir
