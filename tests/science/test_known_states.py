"""What known states teach: a linear-Gaussian model, started from a wrong transition, smooths as well as the exact smoother."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan

from linear_gaussian import simulate
from numpyro_pvmc import PVMC, SupervisedELBO
from oracles import LinearGaussian, rts_smoother

LONG_RUNS = True

A, Q, R = 0.95, 0.3, 1.0
LAW = LinearGaussian(np.zeros(1), np.eye(1), A * np.eye(1), np.zeros(1), Q**2 * np.eye(1), np.eye(1), R**2 * np.eye(1))
TRANSITIONS, SERIES = 60, 40


def model(y, states=None):
    slope = numpyro.param("slope", 0.2)
    series = numpyro.plate("series", y.shape[1])

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(slope * x_prev, Q))
            numpyro.sample("y", dist.Normal(x, R), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("y_0", dist.Normal(x_0, R), obs=y[0])
    scan(step, x_0, y[1:])


def guide(y, states=None):
    """Reads the observation of its own time only: what other times tell of a state, the weights have to say."""
    gain, scale = numpyro.param("gain", 0.5), jnp.exp(numpyro.param("log_scale", -0.4))
    with numpyro.plate("series", y.shape[1]):
        numpyro.sample("x_0", dist.Normal(gain * y[0], scale))
        numpyro.sample("x", dist.Normal(gain * y[1:], scale))


def data(seed):
    states, y = simulate(LAW, TRANSITIONS, SERIES, seed)
    return jnp.asarray(states[..., 0], jnp.float32), jnp.asarray(y[..., 0], jnp.float32)


def squared_error_of(params, states, y):
    """With particles enough that their own noise adds little."""
    mean = PVMC(model, guide, num_particles=256).posterior(jax.random.key(9), params, y).mean()
    return float(jnp.mean((jnp.concatenate([mean["x_0"][None], mean["x"]]) - states) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_reaches_the_exact_smoother_on_other_series(bound):
    """Half of the training series have no labels, and every third state of the others is unknown."""
    states, y = data(0)
    known = states.at[::3].set(jnp.nan).at[:, ::2].set(jnp.nan)
    loss = SupervisedELBO(lambda y, states: {"x_0": states[0], "x": states[1:]}, 64, bound=bound)
    pvmc = PVMC(model, guide, optax.adam(0.03), loss=loss)
    result = pvmc.run(jax.random.key(0), 100, y, known, progress_bar=False, grow=False)
    states, y = data(1)
    exact = [rts_smoother(LAW, np.asarray(y[:, n : n + 1], float)) for n in range(SERIES)]
    best = np.mean([(moments.means[:, 0] - states[:, n]) ** 2 for n, moments in enumerate(exact)])
    at_first = squared_error_of({"slope": 0.2, "gain": 0.5, "log_scale": -0.4}, states, y)
    at_last = squared_error_of(result.params, states, y)
    assert at_first > 1.5 * best  # or there was nothing to learn
    assert at_last < 1.05 * best
