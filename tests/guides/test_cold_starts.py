"""Priors on parameters, wide as people write them: where a run starts, and that it goes on from there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.handlers import seed
from numpyro.infer import init_to_median, init_to_value
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from conftest import initial_params
from numpyro_pvmc import PVMC, AutoSmoothedNormal, AutoStateSpace
from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments

T = 40


def autoregression(y):
    beta = numpyro.sample("beta", dist.Normal(0, 2))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(beta * x, tau))
        numpyro.sample("y", dist.Normal(x, sigma), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0, 1)), y)


def series():
    rng, x, y = np.random.default_rng(0), 0.0, []
    for _ in range(T):
        x = 0.8 * x + 0.4 * rng.normal()
        y.append(x + 0.5 * rng.normal())
    return jnp.array(y)


Y = series()
AT = {"beta": jnp.array(0.9), "tau": jnp.array(0.5), "sigma": jnp.array(0.1)}


def test_coefficients_above_one_do_not_explode_a_cold_start():
    pvmc = PVMC(autoregression, num_particles=8)
    for key in range(3):
        result = pvmc.run(random.key(key), 60, Y, progress_bar=False)
        assert jnp.isfinite(result.losses).all()
        assert result.losses.max() < 100  # at draws of the coefficient from its prior it was 10^6
        assert result.losses[-20:].mean() < 65  # that of white noise is 60; the exact evidence at the best parameters, 46
        assert jnp.abs(result.params["auto_loc"]).max() < 1.5


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(AutoNormal, init_loc_fn=init_to_value(values=AT)),
        pytest.param(functools.partial(AutoMultivariateNormal, init_loc_fn=init_to_value(values=AT)), marks=pytest.mark.slow),
    ],
)
def test_states_start_where_the_guide_of_global_sites_does(make):
    params = initial_params(PVMC(autoregression, AutoStateSpace(autoregression, make)), random.key(0), Y)
    expected = np.sqrt(0.81**T + 0.25 * (1 - 0.81**T) / (1 - 0.81))  # of the last state, given these values
    assert_allclose(params["auto_steps_factor"][-10:].mean(), expected, rtol=0.1)


def test_states_start_at_medians_of_the_priors_where_no_guide_says_more():
    guide = AutoSmoothedNormal(autoregression, init_loc_fn=init_to_median)
    arguments = Arguments((Y,))
    chain = read_chain(read_structure(autoregression, arguments, {}), autoregression, arguments, {})
    state = guide.start(chain)
    assert_allclose(state["auto_steps_factor"].mean(), 1.0, rtol=0.2)  # beta is about 0, tau about 1
    assert jnp.abs(state["auto_steps_mean"]).max() < 1.0


def test_many_parameters_and_those_of_minibatches_are_independent_in_their_guide():
    def model(y, number=2, size=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([number]).to_event(1))

        plate = numpyro.plate("series", 3, subsample_size=size)

        def step(x, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(x, 1.0))
                numpyro.sample("y", dist.Normal(x + w.sum(), 1.0), obs=y_t)
            return x, None

        with plate:
            x = numpyro.sample("x_0", dist.Normal(0, 1))
        scan(step, x, y)

    for number, size, kind in [(2, None, AutoMultivariateNormal), (60, None, AutoNormal), (2, 2, AutoNormal)]:
        guide = AutoStateSpace(model)
        jax.eval_shape(lambda y, guide=guide, of=(number, size): seed(guide, 0)(y, *of), jnp.zeros((4, size or 3)))
        assert type(guide.parameters) is kind
