"""Guides with a scan of their own: the mixture they propose from, in NumPy; unbiased; at K = 1 the plain bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.test_util import check_grads
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO
from scipy import stats

from conftest import few_particles
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, markov
from oracles import LinearGaussian, enumerate_chain, kalman_filter

pytestmark = few_particles

A, Q, R = 0.9, 0.3, 0.5
Y = np.array([0.4, -0.2, 0.9, 1.3])
SERIES = np.stack([Y, -Y], 1)
PARAMS = {"b": jnp.array(0.4), "c": jnp.array(0.5)}


def model(y, series=2):
    plate = numpyro.plate("series", series)

    def step(x_prev, y_t):
        with plate:
            x = numpyro.sample("x", dist.Normal(A * x_prev, Q))
            numpyro.sample("y", dist.Normal(x, R), obs=y_t)
        return x, None

    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


def guide(y, series=2):
    b, c = numpyro.param("b", 0.4), numpyro.param("c", 0.5)
    plate = numpyro.plate("series", series)

    def step(x_prev, y_t):
        with plate:
            return numpyro.sample("x", dist.Normal(c * x_prev + b * y_t, 0.5)), None

    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(0.1, 1.1))
    scan(step, x_0, y)


def test_the_mixture_against_numpy(x64):
    posterior = PVMC(model, guide, num_particles=3, particles="iid").posterior(random.key(0), PARAMS, jnp.asarray(SERIES))
    normal = stats.norm.logpdf
    for n in range(2):
        x = np.concatenate([posterior.particles["x_0"][None, :, n], posterior.particles["x"][:, :, n]])
        node = np.zeros((5, 3))
        node[0] = normal(x[0], 0, 1) - normal(x[0], 0.1, 1.1) - np.log(3)
        for t in range(1, 5):
            components = normal(x[t], 0.5 * x[t - 1][:, None] + 0.4 * SERIES[t - 1, n], 0.5)
            mixture = np.logaddexp.reduce(components, 0) - np.log(3)
            node[t] = normal(SERIES[t - 1, n], x[t], R) - mixture - np.log(3)
        edge = np.array([normal(x[t], A * x[t - 1][:, None], Q) for t in range(1, 5)])
        exact = enumerate_chain(node, edge)
        assert_allclose(posterior.log_normalizer[n], exact.log_normalizer, rtol=1e-8)
        assert_allclose(np.exp(posterior.log_weights["x"][:, :, n]), exact.weights[1:], rtol=1e-6)


def test_each_particle_continues_one_of_the_step_before():
    """A guide with hardly any noise: particle k is where particle k before it leads."""

    def tight(y, series=2):
        plate = numpyro.plate("series", 2)

        def step(x_prev, y_t):
            with plate:
                return numpyro.sample("x", dist.Normal(2.0 * x_prev, 1e-3)), None

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    particles = PVMC(model, tight, num_particles=8, particles="iid").posterior(random.key(0), {}, jnp.asarray(SERIES)).particles
    x = np.concatenate([particles["x_0"][None], particles["x"]])
    assert_allclose(x[1:], 2 * x[:-1], atol=0.02)
    assert len(np.unique(x[0])) == 16


@pytest.mark.parametrize(("num_particles", "number"), [pytest.param(2, 60_000, marks=pytest.mark.slow), (8, 20_000)])
def test_unbiased(num_particles, number):
    pvmc = PVMC(model, guide, num_particles=num_particles, particles="iid")
    one = lambda key: pvmc.posterior(key, PARAMS, jnp.asarray(SERIES[:, :1]), 1).log_normalizer[0]
    log_z = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=2000))(random.split(random.key(2), number))
    distribution = LinearGaussian(*(np.full(shape, value) for shape, value in [((1,), 0.0), ((1, 1), 1.0), ((1, 1), A), ((1,),
    0.0)]),
                         *(np.full((1, 1), value) for value in (Q**2, 1.0, R**2)))  # fmt: skip
    exact = kalman_filter(distribution, np.concatenate([[np.nan], Y])[:, None]).log_evidence
    ratio = np.exp(np.asarray(log_z, np.float64) - exact)
    standard_error = ratio.std() / np.sqrt(number)
    assert standard_error < 0.015, f"too blunt to see anything: {standard_error}"
    assert abs(ratio.mean() - 1) < 4 * standard_error


def test_one_particle_is_the_plain_bound(x64):
    value = jax.jit(lambda loss: loss.loss(random.key(0), PARAMS, model, guide, jnp.asarray(SERIES)), static_argnums=0)
    assert_allclose(value(ImportanceSmoothedELBO(1)), value(Trace_ELBO()), rtol=1e-10)


@pytest.mark.parametrize("gradient", [pytest.param("reparam", marks=pytest.mark.slow), "doubly_reparam"])
def test_gradient_against_finite_differences(x64, gradient):
    """The doubly reparameterised gradient is one of independent draws: a Markovian guide gets the plain one."""
    loss = ImportanceSmoothedELBO(4, gradient=gradient, particles="iid")
    value = jax.jit(lambda params: loss.loss(random.key(0), params, model, guide, jnp.asarray(SERIES)))
    check_grads(value, (jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS),), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.slow
def test_training_and_everything_after():
    pvmc = PVMC(model, guide, num_particles=16, particles="iid")
    result = pvmc.run(random.key(0), 300, jnp.asarray(SERIES), progress_bar=False)
    assert result.losses[-30:].mean() < result.losses[100:130].mean() + 0.1
    samples = pvmc.sample_posterior(random.key(1), result.params, jnp.asarray(SERIES), sample_shape=(5,))
    assert samples["x"].shape == (5, 4, 2)


def test_independent_draws_are_said_aloud():
    with pytest.warns(UserWarning, match=r"\['x'\] are independent draws.*without a scan"):
        PVMC(model, guide, num_particles=4).posterior(random.key(0), PARAMS, jnp.asarray(SERIES))


def test_a_scan_without_chain_sites_is_no_markovian_guide():
    def filtering(y, series=2):
        _, means = scan(lambda m, y_t: (0.5 * m + 0.5 * y_t,) * 2, jnp.zeros(2), y)
        numpyro.sample("x_0", dist.Normal(jnp.zeros(2), 1.0))
        numpyro.sample("x", dist.Normal(means, 0.5))

    posterior = PVMC(model, filtering, num_particles=4).posterior(random.key(0), {}, jnp.asarray(SERIES))
    assert np.isfinite(posterior.log_normalizer).all()


def accumulating(y):
    def step(total, y_t):
        x = numpyro.sample("x", dist.Normal(total, 0.5).expand([2]))
        return total + x, None

    numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]))
    scan(step, jnp.zeros(2), y)


def reading_the_start(y):
    """What every step reads is no state: the mixture would be that of another guide."""
    plate = numpyro.plate("series", 2)
    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        with plate:
            return numpyro.sample("x", dist.Normal(0.5 * x_0, 0.5)), None

    scan(step, jnp.zeros(2), y)


def without_plate(y):
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]))
    markov(lambda x, y_t: (numpyro.sample("x", dist.Normal(0.5 * x, 0.5)), None), x_0, y)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (accumulating, "guide has a `scan` of its own.*accumulates the past"),
        (reading_the_start, r"does not start from \['x_0'\].*as the first carry"),
        (without_plate, r"plates of sizes \[\], .* \[2\]"),
    ],
)
def test_guides_that_cannot_be_read(own, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PVMC(functools.partial(model), own, num_particles=4, particles="iid").init(random.key(0), jnp.asarray(SERIES))
