"""What processes that are gone leave behind on this machine."""

import os
import pathlib

_SHARED = pathlib.Path("/dev/shm")


def shared_memory():
    """Names of shared memory and semaphores of this user that no process holds any more.

    Others run on this machine too, and what theirs hold is not left.
    """
    if not _SHARED.is_dir():
        return set()
    names = {path.name for path in _SHARED.iterdir() if _owner(path) == os.getuid()}
    return names - _held() if names else names


def _owner(path):
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def _held():
    """Names that a process has mapped."""
    found = set()
    for maps in pathlib.Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        # It has just ended, or is another user's.
        except OSError:
            continue
        prefix = f"{_SHARED}/"
        found |= {line.partition(prefix)[2] for line in lines if prefix in line}
    return found
