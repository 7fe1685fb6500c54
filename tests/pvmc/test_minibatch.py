"""Plates that draw a minibatch of the series, and guides for states and parameters together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC, AutoSmoothedNormal, AutoStateSpace, ImportanceSmoothedELBO

pytestmark = few_particles

LENGTH, SERIES = 5, 6
Y = np.random.default_rng(0).normal(size=(LENGTH, SERIES)).cumsum(0)


def panel(y, size=None):
    """Series with levels of their own, and a noise that all share."""
    noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.3))
    series = numpyro.plate("series", SERIES, subsample_size=size)
    with series as chosen:
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, noise))
            numpyro.sample("y", dist.Normal(level + x, 0.5), obs=y_t)
        return x, None

    scan(step, x_0, y[:, chosen])


def given(y, size=None):
    numpyro.sample("noise", dist.LogNormal(-0.4, 0.2))
    with numpyro.plate("series", SERIES, subsample_size=size) as chosen:
        numpyro.sample("level", dist.Normal(0.1, 0.8))
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(numpyro.param("pull", jnp.asarray(0.7)) * y[:, chosen], 0.7))


def test_the_bound_of_minibatches_is_that_of_all_series_in_the_mean(x64):
    y, keys = jnp.asarray(Y), jax.random.split(jax.random.key(0), 20_000)
    of = lambda size: jax.jit(jax.vmap(lambda key: ImportanceSmoothedELBO(4).loss(key, {"pull": 0.7}, panel, given, y, size)))(
        keys
    )
    minibatch, whole = of(2), of(None)
    error = np.hypot(minibatch.std(), whole.std()) / np.sqrt(len(keys))
    assert abs(minibatch.mean() - whole.mean()) < 4 * error
    assert error < 0.2


def test_series_are_chosen_by_the_name_of_the_plate(x64):
    """Weights and log normalizers are not scaled: those of the chosen series are those of the panel at the same particles."""
    y, pvmc = jnp.asarray(Y), PVMC(panel, given, num_particles=4)
    chosen = {"pull": jnp.asarray(0.7), "series": jnp.array([4, 1])}
    posterior = pvmc.posterior(jax.random.key(1), chosen, y, 2)
    assert_array_equal(posterior.params["series"], [4, 1])
    assert posterior.log_normalizer.shape == (2,)
    noise, level = posterior.globals["noise"], posterior.globals["level"]
    normal = lambda x, loc, scale: -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    for n, series in enumerate([4, 1]):
        x_0, x = np.asarray(posterior.particles["x_0"])[:, n], np.asarray(posterior.particles["x"])[:, :, n]
        alpha = np.full(4, -np.log(4))
        for t in range(LENGTH):
            before = x_0 if t == 0 else x[t - 1]
            alpha = np.logaddexp.reduce(alpha[:, None] + normal(x[t], 0.9 * before[:, None], noise), 0) - np.log(4)
            alpha += normal(Y[t, series], level[n] + x[t], 0.5) - normal(x[t], 0.7 * Y[t, series], 0.7)
        assert_allclose(posterior.log_normalizer[n], np.logaddexp.reduce(alpha), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, None])
def test_a_refitted_guide_keeps_all_series(size):
    """Rows of the minibatch move, others rest; a model without the minibatch takes the same state."""
    guide = AutoStateSpace(panel, AutoNormal, functools.partial(AutoSmoothedNormal, covariance="full"))
    pvmc = PVMC(panel, guide, optax.adam(0.02), num_particles=8)
    state = pvmc.init(jax.random.key(0), jnp.asarray(Y), size)
    before = pvmc.get_params(state)
    after = pvmc.get_params(pvmc.update(state, jnp.asarray(Y), size)[0])
    assert before["auto_steps_mean"].shape == (LENGTH, SERIES, 1)
    moved = (np.asarray(before["auto_steps_mean"]) != np.asarray(after["auto_steps_mean"])).any((0, 2))
    assert moved.sum() == (size or SERIES)
    posterior = pvmc.posterior(jax.random.key(1), after, jnp.asarray(Y))
    assert posterior.log_normalizer.shape == (SERIES,)


@pytest.mark.slow
def test_stock_svi_trains_on_minibatches():
    svi = SVI(panel, AutoNormal(panel), optax.adam(0.05), loss=ImportanceSmoothedELBO(4))
    losses = svi.run(jax.random.key(0), 200, jnp.asarray(Y), 2, progress_bar=False).losses
    assert losses[-50:].mean() < losses[:50].mean()


def level(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def exact_distribution_of_scale(y):
    """Mean and standard deviation of the log of `scale`, by a Kalman filter on a grid."""
    grid = np.linspace(-2.0, 2.0, 400)
    mean, variance, logs = np.zeros(400), np.ones(400), -0.5 * (grid / 0.5) ** 2
    for y_t in y:
        mean, variance = 0.9 * mean, 0.81 * variance + np.exp(2 * grid)
        total = variance + 0.25
        logs = logs - 0.5 * np.log(total) - 0.5 * (y_t - mean) ** 2 / total
        mean, variance = mean + variance / total * (y_t - mean), variance * 0.25 / total
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    return weights @ grid, np.sqrt(weights @ (grid - weights @ grid) ** 2)


@pytest.mark.slow
def test_resampled_global_sites_have_their_posterior_distribution():
    """Whatever the guide: here one that is untrained, and off."""
    y = np.random.default_rng(3).normal(size=12).cumsum().astype(np.float32)

    def guide(y):
        numpyro.sample("scale", dist.LogNormal(0.3, 0.6))
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(0.9 * y, 0.6))

    pvmc = PVMC(level, guide, num_particles=32)
    draws = pvmc.sample_posterior(jax.random.key(0), {}, jnp.asarray(y), sample_shape=(2_000,), resample=True)
    mean, deviation = exact_distribution_of_scale(y)
    log_scale = np.log(draws["scale"])
    assert abs(log_scale.mean() - mean) < 0.1 * deviation
    assert abs(log_scale.std() / deviation - 1) < 0.1
    assert abs(mean - 0.3) > 0.2 * deviation


def test_few_effective_draws_are_said():
    def far(y):
        numpyro.sample("scale", dist.LogNormal(-9.0, 0.1))
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(0.9 * y, 0.3))

    with pytest.warns(UserWarning, match=r"Of 200 draws of the global sites \d+\.\d are effective"):
        PVMC(level, far, num_particles=4).sample_posterior(
            jax.random.key(0), {}, jnp.asarray(Y[:, 0], jnp.float32), sample_shape=(200,), resample=True
        )


@pytest.mark.slow
def test_the_guides_of_states_and_parameters():
    guide = AutoStateSpace(level, AutoMultivariateNormal)
    pvmc = PVMC(level, guide, num_particles=8)
    params = pvmc.get_params(pvmc.init(jax.random.key(0), jnp.asarray(Y[:, 0], jnp.float32)))
    assert {"auto_loc", "auto_scale_tril", "auto_steps_mean", "auto_steps_factor"} <= set(params)
    assert guide.median(params)["scale"].shape == ()
    assert guide.quantiles(params, [0.1, 0.9])["x"].shape == (2, LENGTH)
    samples = guide.sample_posterior(jax.random.key(1), params, sample_shape=(3,))
    assert {name: x.shape for name, x in samples.items()} == {"scale": (3,), "x_0": (3,), "x": (3, LENGTH)}


def test_what_makes_no_guide_is_refused():
    with pytest.raises(TypeError, match=r"`parameters` must take a model and return a guide.*Give the class"):
        AutoStateSpace(level, AutoNormal(level))


@pytest.mark.slow
def test_a_start_that_looks_at_all_data_is_none_of_minibatches():
    guide = AutoStateSpace(panel, states=functools.partial(AutoSmoothedNormal, init="laplace"))
    with pytest.raises(ValueError, match=r"`init='laplace'` looks at all data, and the plates \['series'\] draw minibatches"):
        PVMC(panel, guide).init(jax.random.key(0), jnp.asarray(Y), 2)
