"""A program, a guide, parameters and data in; the smoothed posterior out."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_pvmc.chain import read_chain, read_structure
from numpyro_pvmc.coordinates import coordinates_of_model, read_proposal
from numpyro_pvmc.counts import warn_of_cut
from numpyro_pvmc.drawing import draw, sites_to_draw
from numpyro_pvmc.minibatch import draw_indices, take_series
from numpyro_pvmc.moments import diagonal, effective_size
from numpyro_pvmc.objectives import ImportanceSmoothedELBO
from numpyro_pvmc.posterior import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.potentials import propose
from numpyro_pvmc.program import Arguments
from numpyro_pvmc.proposal import check_guide
from numpyro_pvmc.refinement import Proposal, propose_gaussian
from numpyro_pvmc.refinement import refine as refine_proposal
from numpyro_pvmc.smoothing import marginals


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
    return smoothed_posterior(lattice, weighed)


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
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Draw joint trajectories from the smoothed posterior, and global sites afresh for each.

    The arguments are those of :func:`smooth`.

    :param sample_shape: how many to draw.
    :param resample: whether to resample the draws by the importance weights of their global sites.
    :return: ``{site: (*sample_shape, ...)}``, and the effective number of draws of global sites.
    """
    structure = read_structure(model, arguments, params)
    params = params | draw_indices(structure, model, arguments, params, rng_key)  # one for all draws

    def one(rng_key, sample_shape=()):
        posterior_key, sample_key = random.split(rng_key)
        posterior = smooth(posterior_key, model, guide, arguments, params, loss, refine, temper)
        log_weight = structure.scale * posterior.log_normalizer.sum() + posterior.log_weight_globals
        return posterior.sample(sample_key, sample_shape), log_weight

    number = math.prod(sample_shape)
    if not structure.global_sites:
        return one(rng_key, sample_shape)[0], jnp.asarray(float(number))
    key_draws, key_resampling = random.split(rng_key)
    samples, log_weights = lax.map(one, random.split(key_draws, number))
    weights = jax.nn.softmax(log_weights)
    if resample:
        chosen = _systematic(key_resampling, weights)
        samples = {name: x[chosen] for name, x in samples.items()}
    samples = {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}
    return samples, effective_size(weights)


def _systematic(rng_key, weights):
    """As many numbers as there are weights, each as often as its weight says, in random order."""
    key_start, key_order = random.split(rng_key)
    number = len(weights)
    points = (random.uniform(key_start) + jnp.arange(number)) / number
    chosen = jnp.searchsorted(jnp.cumsum(weights), points)
    return random.permutation(key_order, jnp.minimum(chosen, number - 1))


def warn_of_doubts(posterior: SmoothedPosterior, refined: bool) -> None:
    """Say so if a posterior leaves out counts that matter, or rests on hardly any particles after refinement.

    :param posterior: a posterior, not traced.
    :param refined: whether its guide was refined.
    """
    program = posterior.structure, posterior.model, posterior.arguments, posterior.params
    warn_of_cut(*program, posterior.state_probabilities, stacklevel=4)
    if refined:
        warn_of_collapse(posterior)


def warn_of_few_draws(number: float, sample_shape: tuple[int, ...]) -> None:
    """Say so if resampled global sites are hardly different draws.

    :param number: their effective number.
    :param sample_shape: how many were drawn.
    """
    if number < 0.1 * math.prod(sample_shape):
        warnings.warn(
            f"Of {math.prod(sample_shape)} draws of the global sites {float(number):.1f} are effective after resampling: their "
            "guide is far from their posterior, or the estimates of the evidence vary much between draws. Train longer, take a "
            "guide with correlations (`AutoMultivariateNormal`), more particles or more `refine`, or leave `resample=False`.",
            stacklevel=3,
        )


def warn_of_collapse(posterior: SmoothedPosterior) -> None:
    """Say so if a posterior rests on hardly any particles at some times.

    :param posterior: a posterior after refinement, not traced.
    """
    sizes = {name: np.asarray(size) for name, size in posterior.effective_sample_size().items()}
    number = posterior.num_particles
    least = max(0.05 * number, 1.5) if number > 2 else 0.0
    worst = max(sizes, key=lambda name: (sizes[name] < least).mean())
    low = sizes[worst] < least
    if low.any():
        where = f"first at time {np.argwhere(low)[0][0]}" if worst in posterior.structure.step else "at the beginning"
        warnings.warn(
            f"After refinement the effective sample size of site '{worst}' is below {least:.1f} of {number} in "
            f"{100 * low.mean():.0f}% of its steps and series, {where} (least {np.nanmin(sizes[worst]):.1f}): do not trust "
            "these. More rounds (`refine`), more particles, tempered rounds (`temper=0.02`) or a start at the mode "
            "(`AutoSmoothedNormal(model, covariance='full', init='laplace')`) may help; transitions with very little noise "
            "need many particles.",
            stacklevel=4,
        )
