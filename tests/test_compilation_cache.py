import os
import subprocess
import sys

import pytest

# A program that takes long enough to compile, and what of it came from the cache.
PROGRAM = """
import pathlib, jax, jax.numpy as jnp
from metaformer_jax.training.compilation_cache import *
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
folder = keep_compiled_programs(enabled={enabled})
{then}
jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x) @ x.T)[1].sum())(jnp.ones((8, 4)))
hits = [name.rpartition("/")[-1] for name in events].count("cache_hits")
print(folder, hits > 0)
"""
# One of two processes, each on a host of its own, that has compiled something before.
AS_ONE_OF_TWO = """
jax.jit(jnp.sin)(1.0)
jax.process_count, jax.process_index = lambda: 2, lambda: {index}
share_compiled_programs(pathlib.Path({shared!r}))
events.clear()
"""


def _run(environment, *, enabled=True, then=""):
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(enabled=enabled, then=then)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, hit = result.stdout.split()
    return folder, hit == "True"


def test_a_second_process_finds_what_the_first_compiled_unless_it_was_killed_in_writing(tmp_path):
    environment = {"METAFORMER_JAX_CACHE": str(tmp_path)}
    assert _run(environment) == (str(tmp_path / "compiled"), False)
    assert _run(environment) == (str(tmp_path / "compiled"), True)
    entries = sorted(tmp_path.glob("compiled/*-cache"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert not _run(environment)[1]
    assert _run(environment)[1]
    assert sorted(tmp_path.glob("compiled/*-cache")) == entries


def test_without_a_limit_of_bytes_nothing_is_taken_for_half_written(tmp_path):
    environment = {"METAFORMER_JAX_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}
    assert not _run(environment)[1]
    assert _run(environment)[1]


def test_all_processes_of_a_run_find_what_the_first_compiled(tmp_path):
    shared = tmp_path / "workdir/compiled"

    def run(index):
        host = {"METAFORMER_JAX_CACHE": str(tmp_path / f"host-{index}")}
        then = AS_ONE_OF_TWO.format(index=index, shared=str(shared))
        return _run(host, then=then)[1]

    assert [run(0), run(1), run(0)] == [False, True, True]


def test_a_run_keeps_them_in_its_workdir_where_the_default_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    host = {"METAFORMER_JAX_CACHE": str(tmp_path / "file")}
    there, nowhere = str(tmp_path / "workdir/compiled"), str(tmp_path / "file/compiled")
    then = f"said = share_compiled_programs(pathlib.Path({there!r}))\n"
    kept = (
        f"assert said == 'compiled programs are kept in {there}: {nowhere} cannot be written to.'"
    )
    assert [_run(host, then=then + kept)[1] for _ in range(2)] == [False, True]
    then = f"said = share_compiled_programs(pathlib.Path({nowhere!r}))\n"
    assert not _run(host, then=then + "assert said.startswith('compiled programs are not kept')")[1]


def test_a_run_alone_or_without_a_cache_says_nothing_and_moves_nothing(tmp_path):
    there = tmp_path / "workdir/compiled"
    then = f"assert share_compiled_programs(pathlib.Path({str(there)!r})) == ''"
    assert _run({"METAFORMER_JAX_CACHE": str(tmp_path)}, then=then)[0] == str(tmp_path / "compiled")
    (tmp_path / "file").touch()
    _run({"METAFORMER_JAX_CACHE": str(tmp_path / "file")}, enabled=False, then=then)
    assert not there.exists()


def test_the_users_folder_comes_first_and_the_cache_can_be_turned_off(tmp_path):
    environment = {
        "METAFORMER_JAX_CACHE": str(tmp_path / "ours"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs"),
    }
    then = AS_ONE_OF_TWO.format(index=0, shared=str(tmp_path / "shared"))
    assert _run(environment, then=then) == (str(tmp_path / "theirs"), False)
    assert _run(environment, enabled=False, then=then) == ("None", False)
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("name", ["file", "file/within"])
def test_a_folder_that_cannot_be_written_is_done_without(name, tmp_path):
    (tmp_path / "file").touch()
    assert _run({"METAFORMER_JAX_CACHE": str(tmp_path / name)}) == ("None", False)
