"""Precision, and the shape checker: switched on before anything imports the library."""

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(["numpyro_pvmc.semiring", "numpyro_pvmc.smoothing"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Most programs here are compiled to run once; modules that run theirs for long say `LONG_RUNS = True`."""
    quick = not getattr(request.module, "LONG_RUNS", False)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[(True, 1e-10), (False, 1e-4)], ids=["float64", "float32"])
def tolerance(request):
    """Run a test in both precisions; the value is the error that the precision is allowed."""
    enabled, allowed = request.param
    with jax.enable_x64(enabled):
        yield allowed
