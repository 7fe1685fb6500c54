"""Gaussians of all series in, those of a minibatch out, and back."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_pvmc.coordinates import Block, Coordinates, Proposal
from numpyro_pvmc.structure import Plate, Structure


def subsampled(structure: Structure) -> tuple[Plate, ...]:
    """The plates around the chain that draw a minibatch of its series.

    :param structure: the structure of the chain.
    """
    return tuple(plate for plate in structure.plates if plate.total != plate.size)


@contextlib.contextmanager
def minibatch_plates(structure: Structure) -> Iterator[dict[str, jax.Array]]:
    """The subsampled plates of a model, entered in a guide; their indices, by name.

    :param structure: the structure of the chain.
    """
    plates = {p.name: numpyro.plate(p.name, p.total, subsample_size=p.size, dim=p.dim) for p in subsampled(structure)}
    with contextlib.ExitStack() as entered:
        yield {name: entered.enter_context(plate) for name, plate in plates.items()}


def take_series(proposal: Proposal, structure: Structure, indices: Mapping[str, Any]) -> Proposal:
    """The Gaussians of a minibatch.

    :param proposal: Gaussians of all series.
    :param structure: the structure of the chain.
    :param indices: which series, by plate.
    """
    return _each(proposal, structure, lambda x, plate, axis: jnp.take(x, indices[plate.name], axis))


def put_series(proposal: Proposal, part: Proposal, structure: Structure, indices: Mapping[str, Any]) -> Proposal:
    """The Gaussians of all series, after those of a minibatch have changed.

    :param proposal: Gaussians of all series.
    :param part: Gaussians of the minibatch.
    :param structure: the structure of the chain.
    :param indices: which series, by plate.
    """
    if not subsampled(structure):
        return part
    of_plates = [indices[plate.name] if plate.total != plate.size else jnp.arange(plate.size) for plate in structure.plates]
    return jax.tree.map(lambda x, new: x.at[:, *jnp.ix_(*of_plates)].set(new), proposal, part)


def for_all_series(proposal: Proposal, structure: Structure) -> Proposal:
    """Gaussians of a minibatch, averaged, for each of all series: to start from.

    :param proposal: Gaussians of the minibatch.
    :param structure: the structure of the chain.
    """

    def widen(x, plate, axis):
        return jnp.repeat(x.mean(axis, keepdims=True), plate.total, axis)

    return _each(proposal, structure, widen)


def coordinates_of_all(coordinates: Coordinates, structure: Structure) -> Coordinates:
    """Coordinates of sites with the axes of all series.

    :param coordinates: coordinates of a minibatch.
    :param structure: the structure of the chain.
    """
    totals = tuple(plate.total for plate in structure.plates)

    def block(one: Block) -> Block:
        shape = list(one.latent.batch_shape)
        for plate in structure.plates:
            shape[plate.dim] = plate.total
        return one._replace(latent=one.latent._replace(batch_shape=tuple(shape)), plates=totals)

    return Coordinates(*(tuple(map(block, blocks)) for blocks in coordinates))


def _each(proposal, structure, function):
    for number, plate in enumerate(structure.plates):
        if plate.total != plate.size:
            proposal = jax.tree.map(lambda x, plate=plate, axis=number + 1: function(x, plate, axis), proposal)
    return proposal
