"""Refit Gaussians to weighted particles.

The Gaussian nearest to a distribution in inclusive Kullback-Leibler divergence has its mean and covariance, and weighted
particles estimate both.

Shapes: N time steps of a chain, K particles, D coordinates; `plates` are independent series.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_pvmc.ops.full_precision import full_precision


class Moments(NamedTuple):
    """A Gaussian for each time step and series.

    `factor` has shape ``(N, *plates, D)``, standard deviations, or ``(N, *plates, D, D)``, Cholesky factors of covariances.
    """

    mean: Float[Array, "N *plates D"]
    factor: Float[Array, "N *plates_and_D"]

    @property
    def is_full(self) -> bool:
        return self.factor.ndim > self.mean.ndim


@full_precision
def refit(
    old: Moments,
    coordinates: Float[Array, "N *plates K D"],
    log_weights: Float[Array, "N *plates K"],
    rate: float | Float[Array, ""] = 1.0,
    present: Array | None = None,
    wider: float = 1.0,
) -> Moments:
    """Move Gaussians towards the moments of weighted particles.

    The result has the moments of a mixture of the old Gaussian and the one of the particles, which may be `wider`. The share of
    the particles is `rate` if their effective number is enough for a covariance, three times D, and less if it is less.

    :param old: Gaussians to start from.
    :param coordinates: particles.
    :param log_weights: logs of weights that sum to 1 over particles.
    :param rate: the largest share of the particles, between 0 and 1.
    :param present: ``(N, *plates)``, false where there is nothing to fit.
    :param wider: what the covariance of the particles is multiplied by; see :func:`widening`.
    :return: Gaussians of the same kind.
    """
    enough = 3.0 * old.mean.shape[-1] + 1
    weights = _flattened(log_weights, min(enough, log_weights.shape[-1] / 2))
    share = rate * jnp.clip((effective_size(weights) - 1) / (enough - 1), 0.0, 1.0)
    # Without a possible trajectory there are no weights.
    known = jnp.isfinite(log_weights).any(-1) & (True if present is None else present)
    share = jnp.where(known, share, 0.0)[..., None]
    mean = jnp.einsum("...k,...kd->...d", weights, coordinates)
    deviation, shift = coordinates - mean[..., None, :], mean - old.mean
    if old.is_full:
        covariance = wider * jnp.einsum("...k,...ki,...kj->...ij", weights, deviation, deviation)
        between = share[..., None] * (1 - share[..., None]) * shift[..., :, None] * shift[..., None, :]
        before = old.factor @ jnp.swapaxes(old.factor, -1, -2)
        covariance = (1 - share[..., None]) * before + share[..., None] * covariance + between
        # Particles that all stand in one place have no covariance; and rounding must not make it negative.
        ridge = 1e-5 * jnp.diagonal(covariance, axis1=-2, axis2=-1) + jnp.finfo(mean.dtype).tiny
        factor = jnp.linalg.cholesky(covariance + ridge[..., None] * jnp.eye(mean.shape[-1], dtype=mean.dtype))
    else:
        variance = wider * jnp.einsum("...k,...kd->...d", weights, deviation**2)
        factor = jnp.sqrt((1 - share) * old.factor**2 + share * variance + share * (1 - share) * shift**2)
    mean = old.mean + share * shift
    axes = tuple(range(mean.ndim - 1, factor.ndim))
    sound = jnp.isfinite(mean).all(-1) & jnp.isfinite(factor).all(axes) & (share[..., 0] > 0)
    return Moments(
        jnp.where(sound[..., None], mean, old.mean),
        jnp.where(sound.reshape(sound.shape + (1,) * len(axes)), factor, old.factor),
    )


def widening(num_particles: int, dimensions: int, particles: str = "rqmc") -> float:
    """How much larger the variance of a proposal should be than that of the distribution it is for.

    Few particles make too little of the tails, and the next are drawn from what they made of them. And quasi-random particles
    integrate best what vanishes at the ends of the unit cube, as the quotient of a density and a wider one does (Pan, Ouyang &
    He, arXiv:2509.07509). For a Gaussian, a proposal of `v` times its variance leaves ``(sqrt(2 v - 1) / v)**D`` of K equally
    weighted particles. This `v` costs three of them, and a fifth at most; of quasi-random ones in one dimension no less than a
    tenth, for there the gain is many times that. In more it is one for means and none for the evidence. One particle has no
    others to make up for.

    :param num_particles: K.
    :param dimensions: D.
    :param particles: how particles are drawn; see :func:`numpyro_pvmc.guides.draws.draw`.

    .. doctest::

        >>> from numpyro_pvmc.ops.gaussian import widening
        >>> [round(widening(number, dimensions), 2) for number, dimensions in [(64, 1), (64, 5), (1024, 1), (1, 1)]]
        [1.77, 1.16, 1.77, 1.0]
    """
    least = 0.1 if particles == "rqmc" and dimensions == 1 else 0.0
    lost = min(max(3 / num_particles, least), 0.2) if num_particles > 1 else 0.0
    kept = (1 - lost) ** (2 / dimensions)
    return (1 + math.sqrt(1 - kept)) / kept


def effective_size(weights):
    """1 / sum of squared weights."""
    return 1 / jnp.sum(weights**2, -1)


def _flattened(log_weights, enough):
    """Weights, raised to a power below 1 where they rest on too few particles."""

    def halve(bounds, _):
        low, high = bounds
        middle = (low + high) / 2
        is_flat = effective_size(jax.nn.softmax(middle[..., None] * log_weights, -1)) >= enough
        return (jnp.where(is_flat, middle, low), jnp.where(is_flat, high, middle)), None

    none = jnp.zeros(log_weights.shape[:-1], log_weights.dtype)
    log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -1e30)
    (low, _), _ = jax.lax.scan(halve, (none, none + 2.0), None, length=30)
    return jax.nn.softmax(jnp.minimum(low, 1.0)[..., None] * log_weights, -1)


def spread(draws: Float[Array, "M N *plates D"]) -> Moments:
    """Gaussians of about the place and width of equally weighted draws.

    :param draws: draws; those that are not finite do not count.
    :return: medians, and half the distance of the quantiles that a Normal has at one standard deviation from its mean.
    """
    draws = jnp.where(jnp.isfinite(draws), draws, jnp.nan)
    low, middle, high = jnp.nanquantile(draws, jnp.array([0.1587, 0.5, 0.8413], draws.dtype), axis=0)
    width = (high - low) / 2
    return Moments(jnp.where(jnp.isfinite(middle), middle, 0.0), jnp.where(jnp.isfinite(width) & (width > 0), width, 1.0))


def dense(moments: Moments) -> Moments:
    """The same Gaussians with Cholesky factors."""
    if moments.is_full:
        return moments
    eye = jnp.eye(moments.mean.shape[-1], dtype=moments.factor.dtype)
    return Moments(moments.mean, moments.factor[..., None] * eye)


def diagonal(moments: Moments) -> Moments:
    """The same Gaussians without correlations."""
    return Moments(moments.mean, jnp.sqrt(jnp.sum(moments.factor**2, -1))) if moments.is_full else moments
