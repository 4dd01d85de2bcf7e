"""Settings of every test: float64, strict dtype promotion, and one random key.

Curvature is compared with brute force in float64, and strict promotion stops a library that mixes
dtypes by accident at the line that does it.
"""

import gc
import itertools
import pathlib

import compiling  # noqa: F401, before jax
import jax
import pytest
from threadpoolctl import threadpool_limits

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # for meshes; elsewhere the first one is used
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)


SLOW = pathlib.Path(__file__).with_name("slow.txt")


def pytest_addoption(parser):
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N", help="of each test's cases run one in N"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks what slow.txt lists as slow, and leaves out what `--one-in` does."""
    mark_slow(config, items)
    cases = by_function(items)
    kept = {item for found in cases.values() for item in found[:: config.option.one_in]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def by_function(items):
    """Cases of each test, by its name without parameters."""
    found = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0].removeprefix("tests/"), []).append(item)
    return found


def mark_slow(config, items):
    """A line that names no test is an error, not forgotten."""
    lines = {line for line in SLOW.read_text().splitlines() if line and line[0] != "#"}
    quick = {line[1:] for line in lines if line[0] == "!"}
    listed = {line for line in lines if line[0] != "!"}
    cases, named = by_function(items), {i.nodeid.removeprefix("tests/"): [i] for i in items}
    found = named | {name: of[1:] or of for name, of in cases.items()}
    for name in listed & found.keys():
        for item in found[name]:
            if item.nodeid.removeprefix("tests/") not in quick:
                item.add_marker(pytest.mark.slow)
    files = {name.partition("::")[0] for name in cases}
    missing = sorted(x for x in (listed | quick) - found.keys() if x.partition("::")[0] in files)
    if missing and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/slow.txt lists tests that are not there: {missing}")


_MAPS = pathlib.Path("/proc/self/maps")
_tests = itertools.count()


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets compiled programs before Linux's limit on a process's memory maps, 65,530, is met.

    Each takes some. What is compiled beyond the limit ends the process with a segmentation fault.
    """
    yield
    if next(_tests) % 5 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def library_defaults():
    """JAX's own defaults, which users have."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        threadpool_limits(1, user_api="blas"),
    ):
        yield


@pytest.fixture
def optimised():
    """Programs that run for longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compilations():
    """A list that grows by one with each program that is compiled."""
    found = []

    def count(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture
def wide(monkeypatch):
    """What the scripts say of a wrong command line stays in one line."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def standard_promotion():
    """Standard dtype promotion, for third-party code that cannot stand the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield
