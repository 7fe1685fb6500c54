"""Amortised guides: what the network reads, in which units it answers, and that it learns to smooth series it has not seen."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from autoregressions import A, Q, R, exact_means, model, simulate
from numpyro_pvmc import PVMC, AutoAmortisedNormal
from numpyro_pvmc.networks import Convolutions

LONG_RUNS = True


@pytest.fixture(scope="module")
def learned():
    y = jnp.asarray(simulate(0, 30, 64))
    guide = AutoAmortisedNormal(model, Convolutions(channels=(16,), width=19))
    pvmc = PVMC(model, guide, optax.adam(optax.cosine_decay_schedule(1e-2, 300)), num_particles=16)
    return guide, pvmc.run(random.key(1), 300, y, progress_bar=False, grow=False).params


@pytest.mark.slow
def test_smooths_series_it_has_not_seen(learned):
    """The prior's variance is 1.3, the posterior's about 0.2: proposals that ignored the data would be off by 1."""
    guide, params = learned
    y = simulate(1, 50, 20)
    posterior = PVMC(model, guide, num_particles=64, particles="rqmc").posterior(random.key(2), params, jnp.asarray(y))
    means = posterior.mean()
    found, exact = np.concatenate([means["x_0"][None], means["x"]]), exact_means(y)
    # Not the mean over series: once in 10^7 a particle stands five deviations out, and takes the weight of its step.
    assert np.median(((found - exact) ** 2).mean(0)) < 1e-3
    # The proposal itself is near, at the ends too.
    medians = guide.median(params, jnp.asarray(y))
    error = (np.concatenate([medians["x_0"][None], medians["x"]]) - exact) ** 2
    assert error.mean() < 0.01
    assert error[[0, 1, -2, -1]].mean() < 0.04
    share = np.asarray(posterior.effective_sample_size()["x"]) / 64
    assert share.mean() > 0.9


@pytest.mark.slow
@pytest.mark.slow
def test_missing_observations_look_like_the_ends_of_a_series(learned):
    """A gap wider than the network sees parts a series into two, as the chain's distribution does almost."""
    guide, params = learned

    def with_gaps(y):
        series = numpyro.plate("series", y.shape[1])

        def step(x_prev, y_t):
            with series:
                x = numpyro.sample("x", dist.Normal(A * x_prev, Q**0.5))
                with handlers.mask(mask=~jnp.isnan(y_t)):
                    numpyro.sample("y", dist.Normal(x, R**0.5), obs=y_t)
            return x, None

        with series:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    y = simulate(3, 60, 2)
    y[20:40] = np.nan
    own = AutoAmortisedNormal(with_gaps, guide.network)
    whole = own.median(params, jnp.asarray(y))["x"]
    assert_allclose(whole[:20], own.median(params, jnp.asarray(y[:20]))["x"], atol=1e-5)
    assert_allclose(whole[40:], own.median(params, jnp.asarray(y[39:]))["x"][1:], atol=1e-5)
    assert np.isfinite(whole).all()
