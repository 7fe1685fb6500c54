"""A chain and particles in, its log densities at all particles and all neighbouring pairs out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_pvmc.chain import Chain, after_scan, begin, step
from numpyro_pvmc.smoothing import Edges
from numpyro_pvmc.states import joint_values, number_of_states
from numpyro_pvmc.structure import Structure


class Particles(NamedTuple):
    """Values of the chain's sites: `initial` has leading axis K, `steps` leading axes (T, K).

    A chain without sites that have particles has one, without values.
    """

    initial: dict[str, jax.Array]
    steps: dict[str, jax.Array]

    @property
    def number(self) -> int:
        """K, the number of particles at each time step."""
        numbers = [x.shape[1] for x in self.steps.values()] + [x.shape[0] for x in self.initial.values()]
        return numbers[0] if numbers else 1


def target(chain: Chain, particles: Particles) -> tuple[jax.Array, Edges]:
    """Log densities of the model at the particles.

    :param chain: the chain.
    :param particles: its particles.
    :return: the part that reads one particle, shape ``(T + 1, *plates, K)``; the part that reads two, a block ``(*plates, K,
        K)`` for each step. With sites that are summed over S joint values, a particle is K * S points: see
        :mod:`numpyro_pvmc.states`.
    """
    structure = chain.structure
    particles = _with_states(structure, particles)
    number = particles.number
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
        # A chain may have no state: then no leaf says how many particles there are before.
        return jax.vmap(to_all, in_axes=(0, None), out_axes=-2, axis_size=number)(before, latent)

    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), first_state, states)
    return log_p, Edges(edge, (chain.inputs, before, particles.steps))


def _with_states(structure, particles):
    """Each particle with all joint values of the sites that are summed."""
    number, particle = number_of_states(structure), particles.number
    if not structure.states:
        return particles

    def tiled(values):
        return {name: jnp.concatenate([jnp.asarray(x)] * particle) for name, x in values.items()}

    repeated = lambda x, axis: jnp.repeat(x, number, axis)
    initial = {name: repeated(x, 0) for name, x in particles.initial.items()} | tiled(joint_values(structure, False))
    steps = {
        name: jnp.broadcast_to(x, (structure.length, *x.shape)) for name, x in tiled(joint_values(structure, True)).items()
    }
    return Particles(initial, {name: repeated(x, 1) for name, x in particles.steps.items()} | steps)


def particles_of(structure: Structure, drawn: dict[str, jax.Array]) -> Particles:
    """Sort draws by point.

    :param structure: the structure of the chain.
    :param drawn: ``{site: (K, ...)}``.
    """
    return Particles(
        {name: drawn[name] for name in structure.initial},
        {name: jnp.swapaxes(drawn[name], 0, 1) for name in structure.step},
    )
