"""The prey-predator experiment of the PVMC paper under its true dynamics: simulation, and the distribution as a NumPyro
program.

dx1 = (6 - 2 x2) x1 dt + 0.15 x1 dW1, dx2 = (4 x1 - 6) x2 dt + 0.15 x2 dW2, from x = (2, 5), by 256 Milstein steps of 3 / 256;
Poisson observations with means 5 / (1 + exp(4 - f)), f = (5 x1, x1 x2) (Brady, Nüsken & Li, ICML 2026).
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

STEPS, START, NOISE = 256, (2.0, 5.0), 0.15
DT = 3 / STEPS


def simulate(series, seed=0):
    """States and counts of the steps, both (T, series, 2)."""
    rng = np.random.default_rng(seed)
    x, states, counts = np.tile(START, (series, 1)), [], []
    for _ in range(STEPS):
        dw = rng.normal(size=x.shape) * np.sqrt(DT)
        rate = np.stack([6 - 2 * x[:, 1], 4 * x[:, 0] - 6], -1)
        x = x * (1 + rate * DT + NOISE * dw + 0.5 * NOISE**2 * (dw**2 - DT))
        states.append(x)
        counts.append(rng.poisson(5 / (1 + np.exp(4 - np.stack([5 * x[:, 0], x[:, 0] * x[:, 1]], -1)))))
    return np.array(states), np.array(counts)


def model(y):
    """The logarithm of the state is the sample site: there the noise is the same everywhere."""
    series = numpyro.plate("series", y.shape[1])

    def step(log_x, y_t):
        x = jnp.exp(log_x)
        rate = jnp.stack([6 - 2 * x[..., 1], 4 * x[..., 0] - 6], -1) - 0.5 * NOISE**2
        with series:
            log_x = numpyro.sample("log_x", dist.Normal(log_x + rate * DT, NOISE * np.sqrt(DT)).to_event(1))
            x = numpyro.deterministic("x", jnp.exp(log_x))
            f = jnp.stack([5 * x[..., 0], x[..., 0] * x[..., 1]], -1)
            numpyro.sample("y", dist.Poisson(5 / (1 + jnp.exp(4 - f))).to_event(1), obs=y_t)
        return log_x, None

    scan(step, jnp.broadcast_to(jnp.log(jnp.array(START)), (y.shape[1], 2)), y)
