"""A Gaussian proposal in, one nearer to the smoothed posterior out.

Every evaluation of a chain weighs its particles, and the Gaussian nearest to the smoothing marginal at time t has the
moments of the weighted particles at t. So a proposal can be refitted, round by round, without gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_pvmc.chain import Chain, global_log_density, presence
from numpyro_pvmc.coordinates import Coordinates, Proposal, particle_coordinates, sample_sites
from numpyro_pvmc.densities import Particles, particles_of
from numpyro_pvmc.drawing import draw, sites_to_draw
from numpyro_pvmc.moments import refit, widening
from numpyro_pvmc.potentials import Lattice, weigh
from numpyro_pvmc.program import Arguments
from numpyro_pvmc.proposal import Form, proposal_log_densities
from numpyro_pvmc.smoothing import Edges, log_normalizer, marginals
from numpyro_pvmc.states import of_particles

_LUCK = 3.0


def refine(
    rng_key: jax.Array,
    chain: Chain,
    coordinates: Coordinates,
    proposal: Proposal,
    num_particles: int,
    rounds: int,
    temper: float | jax.Array = 1.0,
    particles: str = "rqmc",
    method: str = "auto",
) -> Proposal:
    """Refit a proposal for a number of rounds.

    :param rng_key: random key.
    :param chain: the chain of the model.
    :param coordinates: coordinates of its sites.
    :param proposal: Gaussians in these coordinates to start from.
    :param num_particles: K, the number of particles at each time step.
    :param rounds: how many.
    :param temper: the power to which transition densities are raised in the first round; it rises to 1, and stays there for
        the last quarter of the rounds. Less than 1 helps where transitions are tight against the width of the proposal.
    :param particles: how particles are drawn; see :func:`numpyro_pvmc.drawing.draw`.
    :param method: how trajectories are summed.
    :return: the refitted Gaussians.
    """
    rising = max(rounds - 1 - rounds // 4, 1)

    def one(proposal, key_and_round):
        key, number = key_and_round
        lattice = propose_gaussian(key, chain, coordinates, proposal, num_particles, particles)
        power = jnp.asarray(temper, lattice.node.dtype) ** jnp.maximum(1 - number / rising, 0)
        edges = tempered(lattice.edges, power)
        log_weights = of_particles(chain.structure, marginals(lattice.node, edges, lattice.mask, method).log_weights)
        return refitted(coordinates, proposal, lattice.particles, log_weights, lattice.mask, particles=particles), None

    proposal, _ = lax.scan(one, proposal, (random.split(rng_key, rounds), jnp.arange(rounds)))
    return proposal


def propose_gaussian(
    rng_key: jax.Array,
    chain: Chain,
    coordinates: Coordinates,
    proposal: Proposal,
    num_particles: int,
    particles: str = "rqmc",
    log_q_globals: float | jax.Array = 0.0,
) -> Lattice:
    """Draw particles from a Gaussian proposal, and weigh them.

    :param rng_key: random key.
    :param chain: the chain of the model.
    :param coordinates: coordinates of its sites.
    :param proposal: Gaussians in these coordinates.
    :param num_particles: K, the number of particles at each time step.
    :param particles: how particles are drawn.
    :param log_q_globals: log density of the global sites of `chain` under the law they were drawn from.
    :return: particles and potentials, given the global sites of `chain`.
    """
    structure, arguments = chain.structure, Arguments()

    def guide():
        sample_proposal(coordinates, proposal)

    drawn, _, _, _ = draw(guide, arguments, {}, rng_key, sites_to_draw(structure), num_particles, particles)
    drawn = particles_of(structure, drawn)
    present = presence(chain)
    log_q = proposal_log_densities(structure, guide, arguments, {}, rng_key, drawn, present, Form())
    node, edges, mask = weigh(chain, drawn, log_q, present)
    of_globals = {name: chain.values[name] for name in structure.global_sites}
    zero = jnp.zeros([plate.size for plate in structure.plates], node.dtype)
    return Lattice(chain, drawn, node, edges, mask, zero, of_globals, global_log_density(chain) - log_q_globals, {})


def unless_worse(
    rng_key: jax.Array, chain: Chain, coordinates: Coordinates, proposal: Proposal, fallback: Proposal, num_particles: int
) -> Proposal:
    """A proposal, or another one for each series whose estimate of the evidence is clearly higher with that.

    An estimate is unbiased, and so more than ``exp(3)`` times the evidence once in 20 times at most: nearer estimates say
    nothing of which proposal is better.

    :param rng_key: random key.
    :param chain: the chain of the model.
    :param coordinates: coordinates of its sites.
    :param proposal: Gaussians in these coordinates.
    :param fallback: others, of the same kind.
    :param num_particles: K, the number of particles at each time step.
    """

    def log_evidence(proposal):
        lattice = propose_gaussian(rng_key, chain, coordinates, proposal, num_particles)
        log_z = log_normalizer(lattice.node, lattice.edges, lattice.mask)
        return jnp.where(jnp.isnan(log_z), -jnp.inf, log_z)

    is_worse = log_evidence(fallback) > log_evidence(proposal) + _LUCK

    def choose(own, other):
        return jnp.where(is_worse.reshape(1, *is_worse.shape, *(1,) * (own.ndim - 1 - is_worse.ndim)), other, own)

    return jax.tree.map(choose, proposal, fallback)


def sample_proposal(coordinates: Coordinates, proposal: Proposal, infer: dict[str, Any] | None = None) -> dict[str, jax.Array]:
    """Sample the sites of a chain, as a guide does.

    :param coordinates: coordinates of its sites.
    :param proposal: Gaussians in these coordinates.
    :param infer: what the sites carry along.
    :return: their values.
    """
    values = {}
    if proposal.initial is not None:
        values = sample_sites(coordinates.initial, jax.tree.map(lambda leaf: leaf[0], proposal.initial), infer)
    return values | sample_sites(coordinates.steps, proposal.steps, infer)


def refitted(
    coordinates: Coordinates,
    proposal: Proposal,
    drawn: Particles,
    log_weights: jax.Array,
    mask: jax.Array | None,
    rate: float | jax.Array = 1.0,
    particles: str = "rqmc",
) -> Proposal:
    """A proposal moved towards the moments of weighted particles, and somewhat wider than these.

    :param coordinates: coordinates of the chain's sites.
    :param proposal: Gaussians in these coordinates.
    :param drawn: particles.
    :param log_weights: logs of their smoothing weights, shape ``(T + 1, *plates, K)``.
    :param mask: ``(T + 1, *plates)``, false where a step is absent.
    :param rate: the largest share of the particles; see :func:`numpyro_pvmc.moments.refit`.
    :param particles: how the particles were drawn; see :func:`numpyro_pvmc.moments.widening`.
    """
    initial, steps = particle_coordinates(coordinates, drawn)
    if proposal.initial is not None:
        wider = widening(*initial.shape[-2:], particles)
        initial = refit(proposal.initial, initial, log_weights[:1], rate, wider=wider)
    present, wider = None if mask is None else mask[1:], widening(*steps.shape[-2:], particles)
    return Proposal(initial, refit(proposal.steps, steps, log_weights[1:], rate, present, wider))


def tempered(edges: Edges, power: float | jax.Array) -> Edges:
    """Transition potentials raised to a power.

    :param edges: transition potentials.
    :param power: a number between 0 and 1.
    """
    return Edges(lambda inputs: power * edges.function(inputs), edges.inputs)
