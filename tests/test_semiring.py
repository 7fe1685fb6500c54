"""The log semiring: exact where there is no mass, where terms are far apart, and in its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose

from numpyro_pvmc.semiring import logmatmulexp, logsumexp

INF = np.inf


def logs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_logsumexp_is_the_log_of_the_sum(tolerance, axis):
    x = logs(4, 3, 5)
    assert_allclose(logsumexp(jnp.asarray(x), axis), np.log(np.exp(x).sum(axis)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logsumexp_neither_overflows_nor_underflows(tolerance, shift):
    assert_allclose(logsumexp(jnp.array([shift, shift]), 0), shift + np.log(2), rtol=tolerance)


def test_logsumexp_of_no_mass():
    """A slice that is all -inf: -inf, and a gradient of zero; the slices beside it are untouched."""
    x = jnp.array([[-INF, -INF], [0.0, -INF], [0.0, 0.0]])
    assert_allclose(logsumexp(x, 1), [-INF, 0.0, np.log(2)], rtol=1e-6)
    slope = jax.jacrev(logsumexp)(x, 1)
    assert_allclose(slope[np.arange(3), np.arange(3)], [[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], rtol=1e-6)


def test_derivatives_of_logsumexp_are_shares_and_their_covariance(x64):
    x = jnp.asarray([0.3, -INF, 1.2, -0.4])
    shares = np.exp(x) / np.exp(x).sum()
    assert_allclose(jax.grad(logsumexp)(x, 0), shares, rtol=1e-12)
    hessian = jax.jit(jax.hessian(lambda x: logsumexp(x, 0)))
    assert_allclose(hessian(x), np.diag(shares) - np.outer(shares, shares), rtol=1e-12, atol=1e-15)
    assert_allclose(hessian(jnp.full(4, -INF)), np.zeros((4, 4)))


def test_gradients_of_logsumexp(x64):
    check_grads(jax.jit(lambda x: logsumexp(jnp.asarray(x), 0)), (logs(4, 3),), order=2)


def test_logmatmulexp_is_the_log_of_the_product(tolerance):
    a, b = logs(2, 3, 4), logs(2, 4, 5, seed=1)
    product = np.log(np.exp(a) @ np.exp(b))
    assert_allclose(logmatmulexp(jnp.asarray(a), jnp.asarray(b)), product, rtol=tolerance, atol=tolerance)


def test_logmatmulexp_where_the_largest_of_row_and_column_do_not_meet():
    """Subtracting the maxima of rows and columns would lose both terms: their product is exp(-200), zero in float32."""
    a, b = jnp.array([[0.0, -200.0]]), jnp.array([[-200.0], [0.0]])
    assert a.dtype == jnp.float32
    assert_allclose(logmatmulexp(a, b), [[-200 + np.log(2)]], rtol=1e-6)
    assert_allclose(jax.grad(lambda a: logmatmulexp(a, b)[0, 0])(a), [[0.5, 0.5]], rtol=1e-4)


def test_logmatmulexp_with_particles_no_path_reaches():
    a, b = jnp.array([[-INF, -INF], [0.0, -INF]]), jnp.array([[0.0, -INF], [0.0, -INF]])
    assert_allclose(logmatmulexp(a, b), [[-INF, -INF], [0.0, -INF]])
    for slope in jax.grad(lambda *ab: jnp.exp(logmatmulexp(*ab)).sum(), (0, 1))(a, b):
        assert_allclose(slope.sum(), 1.0)  # one path of mass one, through one element of each
        assert np.isfinite(slope).all()


def test_logmatmulexp_is_associative_and_has_a_one(x64):
    a, b, c = (jnp.asarray(logs(3, 3, seed=seed)) for seed in range(3))
    one = jnp.where(jnp.eye(3, dtype=bool), 0.0, -INF)
    assert_allclose(logmatmulexp(logmatmulexp(a, b), c), logmatmulexp(a, logmatmulexp(b, c)), rtol=1e-12)
    assert_allclose(logmatmulexp(a, one), a, rtol=1e-15)
    assert_allclose(logmatmulexp(one, a), a, rtol=1e-15)


def test_gradients_of_logmatmulexp(x64):
    product = jax.jit(lambda a, b: logmatmulexp(jnp.asarray(a), jnp.asarray(b)))
    check_grads(product, (logs(2, 3), logs(3, 2, seed=1)), order=2)
