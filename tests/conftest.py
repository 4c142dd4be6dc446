"""Set before JAX starts: several devices, and one cache of compiled programs for all processes."""

import os
import shutil
import tempfile
from collections.abc import Iterator

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


@pytest.fixture(scope="module", autouse=True)
def compiled_in_short(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without LLVM's optimisations, which take longer than what most tests run; not so where a
    file's rounding is to be that of users. Programs of their own are compiled as ever."""
    import jax

    is_optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not is_optimized)
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
