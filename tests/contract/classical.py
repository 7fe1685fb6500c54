"""Linear-Gaussian models and their neighbours."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal
from statsmodels.datasets import nile

from contract.entry import Entry, Wrong
from oracles import LinearGaussian, kalman_filter, log_gaussian

positive, unit_interval = dist.constraints.positive, dist.constraints.unit_interval


def evidence(y, mean, scale, slope, noise, sensor_noise, loading=(1.0,)):
    """Of x_0 ~ N(mean, scale^2), x_t = slope x_{t-1} + N(0, noise^2), y_t = loading x_t + N(0, sensor_noise^2)."""
    y, loading = y.reshape(len(y), -1), np.reshape(loading, (-1, 1))
    matrices = [mean], [[scale**2]], [[slope]], [0.0], [[noise**2]], loading, sensor_noise**2 * np.eye(len(loading))
    # The start is not observed.
    y = np.concatenate([np.full((1, y.shape[1]), np.nan), y])
    return kalman_filter(LinearGaussian(*map(np.array, matrices)), y).log_evidence


def with_gap(y):
    """NaN at the third observation."""
    y = np.array(y, float)
    y[2] = np.nan
    return y


# --- the flow of the Nile at Aswan, 1871 to 1970


def local_level(flow=None, T=None):
    noise = numpyro.param("noise", 150.0, constraint=positive)
    level_noise = numpyro.param("level_noise", 30.0, constraint=positive)

    def step(level_prev, flow_t):
        level = numpyro.sample("level", dist.Normal(level_prev, level_noise))
        numpyro.sample("flow", dist.Normal(level, noise), obs=flow_t)
        return level, level

    level_0 = numpyro.sample("level_0", dist.Normal(1000.0, 300.0))
    scan(step, level_0, flow, length=T)


# --- an autoregression driven by two known inputs


def driven_autoregression(y=None, u=None, T=None):
    phi = numpyro.param("phi", 0.5, constraint=dist.constraints.interval(-1.0, 1.0))
    beta = numpyro.param("beta", jnp.array([0.3, -0.3]))

    def step(x_prev, inputs):
        y_t, u_t = inputs
        x = numpyro.sample("x", dist.Normal(phi * x_prev + u_t @ beta, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, (y, u), length=T)


def two_inputs(T):
    t = np.arange(T)
    return (np.stack([np.sin(t / 3.0), (t % 7 == 0).astype(float)], -1),)


def evidence_of_driven_autoregression(y, u):
    driven, moved = [], 0.0
    for u_t in u:
        moved = 0.5 * moved + u_t @ [0.3, -0.3]
        driven.append(moved)
    return evidence(y - np.array(driven), 0.0, 1.0, 0.5, 0.5, 0.4)


# --- a regression whose coefficients walk


def dynamic_regression(y=None, z=None, T=None):
    walk = numpyro.param("walk", 0.3 * jnp.ones(2), constraint=positive)
    noise = numpyro.param("noise", 0.8, constraint=positive)

    def step(beta_prev, inputs):
        y_t, z_t = inputs
        beta = numpyro.sample("beta", dist.Normal(beta_prev, walk).to_event(1))
        numpyro.deterministic("fitted", z_t @ beta)
        numpyro.sample("y", dist.Normal(z_t @ beta, noise), obs=y_t)
        return beta, beta

    beta_0 = numpyro.sample("beta_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scan(step, beta_0, (y, z), length=T)


def regressors(T):
    return (np.stack([np.ones(T), np.cos(np.arange(T) / 2.0)], -1),)


def evidence_of_regression(y, z):
    steps = 1.0 + np.arange(len(y))
    covariance = (z @ z.T) * (1.0 + 0.3**2 * np.minimum.outer(steps, steps)) + 0.8**2 * np.eye(len(y))
    return log_gaussian(y, np.zeros(len(y)), covariance)


def regression_with_a_fixed_coefficient(y=None, z=None, T=None):
    def step(beta_prev, inputs):
        y_t, z_t = inputs
        level = numpyro.sample("level", dist.Normal(beta_prev[0], 0.3))
        slope = numpyro.sample("slope", dist.Delta(beta_prev[1]))
        numpyro.sample("y", dist.Normal(z_t[0] * level + z_t[1] * slope, 0.5), obs=y_t)
        return (level, slope), None

    scan(step, (0.0, numpyro.sample("slope_0", dist.Normal(0.0, 1.0))), (y, z), length=T)


# --- irregular sampling: the steps have known lengths, the observations known errors


def irregular_times(y=None, dt=None, error=None, T=None):
    rate = numpyro.param("rate", 0.5, constraint=positive)

    def step(x_prev, inputs):
        y_t, dt_t, error_t = inputs
        keep = jnp.exp(-rate * dt_t)
        x = numpyro.sample("x", dist.Normal(keep * x_prev, jnp.sqrt(1.0 - keep**2)))
        numpyro.sample("y", dist.Normal(x, error_t), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, (y, dt, error), length=T)


def gaps_and_errors(T):
    t = np.arange(T)
    return 0.2 + 1.5 * (t % 3), 0.2 + 0.1 * (t % 4)


def evidence_at_irregular_times(y, dt, error):
    times = np.cumsum(dt)
    covariance = np.exp(-0.5 * abs(np.subtract.outer(times, times))) + np.diag(error**2)
    return log_gaussian(y, np.zeros(len(y)), covariance)


# --- several sensors, observed after the scan


def observed_after(y=None, T=None):
    loading = numpyro.param("loading", jnp.array([1.0, 0.3, -0.3]))

    def step(x_prev, _):
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.6))
        return x, x

    T = len(y) if T is None else T
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    _, x = scan(step, x_0, None, length=T)
    numpyro.sample("y", dist.Normal(x[:, None] * loading, 0.5).to_event(1), obs=y)


def observed_after_with_the_start(y=None, T=None):
    slope = numpyro.param("slope", 0.4, constraint=unit_interval)

    def step(x_prev, _):
        x = numpyro.sample("x", dist.Normal(slope * x_prev, 0.6).to_event(1))
        return x, x

    T = len(y) - 1 if T is None else T
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    _, x = scan(step, x_0, None, length=T)
    x = jnp.concatenate([x_0[None], x])
    with numpyro.plate("time", T + 1):
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def evidence_with_the_start(y):
    one = np.eye(2)
    distribution = LinearGaussian(np.zeros(2), one, 0.4 * one, np.zeros(2), 0.6**2 * one, one, 0.5**2 * one)
    return kalman_filter(distribution, y).log_evidence


def observed_after_shifted(y=None, T=None):
    """Row t of the observations reads the state before."""

    def step(x_prev, _):
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.6))
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    _, x = scan(step, x_0, None, length=len(y))
    x = jnp.concatenate([x_0[None], x[:-1]])
    numpyro.sample("y", dist.Normal(x[:, None] * jnp.ones(3), 0.5).to_event(1), obs=y)


# --- starts


def learned_start(y=None, T=None):
    mean = numpyro.param("mean_0", 0.0)
    scale = numpyro.param("scale_0", 2.0, constraint=positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.3))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(mean, scale))
    scan(step, x_0, y, length=T)


def known_start(y=None, T=None):
    drift = numpyro.param("drift", 0.0)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev + drift, 0.3))
        numpyro.sample("y", dist.StudentT(4.0, x, 0.5), obs=y_t)
        return x, x

    scan(step, 1.0, y, length=T)


def start_and_lag(y=None, T=None):
    def step(carry, y_t):
        x_prev, x_before = carry
        x = numpyro.sample("x", dist.Normal(1.5 * x_prev - 0.6 * x_before, 0.3))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return (x, x_prev), x

    scan(step, (1.0, 1.0), y, length=T)


# --- priors on the parameters


def priors_on_parameters(y=None, T=None):
    phi = numpyro.sample("phi", dist.Beta(8.0, 2.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 0.5))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x_prev, sigma))
        numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


# --- missing observations, by NumPyro's own argument


def missing_by_obs_mask(y=None, T=None):
    scale = numpyro.param("scale", 0.6, constraint=positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        if y_t is None:
            numpyro.sample("y", dist.Normal(x, 0.4))
        else:
            numpyro.sample("y", dist.Normal(x, 0.4), obs=jnp.nan_to_num(y_t), obs_mask=~jnp.isnan(y_t))
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


def with_holes(y):
    return np.where(np.isin(np.arange(len(y)), (1, 2, 9, 15)), np.nan, y)


def one_step_too_long(y):
    numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(len(y) + 1), 1.0))


ENTRIES = (
    Entry(
        name="local_level",
        about="local level of the Nile's flow, 100 years",
        model=local_level,
        observed="flow",
        data=lambda: nile.load_pandas().data["volume"].to_numpy(float),
        length=100,
        exact=lambda y: evidence(y, 1000.0, 300.0, 1.0, 30.0, 150.0),
        wrong=Wrong(r"'flow' contain NaN, first at time 2.*handlers\.mask", args=lambda y: (with_gap(y),)),
    ),
    Entry(
        name="driven_autoregression",
        about="autoregression with exogenous inputs",
        model=driven_autoregression,
        inputs=two_inputs,
        truth={"phi": 0.8, "beta": np.array([0.7, -1.0])},
        exact=evidence_of_driven_autoregression,
        wrong=Wrong(r"one leading time axis.*\[23, 24\]", args=lambda y, u: (y, u[:-1])),
    ),
    Entry(
        name="dynamic_regression",
        about="regression with walking coefficients",
        model=dynamic_regression,
        inputs=regressors,
        truth={"walk": np.array([0.1, 0.4]), "noise": 0.3},
        exact=evidence_of_regression,
        wrong=Wrong("'slope' of the scan has a `Delta` distribution.*noise", model=regression_with_a_fixed_coefficient),
    ),
    Entry(
        name="irregular_times",
        about="time-varying inputs: irregular times, known errors",
        model=irregular_times,
        inputs=gaps_and_errors,
        truth={"rate": 0.2},
        exact=evidence_at_irregular_times,
        wrong=Wrong(r"one leading time axis.*\[24, 25\]", args=lambda y, dt, error: (y, gaps_and_errors(25)[0], error)),
    ),
    Entry(
        name="observed_after",
        about="vector emission after the scan, T rows",
        model=observed_after,
        truth={"loading": np.array([1.0, 0.7, -1.2])},
        exact=lambda y: evidence(y, 0.0, 1.0, 0.8, 0.6, 0.5, loading=(1.0, 0.3, -0.3)),
        wrong=Wrong("'y' after the scan mixes times", model=observed_after_shifted),
    ),
    Entry(
        name="observed_after_with_the_start",
        about="vector emission after the scan, T + 1 rows",
        model=observed_after_with_the_start,
        rows=1,
        truth={"slope": 0.9},
        exact=evidence_with_the_start,
        wrong=Wrong("'y' contain NaN, first at index 2. Missing values need a mask", args=lambda y: (with_gap(y),)),
    ),
    Entry(
        name="learned_start",
        about="learned distribution of the first state",
        model=learned_start,
        truth={"mean_0": 3.0, "scale_0": 0.2},
        exact=lambda y: evidence(y, 0.0, 2.0, 0.9, 0.3, 0.5),
        wrong=Wrong(
            r"does not sample \['x_0'\]",
            guide=lambda model: lambda y: numpyro.sample("x", dist.Normal(jnp.zeros(len(y)), 1.0)),
        ),
    ),
    Entry(
        name="known_start",
        about="start at a constant; heavy-tailed errors",
        model=known_start,
        truth={"drift": 0.3},
        wrong=Wrong(r"depends on `carry\[0\]`.*second lag.*blocks of L steps", model=start_and_lag),
    ),
    Entry(
        name="priors_on_parameters",
        about="priors on the parameters; the guide samples them",
        model=priors_on_parameters,
        guide=AutoNormal,
        num_steps=100,
        wrong=Wrong(
            r"does not sample \['phi', 'sigma'\]",
            guide=lambda model: (
                lambda y: (
                    numpyro.sample("x_0", dist.Normal(0.0, 1.0)),
                    numpyro.sample("x", dist.Normal(jnp.zeros(len(y)), 1.0)),
                )
            ),
        ),
    ),
    Entry(
        name="missing_by_obs_mask",
        about="missing observations by `obs_mask=`",
        model=missing_by_obs_mask,
        imputed=True,
        spoil=with_holes,
        truth={"scale": 0.3},
        wrong=Wrong(r"site 'x' with shape \(25,\).*leading time axis of 24", guide=lambda model: one_step_too_long),
    ),
)
