"""Sites of one point of a chain in, their unconstrained coordinates out, and laws that are Gaussian there.

The coordinates of one series at one point are the unconstrained values of all latent sites, one after the other: a vector of
length D. What has a leading time axis here has it there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import transforms
from numpyro.handlers import substitute

from numpyro_pvmc.chain import Chain, supports
from numpyro_pvmc.densities import Particles
from numpyro_pvmc.laws import WRAPPERS
from numpyro_pvmc.moments import Moments, dense
from numpyro_pvmc.precise import precise
from numpyro_pvmc.program import Arguments, log_densities
from numpyro_pvmc.proposal import check_guide
from numpyro_pvmc.structure import Latent, Structure, per_series, refuse_unlisted


class Block(NamedTuple):
    """The coordinates of one site.

    `transform` takes unconstrained values, of event shape `event_shape`, to those of the site. `plate_axes` are the axes of
    the plates in the batch shape of the site, in the order of the plates, and `plates` their sizes.
    """

    latent: Latent
    transform: transforms.Transform
    event_shape: tuple[int, ...]
    plate_axes: tuple[int, ...]
    plates: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latent.batch_shape + self.event_shape

    @property
    def size(self) -> int:
        return math.prod(self.shape) // math.prod(self.plates)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of an unconstrained value, those of the plates first."""
        return self.plate_axes + tuple(axis for axis in range(len(self.shape)) if axis not in self.plate_axes)


class Coordinates(NamedTuple):
    """Blocks of the chain's beginning, and of one of its steps."""

    initial: tuple[Block, ...]
    steps: tuple[Block, ...]


class Proposal(NamedTuple):
    """A Gaussian for the chain's beginning, of one point, and one for each step. A chain may have no sites at its beginning."""

    initial: Moments | None
    steps: Moments


def coordinates_of_model(chain: Chain) -> Coordinates:
    """Coordinates in which the sites of a model have no constraints.

    :param chain: the chain of the model.
    :raises ValueError: if a site is discrete.
    """
    refuse_unlisted(chain.structure.sites.values())
    for name, site in chain.structure.sites.items():
        if site.is_discrete:
            raise ValueError(
                f"Latent site '{name}' is discrete, and no Gaussian proposes its values. Leave it out of the guide, so that it "
                "is summed over them, or sample it in a guide of your own."
            )
    of_sites = {name: dist.biject_to(support) for name, support in supports(chain).items()}
    return _coordinates(chain.structure, of_sites)


def to_coordinates(blocks: tuple[Block, ...], values: dict[str, jax.Array]) -> jax.Array:
    """Unconstrained coordinates of values.

    :param blocks: the sites of one point.
    :param values: ``{site: (*leading, *batch, *event)}``.
    :return: an array of shape ``(*leading, *plates, D)``.
    """
    return jnp.concatenate([_flat(block, block.transform.inv(values[block.latent.name])) for block in blocks], -1)


def from_coordinates(blocks: tuple[Block, ...], coordinates: jax.Array) -> dict[str, jax.Array]:
    """Values of sites at given coordinates.

    :param blocks: the sites of one point.
    :param coordinates: an array of shape ``(*leading, *plates, D)``.
    :return: ``{site: (*leading, *batch, *event)}``.
    """
    parts = _split(blocks, coordinates)
    return {block.latent.name: block.transform(_native(block, part)) for block, part in zip(blocks, parts, strict=True)}


def log_jacobians(structure: Structure, blocks: tuple[Block, ...], coordinates: jax.Array) -> dict[str, jax.Array]:
    """Logs of the volumes that sites have for one of coordinates.

    :param structure: the structure of the chain.
    :param blocks: the sites of one point.
    :param coordinates: an array of shape ``(*plates, D)``.
    :return: ``{site: (*plates)}``.
    """
    volumes = {}
    for block, part in zip(blocks, _split(blocks, coordinates), strict=True):
        unconstrained = _native(block, part)
        volume = block.transform.log_abs_det_jacobian(unconstrained, block.transform(unconstrained))
        volumes[block.latent.name] = per_series(volume, structure.plates)
    return volumes


