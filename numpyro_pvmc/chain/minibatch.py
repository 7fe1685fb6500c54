"""Draw the series of a minibatch, once for all that reads them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import numpyro

from numpyro_pvmc.chain.unconstrained import Block, Coordinates
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.find_chain import capture
from numpyro_pvmc.program.structure import Plate, Structure


def subsampled(structure: Structure) -> tuple[Plate, ...]:
    """The plates around the chain that draw a minibatch of its series."""
    return tuple(plate for plate in structure.plates if plate.total != plate.size)


def draw_indices(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], rng_key: jax.Array
) -> dict[str, jax.Array]:
    """One draw of the indices of subsampled plates, which all readings of a program must share.

    :param values: values of parameters; indices among them are kept.
    :return: ``{plate: indices}``.
    """
    if not structure.subsampled:
        return {}
    _, sites = capture(model, arguments, values, structure, rng_key)
    return {name: sites[name]["value"] for name in structure.subsampled}


def check_indices(structure: Structure, values: Mapping[str, Any]) -> None:
    """Refuse indices of series that do not exist.

    :param values: values of parameters, not traced; indices among them.
    :raises ValueError: naming the plate.
    """
    for plate in subsampled(structure):
        given = np.asarray(values.get(plate.name, 0))
        if not ((given >= 0) & (given < plate.total)).all():
            raise ValueError(
                f"The indices given for the plate '{plate.name}' must be from 0 to {plate.total - 1}, the number of its series "
                f"less one, but they are from {given.min()} to {given.max()}."
            )


@contextlib.contextmanager
def minibatch_plates(structure: Structure) -> Iterator[dict[str, jax.Array]]:
    """The subsampled plates of a model, entered in a guide; their indices, by name."""
    plates = {p.name: numpyro.plate(p.name, p.total, subsample_size=p.size, dim=p.dim) for p in subsampled(structure)}
    with contextlib.ExitStack() as entered:
        yield {name: entered.enter_context(plate) for name, plate in plates.items()}


def coordinates_of_all(coordinates: Coordinates, structure: Structure) -> Coordinates:
    """Coordinates of sites with the axes of all series.

    :param coordinates: coordinates of a minibatch.
    """
    totals = tuple(plate.total for plate in structure.plates)

    def block(one: Block) -> Block:
        shape = list(one.latent.batch_shape)
        for plate in structure.plates:
            shape[plate.dim] = plate.total
        return one._replace(latent=one.latent._replace(batch_shape=tuple(shape)), plates=totals)

    return Coordinates(*(tuple(map(block, blocks)) for blocks in coordinates))
