"""Precision, and the shape checker: switched on before anything imports the library."""

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(
    ["numpyro_pvmc.blocks", "numpyro_pvmc.recursion", "numpyro_pvmc.semiring", "numpyro_pvmc.smoothing"], "beartype.beartype"
)


DOUBLE, SINGLE = 1e-10, 1e-4
PRECISION = pytest.StashKey[bool]()
NUMBER = pytest.StashKey[int]()
# A compiled program keeps hundreds of maps of memory, and Linux has 65,530 of them for a process, which then dies.
KEPT = 20


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Most programs here are compiled to run once; modules that run theirs for long say `LONG_RUNS = True`."""
    quick = not getattr(request.module, "LONG_RUNS", False)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def asks_for_float64(item):
    choices = item.callspec.params if hasattr(item, "callspec") else {}
    return "x64" in item.fixturenames or choices.get("tolerance") == DOUBLE


def pytest_collection_modifyitems(items):
    """The tests of a module run one precision after the other: a change of it costs JAX's caches."""
    modules = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (modules.index(item.path), asks_for_float64(item)))


@pytest.fixture(autouse=True)
def precision(request):
    stash, enabled = request.session.stash, asks_for_float64(request.node)
    number = stash.get(NUMBER, 0)
    if enabled != stash.get(PRECISION, enabled) or number == KEPT:
        # JAX keeps the arrays that a program closes over by identity, rounded as they were when it met them first.
        jax.clear_caches()
        number = 0
    stash[PRECISION], stash[NUMBER] = enabled, number + 1
    with jax.enable_x64(enabled):
        yield


@pytest.fixture
def x64(precision):
    """Run a test in float64."""


@pytest.fixture(params=[DOUBLE, SINGLE], ids=["float64", "float32"])
def tolerance(request, precision):
    """Run a test in both precisions; the value is the error that the precision is allowed."""
    return request.param
