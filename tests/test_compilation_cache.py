import os
import subprocess
import sys

import pytest

# A program that takes long enough to compile, and what of it came from the cache.
PROGRAM = """
import jax, jax.numpy as jnp
from metaformer_jax.training.compilation_cache import keep_compiled_programs
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
folder = keep_compiled_programs(enabled={enabled})
jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x) @ x.T)[1].sum())(jnp.ones((8, 4)))
print(folder, sum(name.endswith("cache_hits") for name in events) > 0)
"""


def _run(environment, *, enabled=True):
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(enabled=enabled)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, hit = result.stdout.split()
    return folder, hit == "True"


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    environment = {"METAFORMER_JAX_CACHE": str(tmp_path)}
    assert _run(environment) == (str(tmp_path / "compiled"), False)
    assert _run(environment) == (str(tmp_path / "compiled"), True)


def test_the_users_folder_comes_first_and_the_cache_can_be_turned_off(tmp_path):
    environment = {
        "METAFORMER_JAX_CACHE": str(tmp_path / "ours"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs"),
    }
    assert _run(environment) == (str(tmp_path / "theirs"), False)
    assert _run(environment, enabled=False) == ("None", False)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["file", "file/within"])
def test_a_folder_that_cannot_be_written_is_done_without(name, tmp_path):
    (tmp_path / "file").touch()
    assert _run({"METAFORMER_JAX_CACHE": str(tmp_path / name)}) == ("None", False)
