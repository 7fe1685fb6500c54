"""What a run says when it ends, and that it says nothing of runs that are sound."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC
from numpyro_pvmc.infer.endings import warn_of_ending

Y = jnp.sin(jnp.arange(4.0))


def model(y):
    spread = numpyro.param("spread", 0.5)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, jnp.log1p(spread)))  # NaN below -1
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def guide(y):
    numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 0.5))


@pytest.fixture(scope="module")
def diverging():
    """Its second step goes where the model has no density."""
    return PVMC(model, guide, optax.sgd(-2.0), num_particles=2)


def run(pvmc, **choices):
    return pvmc.run(jax.random.key(0), 30, Y, progress_bar=False, grow=False, **choices)


def test_a_run_that_turns_nan_says_when_and_which_parameters_and_has_no_posterior(diverging):
    with pytest.warns(UserWarning, match=r"not finite at \d+ of 30 steps, first at step \d+; the parameters \['loc', 's"):
        result = run(diverging)
    assert np.isfinite(result.losses[0])
    for ask in (diverging.posterior, diverging.sample_posterior):
        with pytest.raises(ValueError, match=r"Parameters \['loc', 'spread'\] are not finite.* diverged"):
            ask(jax.random.key(0), result.params, Y)
    compiled = jax.jit(lambda params: diverging.posterior(jax.random.key(0), params, Y).log_normalizer)
    assert np.isnan(compiled(result.params))


def test_skipped_updates_are_counted(diverging):
    with pytest.warns(UserWarning, match=r"(\d+) of 30 updates were not finite, and were skipped") as said:
        result = run(diverging, stable_update=True)
    assert np.isfinite(result.params["loc"]).all()
    done = int(result.state.optim_state[0])
    assert str(said[0].message).startswith(f"{30 - done} of 30")


NOISE = np.random.default_rng(0).normal(size=200)


@pytest.mark.parametrize("losses", [NOISE + 50, 50 + np.r_[1e3, NOISE[1:]], NOISE + np.linspace(90, 50, 200), NOISE[:20]])
def test_noise_and_descent_are_sound(losses):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ending(losses, 0, {"a": 1.0, "n": 3, "net": {"w": np.ones(2)}}, 0)
        warn_of_ending(np.r_[np.zeros(100), 500 + losses], 100, {})  # another objective before


@pytest.mark.parametrize(
    ("losses", "params", "message"),
    [
        (NOISE + np.linspace(50, 60, 200), {}, r"ends above where it began: its mean is 59\.\d+ over the last 20 steps"),
        (np.r_[NOISE + 50, np.inf, NOISE], {"a": 1.0}, r"at 1 of 401 steps, first at step 201; the parameters are finite"),
        (NOISE, {"net": {"w": np.array([1.0, np.nan])}}, r"parameters \['net'\] are not finite after the last of 200 steps"),
    ],
)
def test_what_is_not_sound_is_told(losses, params, message):
    with pytest.warns(UserWarning, match=message):
        warn_of_ending(losses, 0, params)
