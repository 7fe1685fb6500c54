"""The estimate of the evidence is unbiased, so a Metropolis chain over parameters that uses it has the exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC
from numpyro_pvmc.exact import exact_posterior

Y = jnp.asarray(np.random.default_rng(0).normal(size=12).cumsum() * 0.6)
PRIOR = dist.Normal(-0.5, 0.7)  # of the log of the scale


def level(y):
    scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


@pytest.mark.slow
def test_pseudo_marginal_metropolis(x64):
    """With few particles the estimates vary, and the chain's distribution is the posterior all the same."""
    pvmc = PVMC(level, num_particles=32, particles="iid")
    params = pvmc.run(random.key(0), 30, Y, progress_bar=False).params

    def log_target(rng_key, log_scale):
        posterior = pvmc.posterior(rng_key, params | {"scale": jnp.exp(log_scale)}, Y)
        return posterior.log_normalizer + PRIOR.log_prob(log_scale)

    def metropolis(state, rng_key):
        log_scale, log_density = state  # the estimate of the present state is kept: that is what makes the chain exact
        for_move, for_estimate, for_choice = random.split(rng_key, 3)
        moved = log_scale + 0.8 * random.normal(for_move)
        moved_density = log_target(for_estimate, moved)
        accept = jnp.log(random.uniform(for_choice)) < moved_density - log_density
        state = jnp.where(accept, moved, log_scale), jnp.where(accept, moved_density, log_density)
        return state, (state[0], accept)

    def chain(rng_key):
        start = jnp.log(0.5), log_target(rng_key, jnp.log(0.5))
        return lax.scan(metropolis, start, random.split(rng_key, 3000))[1]

    draws, accepted = jax.jit(jax.vmap(chain))(random.split(random.key(1), 8))
    noise = np.std([float(log_target(key, jnp.log(0.5))) for key in random.split(random.key(2), 20)])
    assert 0.1 < noise < 2.0
    assert 0.1 < accepted.mean() < 0.9

    grid = jnp.linspace(-4.0, 3.0, 200)
    exact = jax.jit(jax.vmap(lambda at: exact_posterior(level, {"scale": jnp.exp(at)}, Y).log_normalizer))(grid)
    mass = jax.nn.softmax(exact + PRIOR.log_prob(grid))
    mean = (mass * grid).sum()
    sd = jnp.sqrt((mass * (grid - mean) ** 2).sum())
    of_chains = np.asarray(draws[:, 300:])
    error = of_chains.mean(1).std(ddof=1) / np.sqrt(len(of_chains))
    assert error < 0.05 * sd
    assert abs(of_chains.mean() - mean) < 4 * error
    assert abs(of_chains.std() / sd - 1) < 0.06
