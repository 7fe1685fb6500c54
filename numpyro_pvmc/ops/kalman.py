"""Filter, smooth and draw from a linear-Gaussian chain given its matrices.

For one series: :math:`u_t = F_t u_{t-1} + c_t + N(0, Q_t)` and :math:`y_t = H_t u_t + d_t + N(0, R_t)`. The first row, whose F
is zero, is the initial step. An element of y that is missing is NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

try:
    from cuthbertlib.kalman import filter_update, predict, smoothing
except ImportError as error:
    raise ImportError(
        "`numpyro_pvmc.exact` filters with the package `cuthbert`, which could not be imported. Install it with "
        '`pip install "numpyro_pvmc[exact]"`.'
    ) from error


class Matrices(NamedTuple):
    """A chain of N rows, states of D and observations of E numbers; with `lax.scan`'s leading axis N."""

    F: jax.Array  # (N, D, D)
    c: jax.Array  # (N, D)
    root_Q: jax.Array  # (N, D, D), with root_Q root_Q' = Q
    H: jax.Array  # (N, E, D)
    d: jax.Array  # (N, E)
    root_R: jax.Array  # (N, E, E)
    y: jax.Array  # (N, E)


class Gaussians(NamedTuple):
    """A Gaussian distribution at each time."""

    mean: jax.Array  # (N, D)
    root: jax.Array  # (N, D, D)


class Smoothed(NamedTuple):
    """What is known of a chain; `backward` is the distribution of each state given the next: offset, gain and root."""

    log_evidence: jax.Array
    filtered: Gaussians
    smoothed: Gaussians
    backward: Any


def smooth(chain: Matrices) -> Smoothed:
    """The Kalman filter and smoother, in square roots of covariances.

    :param chain: matrices of one series.
    :return: log evidence and moments.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.ops.kalman import Matrices, smooth
        >>> one, none = jnp.ones((1, 1, 1)), jnp.zeros((1, 1))
        >>> smoothed = smooth(Matrices(0 * one, none, one, one, none, one, none + 2.0)).smoothed
        >>> round(float(smoothed.mean[0, 0]), 4)
        1.0
    """
    # `cuthbert.filter` multiplies the elements of an associative scan. In single precision, where the prior has a standard
    # deviation of 1000 and the noise one of 1, that costs 80 nats of log evidence; predictions and updates in turn 5e-4.
    width = chain.c.shape[-1]
    no_state = jnp.zeros_like(chain.c[0]), jnp.eye(width, dtype=chain.c.dtype)

    nothing = jnp.zeros((), chain.c.dtype)

    def advance(state, row):
        predicted = predict(*state, row.F, row.c, row.root_Q)
        state, log_density = filter_update(*predicted, row.H, row.d, row.root_R, row.y, nothing)
        return state, (Gaussians(*state), log_density)

    _, (filtered, log_densities) = lax.scan(advance, no_state, chain)
    log_evidence = log_densities.sum()  # in a tree; a total that grew from row to row would be rounded at each
    head, (mean, root) = jax.tree.map(lambda x: x[:-1], filtered), jax.tree.map(lambda x: x[-1], filtered)
    last = smoothing.SmootherScanElement(mean, jnp.zeros_like(root), root)
    backward = jax.vmap(smoothing.associative_params_single)(*head, chain.F[1:], chain.c[1:], chain.root_Q[1:])
    backward = jax.tree.map(lambda rest, last: jnp.concatenate([rest, last[None]]), backward, last)

    def retreat(after, now):
        state = smoothing.smoothing_operator(after, now)
        return state, Gaussians(state.g, state.D)

    _, smoothed = lax.scan(retreat, jax.tree.map(jnp.zeros_like, last), backward, reverse=True)
    return Smoothed(log_evidence, filtered, smoothed, (backward.g, backward.E, backward.D))


def trajectory(backward: Any, noise: jax.Array) -> jax.Array:
    """One joint draw of all states, backwards in time.

    :param backward: distributions of each state given the next; axes between those of time and of states are series.
    :param noise: independent standard Normal numbers, shaped like the states.
    """

    def retreat(after, now):
        (offset, gain, root), noise = now
        state = offset + (gain @ after[..., None] + root @ noise[..., None])[..., 0]
        return state, state

    return lax.scan(retreat, jnp.zeros_like(noise[0]), (backward, noise), reverse=True)[1]


def block_diagonal(blocks: list[jax.Array]) -> jax.Array:
    """Matrices along the diagonal of one.

    :param blocks: square matrices, with the same leading axes.
    :return: a matrix with these leading axes, zero elsewhere.
    """
    total, before, rows = sum(block.shape[-1] for block in blocks), 0, []
    for block in blocks:
        size = block.shape[-1]
        rows.append(jnp.pad(block, [(0, 0)] * (block.ndim - 1) + [(before, total - before - size)]))
        before += size
    return jnp.concatenate(rows, -2)
