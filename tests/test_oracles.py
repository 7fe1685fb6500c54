"""The oracles against each other, and against hand arithmetic."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from oracles import (
    LinearGaussian,
    dense_smoother,
    enumerate_chain,
    forecast,
    forward_backward,
    kalman_filter,
    paths_and_logs,
    rts_smoother,
)


def random_chain(T, K, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, K)), rng.normal(size=(T - 1, K, K))


def random_linear_gaussian(D=2, E=3, seed=0):
    rng = np.random.default_rng(seed)

    def positive(n):
        root = rng.normal(size=(n, n))
        return root @ root.T + 0.3 * np.eye(n)

    A, C = 0.5 * rng.normal(size=(D, D)), rng.normal(size=(E, D))
    return LinearGaussian(rng.normal(size=D), positive(D), A, rng.normal(size=D), positive(D), C, positive(E))


def observations(missing=(), rows=5, E=3):
    y = np.random.default_rng(7).normal(size=(rows, E))
    y[list(missing)] = np.nan
    return y


def test_two_steps_of_two_particles_by_hand():
    node, edge = np.log([[1.0, 2.0], [3.0, 5.0]]), np.log([[[1.0, 0.5], [2.0, 1.0]]])
    chain = enumerate_chain(node, edge)
    mass = np.array([[1 * 1 * 3, 1 * 0.5 * 5], [2 * 2 * 3, 2 * 1 * 5]])
    assert_allclose(chain.log_normalizer, np.log(mass.sum()))
    assert_allclose(chain.pair_weights[0], mass / mass.sum())
    assert_allclose(chain.weights, [mass.sum(1) / mass.sum(), mass.sum(0) / mass.sum()])
    assert_allclose(chain.filtering_weights, [[1 / 3, 2 / 3], mass.sum(0) / mass.sum()])


@pytest.mark.parametrize(("T", "K"), [(1, 3), (4, 1), (4, 3)])
def test_pairs_have_the_weights_as_margins(T, K):
    chain = enumerate_chain(*random_chain(T, K))
    assert_allclose(chain.weights.sum(-1), np.ones(T))
    assert_allclose(chain.pair_weights.sum(-1), chain.weights[:-1], atol=1e-15)
    assert_allclose(chain.pair_weights.sum(-2), chain.weights[1:], atol=1e-15)
    assert_allclose(chain.filtering_weights[-1], chain.weights[-1])


def test_filtering_weights_are_the_smoothing_weights_of_the_chain_cut_short():
    node, edge = random_chain(4, 3)
    for t in range(4):
        cut = enumerate_chain(node[: t + 1], edge[:t])
        assert_allclose(enumerate_chain(node, edge).filtering_weights[t], cut.weights[t])


def test_paths_of_no_mass_have_no_weight():
    node, edge = random_chain(3, 2)
    node[1, 0] = -np.inf
    chain = enumerate_chain(node, edge)
    alone = enumerate_chain(np.delete(node, 0, 1)[1:2], np.zeros((0, 1, 1)))
    assert np.isfinite(chain.log_normalizer)
    assert_allclose(chain.weights[1], [0.0, alone.weights[0, 0]])
    node[1] = -np.inf
    impossible = enumerate_chain(node, edge)
    assert impossible.log_normalizer == -np.inf
    assert_allclose(impossible.weights, 0.0)
    assert_allclose(impossible.filtering_weights.sum(-1), [1.0, 0.0, 0.0])


def test_an_absent_step_is_a_step_that_keeps_the_particle():
    node, edge = random_chain(5, 2)
    mask = np.array([True, False, True, True, False])
    keep = np.where(np.eye(2, dtype=bool), 0.0, -np.inf)
    held = enumerate_chain(np.where(mask[:, None], node, 0.0), np.where(mask[1:, None, None], edge, keep))
    chain = enumerate_chain(node, edge, mask)
    assert_allclose(chain.log_normalizer, held.log_normalizer)
    assert_allclose(chain.weights, held.weights)
    assert_allclose(chain.filtering_weights, held.filtering_weights)
    assert_allclose(chain.pair_weights, np.where(mask[1:, None, None], held.pair_weights, 0.0))


def test_all_states_as_particles_is_the_hidden_markov_model():
    rng = np.random.default_rng(3)
    log_initial, log_transition = np.log(rng.dirichlet(np.ones(3))), np.log(rng.dirichlet(np.ones(3), size=3))
    log_emission = rng.normal(size=(5, 3))
    node = log_emission.copy()
    node[0] += log_initial
    chain = enumerate_chain(node, np.repeat(log_transition[None], 4, 0))
    for ours, theirs in zip(forward_backward(log_initial, log_transition, log_emission), chain, strict=True):
        assert_allclose(ours, theirs, rtol=1e-12)


def test_paths_are_all_paths():
    paths, logs = paths_and_logs(*random_chain(4, 3))
    assert len({tuple(path) for path in paths}) == len(logs) == 3**4


@pytest.mark.parametrize("missing", [(), (0,), (2,), (0, 4), (0, 1, 2, 3)])
def test_kalman_is_the_dense_joint_gaussian(missing):
    model, y = random_linear_gaussian(), observations(missing)
    for ours, theirs in zip(rts_smoother(model, y), dense_smoother(model, y), strict=True):
        assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    filtered = kalman_filter(model, y)
    for t in range(len(y)):
        if np.isfinite(y[: t + 1]).any():
            cut = dense_smoother(model, y[: t + 1])
            assert_allclose(filtered.means[t], cut.means[t], rtol=1e-9, atol=1e-12)
            assert_allclose(filtered.covariances[t], cut.covariances[t], rtol=1e-9, atol=1e-12)


def test_a_forecast_is_the_dense_distribution_of_the_rows_to_come():
    model, y, horizon = random_linear_gaussian(), observations((1,)), 3
    x_means, x_covariances, y_means, y_covariances = forecast(model, y, horizon)
    dense = dense_smoother(model, np.concatenate([y, np.full((horizon, 3), np.nan)]))
    assert_allclose(x_means, dense.means[len(y) :], rtol=1e-9)
    assert_allclose(x_covariances, dense.covariances[len(y) :], rtol=1e-9)
    assert_allclose(y_means[1], model.C @ x_means[1])
    assert_allclose(y_covariances[1], model.C @ x_covariances[1] @ model.C.T + model.R)


def test_kalman_evidence_by_numerical_integration():
    one = np.ones((1, 1))
    model = LinearGaussian(np.array([0.3]), 0.5 * one, 0.8 * one, np.array([0.1]), 0.4 * one, 1.2 * one, 0.6 * one)
    y = np.array([[np.nan], [0.7], [-0.4]])
    grid = np.linspace(-8, 8, 801)
    width = grid[1] - grid[0]
    step = stats.norm.pdf(grid, 0.8 * grid[:, None] + 0.1, 0.4**0.5) * width
    distribution = stats.norm.pdf(grid, 0.3, 0.5**0.5) * width
    for row in y[1:]:
        distribution = distribution @ step * stats.norm.pdf(row, 1.2 * grid, 0.6**0.5)
    assert_allclose(kalman_filter(model, y).log_evidence, np.log(distribution.sum()), rtol=1e-9)
    assert_allclose(kalman_filter(model, y).means[-1, 0], (distribution * grid).sum() / distribution.sum(), rtol=1e-9)
