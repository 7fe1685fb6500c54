"""Filter and smoother of matrices that may be singular, against the joint Gaussian in NumPy, and against cuthbert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuthbertlib.kalman import filter_update, predict
from numpy.testing import assert_allclose

from numpyro_pvmc.ops import kalman
from numpyro_pvmc.ops.kalman import Matrices, log_evidence, root_of, smooth, trajectory, triangular


def random_matrices(seed, sound=False):
    """Correlated observations, some of them missing; covariances of any rank, unless they are to be sound."""
    rng = np.random.default_rng(seed)
    N, D, E = rng.integers(1, 9), rng.integers(1, 6), rng.integers(1, 4)
    F, c, root_Q = 0.6 * rng.normal(size=(N, D, D)), rng.normal(size=(N, D)), np.zeros((N, D, D))
    F[0] = 0.0
    for t in range(N):
        rank = D if sound else rng.integers(t == 0, D + 1)
        root_Q[t, :, :rank] = rng.normal(size=(D, rank))
    H, d, root_R, y = (rng.normal(size=(N, *shape)) for shape in ((E, D), (E,), (E, E), (E,)))
    y[rng.random(y.shape) < 0.25] = np.nan
    return Matrices(F, c, root_Q, H, d, root_R, y)


def dense(chain):
    """Log evidence, mean of all states and their joint covariance."""
    N, D = chain.c.shape
    mean, noise, means, rows = np.zeros(D), np.zeros((D, N * D)), [], []
    for t in range(N):
        mean, noise = chain.F[t] @ mean + chain.c[t], chain.F[t] @ noise
        noise[:, t * D : (t + 1) * D] = chain.root_Q[t]
        means.append(mean)
        rows.append(noise)
    mean, root = np.concatenate(means), np.concatenate(rows)
    blocks = lambda matrices: np.block([[m if i == j else np.zeros_like(m) for j in range(N)] for i, m in enumerate(matrices)])
    seen = ~np.isnan(chain.y.ravel())
    H, R = blocks(chain.H)[seen], blocks(chain.root_R @ chain.root_R.swapaxes(-1, -2))[np.ix_(seen, seen)]
    residual = (chain.y - chain.d).ravel()[seen] - H @ mean
    total = H @ root @ root.T @ H.T + R
    gain = np.linalg.solve(total, H @ root @ root.T).T
    log_z = -0.5 * (residual @ np.linalg.solve(total, residual) + np.linalg.slogdet(2 * np.pi * total)[1])
    return log_z, mean + gain @ residual, root @ root.T - gain @ total @ gain.T


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
def test_equals_the_joint_gaussian(x64, seed):
    chain = random_matrices(seed)
    N, D = chain.c.shape
    log_z, mean, covariance = dense(chain)
    chain = jax.tree.map(jnp.asarray, chain)
    found = smooth(chain)
    assert_allclose([found.log_densities.sum(), log_evidence(chain)], log_z, rtol=1e-10)
    assert_allclose(found.smoothed.mean.ravel(), mean, atol=1e-9)
    own = np.stack([covariance[t * D : (t + 1) * D, t * D : (t + 1) * D] for t in range(N)])
    assert_allclose(found.smoothed.root @ found.smoothed.root.mT, own, atol=1e-9)
    # Draws are affine in their noise, so unit vectors of it tell their covariance.
    total = N * D + chain.y.size
    draw = lambda noise: trajectory(chain, noise[: N * D].reshape(N, D), noise[N * D :].reshape(chain.y.shape))
    center = draw(jnp.zeros(total))
    along = jax.vmap(lambda noise: (draw(noise) - center).ravel())(jnp.eye(total))
    assert_allclose(center.ravel(), mean, atol=1e-9)
    assert_allclose(along.T @ along, covariance, atol=1e-9)


@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 7))])
@pytest.mark.parametrize("way", ["roots", "covariances"])
def test_derivatives(x64, seed, way):
    chain = random_matrices(seed)
    arrays = jax.tree.map(jnp.asarray, chain)
    by_hand = lambda s: dense(chain._replace(root_Q=s * chain.root_Q, c=s * chain.c))[0]
    function = kalman._by_roots if way == "roots" else lambda chain: kalman._by_covariances(chain)[0]
    value = lambda s: function(arrays._replace(root_Q=s * arrays.root_Q, c=s * arrays.c))
    h = 1e-4
    assert_allclose(jax.grad(value)(1.0), (by_hand(1 + h) - by_hand(1 - h)) / (2 * h), rtol=1e-6)
    second = (by_hand(1 + h) - 2 * by_hand(1.0) + by_hand(1 - h)) / h**2
    assert_allclose(jax.hessian(value)(1.0), second, rtol=1e-3, atol=1e-4)
    assert_allclose(jax.jacfwd(value)(1.0), jax.grad(value)(1.0), rtol=1e-9)


def test_equals_cuthbert_where_that_serves(x64):
    """It takes no singular covariances, and no observation that is missing in part."""
    for seed in range(5):
        chain = random_matrices(seed, sound=True)
        missing = np.isnan(chain.y).any(-1, keepdims=True)
        chain = jax.tree.map(jnp.asarray, chain._replace(y=np.where(missing, np.nan, chain.y)))
        state, total = (jnp.zeros_like(chain.c[0]), jnp.eye(chain.c.shape[-1])), 0.0
        for t in range(len(chain.c)):
            predicted = predict(*state, chain.F[t], chain.c[t], chain.root_Q[t])
            state, log_density = filter_update(*predicted, chain.H[t], chain.d[t], chain.root_R[t], chain.y[t], jnp.zeros(()))
            total += log_density
        assert_allclose(log_evidence(chain), total, rtol=1e-9)


def test_where_covariances_lose_their_digits_roots_are_taken(x64):
    """A state about which nothing is known but that it is less than a hundred million."""
    T = 6
    one, none = np.ones((T, 1, 1)), np.zeros((T, 1))
    F, root_Q = one.copy(), 0.1 * one
    F[0], root_Q[0] = 0.0, 1e8
    chain = Matrices(F, none, root_Q, one, none, 1e-3 * one, np.random.default_rng(0).normal(size=(T, 1)))
    exact = _in_fractions(chain)
    chain = jax.tree.map(jnp.asarray, chain)
    assert abs(kalman._by_covariances(chain)[0] - exact) > 1e-6
    assert_allclose(log_evidence(chain), exact, atol=1e-8)
    # and so for all series, if one of them needs it
    both = jax.tree.map(lambda x: jnp.stack([x, x], 1), chain)
    assert_allclose(log_evidence(both._replace(root_Q=both.root_Q.at[0, 1].set(1.0)))[0], exact, atol=1e-8)


def _in_fractions(chain):
    """The filter of one state, in numbers that are not rounded."""
    from fractions import Fraction as Exact

    mean, variance, total = Exact(0), Exact(0), 0.0
    for t in range(len(chain.c)):
        F, q, r, y = (Exact(float(x[t].item())) for x in (chain.F, chain.root_Q, chain.root_R, chain.y))
        mean, variance = F * mean, F * F * variance + q * q
        sum_, residual = variance + r * r, y - mean
        total += -0.5 * (np.log(2 * np.pi) + np.log(float(sum_)) + float(residual * residual / sum_))
        mean, variance = mean + variance / sum_ * residual, variance * r * r / sum_
    return total


def test_single_precision_keeps_its_digits():
    chain = random_matrices(3)._replace(y=random_matrices(3).y)
    with jax.enable_x64(True):
        exact = float(log_evidence(jax.tree.map(jnp.asarray, chain)))
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), chain)
    assert log_evidence(single).dtype == jnp.float32
    assert_allclose(log_evidence(single), exact, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 12])
def test_roots_of_singular_covariances(x64, size):
    rng = np.random.default_rng(size)
    root = rng.normal(size=(size, max(size // 2, 1)))
    covariance = jnp.asarray(root @ root.T)
    for found in (root_of(covariance), triangular(jnp.asarray(root))):
        assert_allclose(found @ found.T, covariance, atol=1e-12)
        assert (np.triu(found, 1) == 0).all()
    derivative = jax.jacfwd(lambda s: (lambda L: L @ L.T)(root_of(s * covariance)))(1.0)
    assert_allclose(derivative, covariance, atol=1e-10)
    assert jnp.isnan(root_of(covariance - 0.1 * covariance.max() * (1 + jnp.eye(size)))).any()


def test_it_is_batched_and_jitted(x64):
    chains = [random_matrices(3), random_matrices(3)]
    chains[1] = chains[1]._replace(y=chains[1].y + 1.0, root_Q=2 * chains[1].root_Q)
    both = jax.tree.map(lambda *x: jnp.stack(x, 1), *chains)
    assert_allclose(jax.jit(log_evidence)(both), [dense(chain)[0] for chain in chains], rtol=1e-10)
