"""A chain and particles in, its log densities at all particles and all neighbouring pairs out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_pvmc.chain import Chain, after_scan, begin, step
from numpyro_pvmc.smoothing import Edges
from numpyro_pvmc.structure import Structure


class Particles(NamedTuple):
    """Values of the chain's sites: `initial` has leading axis K, `steps` leading axes (T, K)."""

    initial: dict[str, jax.Array]
    steps: dict[str, jax.Array]


def target(chain: Chain, particles: Particles) -> tuple[jax.Array, Edges]:
    """Log densities of the model at the particles.

    :param chain: the chain.
    :param particles: its particles.
    :return: the part that reads one particle, shape ``(T + 1, *plates, K)``; the part that reads two, a block ``(*plates, K,
        K)`` for each step.
    """
    structure = chain.structure
    number = len(next(iter(particles.steps.values()))[0])
    log_begin, first_state = jax.vmap(lambda x_0: begin(chain, x_0), out_axes=(-1, 0), axis_size=number)(particles.initial)

    def node(inputs, state, latent):
        now = step(chain, inputs, state, latent)
        return now.node, now.state, now.output

    nodes = jax.vmap(node, in_axes=(None, 0, 0), out_axes=(-1, 0, 0))
    if structure.holding:
        # A held state is that of an earlier step, so states come one after the other.
        def advance(state, inputs_and_latent):
            inputs, latent = inputs_and_latent
            log_density, state, output = nodes(inputs, state, latent)
            return state, (log_density, state, output)

        _, (log_node, states, outputs) = lax.scan(advance, first_state, (chain.inputs, particles.steps))
    else:
        log_node, states, outputs = jax.vmap(nodes, in_axes=(0, None, 0))(chain.inputs, first_state, particles.steps)
    log_p = jnp.concatenate([log_begin[None], log_node])
    if structure.later_factors:
        log_p = log_p + jax.vmap(lambda x_0, y: after_scan(chain, x_0, y), in_axes=(0, 1), out_axes=-1, axis_size=number)(
            particles.initial, outputs
        )

    def edge(inputs):
        inputs, before, latent = inputs
        pair = lambda state, latent: step(chain, inputs, state, latent).edge
        to_all = jax.vmap(pair, in_axes=(None, 0), out_axes=-1)
        return jax.vmap(to_all, in_axes=(0, None), out_axes=-2)(before, latent)

    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), first_state, states)
    return log_p, Edges(edge, (chain.inputs, before, particles.steps))


def particles_of(structure: Structure, drawn: dict[str, jax.Array]) -> Particles:
    """Sort draws by point.

    :param structure: the structure of the chain.
    :param drawn: ``{site: (K, ...)}``.
    """
    return Particles(
        {name: drawn[name] for name in structure.initial},
        {name: jnp.swapaxes(drawn[name], 0, 1) for name in structure.step},
    )
