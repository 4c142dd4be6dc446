"""Outputs that are there whole or not at all, and that never replace what is not theirs."""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from metaformer_jax.paths import check_has_place, local_path, when_whole
from metaformer_jax.weights.integrity import CHECKSUMS_NAME

# The file by which a converted folder is known, written last.
RECORD_NAME = "metaformer.json"
VARIABLES_NAME = "variables"
# All that a converted folder holds.
FOLDER_NAMES = {RECORD_NAME, CHECKSUMS_NAME, VARIABLES_NAME}


def check_output(path: str | os.PathLike[str], *, force: bool, is_folder: bool) -> pathlib.Path:
    """The absolute path, if it is free or may be replaced.

    Args:
        path: where something is to be written.
        force: whether an earlier output there may be replaced. Only an earlier output: a folder
            of or with anything else is refused all the same.
        is_folder: whether the output is a folder or a file.

    Raises:
        FileExistsError: something is there that must not be replaced.
        ValueError: Orbax could not read a folder of that name.
        OSError: nothing can be written there.
    """
    path = local_path(path).absolute()
    path = path.parent.resolve() / path.name
    if is_folder:
        check_name_for_orbax(path, what="`output`")
    check_has_place(path)
    if not os.path.lexists(path):
        return path
    if path.is_dir() and not path.is_symlink():
        names = {entry.name for entry in path.iterdir()}
        if is_folder and RECORD_NAME in names and (others := sorted(names - FOLDER_NAMES)):
            raise FileExistsError(
                f"`output` must be free or a folder of converted weights alone to replace, got "
                f"{path}, which holds {others[0]} as well. Move that away, or choose another place."
            )
        ours = is_folder and (not names or RECORD_NAME in names)
    else:
        ours = not is_folder and path.is_file()
    if not ours:
        kind = "a folder of converted weights" if is_folder else "a file"
        raise FileExistsError(
            f"`output` must be free or {kind} to replace, got {path}, which is something else. "
            "Choose another place."
        )
    if not force:
        raise FileExistsError(
            f"`output` must not exist yet, got {path}. Choose another place, or replace it with "
            "force=True (--force)."
        )
    return path


def check_name_for_orbax(path: pathlib.Path, *, what: str) -> None:
    """Refuses a folder in which Orbax would write arrays that it does not find again.

    It looks for their parts by a pattern that begins with the folder's path.

    Args:
        path: absolute.
        what: it is, for the message.

    Raises:
        ValueError: the path has a character of such patterns, a backslash, or is not UTF-8.
    """
    name = str(path)
    if found := re.search(r"[\[*?\\\ud800-\udfff]", name):
        shown = name.encode(errors="backslashreplace").decode()
        raise ValueError(
            f"{what} must have a path without {found[0]!a}, in which Orbax can find again what it "
            f"writes, got {shown}. Choose another name."
        )


def check_can_be_written(path: pathlib.Path, *, what: str = "`--output`") -> None:
    """Refuses a file that could not be written after all the work for it; what is there stays.

    Args:
        path: of the file.
        what: it is, for the message.

    Raises:
        ValueError: it could not.
    """
    try:
        if path.exists():
            path.open("ab").close()
        else:
            # Permissions alone do not tell of a disk that is full or read-only.
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"{what} must be a file that can be written, got {str(path)!r}: {error.strerror}."
        ) from error


@contextlib.contextmanager
def whole_output(
    path: str | os.PathLike[str], *, force: bool, is_folder: bool
) -> Iterator[pathlib.Path]:
    """A temporary place beside the output, which takes its name once all is written.

    See `when_whole`.

    Raises:
        FileExistsError, OSError: see `check_output`.
    """
    path = check_output(path, force=force, is_folder=is_folder)
    with when_whole(path, is_folder=is_folder) as partial:
        yield partial
        check_output(path, force=force, is_folder=is_folder)
