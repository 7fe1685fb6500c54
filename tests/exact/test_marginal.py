"""Programs without their chain have the density of the program with it, integrated, and work in NumPyro's inferences."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.util import log_density

from numpyro_pvmc.exact import exact_posterior, marginalize, sample_states

KEY = jax.random.key(0)
Y = np.random.default_rng(0).normal(size=(12, 3))
VALUES = {"scale": 0.4, "phi": 0.7}


def panel(y=None, size=3, subsample=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    phi = numpyro.sample("phi", dist.Beta(8.0, 2.0))
    noise = numpyro.param("noise", 0.5, constraint=dist.constraints.positive)
    numpyro.deterministic("variance", scale**2)
    numpyro.sample("elsewhere", dist.Normal(phi, 1.0), obs=0.3)
    series = numpyro.plate("series", size, subsample_size=subsample)

    def step(x_prev, y_t):
        with series as index:
            x = numpyro.sample("x", dist.Normal(phi * x_prev, scale))
            numpyro.sample("y", dist.Normal(x, noise), obs=None if y_t is None else y_t[index])
        return x, x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    _, xs = scan(step, x_0, y, length=12)
    numpyro.deterministic("top", xs.max())


def sites_of(model, *args, values=VALUES, **kwargs):
    with handlers.trace() as sites, handlers.seed(rng_seed=0), handlers.substitute(data=values):
        model(*args, **kwargs)
    return sites


def test_density_and_names(x64):
    sites = sites_of(marginalize(panel), jnp.asarray(Y))
    assert list(sites) == ["scale", "phi", "noise", "variance", "elsewhere", "series", "x_log_evidence"]
    found, _ = log_density(marginalize(panel), (jnp.asarray(Y),), {}, VALUES)
    prior = dist.HalfNormal(1.0).log_prob(0.4) + dist.Beta(8.0, 2.0).log_prob(0.7) + dist.Normal(0.7, 1.0).log_prob(0.3)
    exact = exact_posterior(panel, VALUES, jnp.asarray(Y)).log_normalizer
    assert_allclose(sites["x_log_evidence"]["fn"].log_factor, exact, rtol=1e-12)
    assert_allclose(found, prior + exact.sum(), rtol=1e-12)


def test_a_minibatch_is_scaled(x64):
    y = jnp.asarray(Y)
    index = jnp.array([2, 0])
    values = VALUES | {"series": index}
    found, sites = log_density(handlers.seed(marginalize(panel), 0), (y,), {"subsample": 2}, values)
    alone = exact_posterior(panel, VALUES, y[:, index], size=2).log_normalizer
    prior = dist.HalfNormal(1.0).log_prob(0.4) + dist.Beta(8.0, 2.0).log_prob(0.7) + dist.Normal(0.7, 1.0).log_prob(0.3)
    assert_allclose(found, prior + 1.5 * alone.sum(), rtol=1e-12)


def test_without_data_it_is_the_program():
    prior = Predictive(marginalize(panel), num_samples=4)(KEY)
    assert prior["y"].shape == (4, 12, 3)
    assert prior["top"].shape == (4,)


def regimes(y):
    """A hidden Markov model."""
    stay = numpyro.sample("stay", dist.Beta(8.0, 2.0))
    matrix = jnp.array([[1.0, 0.0], [0.0, 1.0]]) * stay + (1 - stay) * jnp.array([[0.0, 1.0], [1.0, 0.0]])

    def step(z_prev, y_t):
        z = numpyro.sample("z", dist.Categorical(matrix[z_prev]))
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y_t)
        return z, None

    scan(step, 0, y)


def test_a_finite_chain(x64):
    y = np.array([0.1, 2.2, 1.8])
    value = lambda stay: log_density(marginalize(regimes), (jnp.asarray(y),), {}, {"stay": stay})[0]

    def by_hand(stay):
        matrix = np.array([[stay, 1 - stay], [1 - stay, stay]])
        alpha = np.array([1.0, 0.0])
        for y_t in y:
            alpha = alpha @ matrix * np.exp(-0.5 * (y_t - np.array([0.0, 2.0])) ** 2) / np.sqrt(2 * np.pi)
        return np.log(alpha.sum()) + 7 * np.log(stay) + np.log(1 - stay) + np.log(72.0)

    h = 1e-4
    assert_allclose(value(0.8), by_hand(0.8), rtol=1e-9)
    assert_allclose(jax.grad(value)(0.8), (by_hand(0.8 + h) - by_hand(0.8 - h)) / (2 * h), rtol=1e-6)
    second = (by_hand(0.8 + h) - 2 * by_hand(0.8) + by_hand(0.8 - h)) / h**2
    assert_allclose(jax.hessian(value)(0.8), second, rtol=1e-4)


def local_level(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def grid_posterior(y):
    """Mean and standard deviation of the scale, on a grid, in NumPy."""
    grid, log_p = np.linspace(1e-3, 4.0, 4000), []
    for scale in grid:
        mean, variance, total = 0.0, 1.0, -0.5 * scale**2
        for y_t in y:
            variance += scale**2
            total -= 0.5 * (np.log(variance + 0.25) + (y_t - mean) ** 2 / (variance + 0.25))
            mean, variance = mean + variance / (variance + 0.25) * (y_t - mean), variance * 0.25 / (variance + 0.25)
        log_p.append(total)
    p = np.exp(np.array(log_p) - max(log_p))
    p /= p.sum()
    return (p * grid).sum(), np.sqrt((p * grid**2).sum() - (p * grid).sum() ** 2)


@pytest.fixture(scope="module")
def level():
    return np.cumsum(0.4 * np.random.default_rng(3).normal(size=20))


def test_nuts_and_states(level):
    y = jnp.asarray(level, jnp.float32)
    mcmc = MCMC(NUTS(marginalize(local_level)), num_warmup=200, num_samples=600, progress_bar=False)
    mcmc.run(KEY, y)
    samples = mcmc.get_samples()
    mean, spread = grid_posterior(level)
    assert_allclose(samples["scale"].mean(), mean, atol=0.2 * spread)
    assert_allclose(samples["scale"].std(), spread, rtol=0.2)
    states = sample_states(KEY, local_level, samples, y)
    assert {name: x.shape for name, x in states.items()} == {"x_0": (600,), "x": (600, 20)}
    one = exact_posterior(local_level, {"scale": samples["scale"][5]}, y)
    many = sample_states(KEY, marginalize(local_level), {"scale": jnp.full(4000, samples["scale"][5])}, y)
    assert (abs(many["x"].mean(0) - one.mean()["x"]) < 5 * jnp.sqrt(one.variance()["x"] / 4000)).all()
    in_chains = sample_states(KEY, local_level, {"scale": samples["scale"].reshape(2, 300)}, y, batch_ndims=2)
    assert in_chains["x"].shape == (2, 300, 20)
    forecast = Predictive(local_level, samples | states)(KEY, y)
    assert forecast["y"].shape == (600, 20)


def test_laplace_approximation(x64, level):
    """It takes the Hessian, in forward over reverse mode."""
    y = jnp.asarray(level)
    guide = AutoLaplaceApproximation(marginalize(local_level))
    svi = SVI(marginalize(local_level), guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    result = svi.run(KEY, 300, y, progress_bar=False)
    (variance,) = guide.get_posterior(result.params).covariance_matrix.ravel()
    assert 0 < variance < 10


def test_what_is_impossible_is_minus_infinity():
    @jax.jit
    def factor(scale):
        with handlers.trace() as sites, handlers.substitute(data={"scale": scale}):
            marginalize(local_level)(jnp.zeros(3))
        return sites["x_log_evidence"]["fn"].log_factor

    assert jnp.isfinite(factor(1.0))
    assert factor(jnp.nan) == factor(-1.0) == -jnp.inf


def test_what_is_refused():
    def counts(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match="Site 'y' has a Poisson distribution"):
        marginalize(counts)(jnp.zeros(3))
    with pytest.raises(TypeError, match="has been integrated out already"):
        marginalize(marginalize(local_level))
    with pytest.raises(TypeError, match="A model is a function, but got a int"):
        marginalize(3)
    assert repr(marginalize(local_level)) == "marginalize(local_level)"
