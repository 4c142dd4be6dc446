"""What a folder must allow to become a workdir."""

import errno
import os

import pytest

from metaformer_jax.training import recipes
from metaformer_jax.training.claim import claimed_workdir


def test_a_folder_in_which_no_folder_can_be_renamed_is_refused(tmp_path, monkeypatch):
    def rename(source, target):
        # Of gcsfuse with its defaults.
        raise OSError(errno.EMFILE, "Too many open files", source)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with (
            pytest.raises(ValueError, match=r"renames folders.*: Too many open files\. Mount a b"),
            claimed_workdir(workdir, recipes.digits(), (), {}),
        ):
            raise AssertionError
    with claimed_workdir(workdir, recipes.digits(), (), {}):
        assert [path.name for path in workdir.iterdir()] == ["run.lock"]
