"""Time and accuracy of other methods on the linear-Gaussian experiment, beside ours, in one run.

Each row keeps the root mean square error of log Z of a series, and the squared error of the smoothed (for filters,
filtered) mean. All methods have the true parameters; PVMC and the tree propose from one guide, the exact filter's marginals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import BACKWARD, RESAMPLING, backward_sampled, de_sequentialized, filtered

from linear_gaussian import SERIES, model
from numpyro_pvmc import PVMC
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.pvmc.propose import propose

LONG_RUNS = True
K, KEYS, ROUNDS = 64, 8, 9


@pytest.fixture
def row(measure, benchmark, exact):
    """Measure a function of a key that returns log evidence (series,) and means (T + 1, series, D)."""

    def row(function, keys=KEYS, rounds=ROUNDS, warmups=2, **facts):
        function = jax.jit(function)
        log_z, means = map(np.array, zip(*[function(key) for key in jax.random.split(jax.random.key(1), keys)], strict=True))
        spread = float(np.sqrt(((log_z - exact[0]) ** 2).mean()))
        error = float(((means - exact[1]) ** 2).sum(-1).mean())
        measure(
            function, jax.random.key(0), rounds=rounds, warmups=warmups, **facts, **{"error of log Z": spread, "e_x": error}
        )

    return row


def posterior_of(pvmc, data, **options):
    def run(key):
        posterior = pvmc.posterior(key, {}, data, **options)
        mean = posterior.mean()
        return posterior.log_normalizer, jnp.concatenate([mean["x_0"][None], mean["x"]])

    return run


@pytest.mark.parametrize("particles", ["iid", "rqmc"])
def test_pvmc(row, data, guide, particles):
    row(posterior_of(PVMC(model, guide, num_particles=K, particles=particles), data), method=f"PVMC, {particles}", K=K)


@pytest.mark.parametrize("rounds", [4, 6, 8, 12])
def test_pvmc_from_a_blind_start(row, data, rounds):
    """The guide is refitted from the prior, and all rounds are counted."""
    pvmc = PVMC(model, num_particles=K)
    row(posterior_of(pvmc, data, refine=rounds), method=f"PVMC, refitted {rounds} times from a blind start", K=K)


def test_de_sequentialized(row, data, guide):
    arguments = Arguments((data,), {})
    structure = read_structure(model, arguments, {})

    def run(key):
        potentials = propose(key, structure, model, guide, arguments, {}, K, particles="iid").potentials
        edge = jax.vmap(potentials.edges.function)(potentials.edges.inputs)
        values = potentials.particles.initial["x_0"][None], potentials.particles.steps["x"]
        x = jnp.moveaxis(jnp.concatenate(values), 1, 2)  # (T + 1, series, K, D)
        keys = jax.random.split(key, SERIES)
        return jax.vmap(de_sequentialized, (0, 1, 1, 1), (0, 1))(keys, potentials.node, edge, x)

    row(run, method="de-sequentialized Monte Carlo", K=K)


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("num_particles", [K, 1024])
def test_bootstrap_filter(row, data, num_particles, resampling):
    run = lambda key: filtered(key, data, num_particles, RESAMPLING[resampling])
    row(run, method=f"bootstrap filter (cuthbert, {resampling})", K=num_particles)


@pytest.mark.timeout(3600)  # one call with the most particles takes minutes
@pytest.mark.parametrize(
    ("backward", "num_particles", "keys", "rounds"),
    [("exact", K, KEYS, ROUNDS), ("exact", 256, 4, 3), ("mcmc", 1024, 3, 1), ("mcmc", 4096, 1, 1)],
)
def test_backward_sampling(row, data, backward, num_particles, keys, rounds):
    run = lambda key: backward_sampled(key, data, num_particles, RESAMPLING["xla"], BACKWARD[backward])
    method = f"bootstrap filter and backward sampling (cuthbert, {backward})"
    row(run, keys=keys, rounds=rounds, warmups=0, method=method, K=num_particles)
