"""Weigh particles on a chain.

K particles are drawn from the guide at each time step of the chain: time step 0 is the initial step, time steps 1 to T the
steps of the scan. With the proposal q_t and `log K` for each proposed step, and lower indices for the particles,

    node[0, k] = log p(x_0^k) + log p(y_0 | x_0^k) - log q_0(x_0^k) - log K
    node[t, k] = log p(y_t | x_t^k)                - log q_t(x_t^k) - log K
    edge[t, j, k] = log p(x_t^k | x_{t-1}^j)

(an emission that reads the previous state belongs to the edge; a latent site that does not, to the node). A deterministic
start is a time step of K equal particles, each of weight 1 / K. Discrete sites that the guide leaves out are summed: each
particle stands at all their joint values, see :mod:`numpyro_pvmc.chain.enumeration`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.chain.chain import Chain, Presence, global_log_density, mutable_state, presence, read_chain
from numpyro_pvmc.chain.densities import Particles, particles_of, target
from numpyro_pvmc.chain.enumeration import at_points, has_value, number_of_states
from numpyro_pvmc.ops.smoothing import Edges


class ChainPotentials(NamedTuple):
    """Particles at every time step of a chain, and its potentials: arguments of :mod:`numpyro_pvmc.ops.smoothing`.

    With sites that are summed over S joint values, the potentials have K * S points.

    `log_weight_globals` is log p - log q of the global sites, summed, with all that reads nothing of the chain.
    """

    chain: Chain
    particles: Particles
    node: jax.Array
    edges: Edges
    mask: jax.Array | None
    globals: dict[str, jax.Array]
    log_weight_globals: jax.Array
    mutable_state: dict[str, Any]


def chain_potentials(
    chain: Chain,
    particles: Particles,
    log_q: jax.Array,
    present: Presence | None,
    log_q_globals: float | jax.Array = 0.0,
    mutable: Mapping[str, Any] = MappingProxyType({}),
) -> ChainPotentials:
    """Weigh particles.

    :param log_q: log densities of the distribution they were drawn from, shape ``(T + 1, *plates, K)``.
    :param present: where the chain is present, if it is not everywhere.
    :param log_q_globals: log density of the global sites of `chain` under the distribution they were drawn from.
    :param mutable: mutable state of what drew them.
    """
    of_globals = {name: chain.values[name] for name in chain.structure.global_sites}
    log_weight = global_log_density(chain) - log_q_globals
    state = {**mutable, **mutable_state(chain)}
    return ChainPotentials(chain, particles, *weigh(chain, particles, log_q, present), of_globals, log_weight, state)


def enumerated(chain: Chain) -> ChainPotentials:
    """The potentials of a chain whose states are all discrete: it stands at all their values, and nothing is drawn.

    :param chain: the chain, at values of its global sites.
    :raises ValueError: if there are too many states.
    """
    structure = chain.structure.summing(tuple(chain.structure.finite))
    number_of_states(structure)
    chain = read_chain(structure, chain.model, chain.arguments, chain.values)
    log_q = jnp.zeros((structure.length + 1, *(plate.size for plate in structure.plates), 1))
    return chain_potentials(chain, particles_of(structure, {}), log_q, presence(chain))


def weigh(
    chain: Chain, particles: Particles, log_q: jax.Array, present: Presence | None
) -> tuple[jax.Array, Edges, jax.Array | None]:
    """The potentials of particles.

    :param log_q: log densities of the distribution they were drawn from, shape ``(T + 1, *plates, K)``.
    :param present: where the chain is present, if it is not everywhere.
    :return: nodes, edges, mask: arguments of :mod:`numpyro_pvmc.ops.smoothing`.
    """
    structure = chain.structure
    log_p, edges = target(chain, particles)
    node, mask = log_p - at_points(structure, log_q) - math.log(log_q.shape[-1]), None
    if structure.states:
        first, rest = np.tile(has_value(structure), log_q.shape[-1])
        node = jnp.concatenate([jnp.where(first, node[:1], -jnp.inf), jnp.where(rest, node[1:], -jnp.inf)])
    if present is not None:
        # A masked site that is summed has no density, and is one value, not many.
        counts = {site.name: math.log(len(site.support)) * site.elements(structure.plates) for site in structure.step_states}
        for name, count in counts.items():
            node = node.at[1:].add(jnp.where(present.sites[name], 0.0, -count)[..., None])
        mask = jnp.concatenate([jnp.ones((1, *present.steps.shape[1:]), bool), present.steps])
    return node, edges, mask


def tempered(edges: Edges, power: float | jax.Array) -> Edges:
    """Transition potentials raised to a power.

    :param edges: transition potentials.
    :param power: a number between 0 and 1.
    """
    return Edges(lambda inputs: power * edges.function(inputs), edges.inputs)
