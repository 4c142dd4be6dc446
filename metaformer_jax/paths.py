"""Paths as users give them, the folder for what can be made again, and outputs that are whole."""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path that a user means: no shell has seen the `~` of a config or of `--flag=~/x`."""
    return pathlib.Path(os.path.expanduser(path))


def cache_folder() -> pathlib.Path:
    """`$METAFORMER_JAX_CACHE`, or `metaformer_jax` in the user's cache folder."""
    if folder := os.environ.get("METAFORMER_JAX_CACHE"):
        return local_path(folder)
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "metaformer_jax"


def check_has_place(path: pathlib.Path, *, what: str = "`output`") -> None:
    """Refuses an output whose folder could not be made or written to after all the work for it.

    Args:
        path: absolute; the folders above it need not be there yet.
        what: it is, for the message.

    Raises:
        OSError: it could not.
    """
    folder = next(parent for parent in (*path.parents, path) if os.path.lexists(parent))
    try:
        # Permissions alone do not tell of a disk that is full or read-only.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{what} must be in a folder that can be written to, got {path}, and of {folder}: "
            f"{error.strerror}. Choose another place."
        ) from error


@contextlib.contextmanager
def when_whole(target: pathlib.Path, *, is_folder: bool) -> Iterator[pathlib.Path]:
    """A temporary place beside `target`, which takes its name, and its place, once all is written.

    After an error or an interrupt nothing is left; after a killed process a hidden
    `.<name>.partial-*` is.

    Args:
        target: absolute; what is there is replaced.
        is_folder: whether the place is a new folder, or free for a file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes, of which those of the target can be all.
    hidden = f".{target.name[:32]}"
    partial = target.with_name(f"{hidden}.partial-{secrets.token_hex(4)}{target.suffix}")
    try:
        if is_folder:
            partial.mkdir()
        yield partial
        if is_folder and target.exists():
            replaced = target.with_name(f"{hidden}.replaced-{secrets.token_hex(4)}")
            target.rename(replaced)
            partial.rename(target)
            shutil.rmtree(replaced)
        else:
            partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
