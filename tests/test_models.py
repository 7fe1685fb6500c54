"""Each program against its own second description: the hand-written NumPy densities are those that NumPyro computes."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer.util import log_density

from models import PROGRAMS

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(params=PROGRAMS, ids=str, scope="module")
def program(request):
    return request.param


@pytest.fixture(scope="module")
def guide_sites(program):
    """One draw of every latent from the guide."""
    with jax.enable_x64(True):
        return latent_sites(program, program.guide)


@pytest.fixture
def values(guide_sites):
    return {name: site["value"] for name, site in guide_sites.items()}


def latent_sites(program, half):
    trace = handlers.trace(handlers.seed(half, 0)).get_trace(*program.args, **program.kwargs)
    return {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}


def path(program, values, n):
    """The same draw for the hand-written densities: the globals, and one dictionary for each step of series `n`."""
    chain = {*program.sites, *program.initial_sites}
    globals_ = {name: float(value) for name, value in values.items() if name not in chain}
    first = {name.removesuffix("_0"): np.asarray(values[name])[n] for name in program.initial_sites}
    steps = [{name: np.asarray(values[name])[t][n] for name in program.sites} for t in range(program.length)]
    return globals_, first | globals_, [step | globals_ for step in steps]


def test_the_model_is_its_description(program, values):
    expected = 0.0
    for n in np.ndindex(*program.plates):
        globals_, prev, steps = path(program, values, n)
        expected += program.start(n, prev) if program.start else 0.0
        for t, now in enumerate(steps):
            if program.present is None or program.present[t][n]:
                expected += program.step(t, n, prev, now)
                prev = now
    value, _ = log_density(program.model, program.args, program.kwargs, values)
    assert_allclose(value, expected + program.log_prior(globals_), rtol=1e-12)


def test_the_guide_is_its_description(program, values):
    expected = 0.0
    for n in np.ndindex(*program.plates):
        globals_, first, steps = path(program, values, n)
        expected += program.propose_start(n, first) if program.start else 0.0
        expected += sum(program.propose(t, n, now) for t, now in enumerate(steps))
    value, _ = log_density(program.guide, program.args, program.kwargs, values)
    assert_allclose(value, expected + program.propose_globals(globals_), rtol=1e-12)


@pytest.mark.slow
def test_the_latents_of_model_and_guide_agree(program, guide_sites):
    """Same names, same shapes, one log density for each step and series, and the description covers every latent."""
    model_sites = latent_sites(program, program.model)
    assert set(model_sites) == set(guide_sites) >= {*program.sites, *program.initial_sites}
    for name in program.sites:
        shape = model_sites[name]["value"].shape
        assert shape == guide_sites[name]["value"].shape
        assert shape == (program.length, *program.plates, *program.event)
        for site in (model_sites[name], guide_sites[name]):
            assert site["fn"].log_prob(site["value"]).shape == (program.length, *program.plates)
