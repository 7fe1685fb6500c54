"""Filter, smooth and draw from a linear-Gaussian chain given its matrices.

For one series: :math:`u_t = F_t u_{t-1} + c_t + N(0, Q_t)` and :math:`y_t = H_t u_t + d_t + N(0, R_t)`. The first row, whose F
is zero, is the initial step. An element of y that is missing is NaN. Q and R may be singular, and so may be what is known of a
state: a component without noise of its own is as good as any other.

Observations of a step are made uncorrelated, and enter one after the other (Koopman & Durbin 2000), in square roots of
covariances (Potter's update; Bierman 1977, chapters 2 and 5), which in float32 keep the digits that covariances lose. In
float64 the evidence is computed from covariances, at a tenth of the time, wherever their digits suffice.

**References**

1. *Fast Filtering and Smoothing for Multivariate State Space Models*, Siem Jan Koopman, James Durbin (Journal of Time Series
   Analysis, 2000).
2. *Factorization Methods for Discrete Sequential Estimation*, Gerald J. Bierman (Academic Press, 1977).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from numpyro_pvmc.ops.full_precision import full_precision


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


class _Uncorrelated(NamedTuple):
    """Observations of one step with independent noise: slopes, values less the mean at zero, variances, which are there."""

    slopes: jax.Array  # (E, D)
    values: jax.Array  # (E,)
    variances: jax.Array  # (E,)
    seen: jax.Array  # (E,)


_UNROLLED = 8  # rows that are written out one after the other
_LOST = 1e-10  # the largest share of the evidence, about, that rounding may take from covariances


@full_precision
def log_evidence(chains: Matrices) -> jax.Array:
    """The log evidence of several series, differentiable any number of times, forwards and backwards.

    :param chains: matrices with axes ``(N, *plates, ...)``.
    :return: shape ``(*plates)``.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.ops.kalman import Matrices, log_evidence
        >>> one, none = jnp.ones((1, 1, 1)), jnp.zeros((1, 1))
        >>> round(float(log_evidence(Matrices(0 * one, none, one, one, none, one, none + 2.0))), 4)
        -2.2655
    """
    by_root = lambda chains: _for_series(_by_roots, chains)
    if chains.c.dtype != jnp.float64:
        return by_root(chains)
    log_z, spread = _for_series(_by_covariances, chains)
    is_sound = jnp.all(spread * jnp.finfo(log_z.dtype).eps < _LOST)
    return lax.cond(is_sound, lambda chains: log_z, by_root, chains)


@full_precision
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
    log_densities, filtered = _filter(chain)
    log_z = log_densities.sum()  # in a tree; a total that grew from row to row would be rounded at each
    head, (mean, root) = jax.tree.map(lambda x: x[:-1], filtered), jax.tree.map(lambda x: x[-1], filtered)
    backward = jax.vmap(_given_the_next)(*head, chain.F[1:], chain.c[1:], chain.root_Q[1:])
    last = mean, jnp.zeros_like(root), root
    backward = jax.tree.map(lambda rest, last: jnp.concatenate([rest, last[None]]), backward, last)

    def retreat(after, now):
        offset, gain, root = now
        state = Gaussians(offset + gain @ after.mean, triangular(jnp.concatenate([gain @ after.root, root], -1)))
        return state, state

    nothing = Gaussians(jnp.zeros_like(mean), jnp.zeros_like(root))
    _, smoothed = lax.scan(retreat, nothing, backward, reverse=True)
    return Smoothed(log_z, filtered, smoothed, backward)


@full_precision
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


def triangular(rows: jax.Array) -> jax.Array:
    """A lower triangular square root of a covariance from one with any number of columns, by modified Gram-Schmidt.

    Unlike a QR decomposition it has derivatives where the covariance is singular: a row that is a combination of those before
    it, but for rounding, has a diagonal element of zero.

    :param rows: shape ``(D, M)``.
    :return: shape ``(D, D)``.
    """
    tiny = (8 * rows.shape[-1] * jnp.finfo(rows.dtype).eps) ** 2
    sizes = lax.stop_gradient((rows**2).sum(-1))

    def along(rows, i):
        row = rows[i]
        square = row @ row
        is_there = square > tiny * sizes[i]
        unit = jnp.where(is_there, row * lax.rsqrt(jnp.where(is_there, square, 1.0)), 0.0)
        column = jnp.where(jnp.arange(len(rows)) < i, 0.0, rows @ unit)
        return rows - column[:, None] * unit, column

    if len(rows) > _UNROLLED:
        return lax.scan(along, rows, jnp.arange(len(rows)))[1].T
    columns = []
    for i in range(len(rows)):
        rows, column = along(rows, i)
        columns.append(column)
    return jnp.stack(columns, -1)


def root_of(covariance: jax.Array) -> jax.Array:
    """The lower triangular square root of a covariance, which may be singular, with its derivatives.

    :param covariance: shape ``(..., D, D)``.
    :return: NaN for a matrix that has a negative eigenvalue, beyond rounding.
    """
    size = covariance.shape[-1]
    scale = lax.stop_gradient(jnp.diagonal(covariance, axis1=-2, axis2=-1))
    tiny = 8 * size * jnp.finfo(covariance.dtype).eps

    def along(rest, i):
        column = rest[..., i]
        pivot = column[..., i]
        is_there = pivot > tiny * scale[..., i]
        unit = jnp.where(is_there[..., None], column * lax.rsqrt(jnp.where(is_there, pivot, 1.0))[..., None], 0.0)
        largest = jnp.sqrt(tiny) * jnp.sqrt(jnp.abs(scale * scale[..., i, None]))
        is_sound = is_there | (jnp.abs(column) <= largest).all(-1) & (pivot >= -tiny * scale[..., i])
        unit = jnp.where(is_sound[..., None], unit, jnp.nan)
        return rest - unit[..., :, None] * unit[..., None, :], jnp.where(jnp.arange(size) < i, 0.0, unit)

    _, columns = lax.scan(along, covariance, jnp.arange(size))
    return jnp.moveaxis(columns, 0, -1)


def _for_series(function: Callable, chains: Matrices):
    for _ in range(chains.c.ndim - 2):
        function = jax.vmap(function, in_axes=1)
    return function(chains)


def _uncorrelated(H, d, root_R, y):
    """With R = L D L', L of ones on the diagonal, the elements of the inverse of L times y have the variances D."""
    seen = ~jnp.isnan(y)
    own = jnp.where(seen[:, None], jnp.concatenate([H, (y - d)[:, None]], -1), 0.0)
    root = triangular(jnp.where(seen[:, None], root_R, 0.0))
    size = jnp.diagonal(root)
    unit = jnp.where(size > 0, root / jnp.where(size > 0, size, 1.0), 0.0) * ~jnp.eye(len(size), dtype=bool)
    own = solve_triangular(unit, own, lower=True, unit_diagonal=True)
    return _Uncorrelated(own[:, :-1], own[:, -1], size**2, seen)


