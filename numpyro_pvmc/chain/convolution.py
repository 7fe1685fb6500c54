"""Sum over two counts of a step that are read through their sum only.

The points of such a step are the totals n = s + g, of which there are as many as values of both together, not in pairs. With m
the total before,

    edge[m, n] = log sum_s p(s | m) p(g = n - s)

is a product of two matrices in the log semiring. For counts up to K it takes K^2 densities a step and K^3 multiplications;
all pairs of pairs would take K^4 densities.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_pvmc.chain.chain import Chain, log_density, sites_of_step
from numpyro_pvmc.ops.semiring import logmatmulexp, logsumexp
from numpyro_pvmc.ops.smoothing import Edges, log_normalizer
from numpyro_pvmc.program.structure import Structure


class Inputs(NamedTuple):
    """Of one step, or of all: what its densities read; zeros that are added to the densities of the values of both counts."""

    of_step: Any
    mover: jax.Array
    other: jax.Array


def edges_of_totals(chain: Chain, before: list[jax.Array], number: int) -> Edges:
    """Pairs of totals.

    :param chain: a chain with two counts of a step that are read through their sum only.
    :param before: state leaves of the carry before each step, with leading axes ``(T, number)``.
    :return: blocks of shape ``(*plates, number, number)``, whose inputs are :class:`Inputs`.
    """
    structure = chain.structure
    shape = structure.length, *(plate.size for plate in structure.plates)
    zeros = [jnp.zeros((*shape, len(part.support))) for part in structure.parts]

    def block(inputs):
        return logmatmulexp(*factors(chain, inputs, number))

    return Edges(block, Inputs((chain.inputs, before), *zeros))


def factors(chain: Chain, inputs: Inputs, number: int) -> tuple[jax.Array, jax.Array]:
    """Log densities of one step.

    :param inputs: of one step.
    :return: those of the values s of the first count given each point before, shape ``(*plates, number, s)``; and those of what
        the other has to be for each total, shape ``(*plates, s, number)``.
    """
    mover, other = chain.structure.parts
    here, before = inputs.of_step
    values_of = lambda site: jnp.asarray(site.support, site.dtype)
    full = lambda site, value: jnp.full(site.shape, value, site.dtype)

    def density(name, state, s, g):
        sites = sites_of_step(chain, here, state, {mover.name: full(mover, s), other.name: full(other, g)})[2]
        return log_density(chain, sites, (name,))

    least = min(other.support)
    of_mover = jax.vmap(lambda state, s: density(mover.name, state, s, least), (None, 0), -1)
    log_mover = jax.vmap(lambda state: of_mover(state, values_of(mover)), out_axes=-2, axis_size=number)(before)
    one = jax.tree.map(lambda leaf: leaf[0], before)
    log_other = jax.vmap(lambda g: density(other.name, one, min(mover.support), g), out_axes=-1)(values_of(other))
    log_mover, log_other = log_mover + inputs.mover[..., None, :], log_other + inputs.other
    lacking = np.arange(number) - np.arange(len(mover.support))[:, None]
    is_there = (lacking >= 0) & (lacking < len(other.support))
    return log_mover, jnp.where(is_there, log_other[..., np.where(is_there, lacking, 0)], -jnp.inf)


def probabilities_of_parts(structure: Structure, node: jax.Array, edges: Edges) -> dict[str, jax.Array]:
    """Smoothed probabilities of the values of both counts: the slope of the log evidence by the logs of their densities.

    :param edges: as of :func:`edges_of_totals`.
    :return: ``{site: (T, *plates, number of values)}``.
    """
    inputs = edges.inputs

    def evidence(added):
        return log_normalizer(node, edges._replace(inputs=inputs._replace(mover=added[0], other=added[1]))).sum()

    return _by_name(structure, jax.grad(evidence)((inputs.mover, inputs.other)))


def filtering_probabilities_of_parts(
    structure: Structure, node: jax.Array, edges: Edges, log_filtering: jax.Array
) -> dict[str, jax.Array]:
    """The same given the data up to each time only.

    :param edges: as of :func:`edges_of_totals`.
    :param log_filtering: log filtering weights of the totals, shape ``(T + 1, *plates, number)``.
    """

    def at_step(now):
        node, log_before, inputs = now

        def evidence(added):
            block = edges.function(inputs._replace(mover=added[0], other=added[1]))
            return logsumexp(node + logsumexp(log_before[..., :, None] + block, -2), -1).sum()

        return jax.grad(evidence)((inputs.mover, inputs.other))

    return _by_name(structure, lax.map(at_step, (node[1:], log_filtering[:-1], edges.inputs)))


def _by_name(structure, weights):
    return {site.name: x for site, x in zip(structure.parts, weights, strict=True)}


def draw_parts(rng_key: jax.Array, chain: Chain, inputs: Inputs, numbers: jax.Array, number: int) -> dict[str, jax.Array]:
    """Values of both counts, given totals.

    :param inputs: those of all steps.
    :param numbers: numbers of points, shape ``(N, T + 1, *plates)``.
    :return: ``{site: (N, T, *plates)}``.
    """
    mover, other = chain.structure.parts

    def at_step(now):
        key, inputs, before, after = now
        log_mover, log_other = factors(chain, inputs, number)
        pick = lambda table, index: jnp.take_along_axis(table[None], index[..., None, None], -2)[..., 0, :]
        log_joint = pick(log_mover, before) + pick(log_other.swapaxes(-1, -2), after)
        return random.categorical(key, log_joint)

    by_time = jnp.moveaxis(numbers, 1, 0)
    given = random.split(rng_key, chain.structure.length), inputs, by_time[:-1], by_time[1:]
    drawn = jnp.moveaxis(lax.map(at_step, given), 0, 1)
    return {mover.name: drawn + min(mover.support), other.name: numbers[:, 1:] - drawn + min(other.support)}
