"""The linear-Gaussian experiment of the PVMC paper: its distribution, its data, and the same distribution as a NumPyro program.

State and observation have 5 dimensions, x_0 ~ N(0, I), x_t = A x_{t-1} + N(0, I), y_t = x_t + N(0, I), with
A_ij = 0.38^(|i - j| + 1); 500 transitions; y_0 is observed (Brady, Nüsken & Li, ICML 2026).
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpyro.contrib.control_flow import scan

from oracles import LinearGaussian

DIMENSION, TRANSITIONS, SERIES, DECAY = 5, 500, 16, 0.38


def distribution(decay=DECAY):
    """The oracles' form of the distribution."""
    one, distance = np.eye(DIMENSION), np.abs(np.subtract.outer(range(DIMENSION), range(DIMENSION)))
    return LinearGaussian(np.zeros(DIMENSION), one, decay ** (distance + 1.0), np.zeros(DIMENSION), one, one, one)


def simulate(model, transitions, series, seed=0):
    """States and observations, (T + 1, series, D) and (T + 1, series, E)."""
    rng = np.random.default_rng(seed)
    normal = lambda covariance: rng.multivariate_normal(np.zeros(len(covariance)), covariance, series)
    x = [model.m_0 + normal(model.P_0)]
    for _ in range(transitions):
        x.append(x[-1] @ model.A.T + model.b + normal(model.Q))
    x = np.array(x)
    return x, x @ model.C.T + np.array([normal(model.R) for _ in x])


def model(y):
    """`decay` may be learned; `y` has shape (T + 1, series, D)."""
    decay = numpyro.param("decay", DECAY)
    axis = jnp.arange(DIMENSION)
    A = decay ** (jnp.abs(axis[:, None] - axis) + 1.0)
    series = numpyro.plate("series", y.shape[1])

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(x_prev @ A.T, 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([DIMENSION]).to_event(1))
        numpyro.sample("y_0", dist.Normal(x_0, 1.0).to_event(1), obs=y[0])
    scan(step, x_0, y[1:])


def guide(y):
    """A Normal for each state, near its observation at first."""
    loc, log_scale = numpyro.param("loc", y / 2), numpyro.param("log_scale", jnp.full(y.shape, -0.3))
    scale = jnp.exp(log_scale)
    with numpyro.plate("series", y.shape[1]):
        numpyro.sample("x_0", dist.Normal(loc[0], scale[0]).to_event(1))
        numpyro.sample("x", dist.Normal(loc[1:], scale[1:]).to_event(1))


def on_two_devices(x):
    """Arrays with their series, the second axis, spread over two devices."""
    mesh = jax.make_mesh((2,), ("series",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "series")))