def _one_after_the_other(update, state, observed):
    """Let observations enter; the sum of their log densities."""
    if len(observed.values) <= _UNROLLED:
        log_density = jnp.zeros(())
        for i in range(len(observed.values)):
            state, more = update(state, jax.tree.map(lambda x, i=i: x[i], observed))
            log_density += more
        return state, log_density
    state, log_densities = lax.scan(update, state, observed)
    return state, log_densities.sum()


def _entered(mean, along, variance, one):
    """The mean and the gain after an observation, of slopes `one`, whose log density is the third."""
    there = jnp.where(one.seen, variance, 1.0)
    residual = jnp.where(one.seen, one.values - one.slopes @ mean, 0.0)
    gain = jnp.where(one.seen, along / there, 0.0)
    log_density = jnp.where(one.seen, -0.5 * (jnp.log(2 * jnp.pi * there) + residual**2 / there), 0.0)
    return mean + gain * residual, gain, log_density


def _filter(chain):
    """Log densities of the observations of each row given those before, and what is known of its state."""

    def update(state, one):
        mean, root = state
        row = one.slopes @ root
        variance = row @ row + one.variances
        mean, gain, log_density = _entered(mean, root @ row, variance, one)
        ratio = jnp.where(one.seen & (one.variances > 0), one.variances / jnp.where(one.seen, variance, 1.0), 0.0)
        share = 1 / (1 + jnp.sqrt(jnp.where(ratio > 0, ratio, 1.0)) * (ratio > 0))
        return Gaussians(mean, root - share * jnp.outer(gain, row)), log_density

    def advance(state, row):
        F, c, root_Q, observed = row
        state = Gaussians(F @ state.mean + c, triangular(jnp.concatenate([F @ state.root, root_Q], -1)))
        state, log_density = _one_after_the_other(update, state, observed)
        return state, (log_density, state)

    return lax.scan(advance, Gaussians(*_known(chain)), _rows(chain))[1]


def _by_roots(chain):
    return _filter(chain)[0].sum()


def _by_covariances(chain):
    """The log evidence, and how many times the largest variance of an observation is that of the least."""

    def update(state, one):
        mean, covariance = state
        along = covariance @ one.slopes
        variance = one.slopes @ along + one.variances
        mean, gain, log_density = _entered(mean, along, variance, one)
        known = jnp.where(one.seen, variance, jnp.nan)
        return (mean, covariance - jnp.outer(gain, gain) * jnp.where(one.seen, variance, 0.0)), (log_density, known)

    def advance(state, row):
        (mean, covariance), (F, c, root_Q, observed) = state, row
        state, log_densities, variances = (F @ mean + c, F @ covariance @ F.T + root_Q @ root_Q.T), [], []
        for i in range(len(observed.values)):
            state, (log_density, variance) = update(state, jax.tree.map(lambda x, i=i: x[i], observed))
            log_densities.append(log_density)
            variances.append(variance)
        return state, (jnp.stack(log_densities).sum(), jnp.stack(variances))

    _, (log_densities, variances) = lax.scan(advance, _known(chain), _rows(chain))
    variances = lax.stop_gradient(variances)
    # Of what is subtracted from a variance rounding leaves as much as of the variance, and it is the least one that counts.
    return log_densities.sum(), jnp.nanmax(variances, initial=0.0) / jnp.nanmin(variances, initial=jnp.inf)


def _known(chain):
    """A state before the first row, which nothing reads."""
    width = chain.c.shape[-1]
    return jnp.zeros(width, chain.c.dtype), jnp.zeros((width, width), chain.c.dtype)


def _rows(chain):
    return chain.F, chain.c, chain.root_Q, jax.vmap(_uncorrelated)(chain.H, chain.d, chain.root_R, chain.y)


def _given_the_next(mean, root, F, c, root_Q):
    """The distribution of a state given the next one: offset, gain and root."""
    width = len(mean)
    both = jnp.concatenate([jnp.concatenate([F @ root, root_Q], -1), jnp.concatenate([root, jnp.zeros_like(root_Q)], -1)], -2)
    factor = triangular(both)
    upper, lower = factor[:width, :width], factor[width:, :width]
    # What has no variance says nothing.
    solvable = upper + jnp.diag(jnp.where(jnp.diagonal(upper) > 0, 0.0, 1.0))
    gain = solve_triangular(solvable, lower.T, trans=1, lower=True).T
    return mean - gain @ (F @ mean + c), gain, factor[width:, width:]
