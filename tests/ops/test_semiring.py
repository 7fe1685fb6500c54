"""The log semiring: exact where there is no mass, where terms are far apart, and in its derivatives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose

from numpyro_pvmc.ops.semiring import logmatmulexp, logsumexp

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


def log_of_product(a, b):
    """In float64, each sum less its own largest term."""
    terms = np.asarray(a, float)[..., :, :, None] + np.asarray(b, float)[..., None, :, :]
    largest = np.max(terms, -2, keepdims=True)
    largest = np.where(np.isneginf(largest), 0.0, largest)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(terms - largest).sum(-2)) + largest[..., 0, :]


def shares(a, b, cotangent):
    """Gradients of a product's elements times `cotangent`, by the share of each term in its sum."""
    product = log_of_product(a, b)
    terms = np.asarray(a, float)[..., :, :, None] + np.asarray(b, float)[..., None, :, :]
    of_terms = np.exp(terms - np.where(np.isneginf(product), 0.0, product)[..., :, None, :]) * cotangent[..., :, None, :]
    return of_terms.sum(-1), of_terms.sum(-3)


SMALL, LARGE = (3, 4, 5), (11, 20, 13)  # shapes of terms that are added up, and that are multiplied as matrices
FAR = 1e4  # between logarithms: exponentials of most underflow, in float64, too


def factors(shape, scale=1.0, batch=(2,)):
    rows, terms, columns = shape
    return scale * logs(*batch, rows, terms), scale * logs(*batch, terms, columns, seed=1)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [1.0, FAR])
