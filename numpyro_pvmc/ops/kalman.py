"""Filter, smooth and draw from a linear-Gaussian chain given its matrices.

For one series: :math:`u_t = F_t u_{t-1} + c_t + N(0, Q_t)` and :math:`y_t = H_t u_t + d_t + N(0, R_t)`. The first row, whose F
is zero, is the initial step. An element of y that is missing is NaN. Q and R may be singular, and so may be what is known of a
state: a component without noise of its own is as good as any other.

Observations of a step are made uncorrelated, and enter one after the other (Koopman & Durbin 2000), in square roots of
covariances (Potter's update; Bierman 1977, chapters 2 and 5), which in float32 keep the digits that covariances lose. In
float64 the evidence is computed from covariances, in half the time or less, wherever their digits suffice.

**References**

1. *Fast Filtering and Smoothing for Multivariate State Space Models*, Siem Jan Koopman, James Durbin (Journal of Time Series
   Analysis, 2000).
2. *Time Series Analysis by State Space Methods*, James Durbin, Siem Jan Koopman (2nd edition, Oxford University Press, 2012).
3. *Factorization Methods for Discrete Sequential Estimation*, Gerald J. Bierman (Academic Press, 1977).
"""

from collections.abc import Callable
from typing import NamedTuple

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
    """What is known of a chain; `log_densities` are those of the observations of each row given those before."""

    log_densities: jax.Array
    filtered: Gaussians
    smoothed: Gaussians


class _Uncorrelated(NamedTuple):
    """Observations of one step with independent noise: slopes, values less the mean at zero, variances, which are there."""

    slopes: jax.Array  # (E, D)
    values: jax.Array  # (E,)
    variances: jax.Array  # (E,)
    seen: jax.Array  # (E,)


class _Entered(NamedTuple):
    """What one observation did: its slopes, zero where it is missing, the gain, residual and variance, and its log density."""

    slopes: jax.Array
    gain: jax.Array
    residual: jax.Array
    variance: jax.Array
    log_density: jax.Array


class _Passed(NamedTuple):
    """What the observations of a row did, and their log density."""

    entered: _Entered
    log_density: jax.Array


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
    # Looked at apart: of what is not taken the derivatives may be none, and zero times these would be none, too.
    _, spread = _for_series(_by_covariances, lax.stop_gradient(chains))
    is_sound = jnp.all(spread * jnp.finfo(chains.c.dtype).eps < _LOST)
    by_covariance = lambda chains: _for_series(_by_covariances, chains)[0]
    # Else the derivative would keep what either way needs, of which one is not gone.
    return lax.cond(is_sound, jax.checkpoint(by_covariance), jax.checkpoint(by_root), chains)


@full_precision
def smooth(chain: Matrices) -> Smoothed:
    """The Kalman filter and smoother, in square roots of covariances.

    Backwards goes what the data to come say of a state (Bryson & Frazier 1963; Durbin & Koopman 2012, section 4.4), and no
    covariance is inverted: where observations without noise leave nothing to know, the recursion of Rauch, Tung and Striebel
    would divide rounding by rounding.

    :param chain: matrices of one series.
    :return: log densities, whose sum is the log evidence, and moments.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.ops.kalman import Matrices, smooth
        >>> one, none = jnp.ones((1, 1, 1)), jnp.zeros((1, 1))
        >>> smoothed = smooth(Matrices(0 * one, none, one, one, none, one, none + 2.0)).smoothed
        >>> round(float(smoothed.mean[0, 0]), 4)
        1.0
    """
    passed, filtered = _filter(chain)
    score, information = _backward(chain, passed)
    return Smoothed(passed.log_density, filtered, jax.vmap(_smoothed)(filtered, score, information))


@full_precision
def trajectory(chain: Matrices, noise: jax.Array, noise_of_y: jax.Array) -> jax.Array:
    """One joint draw of all states given the observations (Durbin & Koopman 2002): a draw of chain and observations, moved.

    :param chain: matrices of one series.
    :param noise: independent standard Normal numbers, shaped like the states.
    :param noise_of_y: the same, shaped like the observations.
    """

    def advance(state, row):
        F, root_Q, H, root_R, noise, noise_of_y = row
        state = F @ state + root_Q @ noise
        return state, (state, H @ state + root_R @ noise_of_y)

    rows = chain.F, chain.root_Q, chain.H, chain.root_R, noise, noise_of_y
    _, (states, y) = lax.scan(advance, jnp.zeros_like(chain.c[0]), rows)
    moved = chain._replace(y=chain.y - y)
    passed, filtered = _filter(moved)
    score, _ = _backward(moved, passed, with_information=False)
    return states + jax.vmap(_mean)(filtered, score)


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
    tiny = 8 * rows.shape[-1] * jnp.finfo(rows.dtype).eps
    least = tiny**2 * lax.stop_gradient(rows**2).sum(-1)

    def along(rows, i):
        row = rows[i]
        square = row @ row
        is_there = square > least[i]
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


def root_of(covariance: jax.Array, of_a_share: bool = False) -> jax.Array:
    """The lower triangular square root of a covariance, which may be singular, with its derivatives.

    :param covariance: shape ``(..., D, D)``.
    :param of_a_share: whether it is what is left of an identity, and has the rounding of that: what is negative is zero.
    :return: NaN for a matrix that has a negative eigenvalue, beyond rounding.
    """
    size = covariance.shape[-1]
    scale = lax.stop_gradient(jnp.diagonal(covariance, axis1=-2, axis2=-1))
    scale = jnp.ones_like(scale) if of_a_share else scale
    tiny = 8 * size * jnp.finfo(covariance.dtype).eps

    def along(rest, i):
        column = rest[..., i]
        pivot = column[..., i]
        is_there = pivot > tiny * scale[..., i]
        unit = jnp.where(is_there[..., None], column * lax.rsqrt(jnp.where(is_there, pivot, 1.0))[..., None], 0.0)
        if not of_a_share:
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


