"""Medians of finished work, as ratios to the floor E, which is measured before each round of the same run."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from floor import exponentials, pairs, seconds

from linear_gaussian import SERIES, TRANSITIONS, distribution, simulate
from oracles import kalman_filter, rts_smoother


@pytest.fixture
def measure(benchmark):
    def measure(function, *args, rounds=21, warmups=2, **facts):
        """The median time of a function in seconds, compiled by `warmups` or before; `facts` are kept beside it."""
        floor = []
        benchmark.pedantic(
            lambda: jax.block_until_ready(function(*args)),
            setup=lambda: floor.append(seconds(exponentials, pairs())),
            rounds=rounds,
            warmup_rounds=warmups,
        )
        median, floor = benchmark.stats["median"], np.median(floor[warmups:])
        benchmark.extra_info |= {"E": floor, "ratio to E": median / floor, "load": os.getloadavg()[0]} | facts
        print(f"\n{benchmark.name}: {median:.4f} s, E {floor:.4f} s, ratio {median / floor:.2f}", facts or "")
        return median

    return measure


@pytest.fixture(scope="session")
def data():
    """Of the linear-Gaussian experiment, (T + 1, series, D)."""
    return jnp.asarray(simulate(distribution(), TRANSITIONS, SERIES)[1], jnp.float32)


@pytest.fixture(scope="session")
def exact(data):
    """Its log evidence (series,) and smoothed means (T + 1, series, D), in NumPy."""
    y = np.asarray(data, float)
    smoothed = [rts_smoother(distribution(), y[:, n]) for n in range(SERIES)]
    return np.array([one.log_evidence for one in smoothed]), np.stack([one.means for one in smoothed], 1)


@pytest.fixture(scope="session")
def guide(data):
    """Its filter's marginals."""
    moments = [kalman_filter(distribution(), np.asarray(data, float)[:, n]) for n in range(SERIES)]
    means = jnp.asarray(np.stack([one.means for one in moments], 1), jnp.float32)
    scales = jnp.sqrt(jnp.asarray(np.diagonal(moments[0].covariances, axis1=1, axis2=2), jnp.float32))[:, None]

    def guide(y):
        with numpyro.plate("series", SERIES):
            numpyro.sample("x_0", dist.Normal(means[0], scales[0]).to_event(1))
            numpyro.sample("x", dist.Normal(means[1:], scales[1:]).to_event(1))

    return guide
