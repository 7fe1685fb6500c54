"""Propose the states of a chain from Gaussians, one for each time and series, in unconstrained coordinates."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import transforms
from numpyro.handlers import substitute

from numpyro_pvmc.chain.minibatch import subsampled
from numpyro_pvmc.chain.unconstrained import (
    Block,
    Coordinates,
    coordinates_of_sites,
    flattened,
    unflattened,
)
from numpyro_pvmc.guides.checks import check_guide
from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.gaussian import Moments, dense
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import WRAPPERS
from numpyro_pvmc.program.handlers import log_densities
from numpyro_pvmc.program.structure import Structure


class Proposal(NamedTuple):
    """A Gaussian for the chain's initial step, of one time step, and one for each step. A chain may have no sites at its
    initial step.
    """

    initial: Moments | None
    steps: Moments


@full_precision
def sample_sites(blocks: tuple[Block, ...], moments: Moments, infer: dict[str, Any] | None = None) -> dict[str, jax.Array]:
    """Sample the sites of one time step, Gaussian in their coordinates: one `numpyro.sample` each, given those before it.

    :param blocks: the sites.
    :param moments: Gaussians of their coordinates.
    :param infer: what the sites carry along.
    """
    values, whitened, first = {}, [], 0
    for block in blocks:
        last = first + block.size
        mean = moments.mean[..., first:last]
        if moments.is_full:
            if whitened:
                before = jnp.concatenate(whitened, -1)
                mean = mean + (moments.factor[..., first:last, :first] @ before[..., None])[..., 0]
            factor = moments.factor[..., first:last, first:last]
        else:
            factor = moments.factor[..., first:last]
        value = numpyro.sample(block.latent.name, _distribution(block, mean, factor), infer=dict(infer or {}))
        values[block.latent.name] = value
        if moments.is_full and block is not blocks[-1]:
            residual = flattened(block, block.transform.inv(value)) - mean
            whitened.append(solve_triangular(factor, residual[..., None], lower=True)[..., 0])
        first = last
    return values


def read_proposal(
    structure: Structure, guide: Callable, arguments: Arguments, values: dict[str, Any]
) -> tuple[Coordinates, Proposal]:
    """The Gaussians of a guide that is Gaussian in unconstrained coordinates, and these coordinates.

    A site whose distribution reads another of its step is read at the other's median.

    :param values: values of its parameters, mutable state and global sites.
    :return: coordinates, and the guide's moments in them, with full covariances.
    :raises ValueError: naming the site whose distribution is not a transformed Gaussian.
    """
    check_guide(structure, guide, arguments, values)
    at_median = substitute(guide, substitute_fn=functools.partial(_median, structure))
    sites = log_densities(at_median, arguments, values, random.key(0), {})
    distributions = {name: _gaussian(name, sites[name]["fn"]) for name in structure.sites}
    for name, latent in structure.step.items():
        transform, shape = distributions[name][0], (structure.length, *latent.shape)
        if tuple(transform.inverse_shape(shape)) != (structure.length, *transform.inverse_shape(latent.shape)):
            raise ValueError(
                f"The guide's distribution for site '{name}' has a transform that differs between times, so there are no "
                "coordinates in which to refit it. Put what differs into the location and scale of the Normal, or use "
                "`refine=0`."
            )
    coordinates = coordinates_of_sites(structure, {name: transform for name, (transform, _) in distributions.items()})

    def moments(blocks, leading):
        parts = [_moments_of_distribution(block, distributions[block.latent.name][1], leading) for block in blocks]
        factor = jax.vmap(lambda *factors: jax.scipy.linalg.block_diag(*factors))
        points = parts[0].mean.shape[:-1]
        factors = factor(*(part.factor.reshape(-1, *part.factor.shape[-2:]) for part in parts))
        return Moments(jnp.concatenate([part.mean for part in parts], -1), factors.reshape(*points, *factors.shape[-2:]))

    initial = moments(coordinates.initial, ()) if coordinates.initial else None
    initial = None if initial is None else Moments(initial.mean[None], initial.factor[None])
    return coordinates, Proposal(initial, moments(coordinates.steps, (structure.length,)))


def _distribution(block, mean, factor):
    """The distribution of one site whose coordinates are Gaussian."""
    is_full = factor.ndim > mean.ndim
    if not is_full or block.size == 1:
        scale = factor[..., 0] if is_full else factor
        normal = dist.Normal(unflattened(block, mean), unflattened(block, scale)).to_event(len(block.event_shape))
        return _transformed(normal, [block.transform])
    # To the right of the last plate all axes are those of one vector.
    border = max((axis + 1 for axis in block.plate_axes), default=0)
    kept, vector = block.latent.batch_shape[:border], block.shape[border:]
    if math.prod(kept) != math.prod(block.plates) or list(block.plate_axes) != sorted(block.plate_axes):
        raise ValueError(
            f"Site '{block.latent.name}' has batch axes {block.latent.batch_shape}, of which some that are no plate of the "
            f"chain stand to the left of its plates {block.plates}: they cannot be made one vector. Use "
            "`covariance='diagonal'`, or move the plates to the left."
        )
    leading = mean.shape[: mean.ndim - 1 - len(block.plates)]
    normal = dist.MultivariateNormal(
        mean.reshape(*leading, *kept, block.size), scale_tril=factor.reshape(*leading, *kept, block.size, block.size)
    )
    reshape = transforms.ReshapeTransform(vector, (block.size,))
    others = len(block.latent.batch_shape) - border
    return _transformed(normal, [reshape, transforms.IndependentTransform(block.transform, others)])


def _transformed(distribution, steps):
    steps = [step for step in steps if not _is_identity(step)]
    return dist.TransformedDistribution(distribution, steps) if steps else distribution


def _is_identity(transform):
    if isinstance(transform, transforms.ReshapeTransform):
        return transform._forward_shape == transform._inverse_shape
    if isinstance(transform, transforms.IndependentTransform):
        return _is_identity(transform.base_transform)
    return isinstance(transform, transforms.IdentityTransform)


def _gaussian(name, distribution):
    """The transform and the Gaussian of a distribution that is one transformed."""
    fn, steps = distribution, []
    while not isinstance(fn, dist.Normal | dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        if isinstance(fn, dist.TransformedDistribution):
            steps = list(fn.transforms) + steps
        elif not isinstance(fn, WRAPPERS):
            raise ValueError(
                f"The guide's distribution for site '{name}', {type(distribution).__name__}, is not Gaussian in unconstrained "
                "space, so there is no Gaussian to refit. Use `AutoSmoothedNormal`, or `refine=0`."
            )
        fn = fn.base_dist
    return transforms.ComposeTransform(steps) if steps else transforms.IdentityTransform(), fn


def _median(structure, site):
    if site["type"] != "sample" or site["name"] not in structure.sites:
        return None
    transform, normal = _gaussian(site["name"], site["fn"])
    shape = tuple(transform.inverse_shape(site["fn"].shape()))
    return transform(jnp.broadcast_to(normal.loc, shape))


@full_precision
def _moments_of_distribution(block, normal, leading):
    """Moments in coordinates of a Gaussian distribution, which may still have to be expanded to the site's ``(*leading,
    ...)``.
    """
    is_normal = isinstance(normal, dist.Normal)
    tril = None
    if not is_normal:
        is_dense = isinstance(normal, dist.MultivariateNormal)
        tril = normal.scale_tril if is_dense else jnp.linalg.cholesky(normal.covariance_matrix)
    shape = (*leading, *block.shape)
    dtype = jnp.result_type(float, normal.loc)

    def push(noise):
        scaled = normal.scale * noise if is_normal else (tril @ noise[..., None])[..., 0]
        return flattened(block, jnp.broadcast_to(scaled, shape)).astype(dtype)

    mean = flattened(block, jnp.broadcast_to(normal.loc, shape)).astype(dtype)
    basis = jnp.broadcast_to(jnp.eye(block.size, dtype=dtype)[:, None], (block.size, math.prod(block.plates), block.size))
    columns = jax.vmap(lambda flat: push(unflattened(block, flat.reshape(*block.plates, block.size))))(basis)
    return dense(Moments(mean, jnp.moveaxis(columns, 0, -1)))


def sample_proposal(coordinates: Coordinates, proposal: Proposal, infer: dict[str, Any] | None = None) -> dict[str, jax.Array]:
    """Sample the sites of a chain, as a guide does.

    :param infer: what the sites carry along.
    """
    values = {}
    if proposal.initial is not None:
        values = sample_sites(coordinates.initial, jax.tree.map(lambda leaf: leaf[0], proposal.initial), infer)
    return values | sample_sites(coordinates.steps, proposal.steps, infer)


def take_series(proposal: Proposal, structure: Structure, indices: Mapping[str, Any]) -> Proposal:
    """The Gaussians of a minibatch.

    :param indices: which series, by plate.
    """
    return _each(proposal, structure, lambda x, plate, axis: jnp.take(x, indices[plate.name], axis))


def put_series(proposal: Proposal, part: Proposal, structure: Structure, indices: Mapping[str, Any]) -> Proposal:
    """The Gaussians of all series, after those of a minibatch have changed.

    :param part: Gaussians of the minibatch.
    :param indices: which series, by plate.
    """
    if not subsampled(structure):
        return part
    of_plates = [indices[plate.name] if plate.total != plate.size else jnp.arange(plate.size) for plate in structure.plates]
    return jax.tree.map(lambda x, new: x.at[:, *jnp.ix_(*of_plates)].set(new), proposal, part)


def for_all_series(proposal: Proposal, structure: Structure) -> Proposal:
    """Gaussians of a minibatch, averaged, for each of all series: to start from."""

    def widen(x, plate, axis):
        return jnp.repeat(x.mean(axis, keepdims=True), plate.total, axis)

    return _each(proposal, structure, widen)


def _each(proposal, structure, function):
    for number, plate in enumerate(structure.plates):
        if plate.total != plate.size:
            proposal = jax.tree.map(lambda x, plate=plate, axis=number + 1: function(x, plate, axis), proposal)
    return proposal
