"""Programs that differ in the shape of the state: independent series, vectors, matrices, constrained numbers."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy import stats

from programs import SERIES, Program, counts, guide_means, normal, normal_guide, observations, series_plate


def series():
    y, slopes = observations(4, SERIES), np.array([0.9, 0.5, -0.3])

    def model(y):
        plate = series_plate()

        def step(x_prev, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(jnp.asarray(slopes) * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    return Program(
        name="series",
        model=model,
        args=(y,),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: normal(now["x"], slopes[n] * prev["x"], 0.5) + normal(y[t][n], now["x"], 0.7),
        **normal_guide(4, (SERIES,)),
    )


def vector():
    y, means = observations(3, 3), guide_means(3, (2,))
    A, C = np.array([[0.8, 0.3], [-0.2, 0.7]]), np.array([[1.0, 0.0], [0.5, -1.0], [0.2, 0.4]])
    covariance, guide_covariance = np.array([[0.5, 0.2], [0.2, 0.4]]), np.array([[0.9, -0.3], [-0.3, 1.1]])

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.MultivariateNormal(jnp.asarray(A) @ x_prev, jnp.asarray(covariance)))
            numpyro.sample("y", dist.Normal(jnp.asarray(C) @ x, 0.7).to_event(1), obs=y_t)
            return x, x

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1)), y)

    def guide(y):
        numpyro.sample("x_0", dist.Normal(jnp.array([0.2, -0.1]), 1.1).to_event(1))
        numpyro.sample("x", dist.MultivariateNormal(jnp.asarray(means), jnp.asarray(guide_covariance)))

    return Program(
        name="vector",
        model=model,
        guide=guide,
        args=(y,),
        length=3,
        event=(2,),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: (
            stats.multivariate_normal.logpdf(now["x"], A @ prev["x"], covariance) + normal(y[t], C @ now["x"], 0.7)
        ),
        propose_start=lambda n, first: normal(first["x"], np.array([0.2, -0.1]), 1.1),
        propose=lambda t, n, now: stats.multivariate_normal.logpdf(now["x"], means[t], guide_covariance),
    )


def matrix():
    """An event of two axes, in three series."""
    y, means = observations(3, SERIES), guide_means(3, (SERIES, 2, 2))
    A = np.array([[0.8, 0.3], [-0.2, 0.7]])

    def model(y):
        plate = series_plate()

        def step(x_prev, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(jnp.asarray(A) @ x_prev, 0.5).to_event(2))
                numpyro.sample("y", dist.Normal(x[..., 0, 0] * x[..., 1, 1] - x[..., 0, 1], 0.7), obs=y_t)
            return x, x

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2))
        scan(step, x_0, y)

    def guide(y):
        with series_plate():
            numpyro.sample("x_0", dist.Normal(jnp.eye(2), 1.1).to_event(2))
            numpyro.sample("x", dist.Normal(jnp.asarray(means), 0.8).to_event(2))

    def step(t, n, prev, now):
        (a, b), (_, d) = now["x"]
        return normal(now["x"], A @ prev["x"], 0.5) + normal(y[t][n], a * d - b, 0.7)

    return Program(
        name="matrix",
        model=model,
        guide=guide,
        args=(y,),
        length=3,
        plates=(SERIES,),
        event=(2, 2),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=step,
        propose_start=lambda n, first: normal(first["x"], np.eye(2), 1.1),
        propose=lambda t, n, now: normal(now["x"], means[t][n], 0.8),
    )


def positive():
    y, means = counts(4), guide_means(4)

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Gamma(3.0, 3.0 / x_prev))
            numpyro.sample("y", dist.Poisson(2.0 * x), obs=y_t)
            return x, x

        scan(step, numpyro.sample("x_0", dist.LogNormal(0.1, 0.5)), y)

    def guide(y):
        numpyro.sample("x_0", dist.Gamma(2.0, 1.5))
        numpyro.sample("x", dist.LogNormal(jnp.asarray(means), 0.8))

    return Program(
        name="positive",
        model=model,
        guide=guide,
        args=(y,),
        length=4,
        start=lambda n, first: stats.lognorm.logpdf(first["x"], 0.5, scale=np.exp(0.1)),
        step=lambda t, n, prev, now: (
            stats.gamma.logpdf(now["x"], 3.0, scale=prev["x"] / 3.0) + stats.poisson.logpmf(y[t], 2.0 * now["x"])
        ),
        propose_start=lambda n, first: stats.gamma.logpdf(first["x"], 2.0, scale=1 / 1.5),
        propose=lambda t, n, now: stats.lognorm.logpdf(now["x"], 0.8, scale=np.exp(means[t])),
    )


PROGRAMS = (
    series(),
    vector(),
    matrix(),
    positive(),
)
