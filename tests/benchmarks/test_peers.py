"""Time and accuracy of other methods on the linear-Gaussian experiment, beside ours, in one run.

Each row keeps the standard deviation of log Z of a series over keys, and the squared error of the smoothed (for filters,
filtered) mean. All methods have the true parameters; PVMC and the tree propose from one guide, the exact filter's marginals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from peers import BACKWARD, RESAMPLING, backward_sampled, de_sequentialized, filtered, training_step

from linear_gaussian import SERIES, TRANSITIONS, law, model, simulate
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.chain import read_structure
from numpyro_pvmc.potentials import propose
from numpyro_pvmc.program import Arguments
from oracles import kalman_filter, rts_smoother

LONG_RUNS = True
K, KEYS, ROUNDS = 64, 8, 9


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(simulate(law(), TRANSITIONS, SERIES)[1], jnp.float32)


@pytest.fixture(scope="module")
def exact(data):
    y = np.asarray(data, float)
    smoothed = [rts_smoother(law(), y[:, n]) for n in range(SERIES)]
    return np.array([one.log_evidence for one in smoothed]), np.stack([one.means for one in smoothed], 1)


@pytest.fixture(scope="module")
def guide(data):
    moments = [kalman_filter(law(), np.asarray(data, float)[:, n]) for n in range(SERIES)]
    means = jnp.asarray(np.stack([one.means for one in moments], 1), jnp.float32)
    scales = jnp.sqrt(jnp.asarray(np.diagonal(moments[0].covariances, axis1=1, axis2=2), jnp.float32))[:, None]

    def guide(y):
        with numpyro.plate("series", SERIES):
            numpyro.sample("x_0", dist.Normal(means[0], scales[0]).to_event(1))
            numpyro.sample("x", dist.Normal(means[1:], scales[1:]).to_event(1))

    return guide


@pytest.fixture
def row(measure, benchmark, exact):
    """Measure a function of a key that returns log evidence (series,) and means (T + 1, series, D)."""

    def row(function, keys=KEYS, rounds=ROUNDS, **facts):
        function = jax.jit(function)
        log_z, means = map(np.array, zip(*[function(key) for key in jax.random.split(jax.random.key(1), keys)], strict=True))
        spread = float((log_z - exact[0]).std(0, ddof=1).mean())
        error = float(((means - exact[1]) ** 2).sum(-1).mean())
        measure(function, jax.random.key(0), rounds=rounds, **facts, **{"sd of log Z": spread, "e_x": error})

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
        lattice = propose(key, structure, model, guide, arguments, {}, K, particles="iid")
        edge = jax.vmap(lattice.edges.function)(lattice.edges.inputs)
        values = lattice.particles.initial["x_0"][None], lattice.particles.steps["x"]
        x = jnp.moveaxis(jnp.concatenate(values), 1, 2)  # (T + 1, series, K, D)
        keys = jax.random.split(key, SERIES)
        return jax.vmap(de_sequentialized, (0, 1, 1, 1), (0, 1))(keys, lattice.node, edge, x)

    row(run, method="de-sequentialized Monte Carlo", K=K)


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("num_particles", [K, 1024])
def test_bootstrap_filter(row, data, num_particles, resampling):
    run = lambda key: filtered(key, data, num_particles, RESAMPLING[resampling])
    row(run, method=f"bootstrap filter (cuthbert, {resampling})", K=num_particles)


@pytest.mark.parametrize(
    ("backward", "num_particles"), [("exact", K), ("exact", 256), ("mcmc", 256), ("mcmc", 1024), ("mcmc", 4096)]
)
def test_backward_sampling(row, data, backward, num_particles):
    run = lambda key: backward_sampled(key, data, num_particles, RESAMPLING["xla"], BACKWARD[backward])
    effort = {} if num_particles == K else {"keys": 3, "rounds": 3}
    row(run, **effort, method=f"bootstrap filter and backward sampling (cuthbert, {backward})", K=num_particles)


def test_training_pvmc(measure, data, guide):
    loss = ImportanceSmoothedELBO(K)
    step = jax.jit(jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide, data)))
    measure(step, {"decay": jnp.float32(0.38)}, jax.random.key(0), rounds=ROUNDS, method="PVMC", K=K)


@pytest.mark.parametrize("num_particles", [K, 256])
def test_training_filter(measure, data, num_particles):
    step = jax.jit(lambda key, decay: training_step(key, data, decay, num_particles, RESAMPLING["xla"]))
    facts = {"method": "bootstrap filter, stop-gradient resampling (cuthbert)", "K": num_particles}
    measure(step, jax.random.key(0), jnp.float32(0.38), rounds=ROUNDS, **facts)


@pytest.mark.parametrize("loss", [Trace_ELBO(num_particles=K), RenyiELBO(alpha=0.0, num_particles=K)], ids=["elbo", "renyi"])
def test_training_svi(measure, data, guide, loss):
    """NumPyro's own `SVI` over the same `scan`, with K whole trajectories."""
    svi = SVI(model, guide, optax.adam(1e-3), loss)
    state, update = svi.init(jax.random.key(0), data), jax.jit(svi.update)
    measure(update, state, data, rounds=ROUNDS, method=f"NumPyro SVI, {type(loss).__name__}", K=K)
