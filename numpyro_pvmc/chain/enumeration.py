"""Enumerate the joint values of discrete sites, and sum over them.

A time step of the chain with K particles, and sites that are summed over S joint values, has K * S nodes: those of
particle k are the ones from k * S to (k + 1) * S - 1. The initial step may have fewer joint values than a step, or more; what
it lacks are points without weight.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.semiring import logsumexp
from numpyro_pvmc.program.structure import Structure, align

_MOST = 4096  # joint values of a point, of which there is a matrix for each step

_MOST_BYTES = 1e9


def number_of_states(structure: Structure) -> int:
    """S, how many joint values the summed sites of one time step have: those of the initial step or of a step, if these are
    more.

    :raises ValueError: if they are too many to sum over.
    """
    numbers = [_number(sites, structure) for sites in (structure.initial_states, structure.step_states)]
    if max(numbers) > _MOST:
        raise ValueError(
            f"The discrete sites {sorted(structure.states)} of one step have {max(numbers)} joint values for one series, too "
            f"many to sum over (at most {_MOST}). Sample some of them in the guide, put independent ones into a plate around "
            "the chain, or declare a smaller largest count, `infer={'max_count': n}`."
        )
    return max(numbers)


def check_size(structure: Structure, num_particles: int) -> None:
    """Refuse counts of which the pairs of one step, or the tables of all steps, do not fit into memory.

    :raises ValueError: saying how large they would be.
    """
    if not any(site.moves for site in structure.states.values()):
        return
    points, series = num_particles * number_of_states(structure), math.prod(plate.size for plate in structure.plates)
    bytes_of = {"the pairs of a step": series * points**2, "the values of all steps": series * points * structure.length}
    for what, number in bytes_of.items():
        if (size := number * jnp.result_type(float).itemsize) > _MOST_BYTES:
            raise ValueError(
                f"To sum over the counts {sorted(structure.states)}, {what} would take {size / 1e9:.1f} GB, for {points} "
                f"points a step and {series} series (at most {_MOST_BYTES / 1e9:.0f} GB). Declare a smaller largest count, "
                "`infer={'max_count': n}`, take fewer particles or fewer series at once, or sample the counts in the guide."
            )


def joint_values(structure: Structure, at_steps: bool) -> dict[str, np.ndarray]:
    """All joint values of the summed sites of one time step.

    :param at_steps: whether the time step is a step, or the initial step.
    :return: ``{site: (S, *batch, *event)}``, the same for all series; the last value is repeated where there are fewer.
    """
    sites = structure.step_states if at_steps else structure.initial_states
    if at_steps and structure.parts:
        return _totals(structure)
    number_of_states(structure)  # or there are too many to list
    supports = [support for site in sites for support in [site.support] * site.elements(structure.plates)]
    rows = np.array(list(itertools.product(*supports)), int).reshape(_number(sites, structure), len(supports))
    rows = np.pad(rows, ((0, number_of_states(structure) - len(rows)), (0, 0)), mode="edge")
    values, first = {}, 0
    for site in sites:
        last = first + site.elements(structure.plates)
        of_one = rows[:, first:last].reshape(-1, *site.shape_of_one(structure.plates))
        values[site.name] = np.broadcast_to(of_one, (len(rows), *site.shape)).astype(site.dtype)
        first = last
    return values


def _totals(structure):
    """Counts that are read through their sum only: one stands for all of it, and the other for none."""
    mover, other = structure.parts
    least, number = min(mover.support) + min(other.support), number_of_states(structure)
    totals = np.minimum(np.arange(number), _number(structure.step_states, structure) - 1) + least
    totals = totals.reshape(-1, *(1,) * len(mover.shape))
    values = {mover.name: totals, other.name: np.zeros_like(totals)}
    return {site.name: np.broadcast_to(values[site.name], (number, *site.shape)).astype(site.dtype) for site in structure.parts}


def has_value(structure: Structure) -> np.ndarray:
    """Which of the S joint values there are, at the initial step and at a step: shape ``(2, S)``."""
    numbers = [_number(sites, structure) for sites in (structure.initial_states, structure.step_states)]
    return np.arange(number_of_states(structure)) < np.array(numbers)[:, None]


def values_of_numbers(structure: Structure, numbers: jax.Array) -> dict[str, jax.Array]:
    """Values of the summed sites, given which of the S joint values each time step has.

    :param numbers: numbers from 0 to S - 1, shape ``(T + 1, ..., *plates)``.
    :return: ``{site: (T, ..., *batch, *event)}``, without T for initial sites.
    """
    values = {}
    for sites, at_steps in ((structure.initial_states, False), (structure.step_states, True)):
        tables, of_point = joint_values(structure, at_steps), numbers[1:] if at_steps else numbers[0]
        for site in sites:
            table = _first_series(tables[site.name], site, structure)
            elements = np.ogrid[tuple(slice(size) for size in table.shape[1:])]
            values[site.name] = jnp.asarray(table)[(align(of_point, site, structure), *elements)]
    return values


def at_points(structure: Structure, of_particles: jax.Array) -> jax.Array:
    """What particles have, at all joint values of the summed sites.

    :param of_particles: an array of shape ``(..., K)``.
    :return: an array of shape ``(..., K * S)``.
    """
    number = number_of_states(structure)
    return of_particles if number == 1 else jnp.repeat(of_particles, number, -1)


def of_particles(structure: Structure, log_weights: jax.Array) -> jax.Array:
    """Logs of the weights of particles, whatever the values of the summed sites.

    :param log_weights: logs of weights of nodes, shape ``(..., K * S)``.
    :return: an array of shape ``(..., K)``.
    """
    number = number_of_states(structure)
    return log_weights if number == 1 else logsumexp(log_weights.reshape(*log_weights.shape[:-1], -1, number), -1)


@full_precision
def probabilities(structure: Structure, log_weights: jax.Array) -> dict[str, jax.Array]:
    """Probabilities of the values of each summed site.

    :param log_weights: logs of weights of nodes, shape ``(T + 1, *plates, K * S)``.
    :return: ``{site: (T, *plates, *event, number of values)}``, without T for initial sites; batch axes of more than one
        element that are no plate count as event axes. Counts that are read through their sum are not among them.
    """
    weights = jnp.exp(log_weights)
    weights = weights.reshape(*weights.shape[:-1], -1, number_of_states(structure)).sum(-2)
    found = {}
    # Of totals there are no probabilities of their parts.
    for sites, at_steps in ((structure.initial_states, False), (() if structure.parts else structure.step_states, True)):
        values = joint_values(structure, at_steps)
        for site in sites:
            shape = site.shape_of_one(structure.plates)
            of_one = _first_series(values[site.name], site, structure)
            of_one = of_one.reshape(len(of_one), -1)
            is_value = of_one[..., None] == np.array(site.support)
            own = jnp.einsum("...s,sev->...ev", weights[1:] if at_steps else weights[0], is_value.astype(weights.dtype))
            event = tuple(size for size in shape[: len(site.batch_shape)] if size > 1) + site.event_shape
            found[site.name] = own.reshape(*own.shape[:-2], *event, len(site.support))
    return found


def _number(sites, structure):
    if structure.parts and sites == structure.step_states:
        return sum(len(site.support) for site in sites) - 1
    return math.prod(len(site.support) ** site.elements(structure.plates) for site in sites)


def _first_series(values, site, structure):
    for plate in structure.plates:
        values = values.take([0], 1 + len(site.batch_shape) + plate.dim)
    return values
