"""Small models in, exact answers out: plain NumPy, slow, importing nothing of the library."""

import itertools
from typing import NamedTuple

import numpy as np


class Chain(NamedTuple):
    """Sums over all paths through a chain of T steps and K particles; the weights sum to one over the particles."""

    log_normalizer: float
    weights: np.ndarray  # (T, K)
    pair_weights: np.ndarray  # (T - 1, K, K)
    filtering_weights: np.ndarray  # (T, K)


def log_sum(logs):
    return np.logaddexp.reduce(np.asarray(logs), axis=None, initial=-np.inf)


def paths_and_logs(node, edge):
    """Every path through the potentials with the log of its unnormalised mass."""
    T, K = node.shape
    paths = np.array(list(itertools.product(range(K), repeat=T)))
    t = np.arange(T)
    return paths, np.array([node[t, p].sum() + edge[t[:-1], p[:-1], p[1:]].sum() for p in paths])


def enumerate_chain(node, edge, mask=None):
    """Visit all K^T paths of one chain. Where nothing is possible the weights are zero.

    node: (T, K). edge: (T - 1, K, K), edge[t, i, j] from particle i at t to particle j at t + 1. mask: (T,) booleans;
    an absent step has no factors and no choice: the path stays on the particle of the last present step, and no pair
    into it is counted. The first step is present.
    """
    node, edge = np.asarray(node, float), np.asarray(edge, float)
    if mask is not None and not np.all(mask):
        return _enumerate_present(node, edge, np.asarray(mask))
    T, K = node.shape
    paths, logs = paths_and_logs(node, edge)
    log_normalizer = log_sum(logs)
    mass = np.exp(logs - log_normalizer) if np.isfinite(log_normalizer) else np.zeros(len(logs))
    weights, pair_weights = np.zeros((T, K)), np.zeros((T - 1, K, K))
    for path, m in zip(paths, mass, strict=True):
        weights[np.arange(T), path] += m
        pair_weights[np.arange(T - 1), path[:-1], path[1:]] += m
    filtering_weights = np.zeros((T, K))
    for t in range(T):
        heads, logs = paths_and_logs(node[: t + 1], edge[:t])
        if np.isfinite(log_sum(logs)):
            np.add.at(filtering_weights[t], heads[:, -1], np.exp(logs - log_sum(logs)))
    return Chain(log_normalizer, weights, pair_weights, filtering_weights)


def _enumerate_present(node, edge, mask):
    assert mask[0], "a path needs a particle to stay on"
    present, row = np.flatnonzero(mask), np.cumsum(mask) - 1
    chain = enumerate_chain(node[present], edge[present[1:] - 1])
    pair_weights = np.zeros_like(edge)
    pair_weights[present[1:] - 1] = chain.pair_weights
    return Chain(chain.log_normalizer, chain.weights[row], pair_weights, chain.filtering_weights[row])


def forward_backward(log_initial, log_transition, log_emission):
    """An exact hidden Markov model with S states. log_transition: (S, S) from, to. log_emission: (T, S)."""
    T, S = log_emission.shape
    initial, transition = np.exp(log_initial), np.exp(log_transition)
    emission = np.exp(log_emission)
    forward, scale, backward = np.zeros((T, S)), np.zeros(T), np.ones((T, S))
    for t in range(T):
        joint = (initial if t == 0 else forward[t - 1] @ transition) * emission[t]
        scale[t] = joint.sum()
        forward[t] = joint / scale[t]
    for t in reversed(range(T - 1)):
        backward[t] = transition @ (emission[t + 1] * backward[t + 1]) / scale[t + 1]
    pairs = [forward[t][:, None] * transition * emission[t + 1] * backward[t + 1] / scale[t + 1] for t in range(T - 1)]
    return Chain(np.log(scale).sum(), forward * backward, np.array(pairs).reshape(T - 1, S, S), forward)


class LinearGaussian(NamedTuple):
    """x_0 ~ N(m_0, P_0), x_t = A x_{t-1} + b + N(0, Q), y_t = C x_t + N(0, R).

    Observations are (T + 1, E), row t belonging to x_t. A row with a NaN is missing: if y_0 is not observed, the
    first row is NaN.
    """

    m_0: np.ndarray
    P_0: np.ndarray
    A: np.ndarray
    b: np.ndarray
    Q: np.ndarray
    C: np.ndarray
    R: np.ndarray


class Moments(NamedTuple):
    log_evidence: float
    means: np.ndarray  # (T + 1, D)
    covariances: np.ndarray  # (T + 1, D, D)


def log_gaussian(y, mean, covariance):
    residual = y - mean
    _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (log_determinant + residual @ np.linalg.solve(covariance, residual))


