"""Map the latent sites of a step to unconstrained coordinates, and back.

The coordinates of one series at one time step are the unconstrained values of all latent sites, one after the other: a vector
of length D. What has a leading time axis here has it there.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import transforms

from numpyro_pvmc.chain.chain import Chain, supports
from numpyro_pvmc.chain.densities import Particles
from numpyro_pvmc.program.structure import Latent, Structure, per_series, refuse_unlisted


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
    """Blocks of the chain's initial step, and of one of its steps."""

    initial: tuple[Block, ...]
    steps: tuple[Block, ...]


def coordinates_of_model(chain: Chain) -> Coordinates:
    """Coordinates in which the sites of a model have no constraints.

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
    return coordinates_of_sites(chain.structure, of_sites)


def to_coordinates(blocks: tuple[Block, ...], values: dict[str, jax.Array]) -> jax.Array:
    """Unconstrained coordinates of values.

    :param values: ``{site: (*leading, *batch, *event)}``.
    :return: an array of shape ``(*leading, *plates, D)``.
    """
    return jnp.concatenate([flattened(block, block.transform.inv(values[block.latent.name])) for block in blocks], -1)


def from_coordinates(blocks: tuple[Block, ...], coordinates: jax.Array) -> dict[str, jax.Array]:
    """Values of sites at given coordinates.

    :param coordinates: an array of shape ``(*leading, *plates, D)``.
    :return: ``{site: (*leading, *batch, *event)}``.
    """
    parts = _split(blocks, coordinates)
    return {block.latent.name: block.transform(unflattened(block, part)) for block, part in zip(blocks, parts, strict=True)}


def log_jacobians(structure: Structure, blocks: tuple[Block, ...], coordinates: jax.Array) -> dict[str, jax.Array]:
    """Logs of the volumes that sites have for one of coordinates.

    :param coordinates: an array of shape ``(*plates, D)``.
    :return: ``{site: (*plates)}``.
    """
    volumes = {}
    for block, part in zip(blocks, _split(blocks, coordinates), strict=True):
        unconstrained = unflattened(block, part)
        volume = block.transform.log_abs_det_jacobian(unconstrained, block.transform(unconstrained))
        volumes[block.latent.name] = per_series(volume, structure.plates)
    return volumes


def particle_coordinates(coordinates: Coordinates, particles: Particles) -> tuple[jax.Array | None, jax.Array]:
    """Coordinates of particles, at the initial step and at the steps.

    :param coordinates: the coordinates.
    :return: arrays of shape ``(N, *plates, K, D)``; ``None`` for a chain without sites at its initial step.
    """
    initial = None
    if coordinates.initial:
        initial = jnp.moveaxis(to_coordinates(coordinates.initial, particles.initial), 0, -2)[None]
    return initial, jnp.moveaxis(to_coordinates(coordinates.steps, particles.steps), 1, -2)


def coordinates_of_sites(structure, of_sites):
    def block(latent):
        transform = of_sites[latent.name]
        event_shape = tuple(transform.inverse_shape(latent.shape))[len(latent.batch_shape) :]
        plate_axes = tuple(len(latent.batch_shape) + plate.dim for plate in structure.plates)
        return Block(latent, transform, event_shape, plate_axes, tuple(plate.size for plate in structure.plates))

    return Coordinates(tuple(map(block, structure.initial_sites)), tuple(map(block, structure.step_sites)))


def flattened(block, unconstrained):
    leading = unconstrained.ndim - len(block.shape)
    axes = (*range(leading), *(leading + axis for axis in block.order))
    return unconstrained.transpose(axes).reshape(*unconstrained.shape[:leading], *block.plates, block.size)


def unflattened(block, flat):
    leading = flat.ndim - 1 - len(block.plates)
    moved = flat.reshape((*flat.shape[:leading], *(block.shape[axis] for axis in block.order)))
    back = sorted(range(len(block.order)), key=block.order.__getitem__)
    return moved.transpose((*range(leading), *(leading + axis for axis in back)))


def _split(blocks, coordinates):
    ends = [sum(block.size for block in blocks[: i + 1]) for i in range(len(blocks) - 1)]
    return jnp.split(coordinates, ends, -1)
