"""Models with simulated data, on which a proposal is refitted from a blind start."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive

T = 60


class Blind(NamedTuple):
    """`data` draws the arguments of the model, given a random key."""

    name: str
    model: Callable
    data: Callable

    def __repr__(self):
        return self.name


def _of_prior(model, *sites, **kwargs):
    """Data drawn from the model itself."""

    def data(key):
        drawn = Predictive(model, num_samples=1)(key, **kwargs)
        return tuple(drawn[site][0] for site in sites)

    return data


def poisson_counts(y=None):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(1.0 + 0.95 * (x_prev - 1.0), 0.2))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(1.0, 0.6)), y, length=T)


def tracking(bearing=None):
    """Position and velocity in the plane, seen by a sensor that measures directions and poor distances."""

    def step(state, bearing_t):
        moved = jnp.concatenate([state[:2] + 0.2 * state[2:], 0.95 * state[2:]])
        state = numpyro.sample("state", dist.Normal(moved, jnp.array([0.1, 0.1, 0.15, 0.15])).to_event(1))
        direction = jnp.arctan2(state[1] + 5.0, state[0])
        distance = jnp.hypot(state[0], state[1] + 5.0)
        seen = dist.Normal(jnp.stack([direction, distance]), jnp.array([0.03, 0.3])).to_event(1)
        numpyro.sample("bearing", seen, obs=bearing_t)
        return state, None

    start = numpyro.sample("state_0", dist.Normal(jnp.array([0.0, 1.0, 0.0, 0.0]), 0.5).to_event(1))
    scan(step, start, bearing, length=T)


def epidemic(cases=None):
    """Susceptible and infected shares of a city of 20,000, on the logit scale, and daily reported cases."""
    population = 20_000

    def step(state, cases_t):
        s, i, r = (state[..., k] for k in range(3))
        infected, recovered = 0.35 * s * i, 0.12 * i
        mean = jnp.stack([s - infected, i + infected - recovered, r + recovered])
        state = numpyro.sample("state", dist.Dirichlet(3000.0 * jnp.clip(mean, 1e-5)))
        numpyro.sample("cases", dist.Binomial(population, 0.2 * state[1]), obs=cases_t)
        return state, None

    scan(step, numpyro.sample("state_0", dist.Dirichlet(jnp.array([194.0, 4.0, 2.0]))), cases, length=T)


def panel(y=None):
    """Thirty series with a level and a slope each."""
    series = numpyro.plate("series", 30)

    def step(state, y_t):
        level, slope = state
        with series:
            slope = numpyro.sample("slope", dist.Normal(0.9 * slope, 0.1))
            level = numpyro.sample("level", dist.Normal(0.98 * level + slope, 0.3))
            numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        return (level, slope), None

    with series:
        level = numpyro.sample("level_0", dist.Normal(0.0, 1.0))
        slope = numpyro.sample("slope_0", dist.Normal(0.0, 0.2))
    scan(step, (level, slope), y, length=T)


def constrained(y=None):
    """A positive rate and a probability, that wander."""

    def step(state, y_t):
        rate, share = state
        rate = numpyro.sample("rate", dist.Gamma(50.0, 50.0 / (0.9 * rate + 0.3)))
        share = numpyro.sample("share", dist.Beta(40.0 * (0.9 * share + 0.05), 40.0 * (0.95 - 0.9 * share)))
        numpyro.sample("y", dist.Normal(jnp.stack([rate * share, rate]), 0.4).to_event(1), obs=y_t)
        return (rate, share), None

    rate = numpyro.sample("rate_0", dist.Gamma(5.0, 2.0))
    share = numpyro.sample("share_0", dist.Beta(2.0, 2.0))
    scan(step, (rate, share), y, length=T)


def two_sites(y=None):
    """A trend and a persistent volatility."""

    def step(state, y_t):
        trend, log_scale = state
        log_scale = numpyro.sample("log_scale", dist.Normal(0.95 * log_scale - 0.05, 0.2))
        trend = numpyro.sample("trend", dist.Normal(0.98 * trend, 0.3 * jnp.exp(log_scale)))
        numpyro.sample("y", dist.StudentT(5.0, trend, 0.5), obs=y_t)
        return (trend, log_scale), None

    trend = numpyro.sample("trend_0", dist.Normal(0.0, 1.0))
    scan(step, (trend, numpyro.sample("log_scale_0", dist.Normal(-1.0, 0.5))), y, length=T)


def local_level(y=None):
    """A level in the thousands: nothing here is of unit scale."""

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, 40.0))
        numpyro.sample("y", dist.Normal(level, 120.0), obs=y_t)
        return level, None

    scan(step, numpyro.sample("level_0", dist.Normal(1000.0, 500.0)), y, length=T)


BLIND = [
    Blind("poisson_counts", poisson_counts, _of_prior(poisson_counts, "y")),
    Blind("tracking", tracking, _of_prior(tracking, "bearing")),
    Blind("epidemic", epidemic, _of_prior(epidemic, "cases")),
    Blind("panel", panel, _of_prior(panel, "y")),
    Blind("constrained", constrained, _of_prior(constrained, "y")),
    Blind("two_sites", two_sites, _of_prior(two_sites, "y")),
    Blind("local_level", local_level, _of_prior(local_level, "y")),
]


def key_of(program):
    return random.key(sum(map(ord, program.name)))
