"""Stochastic volatility on ten years of the S&P 500, parameters learned from a poor start with a refitted guide."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from cuthbert import filter as run_filter
from cuthbert.smc import particle_filter
from cuthbertlib.resampling import adaptive, systematic
from jax import random

from numpyro_pvmc import PVMC, AutoSmoothedNormal
from numpyro_pvmc.datasets import load_sp500_returns
from record import record
from volatility import model

LONG_RUNS = True


@jax.jit
def filter_evidence(key, y, mu, phi, s):
    """Log evidence by a bootstrap particle filter of 10,000 particles, which knows nothing of the guide."""
    filter_ = particle_filter.build_filter(
        init_sample=lambda key: mu + s / jnp.sqrt(1 - phi**2) * random.normal(key),
        propagate_sample=lambda key, x, y: mu + phi * (x - mu) + s * random.normal(key),
        log_potential=lambda x_prev, x, y: dist.Normal(0.0, jnp.exp(x / 2)).log_prob(y),
        n_filter_particles=10_000,
        resampling_fn=adaptive.ess_decorator(systematic.resampling, 0.5),
    )
    key_init, key_filter = random.split(key)
    return run_filter(filter_, y, filter_.init_prepare(key=key_init), key=key_filter).log_normalizing_constant[-1]


@pytest.mark.slow
def test_learned_from_a_poor_start():
    y = jnp.asarray(load_sp500_returns(2516)[0])
    pvmc = PVMC(model, AutoSmoothedNormal(model), optax.adam(0.1), num_particles=64)
    started = time.perf_counter()
    result = jax.block_until_ready(pvmc.run(random.key(0), 150, y, progress_bar=False))
    seconds = time.perf_counter() - started
    posterior = jax.jit(jax.vmap(lambda key: pvmc.posterior(key, result.params, y).log_normalizer))
    bound = np.asarray(posterior(random.split(random.key(1), 100)))
    learned = [result.params[name] for name in ("mu", "phi", "s")]
    # The log evidence of one filter has a standard deviation of 0.35.
    of_filters = np.array([filter_evidence(key, y, *learned) for key in random.split(random.key(2), 48)], float)
    evidence = np.logaddexp.reduce(of_filters) - np.log(len(of_filters))
    record("volatility", "refitted guide, K = 64, 150 updates", "bound", bound.mean(), f"filter {evidence:.2f}", seconds)
    assert abs(bound.mean() - evidence) <= 0.3
    assert 0.9 < result.params["phi"] < 0.99
