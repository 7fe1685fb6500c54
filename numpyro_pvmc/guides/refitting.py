"""Move Gaussian proposals towards the moments of weighted particles."""

import jax
import jax.numpy as jnp

from numpyro_pvmc.chain.chain import Chain, presence
from numpyro_pvmc.chain.densities import Particles, particles_of
from numpyro_pvmc.chain.potentials import ChainPotentials, chain_potentials
from numpyro_pvmc.chain.unconstrained import Coordinates, particle_coordinates
from numpyro_pvmc.guides.checks import GuideKind, proposal_log_densities
from numpyro_pvmc.guides.draws import draw, sites_to_draw
from numpyro_pvmc.guides.gaussian import Proposal, sample_proposal
from numpyro_pvmc.ops.gaussian import refit, widening
from numpyro_pvmc.ops.smoothing import log_normalizer
from numpyro_pvmc.program.arguments import Arguments

_LUCK = 3.0


def propose_gaussian(
    rng_key: jax.Array,
    chain: Chain,
    coordinates: Coordinates,
    proposal: Proposal,
    num_particles: int,
    particles: str = "rqmc",
    log_q_globals: float | jax.Array = 0.0,
) -> ChainPotentials:
    """Draw particles from a Gaussian proposal, and weigh them.

    :param particles: how particles are drawn.
    :param log_q_globals: log density of the global sites of `chain` under the distribution they were drawn from.
    :return: particles and potentials, given the global sites of `chain`.
    """
    structure, arguments = chain.structure, Arguments()

    def guide():
        sample_proposal(coordinates, proposal)

    drawn, _, _, _ = draw(guide, arguments, {}, rng_key, sites_to_draw(structure), num_particles, particles)
    drawn = particles_of(structure, drawn)
    present = presence(chain)
    log_q = proposal_log_densities(structure, guide, arguments, {}, rng_key, drawn, present, GuideKind())
    return chain_potentials(chain, drawn, log_q, present, log_q_globals)


def unless_worse(
    rng_key: jax.Array, chain: Chain, coordinates: Coordinates, proposal: Proposal, fallback: Proposal, num_particles: int
) -> Proposal:
    """A proposal, or another one for each series whose estimate of the evidence is clearly higher with that.

    An estimate is unbiased, and so more than ``exp(3)`` times the evidence once in 20 times at most: nearer estimates say
    nothing of which proposal is better.

    :param fallback: others, of the same kind.
    """

    def log_evidence(proposal):
        potentials = propose_gaussian(rng_key, chain, coordinates, proposal, num_particles)
        log_z = log_normalizer(potentials.node, potentials.edges, potentials.mask)
        return jnp.where(jnp.isnan(log_z), -jnp.inf, log_z)

    is_worse = log_evidence(fallback) > log_evidence(proposal) + _LUCK

    def choose(own, other):
        return jnp.where(is_worse.reshape(1, *is_worse.shape, *(1,) * (own.ndim - 1 - is_worse.ndim)), other, own)

    return jax.tree.map(choose, proposal, fallback)


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

    :param drawn: particles.
    :param log_weights: logs of their smoothing weights, shape ``(T + 1, *plates, K)``.
    :param mask: ``(T + 1, *plates)``, false where a step is absent.
    :param rate: the largest share of the particles; see :func:`numpyro_pvmc.ops.gaussian.refit`.
    :param particles: how the particles were drawn; see :func:`numpyro_pvmc.ops.gaussian.widening`.
    """
    initial, steps = particle_coordinates(coordinates, drawn)
    if proposal.initial is not None:
        wider = widening(*initial.shape[-2:], particles)
        initial = refit(proposal.initial, initial, log_weights[:1], rate, wider=wider)
    present, wider = None if mask is None else mask[1:], widening(*steps.shape[-2:], particles)
    return Proposal(initial, refit(proposal.steps, steps, log_weights[1:], rate, present, wider))
