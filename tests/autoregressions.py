"""Noisy autoregressions, many of them, as a program with a plate, and what is exact about them."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC, AutoAmortisedNormal
from numpyro_pvmc.networks import Convolutions
from oracles import LinearGaussian, rts_smoother

SMALL = Convolutions(channels=(4,), width=3)
A, Q, R = 0.9, 0.25, 0.64
LAW = LinearGaussian(np.zeros(1), np.eye(1), A * np.eye(1), np.zeros(1), Q * np.eye(1), np.eye(1), R * np.eye(1))


def model(y, level=0.0):
    """Autoregressions around a level, in a plate; `y` has shape (T, series)."""
    series = numpyro.plate("series", y.shape[1])

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(level + A * (x_prev - level), Q**0.5))
            numpyro.sample("y", dist.Normal(x, R**0.5), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(level, 1.0))
    scan(step, x_0, y)


def simulate(seed, length, series):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=series), []
    for _ in range(length):
        x = A * x + Q**0.5 * rng.normal(size=series)
        y.append(x + R**0.5 * rng.normal(size=series))
    return np.array(y)


def with_the_start(y):
    """Observations of one more time, the first: of x_0 nothing is observed."""
    return np.concatenate([np.full_like(y[:1], np.nan), y])


def exact_means(y):
    """(T + 1, series); the first row is that of x_0."""
    return np.stack([rts_smoother(LAW, series[:, None]).means[:, 0] for series in with_the_start(y).T], 1)


def trained(program, *args, network=SMALL, steps=3, **choices):
    guide = AutoAmortisedNormal(program, network, **choices)
    pvmc = PVMC(program, guide, optax.adam(1e-2), num_particles=4)
    return guide, pvmc, pvmc.run(random.key(0), steps, *args, progress_bar=False, grow=False).params


def initialised(program, *args, network=SMALL, **choices):
    """A guide as it begins, and its parameters and mutable state."""
    guide = AutoAmortisedNormal(program, network, **choices)
    sites = handlers.trace(handlers.seed(guide, 0)).get_trace(*args)
    return guide, {name: site["value"] for name, site in sites.items() if site["type"] in ("param", "mutable")}
