"""Sums over long chains keep the digits of their precision, against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from numpyro_pvmc.ops.kalman import Matrices, smooth
from numpyro_pvmc.ops.smoothing import Edges, log_normalizer, log_normalizer_and_weights, marginals

K, SLOPE = 4, np.float32(0.9)
long_chains = pytest.mark.parametrize(
    "T", [50_000, pytest.param(200_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], scope="module"
)


@pytest.fixture(scope="module")
def chain(T):
    """Nodes and particles in float32, and the log normalizer and its slope, by central differences, in float64."""
    rng = np.random.default_rng(0)
    node, x = (rng.normal(size=(T, K)).astype(np.float32) for _ in range(2))
    step = 1e-4
    slopes = (float(SLOPE) + step * np.array([-1.0, 0.0, 1.0]))[:, None, None]
    node_64, x_64 = node.astype(float), x.astype(float)
    alpha, gains = np.tile(node_64[0], (3, 1)), np.zeros((T, 3))
    for t in range(1, T):
        mass = np.exp(alpha[:, :, None] - 0.5 * (x_64[t] - slopes * x_64[t - 1][:, None]) ** 2).sum(1)
        alpha = node_64[t] + np.log(mass)
        gains[t] = alpha.max(1)
        alpha = alpha - gains[t][:, None]
    below, value, above = (math.fsum(column) for column in np.vstack([gains, np.log(np.exp(alpha).sum(1))]).T)
    return node, x, value, (above - below) / (2 * step)


@long_chains
@pytest.mark.parametrize("method", ["sequential", "blocked", pytest.param("associative", marks=pytest.mark.slow)])
def test_all_methods_keep_the_digits_of_float32(chain, method):
    """Half a unit in the last place is 6e-8; a total that is carried from step to step is off by a hundred times that."""
    *potentials, value, slope = chain

    @jax.jit
    def everything(node, x, slope):
        edges = lambda slope: Edges(lambda pair: -0.5 * (pair[1] - slope * pair[0][:, None]) ** 2, (x[:-1], x[1:]))
        alone = jax.value_and_grad(lambda slope: log_normalizer(node, edges(slope), method=method))(slope)
        together, _ = log_normalizer_and_weights(node, edges(slope), method=method)
        return *alone, together, marginals(node, edges(slope), method=method).log_normalizer

    alone, by_slope, *others = everything(*map(jnp.asarray, potentials), SLOPE)
    assert alone.dtype == jnp.float32
    assert_allclose([alone, *others], value, rtol=2e-7)
    assert_allclose(by_slope, slope, rtol=5e-7)


@long_chains
def test_the_kalman_filter_keeps_the_digits_of_float32(T):
    """Once its gain has settled all terms are rounded alike, which adds up to hundreds of units in the last place."""
    y = np.random.default_rng(0).normal(size=T).astype(np.float32)
    scale_q, scale_r = np.float32(1.0), np.float32(2.0)
    mean, variance, terms = 0.0, 1.0, []
    for t in range(T):
        if t:
            mean, variance = float(SLOPE) * mean, float(SLOPE) ** 2 * variance + float(scale_q) ** 2
        total = variance + float(scale_r) ** 2
        terms.append(-0.5 * (math.log(2 * math.pi * total) + (float(y[t]) - mean) ** 2 / total))
        mean, variance = mean + variance / total * (float(y[t]) - mean), variance - variance**2 / total
    one = np.ones((T, 1, 1), np.float32)
    F, root_Q = SLOPE * one, scale_q * one
    F[0], root_Q[0] = 0.0, 1.0
    none = np.zeros((T, 1), np.float32)
    rows = Matrices(F, none, root_Q, one, none, scale_r * one, y[:, None])
    found = jax.jit(lambda rows: smooth(rows).log_densities.sum())(rows)
    assert found.dtype == jnp.float32
    assert_allclose(found, math.fsum(terms), rtol=2e-7)
