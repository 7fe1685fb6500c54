"""Evaluate the log density of every pair of neighbouring particles.

The transition of a chain is asked for at every pair of J particles before and K after. Its distribution takes J evaluations of
the model, the values K; what is left for the pairs is an elementary function of the two. A generic log density, mapped over
both, computes the same with its event axes last, where a sum over them is slow; here the particles are the last two axes.

Distributions without a form of their own are left to the generic way. One line registers a distribution of single numbers::

    pair_form.register(MyDistribution, lambda distribution: univariate(distribution, lambda x, loc: ...))
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions.transforms import Transform

from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.program.distributions import WRAPPERS, mask_of
from numpyro_pvmc.program.handlers import Site
from numpyro_pvmc.program.structure import Structure

_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
_UNROLLED = 16  # components that are summed one after the other in the program, not in a loop

_BY_BROADCASTING = (
    dist.AsymmetricLaplace,
    dist.Beta,
    dist.Cauchy,
    dist.Exponential,
    dist.Gamma,
    dist.Gumbel,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.InverseGamma,
    dist.Laplace,
    dist.Logistic,
    dist.SoftLaplace,
    dist.StudentT,
    dist.Uniform,
    dist.VonMises,
    dist.Weibull,
)


class PairForm(NamedTuple):
    """How to compute the log densities of pairs.

    `parameters` are those of a distribution, and broadcast to its shape ``(*batch, *event)``; they may have further axes at the
    end. ``prepare(parameters, value, mask)`` does what takes time J or K, for parameters of shape ``(*plates, n, ..., J)``,
    with 1 in place of J where they are the same for all, a value ``(*plates, n, K)``, and a mask ``(*plates, n, 1)`` or
    ``None``. ``density(prepared)`` has shape ``(*plates, J, K)``.
    """

    parameters: dict[str, jax.Array]
    prepare: Callable[[dict[str, jax.Array], jax.Array, jax.Array | None], Any]
    density: Callable[[Any], jax.Array]


class Pair(NamedTuple):
    """One site of a step, for one particle before and one after, arranged as for :class:`PairForm`, but for the last axis."""

    parameters: dict[str, jax.Array]
    value: jax.Array
    log_volume: jax.Array
    mask: jax.Array | None
    scale: jax.Array | None


@functools.singledispatch
def pair_form(distribution: dist.Distribution) -> PairForm | None:
    """How to compute the log densities of pairs under a distribution, if there is a better way than the generic one.

    :param distribution: a distribution, without wrappers.
    """
    if type(distribution) not in _BY_BROADCASTING:
        return None
    # With NumPyro's validation on, the density of what lies outside the support is zero.
    again = functools.partial(type(distribution), validate_args=distribution._validate_args)
    return univariate(distribution, lambda value, **parameters: again(**parameters).log_prob(value))


def univariate(distribution: dist.Distribution, log_density: Callable[..., jax.Array]) -> PairForm:
    """The form of a distribution of single numbers.

    :param distribution: a distribution whose parameters all have its batch shape.
    :param log_density: takes a value, and the parameters by name, and works by broadcasting.
    """

    def of_component(one):
        parameters, value, mask = one
        terms = log_density(value[..., None, :], **{name: x[..., :, None] for name, x in parameters.items()})
        return terms if mask is None else jnp.where(mask[..., None], terms, 0.0)

    parameters = {name: getattr(distribution, name) for name in type(distribution).arg_constraints}
    return PairForm(parameters, lambda *parts: parts, lambda parts: _sum_over_components(of_component, parts))


@pair_form.register
def _(distribution: dist.Normal):
    def prepare(parameters, value, mask):
        loc, scale = parameters["loc"], parameters["scale"]
        return _standardised(loc, 1 / scale, value, jnp.log(scale), mask)

    return PairForm({"loc": distribution.loc, "scale": distribution.scale}, prepare, _normal)


@pair_form.register
def _(distribution: dist.MultivariateNormal):
    return _multivariate_normal(distribution.loc, distribution.scale_tril)


@pair_form.register
@full_precision
def _(distribution: dist.LowRankMultivariateNormal):
    return _multivariate_normal(distribution.loc, jnp.linalg.cholesky(distribution.covariance_matrix))


def _multivariate_normal(loc, tril):
    if loc.shape[-1] > _UNROLLED:
        return None

    def prepare(parameters, value, mask):
        loc, tril = parameters["loc"], parameters["tril"].astype(jnp.result_type(value, *parameters.values()))
        log_diagonal = jnp.log(jnp.diagonal(tril, axis1=-3, axis2=-2)).swapaxes(-1, -2)
        if tril.shape[-1] > 1:
            return loc, tril, value, log_diagonal, mask
        # Distances are those of whitened points. Whitening far from the origin would round them off.
        origin = lax.stop_gradient(value.mean(-1, keepdims=True))
        entry = lambda i, j: tril[..., i, j, :]
        loc, value = (jnp.stack(_whitened(entry, _components(x - origin)), -2) for x in (loc, value))
        return _standardised(loc, jnp.ones_like(loc[..., :1]), value, log_diagonal, mask)

    def density(prepared):
        if isinstance(prepared, _Standardised):
            return _normal(prepared)
        loc, tril, value, log_diagonal, mask = prepared
        apart = [x[..., None, :] - m[..., :, None] for x, m in zip(_components(value), _components(loc), strict=True)]
        squares = sum(jnp.square(x) for x in _whitened(lambda i, j: tril[..., i, j, :, None], apart))
        terms = -0.5 * squares - (log_diagonal + _HALF_LOG_2_PI).sum(-2)[..., None]
        return terms if mask is None else jnp.where(mask[..., :1, :], terms, 0.0)

    return PairForm({"loc": loc, "tril": tril}, prepare, density)


class _Standardised(NamedTuple):
    """Independent components: densities are those of ``rate (value - loc)``; `log_scale` is summed, with its constant."""

    loc: jax.Array
    rate: jax.Array
    value: jax.Array
    log_scale: jax.Array


def _standardised(loc, rate, value, log_scale, mask):
    log_scale = log_scale + _HALF_LOG_2_PI
    if mask is not None:
        loc, rate, value, log_scale = (jnp.where(mask, x, 0.0) for x in (loc, rate, value, log_scale))
    loc = jnp.broadcast_to(loc, jnp.broadcast_shapes(loc.shape, rate.shape))
    return _Standardised(loc, rate, value, log_scale.sum(-2))


def _normal(prepared):
    return -0.5 * _squares(prepared.loc, prepared.rate, prepared.value) - prepared.log_scale[..., None]


def _components(x):
    return [x[..., i, :] for i in range(x.shape[-2])]


def _whitened(entry, components):
    """Forward substitution, component by component: no call of a library for each of many small systems."""
    found = []
    for i, x in enumerate(components):
        found.append((x - sum(entry(i, j) * y for j, y in enumerate(found))) / entry(i, i))
    return found


def _sum_over_components(function, arrays):
    """The sum of `function` over the last axis but one of arrays."""
    number = jax.tree.leaves(arrays)[0].shape[-2]
    if number <= _UNROLLED:
        terms = [function(jax.tree.map(lambda x, i=i: x[..., i, :], arrays)) for i in range(number)]
        return sum(terms[1:], start=terms[0])
    step = jax.checkpoint(lambda total, one: (total + function(one), None))
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[..., 0, :], arrays))
    return lax.scan(step, jnp.zeros(first.shape, first.dtype), jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), arrays))[0]


@jax.custom_vjp
def _squares(loc, rate, value):
    """Sums over components of ``(rate (value - loc))^2``, for all pairs: ``(..., J, K)``.

    By differences, which keep their digits however far particles lie from each other.
    """

    def of_component(one):
        loc, rate, value = one
        return jnp.square(rate[..., :, None] * (value[..., None, :] - loc[..., :, None]))

    return _sum_over_components(of_component, (loc, rate, value))


@full_precision
def _pull_back_squares(kept, cotangent):
    """The derivative by `loc` and `value` is linear in distances, and so may be expanded into matrix products.

    They lose as many digits as there are noise scales between particles, not as there are in the square of that. The derivative
    by `rate` is quadratic, and is summed by differences.
    """
    loc, rate, value = kept
    origin = lax.stop_gradient(value.mean(-1, keepdims=True))
    here, there, weight = loc - origin, value - origin, 2 * jnp.square(rate)
    number = loc.shape[-2]
    before = jnp.concatenate([weight * here, jnp.broadcast_to(weight, loc.shape)], -2)
    to_value = jnp.einsum("...nj,...jk->...nk", before, cotangent)
    to_loc = jnp.einsum("...nk,...jk->...nj", jnp.concatenate([there, jnp.ones_like(there[..., :1, :])], -2), cotangent)
    of_value = there * to_value[..., number:, :] - to_value[..., :number, :]
    of_loc = weight * (here * to_loc[..., number:, :] - to_loc[..., :number, :])

    def of_component(one):
        loc, value = one
        return (cotangent * jnp.square(value[..., None, :] - loc[..., :, None])).sum(-1)

    if number <= _UNROLLED:
        squares = jnp.stack([of_component((loc[..., i, :], value[..., i, :])) for i in range(number)], -2)
    else:
        squares = jnp.moveaxis(lax.map(of_component, (jnp.moveaxis(loc, -2, 0), jnp.moveaxis(value, -2, 0))), 0, -2)
    return of_loc, 2 * rate * _summed_to(squares, rate.shape), of_value


def _summed_to(x, shape):
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1]
    return x.sum(axes, keepdims=True)


_squares.defvjp(lambda loc, rate, value: (_squares(loc, rate, value), (loc, rate, value)), _pull_back_squares)


def read_pair(site: Site, structure: Structure) -> tuple[Pair, PairForm] | None:
    """A site of a step, arranged for the log densities of pairs.

    :param site: a sample site.
    :param structure: the structure of the chain.
    :return: its parts, and how to compute log densities from them; ``None`` if there is only the generic way.
    """
    fn, shape, value = site["fn"], site["fn"].shape(), site["value"]
    if site["scale"] is not None and jnp.ndim(site["scale"]):
        return None
    distribution = fn
    while isinstance(distribution, dist.MaskedDistribution | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    log_volume, value = jnp.zeros(()), jnp.broadcast_to(value, shape)
    while True:
        if isinstance(distribution, dist.MaskedDistribution):
            return None  # a mask inside of an event
        form = pair_form(distribution)
        if isinstance(distribution, WRAPPERS):
            distribution = distribution.base_dist
        elif (
            form is None
            and isinstance(distribution, dist.TransformedDistribution)
            and all(map(_is_elementwise, distribution.transforms))
        ):
            for transform in reversed(distribution.transforms):
                before = transform.inv(value)
                log_volume, value = log_volume - transform.log_abs_det_jacobian(before, value), before
            distribution = distribution.base_dist
        else:
            break
    outside = jnp.isnan(value) & ~jnp.isnan(site["value"])  # of what the transforms reach
    log_volume, value = jnp.where(outside, -jnp.inf, log_volume), jnp.where(outside, 0.0, value)
    mask, event = mask_of(site), len(distribution.event_shape)
    if form is None or (event and math.prod(shape) != math.prod(plate.size for plate in structure.plates) * shape[-1]):
        return None
    plates = [len(fn.batch_shape) + plate.dim for plate in structure.plates]
    if min(plates, default=0) < 0:
        return None
    order = plates + [axis for axis in range(len(shape)) if axis not in plates]
    sizes = [shape[axis] for axis in plates]

    def arranged(x, extra=()):
        x = jnp.broadcast_to(x, shape + extra)
        x = x.transpose(*order, *range(len(shape), x.ndim))
        return x.reshape(*sizes, math.prod(shape) // math.prod(sizes), *extra)

    log_volume = arranged(log_volume)
    if mask is not None:
        mask = arranged(jnp.reshape(mask, jnp.shape(mask) + (1,) * fn.event_dim))
        log_volume, mask = jnp.where(mask, log_volume, 0.0), mask[..., None]
    trailing = lambda name, x: x.shape[-1:] if event and name != "loc" else ()
    parameters = {name: arranged(x, trailing(name, x)) for name, x in form.parameters.items()}
    return Pair(parameters, arranged(value), log_volume.sum(-1), mask, site["scale"]), form


def _is_elementwise(transform: Transform) -> bool:
    return transform.domain.event_dim == transform.codomain.event_dim == 0
