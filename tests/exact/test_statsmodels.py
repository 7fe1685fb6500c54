"""Evidence and smoothed states of statsmodels' models of time series, on data that it ships, from programs of their carries.

Statsmodels puts its prior at the first observation, so that one is observed before the scan.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.exact import exact_posterior, maximum_likelihood


def program(y, T, Z, R, noise, h, mean, spread):
    """Only what is drawn has noise; all else of the state is carried."""

    def observe(name, state, y_t):
        fn = dist.Normal(Z @ state, h) if h > 0 else dist.Delta(Z @ state)
        with handlers.mask(mask=~jnp.isnan(y_t)):
            numpyro.sample(name, fn, obs=jnp.nan_to_num(y_t))

    def step(state, y_t):
        state = T @ state + R @ numpyro.sample("noise", dist.Normal(jnp.zeros(len(noise)), noise).to_event(1))
        observe("y", state, y_t)
        return state, numpyro.deterministic("state", state)

    first = numpyro.sample("state_0", dist.Normal(mean, spread).to_event(1))
    observe("y_0", first, y[0])
    scan(step, first, y[1:])


def nile():
    return sm.tsa.UnobservedComponents(sm.datasets.nile.load_pandas().data.volume.to_numpy(), "llevel"), [15099.0, 1469.1]


def carbon_dioxide():
    y = sm.datasets.co2.load_pandas().data.co2.resample("MS").mean()[:120].to_numpy()  # some months are missing
    seasons = [{"period": 12, "harmonics": 2}]
    return sm.tsa.UnobservedComponents(y, "lltrend", freq_seasonal=seasons), [0.1, 0.05, 0.001, 0.01]


def el_nino():
    """Dummy seasons: of twelve states one has noise."""
    y = sm.datasets.elnino.load_pandas().data.set_index("YEAR").to_numpy().ravel()[:120]
    return sm.tsa.UnobservedComponents(y, "llevel", seasonal=12), [0.05, 0.1, 0.02]


def sunspots():
    """An ARMA model, observed without noise."""
    y = sm.datasets.sunspots.load_pandas().data.SUNACTIVITY.to_numpy()[:150]
    return sm.tsa.SARIMAX(y - y.mean(), order=(3, 0, 2)), [1.2, -0.5, -0.1, 0.3, 0.1, 250.0]


@pytest.mark.parametrize("example", [nile, carbon_dioxide, el_nino, sunspots])
def test_equals_statsmodels(x64, example):
    model, params = example()
    size = model.k_states
    mean, spread = np.zeros(size), np.full(size, 2.0)
    mean[0], spread[0] = np.nanmean(model.endog), 3 * np.nanstd(model.endog)
    model.ssm.initialize_known(mean, np.diag(spread**2))
    model.loglikelihood_burn = model.ssm.loglikelihood_burn = 0
    expected = model.smooth(np.array(params))
    T, Z, R = np.asarray(model["transition"]), np.asarray(model["design"])[0], np.asarray(model["selection"])
    noise, h = np.sqrt(np.diagonal(np.asarray(model["state_cov"]))), np.sqrt(np.asarray(model["obs_cov"]).item())
    y = jnp.asarray(model.endog.ravel())
    posterior = exact_posterior(program, {}, y, T, Z, R, noise, h, mean, spread)
    assert_allclose(posterior.log_normalizer, expected.llf, rtol=1e-9)
    states = [posterior.mean()["state_0"]]
    for drawn in posterior.mean()["noise"]:
        states.append(T @ states[-1] + R @ drawn)
    assert_allclose(np.stack(states), expected.smoothed_state.T, atol=1e-6 * spread[0])


def local_level(y, mean, spread):
    sizes = numpyro.param("sizes", jnp.array([100.0, 50.0]), constraint=dist.constraints.positive)
    first = numpyro.sample("x_0", dist.Normal(mean, spread))
    numpyro.sample("y_0", dist.Normal(first, sizes[0]), obs=y[0])

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, sizes[1]))
        numpyro.sample("y", dist.Normal(x, sizes[0]), obs=y_t)
        return x, None

    scan(step, first, y[1:])


def test_maximum_likelihood(x64):
    model, _ = nile()
    model.ssm.initialize_known(np.array([1000.0]), np.array([[300.0**2]]))
    model.loglikelihood_burn = model.ssm.loglikelihood_burn = 0
    found = maximum_likelihood(local_level, jnp.asarray(model.endog.ravel()), 1000.0, 300.0)
    variances = np.asarray(found.params["sizes"]) ** 2
    expected = model.smooth(variances, cov_type="approx")
    assert_allclose(found.log_evidence, expected.llf, rtol=1e-9)
    for factor in ([1.02, 1.0], [0.98, 1.0], [1.0, 1.05], [1.0, 0.95]):
        assert model.loglike(variances * factor) < expected.llf
    # Of a variance v = s^2 the standard error is 2 s times that of s.
    assert_allclose(2 * found.params["sizes"] * found.standard_errors["sizes"], expected.bse, rtol=0.02)


def test_a_maximum_that_cannot_be_searched():
    with pytest.raises(ValueError, match="there is nothing to estimate"):
        maximum_likelihood(_without_parameters, jnp.zeros(3))
    with pytest.raises(ValueError, match="not finite where the search starts"):
        maximum_likelihood(local_level, jnp.array([0.0, 1e30, 0.0]), 0.0, 1.0, init_params={"sizes": jnp.array([1e-9, 1e-9])})


def _without_parameters(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)
