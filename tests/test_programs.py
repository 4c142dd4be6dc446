"""One line and an exit code for whatever ends a program early."""

import errno
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from metaformer_jax import programs
from metaformer_jax.data.loader import DataError
from metaformer_jax.weights import CheckpointError, DownloadError


def _raise(error):
    raise error


@pytest.fixture
def _default_ctrl_c():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("`x` must be 1, got 2."), 2, "`x` must be 1, got 2."),
        (CheckpointError("truncated"), 2, "truncated"),
        (ImportError("torch is missing"), 2, "torch is missing"),
        (DownloadError("no network"), 2, "no network"),
        (DataError("too many"), 2, "too many"),
        (FileExistsError("`out` is there."), 2, "`out` is there."),
        (
            OSError(errno.ENOSPC, "No space left on device", "out"),
            2,
            "out: No space left on device",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "[Errno 32] Broken pipe"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAt ..."),
            2,
            "the device failed: RESOURCE_EXHAUSTED: Out of memory. Use less.",
        ),
        (KeyboardInterrupt(), 130, "nothing was written"),
    ],
)
def test_an_error_is_one_line(error, code, line, capsys):
    def work():
        raise error

    given = {"if_interrupted": "nothing was written", "if_device_fails": "Use less."}
    assert programs.run(work, **given) == code
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a"), AssertionError("a")])
def test_a_bug_passes(error):
    with pytest.raises(type(error)):
        programs.run(lambda: _raise(error))


def test_a_reader_that_has_read_enough_is_no_error():
    program = (
        "import sys; from metaformer_jax import programs;"
        "sys.exit(programs.run(lambda: [print('line', flush=True) for _ in range(10**6)] and None))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.usefixtures("_default_ctrl_c")
def test_ctrl_c_waits_for_the_end_of_an_import(tmp_path, monkeypatch, capsys):
    done = tmp_path / "done"
    (tmp_path / "slow_to_import.py").write_text(
        "import os, signal, time, pathlib\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(0.2)\n"
        f"pathlib.Path({str(done)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        import slow_to_import  # noqa: F401

        assert done.exists()
        time.sleep(60)

    start = time.monotonic()
    assert programs.run(work) == 130
    assert time.monotonic() - start < 60
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_default_ctrl_c")
def test_a_program_that_is_run_by_an_import_hears_ctrl_c(tmp_path, monkeypatch):
    (tmp_path / "runs_when_imported.py").write_text(
        "import os, signal, time\n"
        "from metaformer_jax import programs\n"
        "def work():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "code = programs.run(work)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import runs_when_imported

    assert runs_when_imported.code == 130


def test_a_background_job_goes_on_ignoring_ctrl_c():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert programs.run(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
