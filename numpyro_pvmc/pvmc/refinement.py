"""A Gaussian proposal in, one nearer to the smoothed posterior out.

Every evaluation of a chain weighs its particles, and the Gaussian nearest to the smoothing marginal at time t has the
moments of the weighted particles at t. So a proposal can be refitted, round by round, without gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_pvmc.chain.chain import Chain
from numpyro_pvmc.chain.enumeration import of_particles
from numpyro_pvmc.chain.potentials import tempered
from numpyro_pvmc.chain.unconstrained import Coordinates
from numpyro_pvmc.guides.gaussian import Proposal
from numpyro_pvmc.guides.refitting import propose_gaussian, refitted
from numpyro_pvmc.ops.smoothing import marginals


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
    :param particles: how particles are drawn; see :func:`numpyro_pvmc.guides.draws.draw`.
    :param method: how trajectories are summed.
    :return: the refitted Gaussians.
    """
    rising = max(rounds - 1 - rounds // 4, 1)

    def one(proposal, key_and_round):
        key, number = key_and_round
        potentials = propose_gaussian(key, chain, coordinates, proposal, num_particles, particles)
        power = jnp.asarray(temper, potentials.node.dtype) ** jnp.maximum(1 - number / rising, 0)
        edges = tempered(potentials.edges, power)
        log_weights = of_particles(chain.structure, marginals(potentials.node, edges, potentials.mask, method).log_weights)
        return refitted(coordinates, proposal, potentials.particles, log_weights, potentials.mask, particles=particles), None

    proposal, _ = lax.scan(one, proposal, (random.split(rng_key, rounds), jnp.arange(rounds)))
    return proposal
