"""Which way of summing trajectories is the fastest, by the number of steps, of particles and of series."""

import jax
import jax.numpy as jnp
import pytest

from numpyro_pvmc.ops.smoothing import METHODS, Edges, log_normalizer

LONG_RUNS = True
SIZES = [(T, K, B) for B in (1, 16) for T in (100, 1_000, 10_000) for K in (4, 16, 64) if T * K**3 * B < 1e10]


def value_and_gradient(method):
    """Of a random walk's log evidence, with respect to its particles."""
    edge = lambda ends: -0.5 * (ends[1][..., None, :] - ends[0][..., :, None]) ** 2
    total = lambda x: log_normalizer(-0.5 * x**2, Edges(edge, (x[:-1], x[1:])), method=method).sum()
    return jax.jit(jax.value_and_grad(total))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "auto"])
@pytest.mark.parametrize(("T", "K", "B"), SIZES)
def test_value_and_gradient(measure, T, K, B, method):
    x = jax.random.normal(jax.random.key(0), (T, B, K), jnp.float32)
    measure(value_and_gradient(method), x, rounds=7, method=method, T=T, K=K, B=B)
