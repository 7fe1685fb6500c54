"""Precision, devices, the shape checker, and what keeps compilation short: switched on before anything imports the library."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(
    [f"numpyro_pvmc.ops.{name}" for name in ("associative", "blocked", "forward_backward", "semiring", "smoothing")],
    "beartype.beartype",
)
# The processor, for work that is spread over devices; all other work is on the first.
jax.config.update("jax_num_cpu_devices", 2)


DOUBLE, SINGLE = 1e-10, 1e-4
# In place of the fixture `tolerance` where a test takes seconds: the slow run has single precision.
in_both_precisions = pytest.mark.parametrize(
    "tolerance", [DOUBLE, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["float64", "float32"]
)
# Of tests that take few particles, or guides that were never trained, on purpose.
few_particles = pytest.mark.filterwarnings("ignore:The effective sample size of site:UserWarning")
PRECISION = pytest.StashKey[bool]()
MAPS = Path("/proc/self/maps")
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def initial_params(svi, key, *args, **kwargs):
    """What a run would start from, in one program: operation by operation there are dozens to compile."""
    return jax.jit(lambda key: svi.get_params(svi.init(key, *args, **kwargs)))(key)


def pytest_addoption(parser):
    parser.addoption("--method", choices=("sequential", "blocked", "associative"), help='what `method="auto"` takes')
    parser.addoption("--accelerator", action="store_true", help="the ways that are taken on an accelerator, on this machine")
    parser.addoption("--pair-by-pair", action="store_true", help="no densities put together from distributions and values")


def pytest_configure(config):
    """The default run has XLA write its loops in the older way, which compiles in 0.6 of the time.

    An XLA that does not know the flag ends the process that sets it, so another process tries it first.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.option.markexpr == "not slow" and OLDER_EMITTERS not in flags:
        environment = os.environ | {"XLA_FLAGS": f"{flags} {OLDER_EMITTERS}", "JAX_PLATFORMS": "cpu"}
        attempt = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
        if attempt.returncode == 0:
            os.environ["XLA_FLAGS"] = environment["XLA_FLAGS"]


@pytest.fixture(scope="session", autouse=True)
def another_way(request):
    """All tests hold for every way of summing trajectories, and of computing the densities of pairs."""
    # Not at the top: the shape checker sees only what is imported after its hook.
    from numpyro_pvmc.chain import densities
    from numpyro_pvmc.ops import smoothing

    method = request.config.getoption("method")
    with pytest.MonkeyPatch.context() as patch:
        if method:
            # Products of matrices take K times as long as those of a vector and a matrix: not for more particles than these.
            patch.setattr(smoothing, "_best_method", lambda length, series, number: method if number <= 256 else "sequential")
        if request.config.getoption("accelerator"):
            patch.setattr(jax, "default_backend", lambda: "gpu")
        if request.config.getoption("pair_by_pair"):
            patch.setattr(densities, "read_pair", lambda *site: None)
        yield


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Most programs here are compiled to run once; slow tests run theirs for long, unless their module says otherwise."""
    is_slow = request.node.get_closest_marker("slow") is not None
    jax.config.update("jax_disable_most_optimizations", not getattr(request.module, "LONG_RUNS", is_slow))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def asks_for_float64(item):
    choices = item.callspec.params if hasattr(item, "callspec") else {}
    return "x64" in item.fixturenames or choices.get("tolerance") == DOUBLE


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """All tests of one precision run before those of the other: a change of it costs JAX's caches.

    Under ``--dist loadgroup`` what goes to a process is the tests of one module and one precision.
    """
    items.sort(key=asks_for_float64)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{64 if asks_for_float64(item) else 32}"))


def is_crowded():
    """A compiled program keeps hundreds of maps of memory, and each makes the next slower.

    Linux lets a process have 65,530 of them, and then it dies.
    """
    return MAPS.exists() and MAPS.read_bytes().count(b"\n") > 5_000


@pytest.fixture(autouse=True)
def precision(request):
    enabled = asks_for_float64(request.node)
    if enabled != request.session.stash.get(PRECISION, enabled) or is_crowded():
        # JAX keeps the arrays that a program closes over by identity, rounded as they were when it met them first.
        jax.clear_caches()
    request.session.stash[PRECISION] = enabled
    with jax.enable_x64(enabled):
        yield


@pytest.fixture
def x64(precision):
    """Run a test in float64."""


@pytest.fixture(params=[DOUBLE, SINGLE], ids=["float64", "float32"])
def tolerance(request, precision):
    """Run a test in both precisions; the value is the error that the precision is allowed."""
    return request.param
