"""The whole way from a program to its answer, against visiting every trajectory through the same particles.

The particles are the library's; everything computed from them is computed a second time from the program's hand-written
densities, in NumPy.
"""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import DOUBLE, SINGLE
from models import BY_NAME
from numpyro_pvmc import PVMC
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.ops.smoothing import pairwise_marginals
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.pvmc.propose import propose
from oracles import enumerate_chain

# Random programs and those of the contract go the same way; these are of the kinds that differ most.
QUICK = (
    *("autoregression_4", "two_coupled_sites", "held", "global_sites", "missing"),
    *("clock", "pair_emission", "factor", "after_the_scan_in_plates"),
)
CASES = [  # tolerance, program, number of particles
    *(pytest.param(DOUBLE, name, 3, marks=() if name in QUICK else pytest.mark.slow) for name in BY_NAME),
    *(pytest.param(DOUBLE, name, 1, marks=pytest.mark.slow) for name in ("deterministic_start", "padded", "two_coupled_sites")),
    (SINGLE, "autoregression_4", 2),
    *(
        pytest.param(SINGLE, name, 2, marks=pytest.mark.slow)
        for name in ("global_sites", "two_coupled_sites", "parameters", "vector", "positive")
    ),
    *(pytest.param(SINGLE, name, 3, marks=pytest.mark.slow) for name in ("held", "sensors", "series", "missing", "clock")),
]


def smooth(program, num_particles):
    """A posterior of the untrained guide, and the weights of pairs of neighbours, (T, *plates, K, K)."""
    pvmc = PVMC(program.model, program.guide, num_particles=num_particles, particles="iid")
    state = pvmc.init(jax.random.key(1), *program.args, **program.kwargs)
    params, arguments, key = pvmc.get_params(state), Arguments(program.args, program.kwargs), jax.random.key(2)
    structure = read_structure(program.model, arguments, params)

    @jax.jit
    def posterior_and_pairs(key, params, arguments):
        potentials = propose(key, structure, program.model, program.guide, arguments, params, num_particles).potentials
        edge = jax.vmap(potentials.edges.function)(potentials.edges.inputs)
        pairs = pairwise_marginals(potentials.node, edge, potentials.mask)
        return pvmc.posterior(key, params, *arguments.args, **arguments.kwargs), pairs

    return posterior_and_pairs(key, params, arguments)


def presence(program, n):
    """For each step of series `n` whether it is present."""
    return np.ones(program.length, bool) if program.present is None else program.present[:, *n]


def columns(program, posterior, n):
    """The particles of series `n`: for each present step, the start first, a list of K dictionaries."""
    globals_ = {name: float(value) for name, value in posterior.globals.items()}
    particles = {name: np.asarray(value, float) for name, value in posterior.particles.items()}
    K = particles[program.sites[0]].shape[1]
    first = [{s.removesuffix("_0"): particles[s][k][n] for s in program.initial_sites} | globals_ for k in range(K)]
    steps = [
        [{s: particles[s][t, k][n] for s in program.sites} | globals_ for k in range(K)]
        for t in np.flatnonzero(presence(program, n))
    ]
    return first, steps


def enumerate_program(program, posterior, n):
    """Every trajectory of series `n`, through the start, if it is drawn, and the present steps."""
    first, steps = columns(program, posterior, n)
    times = np.flatnonzero(presence(program, n))
    log_k = np.log(len(first))
    node = [[-program.propose(t, n, now) - log_k for now in step] for t, step in zip(times, steps, strict=True)]
    edge = [
        [[program.step(t, n, prev, now) for now in after] for prev in before]
        for t, before, after in zip(times[1:], steps[:-1], steps[1:], strict=True)
    ]
    if program.start:
        node.insert(0, [program.start(n, x) - program.propose_start(n, x) - log_k for x in first])
        edge.insert(0, [[program.step(times[0], n, prev, now) for now in steps[0]] for prev in first])
    else:
        node[0] += np.array([program.step(times[0], n, {}, now) for now in steps[0]])
    edge = np.reshape(edge, (len(node) - 1, len(first), len(first)))
    return enumerate_chain(np.array(node), edge)


def check_shapes(program, posterior, num_particles):
    """Time, particles, plates, event; the initial sites have no time; no other axes."""
    assert posterior.log_normalizer.shape == program.plates
    assert set(posterior.particles) == {*program.sites, *program.initial_sites}
    assert set(posterior.log_weights) == set(posterior.log_filtering_weights) == set(posterior.particles)
    for site in posterior.particles:
        time = (program.length,) if site in program.sites else ()
        assert posterior.particles[site].shape == (*time, num_particles, *program.plates, *program.event)
        assert posterior.log_weights[site].shape == (*time, num_particles, *program.plates)
        assert posterior.log_filtering_weights[site].shape == (*time, num_particles, *program.plates)


def check(program, posterior, pairs, tolerance):
    """log Z, smoothing and filtering weights of every series; an absent step repeats the last present one's weights."""
    near = {"rtol": tolerance, "atol": tolerance}
    for n in np.ndindex(*program.plates):
        exact = enumerate_program(program, posterior, n)
        assert_allclose(posterior.log_normalizer[n], exact.log_normalizer, **near)
        if program.present is None:
            # A constant start is a point of K equal particles, which the enumeration does not have.
            assert_allclose(np.asarray(pairs)[int(program.start is None) :, *n], exact.pair_weights, **near)
        last_present = np.cumsum(presence(program, n)) - 1 + bool(program.start)
        begun = last_present >= 0
        for ours, theirs in (
            (posterior.log_weights, exact.weights),
            (posterior.log_filtering_weights, exact.filtering_weights),
        ):
            for site in program.sites:
                assert_allclose(np.exp(ours[site])[begun][:, :, *n], theirs[last_present[begun]], **near)
            for site in program.initial_sites:
                assert_allclose(np.exp(ours[site])[:, *n], theirs[0], **near)


@pytest.mark.parametrize(("tolerance", "name", "num_particles"), CASES, indirect=["tolerance"])
def test_enumeration(tolerance, name, num_particles):
    program = BY_NAME[name]
    posterior, pairs = smooth(program, num_particles)
    assert posterior.log_normalizer.dtype == (np.float64 if tolerance == DOUBLE else np.float32)
    check_shapes(program, posterior, num_particles)
    check(program, posterior, pairs, tolerance)
    if program.present is not None:
        assert_array_equal(np.isnan(posterior.effective_sample_size()["x"]), ~program.present)
