"""Compiled programs kept on disk, so that a second start need not compile again."""

import os
import pathlib
import tempfile

import jax

from metaformer_jax.weights.hub import cache_folder

# The least recently used are deleted beyond this.
_MAX_BYTES = 4 * 2**30
# Programs that compile faster are not worth a file.
_MIN_SECONDS = 0.3


def keep_compiled_programs(*, enabled: bool = True) -> pathlib.Path | None:
    """Turns JAX's persistent compilation cache on, in the folder that weights are cached in.

    Several processes may share it. A folder that the user names, `$JAX_COMPILATION_CACHE_DIR`,
    comes first; one that cannot be written to is done without.

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
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell of a disk that is full or read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    limits = {
        "jax_compilation_cache_max_size": _MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": _MIN_SECONDS,
    }
    for name, value in limits.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder
