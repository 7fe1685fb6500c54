"""Emissions after the scan belong to their own times, and count once in a minibatch."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.exact import exact_posterior

MATRIX = np.array([[0.9, 0.1], [0.3, 0.7]])
Y = np.random.default_rng(0).normal(size=(4, 3)) + np.array([0.0, 2.0, 1.0, 2.0])[:, None]


def model(y, subsample=None):
    series = numpyro.plate("series", y.shape[1], subsample_size=subsample)

    def step(z_prev, _):
        with series:
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(MATRIX)[z_prev]))
        return z, z

    _, zs = scan(step, jnp.zeros(subsample or y.shape[1], int), None, length=len(y))
    with series as index:
        numpyro.sample("y", dist.Normal(2.0 * zs, 1.0), obs=y[:, index])


def by_hand(y):
    alpha = np.array([1.0, 0.0])
    for y_t in y:
        alpha = alpha @ MATRIX * np.exp(-0.5 * (y_t - np.array([0.0, 2.0])) ** 2) / np.sqrt(2 * np.pi)
    return np.log(alpha.sum())


def test_rows_are_times(x64):
    found = exact_posterior(model, {}, jnp.asarray(Y)).log_normalizer
    assert_allclose(found, [by_hand(y) for y in Y.T], rtol=1e-12)


@pytest.mark.parametrize("index", [[0, 2], [1, 0]])
def test_a_series_of_a_minibatch_counts_once(x64, index):
    minibatch = handlers.substitute(model, data={"series": jnp.array(index)})
    found = exact_posterior(minibatch, {}, jnp.asarray(Y), subsample=2).log_normalizer
    assert_allclose(found, [by_hand(Y[:, n]) for n in index], rtol=1e-12)