def kalman_filter(model, y):
    """log p(y) and the distributions of x_t given y_0..y_t."""
    m_0, P_0, A, b, Q, C, R = model
    means, covariances, log_evidence = [], [], 0.0
    for t in range(len(y)):
        mean, covariance = (m_0, P_0) if t == 0 else (A @ means[-1] + b, A @ covariances[-1] @ A.T + Q)
        if not np.isnan(y[t]).any():
            innovation = C @ covariance @ C.T + R
            gain = covariance @ C.T @ np.linalg.inv(innovation)
            log_evidence += log_gaussian(y[t], C @ mean, innovation)
            mean, covariance = mean + gain @ (y[t] - C @ mean), covariance - gain @ innovation @ gain.T
        means.append(mean)
        covariances.append(covariance)
    return Moments(log_evidence, np.array(means), np.array(covariances))


def rts_smoother(model, y):
    """log p(y) and the distributions of x_t given all of y."""
    _, _, A, b, Q, _, _ = model
    log_evidence, means, covariances = kalman_filter(model, y)
    means, covariances = means.copy(), covariances.copy()
    for t in reversed(range(len(y) - 1)):
        predicted = A @ covariances[t] @ A.T + Q
        gain = covariances[t] @ A.T @ np.linalg.inv(predicted)
        means[t] += gain @ (means[t + 1] - A @ means[t] - b)
        covariances[t] += gain @ (covariances[t + 1] - predicted) @ gain.T
    return Moments(log_evidence, means, covariances)


def forecast(model, y, horizon):
    """The distributions of x and of y at each of the `horizon` steps after the last row of y, given y: four arrays."""
    future = np.full((horizon, y.shape[1]), np.nan)
    _, means, covariances = kalman_filter(model, np.concatenate([y, future]))
    x_means, x_covariances = means[len(y) :], covariances[len(y) :]
    return x_means, x_covariances, x_means @ model.C.T, model.C @ x_covariances @ model.C.T + model.R


def dense_smoother(model, y):
    """What `rts_smoother` returns, by conditioning the joint Gaussian distribution of (x_0..x_T, y_0..y_T) in one solve."""
    m_0, P_0, A, b, Q, C, R = model
    N, D = len(y), len(m_0)
    mean, covariance = [m_0], np.zeros((N, N, D, D))
    covariance[0, 0] = P_0
    for t in range(1, N):
        mean.append(A @ mean[-1] + b)
        for s in range(t):
            covariance[t, s] = A @ covariance[t - 1, s]
            covariance[s, t] = covariance[t, s].T
        covariance[t, t] = A @ covariance[t - 1, t - 1] @ A.T + Q
    mean, covariance = np.concatenate(mean), covariance.transpose(0, 2, 1, 3).reshape(N * D, N * D)
    seen = ~np.isnan(y).any(-1)
    observe, noise = np.kron(np.eye(N)[seen], C), np.kron(np.eye(seen.sum()), R)
    evidence = observe @ covariance @ observe.T + noise
    gain = np.linalg.solve(evidence, observe @ covariance).T
    residual = y[seen].ravel() - observe @ mean
    posterior = (covariance - gain @ observe @ covariance).reshape(N, D, N, D)
    return Moments(
        log_gaussian(y[seen].ravel(), observe @ mean, evidence),
        (mean + gain @ residual).reshape(N, D),
        np.stack([posterior[t, :, t] for t in range(N)]),
    )


def gaussian_integral(log_density, size):
    """The integral of exp(log_density) over `size` numbers, of which it is a quadratic function: log, mean, covariance."""
    zero, one = log_density(np.zeros(size)), np.eye(size)
    ahead = np.array([log_density(e) for e in one])
    slope = (ahead - np.array([log_density(-e) for e in one])) / 2
    curvature = np.array([[log_density(a + b) for b in one] for a in one]) - ahead[:, None] - ahead + zero
    covariance = np.linalg.inv(-curvature)
    mean = covariance @ slope
    probe = np.linspace(-2.0, 3.0, size)
    assert np.isclose(log_density(probe), zero + slope @ probe + probe @ curvature @ probe / 2), "it is not quadratic"
    _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return zero + slope @ mean / 2 + log_determinant / 2, mean, covariance


def sum_counts(initial, moves, emissions):
    """A hidden Markov chain whose matrices differ from step to step, by probabilities: log evidence, smoothed probabilities.

    initial: (S,) before the first step. moves: (T, S, S) from, to; not normalised where mass is left out. emissions: (T, S).
    """
    moves = np.asarray(moves)
    forward, log_z, before = [], 0.0, np.asarray(initial)
    for move, emission in zip(moves, emissions, strict=True):
        now = before @ move * emission
        log_z, before = log_z + np.log(now.sum()), now / now.sum()
        forward.append(before)
    backward = [np.ones(len(initial))]
    for move, emission in list(zip(moves, emissions, strict=True))[:0:-1]:
        later = move @ (emission * backward[0])
        backward.insert(0, later / later.sum())
    weights = np.array(forward) * np.array(backward)
    return log_z, weights / weights.sum(1, keepdims=True)