def test_logmatmulexp_is_the_log_of_the_product(tolerance, shape, scale):
    a, b = (jnp.asarray(x) for x in factors(shape, scale))
    assert_allclose(logmatmulexp(a, b), log_of_product(a, b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [1.0, 30.0, FAR])
def test_gradients_of_logmatmulexp_are_shares(tolerance, shape, scale):
    """In float32, at 30, some elements of the product of exponentials are small and some underflow."""
    # Multiples of 1/16, and sums of two, are numbers in float32.
    a, b = (jnp.asarray(np.round(16 * x) / 16) for x in factors(shape, scale))
    cotangent = logs(2, shape[0], shape[2], seed=2)
    slopes = jax.jit(jax.grad(lambda a, b: jnp.sum(logmatmulexp(a, b) * cotangent), (0, 1)))(a, b)
    for slope, expected in zip(slopes, shares(a, b, cotangent), strict=True):
        assert_allclose(slope, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("terms", [2, 20])
def test_logmatmulexp_where_the_largest_of_row_and_column_do_not_meet(terms):
    """Subtracting the maxima of rows and columns would lose all terms: their product is exp(-200), zero in float32."""
    a = jnp.full((1, terms), -400.0).at[0, :2].set(jnp.array([0.0, -200.0]))
    b = jnp.full((terms, 1), -400.0).at[:2, 0].set(jnp.array([-200.0, 0.0]))
    assert a.dtype == jnp.float32
    assert_allclose(logmatmulexp(a, b), [[-200 + np.log(2)]], rtol=1e-6)
    slope = jax.grad(lambda a: logmatmulexp(a, b)[0, 0])(a)
    assert_allclose(slope[0, :2], [0.5, 0.5], rtol=1e-4)
    assert_allclose(slope[0, 2:], 0.0)


def test_logmatmulexp_where_some_terms_underflow():
    """The one term that does not is smaller than the sum of those that do."""
    a = jnp.full((1, 201), -89.0).at[0, 0].set(0.0)
    b = jnp.zeros((201, 1)).at[0, 0].set(-84.0)
    assert_allclose(logmatmulexp(a, b), [[np.log(np.exp(-84.0) + 200 * np.exp(-89.0))]], rtol=1e-6)


@pytest.mark.parametrize("apart", [60.0, 65.0, 70.0])
def test_second_derivatives_of_logmatmulexp_before_exponentials_underflow(apart):
    """exp(-65) is 6e-29: its inverse is a number in float32, the square of its inverse is not."""
    a = jnp.full((1, 20), -jnp.inf).at[0, :2].set(jnp.array([0.0, -apart]))
    b = jnp.full((20, 1), -jnp.inf).at[:2, 0].set(jnp.array([-apart, 0.0]))
    move = lambda x: logmatmulexp(a.at[0, :2].add(x), b)[0, 0]
    assert_allclose(jax.jit(jax.hessian(move))(jnp.zeros(2)), [[0.25, -0.25], [-0.25, 0.25]], rtol=1e-4)


@pytest.mark.parametrize("terms", [2, 20])
def test_logmatmulexp_with_particles_no_path_reaches(terms):
    a = jnp.full((2, terms), -INF).at[1, 0].set(0.0)
    b = jnp.full((terms, 2), -INF).at[:2, 0].set(0.0)
    assert_allclose(logmatmulexp(a, b), [[-INF, -INF], [0.0, -INF]])
    for slope in jax.grad(lambda *ab: jnp.exp(logmatmulexp(*ab)).sum(), (0, 1))(a, b):
        assert_allclose(slope.sum(), 1.0)  # one path of mass one, through one element of each
        assert np.isfinite(slope).all()


@pytest.mark.parametrize(("number", "rounding"), [(3, 1e-15), (12, 1e-13)])
def test_logmatmulexp_is_associative_and_has_a_one(x64, number, rounding):
    a, b, c = (jnp.asarray(logs(number, number, seed=seed)) for seed in range(3))
    one = jnp.where(jnp.eye(number, dtype=bool), 0.0, -INF)
    assert_allclose(logmatmulexp(logmatmulexp(a, b), c), logmatmulexp(a, logmatmulexp(b, c)), rtol=1e-12)
    assert_allclose(logmatmulexp(a, one), a, rtol=rounding)
    assert_allclose(logmatmulexp(one, a), a, rtol=rounding)


@pytest.mark.parametrize(("shape", "scale"), [(SMALL, 1.0), (LARGE, 1.0), (LARGE, FAR)])
def test_gradients_of_logmatmulexp(x64, shape, scale):
    product = jax.jit(lambda a, b: logmatmulexp(jnp.asarray(a), jnp.asarray(b)))
    check_grads(product, factors(shape, scale, batch=()), order=2)


@pytest.mark.parametrize("number", [3, 200])
def test_logmatmulexp_over_a_batch_of_which_one_is_far_apart(number):
    """What one product of a batch, or of a transformed function, needs changes none of the others."""
    a, b = (jnp.asarray(x).at[1].multiply(FAR) for x in factors(LARGE, batch=(number,)))
    together = logmatmulexp(a, b)
    assert_allclose(together, log_of_product(a, b), rtol=1e-4, atol=1e-4)
    one_by_one = jax.jit(jax.vmap(logmatmulexp))
    assert_allclose(one_by_one(a, b), together, rtol=1e-6, atol=1e-5)
    assert "conditional" in one_by_one.lower(a, b).compile().as_text()  # or the slower way is taken always
    slopes = [jax.grad(lambda a, b, f=f: jnp.sum(f(a, b) ** 2), (0, 1))(a[:3], b[:3]) for f in (logmatmulexp, one_by_one)]
    for slope, expected in zip(*slopes, strict=True):
        assert_allclose(slope, expected, rtol=1e-5, atol=1e-4)


def test_second_derivatives_of_logmatmulexp_after_exponentials_underflow(x64):
    """Two terms of a sum are alike; to the largest of their rows and columns they are nothing."""
    a, b = jnp.full((1, 20), -2 * FAR).at[0, :3].set(jnp.array([0.0, -FAR, -FAR])), jnp.full((20, 1), -2 * FAR)
    b = b.at[:3, 0].set(jnp.array([-2 * FAR, 0.0, 1.0]))
    hessian = jax.jit(jax.hessian(lambda x: logmatmulexp(a.at[0, 1:3].add(x), b)[0, 0]))(jnp.zeros(2))
    share = 1 / (1 + np.e)
    assert_allclose(hessian, share * (1 - share) * np.array([[1, -1], [-1, 1]]), rtol=1e-10)


def test_logmatmulexp_holds_no_array_of_all_terms():
    """Products of 256 x 256 matrices would have 17 million."""
    a, b = (jnp.asarray(x) for x in factors(LARGE))
    loss = lambda a, b: jnp.sum(logmatmulexp(a, b) ** 2)
    slope = jax.grad(loss, (0, 1))
    for function in (loss, slope, lambda a, b: jax.jvp(slope, (a, b), (a, b))):
        shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(function)(a, b)))
        assert max(np.prod([int(side) for side in shape.split(",")]) for shape in shapes) < a.size * LARGE[2]
