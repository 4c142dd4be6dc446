"""Keeps compiled programs on disk, so that the next start need not compile again."""

import contextlib
import os
import pathlib
import tempfile

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from metaformer_jax.paths import cache_folder

# The least recently used are deleted beyond this.
_MAX_BYTES = 4 * 2**30
# Programs that compile faster than this are not worth a file.
_MIN_SECONDS = 0.3
# How long to wait for another process's lock; JAX waits as long.
_LOCK_SECONDS = 10


def keep_compiled_programs(*, enabled: bool = True) -> pathlib.Path | None:
    """Turns on JAX's persistent compilation cache, in the folder that weights are cached in.

    Several programs may share it. If the user names a folder by `$JAX_COMPILATION_CACHE_DIR`, that
    one is used. If the default folder cannot be written to, no cache is used until
    `share_compiled_programs` sets another folder.

    Args:
        enabled: False turns the cache off, wherever it would be.

    Returns:
        The folder; None if no cache is used.
    """
    if not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(chosen)
    folder = _default_folder()
    if not _can_be_written(folder):
        return None
    _prepare(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def share_compiled_programs(folder: pathlib.Path) -> str:
    """Moves the cache to a folder that all processes of a run see.

    With several processes, JAX lets only the first one write what it compiles. The others, on other
    hosts, would look for programs in folders that stay empty, and compile at every start. With a
    single process nothing changes unless the default folder cannot be written to. A folder or
    setting that the user chose is never changed.

    Args:
        folder: seen by all processes of the run.

    Returns:
        A sentence for the user if the default folder cannot be written to; otherwise "".
    """
    before, default = jax.config.values["jax_compilation_cache_dir"], _default_folder()
    is_enabled = jax.config.values["jax_enable_compilation_cache"]
    is_unwritable = is_enabled and before is None and not _can_be_written(default)
    is_apart = before == str(default) and jax.process_count() > 1
    if not (is_unwritable or is_apart):
        return ""
    if jax.process_index() == 0:
        if not _can_be_written(folder):
            neither = f"neither {default} nor {folder} can be written to"
            return f"compiled programs are not kept: {neither}." if is_unwritable else ""
        _prepare(folder)
    else:
        # Processes that only read delete nothing, and need not wait for each other.
        _set_unless_chosen("jax_compilation_cache_max_size", -1)
    compilation_cache.reset_cache()
    # Absolute, so that it does not depend on the current folder: the path is part of JAX's keys.
    compilation_cache.set_cache_dir(str(folder.absolute()))
    if not is_unwritable:
        return ""
    return f"compiled programs are kept in {folder}: {default} cannot be written to."


def _default_folder() -> pathlib.Path:
    return cache_folder() / "compiled"


def _can_be_written(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not show whether a disk is full or read-only.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _prepare(folder: pathlib.Path) -> None:
    _set_unless_chosen("jax_compilation_cache_max_size", _MAX_BYTES)
    _set_unless_chosen("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    _remove_unfinished(folder)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes programs that a killed process had written in part.

    JAX can neither read such a file nor replace it, and if the size of the folder is limited, it
    cannot write any other program either. With a limit, JAX writes a second file after that of the
    program, for the time of its last use: a program without this file was not finished.
    """
    if jax.config.values["jax_compilation_cache_max_size"] == -1:
        return
    # If the file system has no locks, or another process holds this one, JAX will fail too, and
    # report it.
    with (
        contextlib.suppress(OSError, NotImplementedError),
        filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS),
    ):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


def _set_unless_chosen(name: str, value: float) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)
