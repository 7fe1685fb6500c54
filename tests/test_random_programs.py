"""Programs made at random: their posteriors, against all trajectories through the same particles, scored by NumPyro.

A failure prints what the program chose; `random_program(seed)` is the program, and
`pytest "tests/test_random_programs.py::test_random_program[seed]" -m ""` runs it alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.autoguide import AutoGuide

from brute_force import enumerate_posterior
from conftest import few_particles, initial_params
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from random_programs import random_program

pytestmark = few_particles

PROGRAMS, QUICK = 300, 8
LONG_RUNS = False
DRAWS = 3000  # that backward draws by smoothing weights are wrong takes a thousand to see
NEAR = {"rtol": 1e-9, "atol": 1e-10}


def smooth(program):
    """The posterior, and the values of all parameters."""
    pvmc = PVMC(program.model, program.guide, num_particles=program.num_particles, particles="iid")
    params = {name: jnp.asarray(value) for name, value in program.params.items()}
    if isinstance(program.guide, AutoGuide):
        if "interval" in str(program):  # whose ends may be parameters, which the guide keeps as it met them: not traced
            initial = pvmc.get_params(pvmc.init(random.key(0), *program.args, **program.kwargs))
        else:
            initial = initial_params(pvmc, random.key(0), *program.args, **program.kwargs)
        params = initial | params
    return pvmc.posterior(random.key(1), params, *program.args, **program.kwargs), params


def last_present(program):
    """At each time the number of the last present step, -1 before the first: (T, *plates)."""
    t = np.arange(program.length).reshape(-1, *(1,) * (program.present.ndim - 1))
    return np.maximum.accumulate(np.where(program.present, t, -1))


def check_weights(program, posterior, exact):
    assert_allclose(posterior.log_normalizer, exact.log_normalizer, **NEAR)
    assert set(posterior.log_weights) == set(exact.weights)
    for name, expected in exact.weights.items():
        weights = np.exp(posterior.log_weights[name])
        if program.present is not None and name in program.sites:
            # An absent step repeats the weights of the last present one, or of the beginning.
            last = last_present(program)[:, None]
            at_start = [exact.weights[site] for site in program.initial_sites if site in exact.weights]
            before = np.broadcast_to(at_start[0], weights.shape) if at_start else weights
            expected = np.where(last >= 0, np.take_along_axis(expected, np.maximum(last, 0), 0), before)
        assert_allclose(weights, expected, **NEAR, err_msg=name)
    for name, expected in exact.state_weights.items():
        probabilities = np.asarray(posterior.state_probabilities[name])
        if program.present is not None and name in program.sites:
            expected = np.where(program.present[..., None], expected, probabilities)
        assert_allclose(probabilities, expected, **NEAR, err_msg=name)


def check_draws(program, posterior, exact, params):
    """Draws are trajectories of the particles, as likely as they should be; deterministic sites are what the model computes."""
    samples = posterior.sample(random.key(2), (DRAWS,))
    log_mass = exact.log_mass(samples)
    assert np.isfinite(log_mass).all(), "a draw is no trajectory of the particles"
    every = exact.log_mass(exact.values)
    mass = np.exp(exact.log_weights)
    finite = np.where(mass > 0, every, 0.0)
    mean = (mass * finite).sum(0)
    error = np.sqrt((mass * (finite - mean) ** 2).sum(0) / DRAWS)
    assert (np.abs(log_mass.mean(0) - mean) < 5 * error + 1e-8).all(), "draws have not the probabilities of their trajectories"

    def deterministic(sample):
        sites = trace(seed(substitute(program.model, data={**params, **sample}), 0)).get_trace(*program.args, **program.kwargs)
        return {name: site["value"] for name, site in sites.items() if site["type"] == "deterministic"}

    free = posterior.structure.free
    latent = {name: samples[name][:20] for name in (*exact.values, *posterior.globals, *free)}
    expected = jax.jit(jax.vmap(deterministic))(latent)
    assert set(samples) == {*latent, *expected}
    for name, value in expected.items():
        assert_allclose(samples[name][:20], value, **NEAR, err_msg=name)


def check_gradient(program, posterior, params):
    """The loss is the bound of the same particles, and its gradients are finite."""
    loss = ImportanceSmoothedELBO(program.num_particles, particles="iid").loss

    @jax.jit
    def value_and_grad(params):
        of_params = lambda params: loss(random.key(1), params, program.model, program.guide, *program.args, **program.kwargs)
        return jax.value_and_grad(of_params)(params)

    try:
        value, gradient = value_and_grad(params)
    except ValueError as error:  # a gradient of weights, of which there is none
        if program.num_particles > 1 or "with one particle every weight is 1" not in str(error):
            raise
        return
    if not posterior.globals and not program.ignore:
        assert_allclose(-value, posterior.structure.scale * np.sum(posterior.log_normalizer), **NEAR)
    for name, slope in gradient.items():
        assert np.isfinite(slope).all(), f"the gradient for {name} is not finite"


def check(program):
    with numpyro.validation_enabled(program.validated):
        posterior, params = smooth(program)
    with numpyro.validation_enabled(False):
        check_posterior(program, posterior, params)


def check_posterior(program, posterior, params):
    exact = enumerate_posterior(
        posterior,
        program.scored,
        program.guide,
        program.args,
        program.kwargs,
        params,
        present=program.present,
        states=program.states,
        ignore=(*program.ignore, *posterior.structure.free),
    )
    check_weights(program, posterior, exact)
    check_draws(program, posterior, exact, params)
    if program.is_masked or program.seed % 3 == 0:
        check_gradient(program, posterior, params)


@pytest.mark.parametrize("number", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(PROGRAMS)])
def test_random_program(x64, number):
    program = random_program(number)
    try:
        check(program)
    except Exception as error:
        error.add_note(f"{program}\nAlone: pytest 'tests/test_random_programs.py::test_random_program[{number}]' -m ''")
        raise
