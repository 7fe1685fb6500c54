"""Draw K evenly spread values of a distribution.

Randomised quasi-Monte Carlo: the K points of one Sobol set, each coordinate XORed with random bits, are each uniform on the
unit cube, and together fill it more evenly than independent ones. With bits drawn afresh for every time step and series the
draws of one step are independent of those of another. A quantile function, or a Cholesky factor on Normal quantiles, carries
the points to the distribution (L'Ecuyer & Lemieux 2002).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy
from jax import random
from jax.scipy.special import ndtri

from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.program.distributions import WRAPPERS
from numpyro_pvmc.program.tracebacks import warn_caller

PARTICLES = ("rqmc", "iid")

_BITS = 32
_MOST_COORDINATES = 21_201  # that SciPy has direction numbers for
# Their quantile functions come from another package, and have no gradient.
_NO_QUANTILES = (dist.Beta, dist.Gamma, dist.StudentT, dist.DiscreteUniform)


def check_particles(particles: str, num_particles: int) -> None:
    """Refuse an unknown way to draw particles, and say where an unlucky number of them wastes the better one.

    :param particles: a name.
    :raises ValueError: if there is no such way.
    """
    if particles not in PARTICLES:
        raise ValueError(f"`particles` must be one of {PARTICLES}, but got {particles!r}.")
    if particles == "rqmc" and num_particles & (num_particles - 1):
        near = 2 ** (num_particles.bit_length() - 1)
        warn_caller(
            f"Quasi-random particles are even in numbers that are powers of two, but `num_particles` is {num_particles}. The "
            f"result stays unbiased; take {near} or {2 * near}, or `particles='iid'`.",
        )


def noise_shape(fn: dist.Distribution) -> tuple[int, ...] | None:
    """How many uniform numbers one draw of a distribution takes.

    :return: their shape, whose leading axes are those of the distribution's batch; ``None`` if the distribution is not such a
        function of uniform numbers.
    """
    if isinstance(fn, dist.Independent | dist.MaskedDistribution):
        return noise_shape(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        base = noise_shape(fn.base_dist)
        return None if base is None else fn.batch_shape + base[len(fn.base_dist.batch_shape) :]
    if isinstance(fn, dist.TransformedDistribution):
        return noise_shape(fn.base_dist)
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return fn.shape()
    if _probabilities(fn) is not None:
        return fn.batch_shape
    if fn.event_shape or isinstance(fn, _NO_QUANTILES) or isinstance(getattr(fn, "base_dist", None), _NO_QUANTILES):
        return None
    try:
        jax.eval_shape(fn.icdf, jax.ShapeDtypeStruct(fn.batch_shape, jnp.result_type(float)))
    except (NotImplementedError, ImportError):
        return None
    return fn.batch_shape


@full_precision
def from_uniform(fn: dist.Distribution, uniform: jax.Array) -> jax.Array:
    """A draw of a distribution, as a function of uniform numbers.

    :param fn: a distribution for which :func:`noise_shape` is a shape.
    :param uniform: numbers between 0 and 1 of that shape.
    :return: a draw, differentiable with respect to the parameters of the distribution if it is continuous.
    """
    if isinstance(fn, WRAPPERS):
        return from_uniform(fn.base_dist, uniform)
    if isinstance(fn, dist.TransformedDistribution):
        value = from_uniform(fn.base_dist, uniform)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        is_dense = isinstance(fn, dist.MultivariateNormal)
        factor = fn.scale_tril if is_dense else jnp.linalg.cholesky(fn.covariance_matrix)
        return fn.loc + (factor @ ndtri(uniform)[..., None])[..., 0]
    probabilities = _probabilities(fn)
    if probabilities is not None:
        below = jnp.cumsum(probabilities, -1)[..., :-1]
        return (uniform[..., None] > below).sum(-1, dtype=jnp.result_type(int))
    return fn.icdf(uniform)


def uniform_points(
    rng_key: jax.Array, shape: tuple[int, ...], shared_axes: tuple[int, ...], particle: jax.Array, number: int, first: int
) -> jax.Array:
    """The uniform numbers of one of K particles.

    :param rng_key: random key, the same for all particles.
    :param shape: their shape.
    :param shared_axes: axes of it over which points are independent, such as time and series; the others are the coordinates
        of a point.
    :param particle: which particle, from 0.
    :param number: K.
    :param first: the first coordinate to take of the Sobol set.
    :return: an array of floating-point numbers, none of them 0 or 1.
    """
    own = [axis for axis in range(len(shape)) if axis not in shared_axes]
    count = math.prod(shape[axis] for axis in own)
    table = jnp.asarray(_sobol(number, first + count))[particle, first:]
    table = table.reshape([shape[axis] if axis in own else 1 for axis in range(len(shape))])
    bits = table ^ random.bits(rng_key, shape, jnp.uint32)
    dtype = jnp.result_type(float)
    # A single-precision number has 24 bits: with more than 23 of the points' own, one in 2^24 would round to 1, and its
    # quantile be infinite.
    kept = 23 if dtype == jnp.float32 else _BITS
    return ((bits >> (_BITS - kept)).astype(dtype) + 0.5) * 2.0**-kept


def has_points(coordinates: int) -> bool:
    """Whether there are Sobol points of so many coordinates.

    :param coordinates: how many.
    """
    return coordinates <= _MOST_COORDINATES


@functools.cache
def _sobol(number, coordinates):
    powers = max(number - 1, 0).bit_length()
    # SciPy imports `scipy.stats` when it is first asked for, which takes longer than all of this library: not before that.
    points = scipy.stats.qmc.Sobol(coordinates, scramble=False, bits=_BITS).random_base2(powers)[:number]
    return np.asarray(points * 2.0**_BITS).astype(np.uint32)


def _probabilities(fn):
    """Of the values 0, 1, .. of a discrete distribution with few of them."""
    if isinstance(fn, dist.CategoricalProbs | dist.CategoricalLogits):
        return fn.probs
    if isinstance(fn, dist.BernoulliProbs | dist.BernoulliLogits):
        return jnp.stack([1 - fn.probs, fn.probs], -1)
    return None
