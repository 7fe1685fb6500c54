"""Smooth: draw particles from a guide, refitted first if that is asked for, and weigh them.

Every evaluation of a chain weighs its particles, and the Gaussian nearest to the smoothing marginal at time t has the
moments of the weighted particles at t. So a proposal can be refitted, round by round, without gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_pvmc.chain.chain import Chain, read_chain
from numpyro_pvmc.chain.enumeration import of_particles
from numpyro_pvmc.chain.minibatch import draw_indices
from numpyro_pvmc.chain.potentials import tempered
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.chain.unconstrained import Coordinates, coordinates_of_model
from numpyro_pvmc.guides.checks import check_guide
from numpyro_pvmc.guides.draws import draw, sites_to_draw
from numpyro_pvmc.guides.gaussian import Proposal, read_proposal, take_series
from numpyro_pvmc.guides.refitting import propose_gaussian, refitted
from numpyro_pvmc.infer.objective import ChainELBO
from numpyro_pvmc.ops.gaussian import diagonal
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.posterior.particles import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.pvmc.propose import propose


def smooth(
    rng_key: jax.Array,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    loss: ChainELBO,
    refine: int = 0,
    temper: float | jax.Array = 1.0,
) -> SmoothedPosterior:
    """Draw particles from the guide, refitted first if that is asked for, and weigh them.

    :param loss: says how many particles, how they are drawn and how trajectories are summed.
    :param refine: number of rounds in which the guide's Gaussians are refitted.
    :param temper: power of the transition densities in the first of them.
    :return: the posterior, given one draw of the global sites.
    :raises ValueError: if the guide does not fit the chain, or is to be refitted and is not Gaussian.
    """
    structure = read_structure(model, arguments, params)
    params = params | draw_indices(structure, model, arguments, params, rng_key)
    form = check_guide(structure, guide, arguments, params)
    structure = structure.summing(form.summed)
    for part in form.refitted_by:  # the model's prior at these very parameters, where they lack the guide's state
        params = part.start(read_chain(structure, model, arguments, params)) | params
    if refine and structure.sites:
        potentials = _refined(rng_key, structure, model, guide, arguments, params, form, loss, refine, temper)
    else:
        choices = {"num_particles": loss.num_particles, "particles": loss.particles}
        potentials = propose(rng_key, structure, model, guide, arguments, params, **choices).potentials
    weighed = marginals(potentials.node, potentials.edges, potentials.mask, loss.method)
    return smoothed_posterior(potentials, weighed)


def _refined(rng_key, structure, model, guide, arguments, params, form, loss, refine, temper):
    """Particles of a refitted proposal, drawn after the last round."""
    key_globals, key_rounds, key_last = random.split(rng_key, 3)
    drawn, ignored = sites_to_draw(structure), structure.free
    _, global_values, log_q_globals, mutable = draw(guide, arguments, params, key_globals, drawn, 1, ignored=ignored)
    values = params | mutable | global_values
    chain = read_chain(structure, model, arguments, values)
    if form.refitted_by:
        coordinates, proposal = coordinates_of_model(chain), form.refitted_by[0].proposal(values)
        proposal = take_series(proposal, structure, values)
    else:
        coordinates, proposal = read_proposal(structure, guide, arguments, values)
        # With fewer particles than three times its rows a covariance is mostly noise.
        if 3 * proposal.steps.mean.shape[-1] > loss.num_particles:
            proposal = Proposal(*(None if moments is None else diagonal(moments) for moments in proposal))
    proposal = refine_proposal(
        key_rounds, chain, coordinates, proposal, loss.num_particles, refine, temper, loss.particles, loss.method
    )
    return propose_gaussian(key_last, chain, coordinates, proposal, loss.num_particles, loss.particles, log_q_globals)


def refine_proposal(
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
