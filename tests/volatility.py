"""Stochastic volatility: the log variance of returns is a hidden autoregression."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan


def model(y):
    """The parameters start far from what they will be: mean -0.5, persistence 0.97, noise 0.27."""
    mu = numpyro.param("mu", 1.0)
    phi = numpyro.param("phi", 0.5, constraint=dist.constraints.unit_interval)
    s = numpyro.param("s", 0.8, constraint=dist.constraints.positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(mu + phi * (x_prev - mu), s))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(mu, s / jnp.sqrt(1 - phi**2))), y)
