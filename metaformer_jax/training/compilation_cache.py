"""Compiled programs kept on disk, so that a second start need not compile again."""

import contextlib
import os
import pathlib
import tempfile

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from metaformer_jax.weights.hub import cache_folder

# The least recently used are deleted beyond this.
_MAX_BYTES = 4 * 2**30
# Programs that compile faster are not worth a file.
_MIN_SECONDS = 0.3
# Of those who read and write there; JAX waits as long.
_LOCK_SECONDS = 10


def keep_compiled_programs(*, enabled: bool = True) -> pathlib.Path | None:
    """Turns JAX's persistent compilation cache on, in the folder that weights are cached in.

    Several processes may share it. A folder that the user names, `$JAX_COMPILATION_CACHE_DIR`,
    comes first; one that cannot be written to is done without, until a run has another.

    Args:
        enabled: False turns the cache off, wherever it would be.

    Returns:
        The folder; None where no cache is used.
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
    """Moves what `keep_compiled_programs` turned on to where all processes of a run see it.

    Of several processes JAX lets the first alone write what it compiles. The others, on hosts of
    their own, would look for it in folders that stay empty, and compile at every start. Alone,
    nothing is changed unless the folder of before cannot be written to; and nothing where the user
    chose.

    Args:
        folder: seen by all processes of the run.

    Returns:
        A sentence where the folder of before cannot be written to; otherwise nothing.
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
        # Those who only read delete nothing, and need not wait for each other.
        _set_unless_chosen("jax_compilation_cache_max_size", -1)
    compilation_cache.reset_cache()
    # By the same name from wherever it is called: that is a part of what programs are found by.
    compilation_cache.set_cache_dir(str(folder.absolute()))
    if not is_unwritable:
        return ""
    return f"compiled programs are kept in {folder}: {default} cannot be written to."


def _default_folder() -> pathlib.Path:
    return cache_folder() / "compiled"


def _can_be_written(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell of a disk that is full or read-only.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _prepare(folder: pathlib.Path) -> None:
    _set_unless_chosen("jax_compilation_cache_max_size", _MAX_BYTES)
    _set_unless_chosen("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    _remove_unfinished(folder)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what a process that was killed had begun to write.

    JAX can neither read it nor writes it again, nor anything else once it counts the folder's
    bytes. Where these have a limit, a second file, written after the program's, tells of its last
    use; what has none was not finished.
    """
    if jax.config.values["jax_compilation_cache_max_size"] == -1:
        return
    # Where a file system has no locks, or another process keeps this one, JAX has no better luck
    # with it, and says so.
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
