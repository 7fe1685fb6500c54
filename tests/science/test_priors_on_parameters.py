"""Priors on the scales of the local level of the Nile: their posterior under PVMC against NUTS on the same program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import statsmodels.api as sm
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_pvmc import PVMC, AutoSmoothedNormal, AutoStateSpace
from record import record

LONG_RUNS = True
SCALES = ("sigma_obs", "sigma_level")


def nile(y):
    sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(2.0))
    sigma_level = numpyro.sample("sigma_level", dist.HalfNormal(1.0))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, sigma_level))
        numpyro.sample("y", dist.Normal(x, sigma_obs), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(11.0, 3.0)), y)


@pytest.mark.slow
def test_scales_of_the_nile_agree_with_nuts():
    y = jnp.asarray(sm.datasets.nile.load_pandas().data["volume"].to_numpy(np.float32) / 100)
    sampler = MCMC(NUTS(nile), num_warmup=1000, num_samples=8000, num_chains=4, chain_method="sequential", progress_bar=False)
    sampler.run(jax.random.key(0), y)
    nuts = sampler.get_samples()

    guide = AutoStateSpace(nile, AutoMultivariateNormal, functools.partial(AutoSmoothedNormal, rate=0.1))
    pvmc = PVMC(nile, guide, optax.adam(optax.exponential_decay(0.02, 1000, 0.1)), num_particles=64)
    result = pvmc.run(jax.random.key(1), 2000, y, progress_bar=False)
    draws = pvmc.sample_posterior(jax.random.key(2), result.params, y, sample_shape=(8000,), resample=True)
    for name in SCALES:
        shift = (draws[name].mean() - nuts[name].mean()) / nuts[name].std()
        ratio = draws[name].std() / nuts[name].std()
        record("nile", f"K=64, {name}", "posterior mean less that of NUTS, in posterior sds", float(shift), "0")
        record("nile", f"K=64, {name}", "posterior sd as a share of that of NUTS", float(ratio), "1")
        assert abs(shift) < 0.1
        assert abs(ratio - 1) < 0.15
