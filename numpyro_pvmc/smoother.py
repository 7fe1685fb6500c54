"""A program, a guide, parameters and data in; the smoothed posterior out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_pvmc.chain import read_chain, read_structure
from numpyro_pvmc.coordinates import coordinates_of_model, read_proposal
from numpyro_pvmc.diagnostics import Health, health, refuse_integers, warn
from numpyro_pvmc.drawing import draw, sites_to_draw
from numpyro_pvmc.explanation import explain
from numpyro_pvmc.minibatch import draw_indices, take_series
from numpyro_pvmc.moments import diagonal, effective_size
from numpyro_pvmc.objectives import ImportanceSmoothedELBO
from numpyro_pvmc.posterior import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.potentials import propose
from numpyro_pvmc.program import Arguments, is_traced
from numpyro_pvmc.proposal import check_guide
from numpyro_pvmc.refinement import Proposal, propose_gaussian
from numpyro_pvmc.refinement import refine as refine_proposal
from numpyro_pvmc.smoothing import marginals
from numpyro_pvmc.tracebacks import warn_caller


def smooth(
    rng_key: jax.Array,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    loss: ImportanceSmoothedELBO,
    refine: int = 0,
    temper: float | jax.Array = 1.0,
) -> SmoothedPosterior:
    """Draw particles from the guide, refitted first if that is asked for, and weigh them.

    :param rng_key: random key.
    :param model: a NumPyro program.
    :param guide: a NumPyro program that fits it.
    :param arguments: what both are called with.
    :param params: values of parameters and mutable state.
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
        lattice = _refined(rng_key, structure, model, guide, arguments, params, form, loss, refine, temper)
    else:
        lattice = propose(rng_key, structure, model, guide, arguments, params, loss.num_particles, particles=loss.particles)
    weighed = marginals(lattice.node, lattice.edges, lattice.mask, loss.method)
    return smoothed_posterior(lattice, weighed, temper)


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


class Sampled(NamedTuple):
    """Draws, and what tells whether they can be believed; with an axis for the posteriors that they were drawn from.

    `number` is the effective number of draws of global sites. `chosen` are the posteriors that are left after resampling; a
    posterior can be made again with its `key`, and the `indices` of minibatches.
    """

    samples: dict[str, jax.Array]
    number: jax.Array
    chosen: jax.Array
    health: Health
    key: jax.Array
    indices: dict[str, jax.Array]


def sample(
    rng_key: jax.Array,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    loss: ImportanceSmoothedELBO,
    refine: int = 0,
    temper: float | jax.Array = 1.0,
    sample_shape: tuple[int, ...] = (),
    resample: bool = False,
) -> Sampled:
    """Draw joint trajectories from the smoothed posterior, and global sites afresh for each.

    The arguments are those of :func:`smooth`.

    :param sample_shape: how many to draw.
    :param resample: whether to resample the draws by the importance weights of their global sites.
    :return: ``{site: (*sample_shape, ...)}``, and what tells whether they can be believed.
    """
    structure = read_structure(model, arguments, params)
    indices = draw_indices(structure, model, arguments, params, rng_key)  # one for all draws
    params = params | indices

    def one(rng_key, sample_shape=()):
        posterior_key, sample_key = random.split(rng_key)
        posterior = smooth(posterior_key, model, guide, arguments, params, loss, refine, temper)
        log_weight = structure.scale * posterior.log_normalizer.sum() + posterior.log_weight_globals
        return posterior.sample(sample_key, sample_shape), log_weight, health(posterior), posterior_key

    number = math.prod(sample_shape)
    if not structure.global_sites:
        samples, _, *of_posterior = one(rng_key, sample_shape)
        of_posterior = jax.tree.map(lambda x: x[None], of_posterior)
        return Sampled(samples, jnp.asarray(float(number)), jnp.arange(1), *of_posterior, indices)
    key_draws, key_resampling = random.split(rng_key)
    samples, log_weights, *of_posteriors = lax.map(one, random.split(key_draws, number))
    weights, chosen = jax.nn.softmax(log_weights), jnp.arange(number)
    if resample:
        chosen = _systematic(key_resampling, weights)
        samples = {name: x[chosen] for name, x in samples.items()}
    samples = {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}
    return Sampled(samples, effective_size(weights), chosen, *of_posteriors, indices)


def _systematic(rng_key, weights):
    """As many numbers as there are weights, each as often as its weight says, in random order."""
    key_start, key_order = random.split(rng_key)
    number = len(weights)
    points = (random.uniform(key_start) + jnp.arange(number)) / number
    chosen = jnp.searchsorted(jnp.cumsum(weights), points)
    return random.permutation(key_order, jnp.minimum(chosen, number - 1))


def check_samples(
    drawn: Sampled,
    again: Callable[[jax.Array, dict[str, jax.Array]], SmoothedPosterior],
    refine: int,
    temper: float | jax.Array,
    resampled: bool = False,
) -> None:
    """Refuse draws that are no numbers, and say so if they should not be believed.

    :param drawn: draws. Nothing is looked at while they are traced.
    :param again: makes the posterior of a key and of indices of minibatches again.
    :param refine: for how many rounds proposals were refitted.
    :param temper: the power of transition densities in the first of them.
    :param resampled: whether global sites were resampled.
    :raises ValueError: naming what is not a number; or sites of integers that cannot be drawn.
    """
    if is_traced(drawn):
        return
    found, chosen = jax.tree.map(np.asarray, drawn.health), np.unique(drawn.chosen)
    if found.unknown.any():
        explain(again(drawn.key[found.unknown.argmax()], drawn.indices))
    found = jax.tree.map(lambda x: x[chosen], found)
    refuse_integers(found)
    warn(found, refine, temper)
    number = math.prod(np.shape(drawn.chosen))
    if resampled and drawn.number < 0.1 * number:
        warn_caller(
            f"Of {number} draws of the global sites {float(drawn.number):.1f} are effective after resampling: their guide is "
            "far from their posterior, or the estimates of the evidence vary much between draws. Train longer, take a guide "
            "with correlations (`AutoMultivariateNormal`), more particles or more `refine`, or leave `resample=False`.",
        )
