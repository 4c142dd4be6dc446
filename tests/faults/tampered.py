"""The training program, tampered with as the environment variable TAMPER says, in JSON.

{"die": ["commit", 2]}            dies by SIGKILL at this moment, the second time that it comes
{"die": [...], "by": "SIGTERM"}   likewise by another signal
{"damage": [3, "/path", 100]}     in the third step a file is cut to 100 bytes, a folder removed
{"note": "/path/indices.jsonl"}   writes down which examples each step trains on
{"poison": true}                  an image of one colour is not finite on the device
{"fail": 8}                       an error that nobody foresaw, when so many steps were sent
{"slow": 4}                       takes so many seconds to open the data
{"keep": true}                    keeps what it compiles, though it is not the first process
"""

import importlib.abc
import json
import os
import pathlib
import runpy
import signal
import sys
import threading

_signal = signal.SIGKILL


def _die():
    os.kill(os.getpid(), _signal)


def _nth(n, function):
    """Does something the n-th time that it is called."""
    calls = iter(range(1, 1 << 30))

    def counted(*args):
        if next(calls) == n:
            function(*args)

    return counted


def _before(owner, name, do):
    """Calls `do` with the arguments before each call."""
    original = getattr(owner, name)

    def tampered(*args, **kwargs):
        do(*args)
        return original(*args, **kwargs)

    setattr(owner, name, tampered)


def _after(owner, name, do):
    original = getattr(owner, name)

    def tampered(*args, **kwargs):
        result = original(*args, **kwargs)
        do(*args)
        return result

    setattr(owner, name, tampered)


def _die_in_a_step(n, seconds):
    from metaformer_jax.training.metrics import PendingMetrics

    # The step has been sent to the devices.
    later = threading.Timer(seconds, _die)
    _before(PendingMetrics, "add", _nth(n, lambda *_: later.start()))


def _die_in_a_save(n, seconds):
    from metaformer_jax.training.checkpoint import Checkpoints

    later = threading.Timer(seconds, _die)
    _after(Checkpoints, "save", _nth(n, lambda *_: later.start()))


def _die_before_the_commit(n):
    from metaformer_jax.training import checkpoint

    _after(checkpoint, "write_checksums", _nth(n, lambda *_: _die()))


def _die_after_the_commit(n):
    original = os.rename

    def rename(source, target):
        original(source, target)
        if pathlib.Path(target).name.isdecimal():
            committed()

    committed = _nth(n, _die)
    os.rename = rename


def _die_in_an_evaluation(n):
    from metaformer_jax.training import evaluation, loop

    original, batch = evaluation.evaluate_state, _nth(n, _die)

    def evaluate_state(*args, is_stopped=lambda: False, **kwargs):
        return original(*args, is_stopped=lambda: bool(batch()) or is_stopped(), **kwargs)

    loop.evaluate_state = evaluation.evaluate_state = evaluate_state


def _die_in_a_line_of_the_metrics(n):
    from metaformer_jax.training.metrics import MetricWriter

    def write_half(self, step, **_):
        self._file.write(f'{{"step": {step}, "train/loss": 0.')
        self._file.flush()
        _die()

    original, last = MetricWriter.write, _nth(n, write_half)

    def write(self, step, **groups):
        last(self, step)
        original(self, step, **groups)

    MetricWriter.write = write


def _die_while_an_old_checkpoint_is_deleted(n):
    import shutil

    def half(folder, *_):
        files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
        for path in files[::2]:
            path.unlink()
        _die()

    half_nth = _nth(n, half)
    _before(
        shutil,
        "rmtree",
        lambda folder, *_: half_nth(folder) if pathlib.Path(folder).name.isdecimal() else None,
    )


def _kill_a_worker(n):
    import multiprocessing

    from metaformer_jax.training.metrics import PendingMetrics

    def kill(*_):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    _before(PendingMetrics, "add", _nth(n, kill))


def _die_in_an_import(name):
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            if fullname == name:
                _die()

    sys.meta_path.insert(0, Finder())


def _die_while_others_are_waited_for(seconds):
    import jax

    later = threading.Timer(seconds, _die)
    later.daemon = True
    _before(jax.distributed, "initialize", lambda *_: later.start())


MOMENTS = {
    "join": _die_while_others_are_waited_for,
    "import": _die_in_an_import,
    "step": _die_in_a_step,
    "save": _die_in_a_save,
    "commit": _die_before_the_commit,
    "committed": _die_after_the_commit,
    "evaluation": _die_in_an_evaluation,
    "metrics": _die_in_a_line_of_the_metrics,
    "deletion": _die_while_an_old_checkpoint_is_deleted,
    "worker": _kill_a_worker,
}


def _damage(n, path, size):
    import shutil

    from metaformer_jax.training.metrics import PendingMetrics

    def damage(*_):
        if pathlib.Path(path).is_dir():
            shutil.rmtree(path)
        else:
            os.truncate(path, size)

    _before(PendingMetrics, "add", _nth(n, damage))


def _note_examples(path):
    from metaformer_jax.training.guard import Guard

    def note(guard, step, indices):
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "indices": indices.tolist()}) + "\n")

    _before(Guard, "expect", note)


def _poison_plain_images():
    import jax.numpy as jnp

    from metaformer_jax.data.device import DeviceTransform

    original = DeviceTransform.training

    def training(self, mixed, image_keys):
        images, targets = original(self, mixed, image_keys)
        plain = jnp.all(mixed.images == mixed.images[:, :1, :1], axis=(1, 2, 3), keepdims=True)
        return jnp.where(plain, jnp.nan, images), targets

    DeviceTransform.training = training


def _fail(n):
    from metaformer_jax.training.metrics import PendingMetrics

    def fail(*_):
        raise RuntimeError("nobody foresaw this")

    _before(PendingMetrics, "add", _nth(n, fail))


def _open_slowly(seconds):
    import time

    from metaformer_jax.training import run

    def wait(*_):
        print("opening slowly", flush=True)
        time.sleep(seconds)

    _before(run, "open_source", wait)


def _keep_what_is_compiled():
    # JAX lets the first process alone write, but on CPUs each looks for names of its own.
    from jax._src import compiler, distributed

    original, process = compiler._cache_write, distributed.global_state

    def write(*args):
        me, process.process_id = process.process_id, 0
        try:
            original(*args)
        finally:
            process.process_id = me

    compiler._cache_write = write


def _tamper(
    *, die=None, by="SIGKILL", damage=None, note=None, poison=False, fail=0, slow=0, keep=False
):
    if die:
        global _signal
        _signal = signal.Signals[by]
        moment, *arguments = die
        MOMENTS[moment](*arguments)
    if damage:
        _damage(*damage)
    if note:
        _note_examples(note)
    if poison:
        _poison_plain_images()
    if fail:
        _fail(fail)
    if slow:
        _open_slowly(slow)
    if keep:
        _keep_what_is_compiled()


# Workers load this file as well, and are to do as they always do.
if __name__ == "__main__":
    _tamper(**json.loads(os.environ.get("TAMPER", "{}")))
    sys.argv[0] = "metaformer_jax.main"
    runpy.run_module("metaformer_jax.main", run_name="__main__", alter_sys=False)