@precise
def sample_sites(blocks: tuple[Block, ...], moments: Moments, infer: dict[str, Any] | None = None) -> dict[str, jax.Array]:
    """Sample the sites of one point, Gaussian in their coordinates: one `numpyro.sample` each, given those before it.

    :param blocks: the sites.
    :param moments: Gaussians of their coordinates.
    :param infer: what the sites carry along.
    :return: their values.
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
        value = numpyro.sample(block.latent.name, _law(block, mean, factor), infer=dict(infer or {}))
        values[block.latent.name] = value
        if moments.is_full and block is not blocks[-1]:
            residual = _flat(block, block.transform.inv(value)) - mean
            whitened.append(solve_triangular(factor, residual[..., None], lower=True)[..., 0])
        first = last
    return values


def read_proposal(
    structure: Structure, guide: Callable, arguments: Arguments, values: dict[str, Any]
) -> tuple[Coordinates, Proposal]:
    """The Gaussians of a guide that is Gaussian in unconstrained coordinates, and these coordinates.

    A site whose law reads another of its step is read at the other's median.

    :param structure: the structure of the model's chain.
    :param guide: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of its parameters, mutable state and global sites.
    :return: coordinates, and the guide's moments in them, with full covariances.
    :raises ValueError: naming the site whose law is not a transformed Gaussian.
    """
    check_guide(structure, guide, arguments, values)
    at_median = substitute(guide, substitute_fn=functools.partial(_median, structure))
    sites = log_densities(at_median, arguments, values, random.key(0), {})
    laws = {name: _gaussian(name, sites[name]["fn"]) for name in structure.sites}
    for name, latent in structure.step.items():
        transform, shape = laws[name][0], (structure.length, *latent.shape)
        if tuple(transform.inverse_shape(shape)) != (structure.length, *transform.inverse_shape(latent.shape)):
            raise ValueError(
                f"The guide's law for site '{name}' has a transform that differs between times, so there are no coordinates "
                "in which to refit it. Put what differs into the location and scale of the Normal, or use `refine=0`."
            )
    coordinates = _coordinates(structure, {name: transform for name, (transform, _) in laws.items()})

    def moments(blocks, leading):
        parts = [_moments_of_law(block, laws[block.latent.name][1], leading) for block in blocks]
        factor = jax.vmap(lambda *factors: jax.scipy.linalg.block_diag(*factors))
        points = parts[0].mean.shape[:-1]
        factors = factor(*(part.factor.reshape(-1, *part.factor.shape[-2:]) for part in parts))
        return Moments(jnp.concatenate([part.mean for part in parts], -1), factors.reshape(*points, *factors.shape[-2:]))

    initial = moments(coordinates.initial, ()) if coordinates.initial else None
    initial = None if initial is None else Moments(initial.mean[None], initial.factor[None])
    return coordinates, Proposal(initial, moments(coordinates.steps, (structure.length,)))


def particle_coordinates(coordinates: Coordinates, particles: Particles) -> tuple[jax.Array | None, jax.Array]:
    """Coordinates of particles, at the beginning and at the steps.

    :param coordinates: the coordinates.
    :param particles: particles.
    :return: arrays of shape ``(N, *plates, K, D)``; ``None`` for a chain without sites at its beginning.
    """
    initial = None
    if coordinates.initial:
        initial = jnp.moveaxis(to_coordinates(coordinates.initial, particles.initial), 0, -2)[None]
    return initial, jnp.moveaxis(to_coordinates(coordinates.steps, particles.steps), 1, -2)


def _coordinates(structure, of_sites):
    def block(latent):
        transform = of_sites[latent.name]
        event_shape = tuple(transform.inverse_shape(latent.shape))[len(latent.batch_shape) :]
        plate_axes = tuple(len(latent.batch_shape) + plate.dim for plate in structure.plates)
        return Block(latent, transform, event_shape, plate_axes, tuple(plate.size for plate in structure.plates))

    return Coordinates(tuple(map(block, structure.initial_sites)), tuple(map(block, structure.step_sites)))


def _flat(block, unconstrained):
    leading = unconstrained.ndim - len(block.shape)
    axes = (*range(leading), *(leading + axis for axis in block.order))
    return unconstrained.transpose(axes).reshape(*unconstrained.shape[:leading], *block.plates, block.size)


def _native(block, flat):
    leading = flat.ndim - 1 - len(block.plates)
    moved = flat.reshape((*flat.shape[:leading], *(block.shape[axis] for axis in block.order)))
    back = sorted(range(len(block.order)), key=block.order.__getitem__)
    return moved.transpose((*range(leading), *(leading + axis for axis in back)))


def _split(blocks, coordinates):
    ends = [sum(block.size for block in blocks[: i + 1]) for i in range(len(blocks) - 1)]
    return jnp.split(coordinates, ends, -1)


def _law(block, mean, factor):
    """The law of one site whose coordinates are Gaussian."""
    is_full = factor.ndim > mean.ndim
    if not is_full or block.size == 1:
        scale = factor[..., 0] if is_full else factor
        normal = dist.Normal(_native(block, mean), _native(block, scale)).to_event(len(block.event_shape))
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


def _transformed(law, steps):
    steps = [step for step in steps if not _is_identity(step)]
    return dist.TransformedDistribution(law, steps) if steps else law


def _is_identity(transform):
    if isinstance(transform, transforms.ReshapeTransform):
        return transform._forward_shape == transform._inverse_shape
    if isinstance(transform, transforms.IndependentTransform):
        return _is_identity(transform.base_transform)
    return isinstance(transform, transforms.IdentityTransform)


def _gaussian(name, law):
    """The transform and the Gaussian of a law that is one transformed."""
    fn, steps = law, []
    while not isinstance(fn, dist.Normal | dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        if isinstance(fn, dist.TransformedDistribution):
            steps = list(fn.transforms) + steps
        elif not isinstance(fn, WRAPPERS):
            raise ValueError(
                f"The guide's law for site '{name}', {type(law).__name__}, is not Gaussian in unconstrained space, so there "
                "is no Gaussian to refit. Use `AutoSmoothedNormal`, or `refine=0`."
            )
        fn = fn.base_dist
    return transforms.ComposeTransform(steps) if steps else transforms.IdentityTransform(), fn


def _median(structure, site):
    if site["type"] != "sample" or site["name"] not in structure.sites:
        return None
    transform, normal = _gaussian(site["name"], site["fn"])
    shape = tuple(transform.inverse_shape(site["fn"].shape()))
    return transform(jnp.broadcast_to(normal.loc, shape))


@precise
def _moments_of_law(block, normal, leading):
    """Moments in coordinates of a Gaussian law, which may still have to be expanded to the site's ``(*leading, ...)``."""
    is_normal = isinstance(normal, dist.Normal)
    tril = None
    if not is_normal:
        is_dense = isinstance(normal, dist.MultivariateNormal)
        tril = normal.scale_tril if is_dense else jnp.linalg.cholesky(normal.covariance_matrix)
    shape = (*leading, *block.shape)
    dtype = jnp.result_type(float, normal.loc)

    def push(noise):
        scaled = normal.scale * noise if is_normal else (tril @ noise[..., None])[..., 0]
        return _flat(block, jnp.broadcast_to(scaled, shape)).astype(dtype)

    mean = _flat(block, jnp.broadcast_to(normal.loc, shape)).astype(dtype)
    basis = jnp.broadcast_to(jnp.eye(block.size, dtype=dtype)[:, None], (block.size, math.prod(block.plates), block.size))
    columns = jax.vmap(lambda flat: push(_native(block, flat.reshape(*block.plates, block.size))))(basis)
    return dense(Moments(mean, jnp.moveaxis(columns, 0, -1)))