def _one_after_the_other(update, state, observed, reverse=False):
    """Let observations enter; and what is kept of each."""
    if len(observed.slopes) > _UNROLLED:
        return lax.scan(update, state, observed, reverse=reverse)
    kept = []
    for i in range(len(observed.slopes))[:: -1 if reverse else 1]:
        state, of_one = update(state, jax.tree.map(lambda x, i=i: x[i], observed))
        kept.append(of_one)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts[:: -1 if reverse else 1]), *kept)


def _entered(mean, along, variance, one):
    """What an observation does to what is known, of whose covariance `along` is the product with its slopes."""
    there = jnp.where(one.seen, variance, 1.0)
    residual = jnp.where(one.seen, one.values - one.slopes @ mean, 0.0)
    gain = jnp.where(one.seen, along / there, 0.0)
    log_density = jnp.where(one.seen, -0.5 * (jnp.log(2 * jnp.pi * there) + residual**2 / there), 0.0)
    return mean + gain * residual, _Entered(jnp.where(one.seen, one.slopes, 0.0), gain, residual, there, log_density)


def _filter(chain):
    """What the observations of each row did, and what is known of its state after them."""

    def update(state, one):
        mean, root = state
        row = one.slopes @ root
        mean, entered = _entered(mean, root @ row, row @ row + one.variances, one)
        ratio = jnp.where(one.seen & (one.variances > 0), one.variances / entered.variance, 0.0)
        share = 1 / (1 + jnp.sqrt(jnp.where(ratio > 0, ratio, 1.0)) * (ratio > 0))
        return Gaussians(mean, root - share * jnp.outer(entered.gain, row)), entered

    def advance(state, row):
        F, c, root_Q, observed = row
        predicted = Gaussians(F @ state.mean + c, triangular(jnp.concatenate([F @ state.root, root_Q], -1)))
        state, entered = _one_after_the_other(update, predicted, observed)
        return state, (_Passed(entered, entered.log_density.sum()), state)

    return lax.scan(advance, Gaussians(*_known(chain)), _rows(chain))[1]


def _backward(chain, passed, with_information=True):
    """The gradient of the log density of the data after each row with respect to its state, and their information."""

    def update(later, one):
        score, information = later
        score = score + one.slopes * (one.residual / one.variance - one.gain @ score)
        if with_information:
            along = information @ one.gain
            twice = jnp.outer(one.slopes, one.slopes) * (1 / one.variance + one.gain @ along)
            information = information - jnp.outer(one.slopes, along) - jnp.outer(along, one.slopes) + twice
        return (score, information), ()

    def retreat(later, row):
        F, entered = row
        (score, information), _ = _one_after_the_other(update, later, entered, reverse=True)
        return (F.T @ score, F.T @ information @ F if with_information else information), later

    width = chain.c.shape[-1]
    nothing = jnp.zeros(width, chain.c.dtype), jnp.zeros((width, width) if with_information else (), chain.c.dtype)
    return lax.scan(retreat, nothing, (chain.F, passed.entered), reverse=True)[1]


def _mean(filtered, score):
    return filtered.mean + filtered.root @ (filtered.root.T @ score)


def _smoothed(filtered, score, information):
    share = jnp.eye(len(score)) - filtered.root.T @ information @ filtered.root
    return Gaussians(_mean(filtered, score), filtered.root @ root_of(share, of_a_share=True))


def _by_roots(chain):
    return _filter(chain)[0].log_density.sum()


def _by_covariances(chain):
    """The log evidence, and how many times the largest variance of an observation is that of the least."""

    def update(state, one):
        mean, covariance = state
        along = covariance @ one.slopes
        mean, entered = _entered(mean, along, one.slopes @ along + one.variances, one)
        left = covariance - jnp.outer(entered.gain, entered.gain) * entered.variance
        return (mean, left), (entered.log_density, jnp.where(one.seen, entered.variance, jnp.nan))

    def advance(state, row):
        (mean, covariance), (F, c, Q, observed) = state, row
        predicted = F @ mean + c, F @ covariance @ F.T + Q
        state, (log_densities, variances) = _one_after_the_other(update, predicted, observed)
        return state, (log_densities.sum(), variances)

    F, c, root_Q, observed = _rows(chain)
    _, (log_densities, variances) = lax.scan(advance, _known(chain), (F, c, root_Q @ root_Q.mT, observed))
    variances = lax.stop_gradient(variances)
    # Of what is subtracted from a variance rounding leaves as much as of the variance, and it is the least one that counts.
    return log_densities.sum(), jnp.nanmax(variances, initial=0.0) / jnp.nanmin(variances, initial=jnp.inf)


def _known(chain):
    """A state before the first row, which nothing reads."""
    width = chain.c.shape[-1]
    return jnp.zeros(width, chain.c.dtype), jnp.zeros((width, width), chain.c.dtype)


def _rows(chain):
    return chain.F, chain.c, chain.root_Q, jax.vmap(_uncorrelated)(chain.H, chain.d, chain.root_R, chain.y)
