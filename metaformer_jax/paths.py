"""Paths as users give them, and the folder for what can be made again."""

import os
import pathlib


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path that a user means: no shell has seen the `~` of a config or of `--flag=~/x`."""
    return pathlib.Path(os.path.expanduser(path))


def cache_folder() -> pathlib.Path:
    """`$METAFORMER_JAX_CACHE`, or `metaformer_jax` in the user's cache folder."""
    if folder := os.environ.get("METAFORMER_JAX_CACHE"):
        return local_path(folder)
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "metaformer_jax"
