"""A program, a guide, parameters and data in; the smoothed posterior out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax, random

from numpyro_pvmc.chain.chain import read_chain, read_structure
from numpyro_pvmc.chain.explanation import explain
from numpyro_pvmc.chain.minibatch import draw_indices
from numpyro_pvmc.chain.unconstrained import coordinates_of_model
from numpyro_pvmc.guides.checks import check_guide
from numpyro_pvmc.guides.draws import draw, sites_to_draw
from numpyro_pvmc.guides.gaussian import read_proposal, take_series
from numpyro_pvmc.guides.refitting import propose_gaussian
from numpyro_pvmc.ops.gaussian import diagonal
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.posterior.diagnostics import Health, health, refuse_integers, warn
from numpyro_pvmc.posterior.particles import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.posterior.resampling import Guide
from numpyro_pvmc.posterior.resampling import resample as resample_globals
from numpyro_pvmc.program.arguments import Arguments, is_traced
from numpyro_pvmc.program.tracebacks import warn_caller
from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO
from numpyro_pvmc.pvmc.propose import propose
from numpyro_pvmc.pvmc.refinement import Proposal
from numpyro_pvmc.pvmc.refinement import refine as refine_proposal


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
        potentials = _refined(rng_key, structure, model, guide, arguments, params, form, loss, refine, temper)
    else:
        choices = {"num_particles": loss.num_particles, "particles": loss.particles}
        potentials = propose(rng_key, structure, model, guide, arguments, params, **choices).potentials
    weighed = marginals(potentials.node, potentials.edges, potentials.mask, loss.method)
    return smoothed_posterior(potentials, weighed, temper)


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

    A posterior can be made again with its `key`, the `indices` of minibatches, and its `values` of what the guide draws its
    global sites from. `log_weights` are those of the global sites that were resampled, the guide's own draws first.
    """

    samples: dict[str, jax.Array]
    health: Health
    key: jax.Array
    indices: dict[str, jax.Array]
    values: dict[str, jax.Array]
    log_weights: jax.Array | None = None


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
    :param resample: whether to draw the global sites from their posterior, see :mod:`numpyro_pvmc.posterior.resampling`.
    :return: ``{site: (*sample_shape, ...)}``, and what tells whether they can be believed.
    """
    structure = read_structure(model, arguments, params)
    indices = draw_indices(structure, model, arguments, params, rng_key)  # one for all draws
    params = params | indices

    def one(posterior_key, sample_key, values, sample_shape=()):
        posterior = smooth(posterior_key, model, guide, arguments, params | values, loss, refine, temper)
        log_weight = structure.scale * posterior.log_normalizer.sum() + posterior.log_weight_globals
        return (posterior.sample(sample_key, sample_shape), health(posterior)), log_weight

    number = math.prod(sample_shape)
    if not structure.global_sites:
        key, sample_key = random.split(rng_key)
        (samples, found), _ = one(key, sample_key, {}, sample_shape)
        return Sampled(samples, *jax.tree.map(lambda x: x[None], (found, key)), indices, {})
    values, log_weights = {}, None
    if resample:
        of_guide = Guide(guide, arguments, params, {*structure.sites, *structure.free, *structure.subsampled})
        (samples, found), keys, values, log_weights = resample_globals(rng_key, of_guide, one, number)
    else:
        keys, sample_keys = jax.vmap(random.split, out_axes=1)(random.split(rng_key, number))
        (samples, found), _ = lax.map(lambda keys: one(*keys, {}), (keys, sample_keys))
    samples = {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}
    return Sampled(samples, found, keys, indices, values, log_weights)


def check_samples(
    drawn: Sampled,
    again: Callable[[jax.Array, dict[str, jax.Array]], SmoothedPosterior],
    refine: int,
    temper: float | jax.Array,
) -> None:
    """Refuse draws that are no numbers, and say so if they should not be believed.

    :param drawn: draws. Nothing is looked at while they are traced.
    :param again: makes a posterior again, given its key and values.
    :param refine: for how many rounds proposals were refitted.
    :param temper: the power of transition densities in the first of them.
    :raises ValueError: naming what is not a number; or sites of integers that cannot be drawn.
    """
    if is_traced(drawn):
        return
    found = jax.tree.map(np.asarray, drawn.health)
    if found.unknown.any():
        worst = found.unknown.argmax()
        explain(again(drawn.key[worst], drawn.indices | {name: x[worst] for name, x in drawn.values.items()}))
    refuse_integers(found)
    warn(found, refine, temper)
    if drawn.log_weights is None:
        return
    number, log_weights = len(drawn.key), np.asarray(drawn.log_weights, float)
    if unknown := np.isnan(log_weights).sum():
        warn_caller(
            f"{unknown} of {len(log_weights)} draws of the global sites, from their guide and around, have no weight: there "
            "the model's densities are not numbers. They were left out; if the posterior reaches so far, the draws do not."
        )
    possible = log_weights[log_weights > -np.inf]
    weights = np.exp(possible - possible.max(initial=-np.inf))
    effective = weights.sum() ** 2 / (weights**2).sum() if len(weights) else 0.0
    if effective < 0.1 * number:
        warn_caller(
            f"Of {number} draws of the global sites {effective:.1f} are effective after resampling: their guide is "
            "far from their posterior, or the estimates of the evidence vary much between draws. Train longer, take a guide "
            "with correlations (`AutoMultivariateNormal`), more particles or more `refine`, or leave `resample=False`.",
        )
