"""Set before JAX starts: several devices, and one cache of compiled programs for all processes."""

import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import leftovers
import pytest

_MEMORY_BEFORE = pytest.StashKey[set[str]]()

# Sharding is really exercised.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile the same small programs again and again, in both workers and in programs that
# they call. The first process that loads this file makes the folder, the others inherit it.
_MADE_HERE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _MADE_HERE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="metaformer-jax-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Traces consist of millions of objects, and looking for garbage among them as often as Python does
# by default takes a fifth of the time of tests that trace.
gc.set_threshold(50_000, 20, 50)


@functools.cache
def _options_in_short() -> dict[str, bool]:
    import jax

    options: dict[str, bool] = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0.0, compiler_options=options).lower().compile()
    # Releases of XLA after that of JAX 0.10 have the newer emitters only.
    except jax.errors.JaxRuntimeError:
        return {}
    return options


@pytest.fixture(scope="module", autouse=True)
def compiled_in_short(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without LLVM's optimisations and XLA's newer emitters of fusions, which take longer than what
    most tests run; not so where a file's rounding is to be that of users. Programs of their own are
    compiled as ever."""
    import jax
    from jax._src import compiler

    if request.node.get_closest_marker("optimized") is not None:
        yield
        return
    original, in_short = compiler.get_compile_options, _options_in_short()

    def get_compile_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
        options = in_short | dict(env_options_overrides or {})
        return original(*args, env_options_overrides=options, **kwargs)

    # No setting of JAX passes an option for XLA to all that a process compiles from now on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_MEMORY_BEFORE] = leftovers.shared_memory()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails where tests left shared memory; those of faults look for it after each of them."""
    is_worker = hasattr(session.config, "workerinput")
    left = set() if is_worker else leftovers.shared_memory() - session.config.stash[_MEMORY_BEFORE]
    if left:
        print(f"\nShared memory was left behind: {', '.join(sorted(left))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if _MADE_HERE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
