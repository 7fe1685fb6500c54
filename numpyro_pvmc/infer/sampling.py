"""Draw joint trajectories from posteriors, with global sites afresh for each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax, random

from numpyro_pvmc.chain.explanation import explain
from numpyro_pvmc.chain.minibatch import draw_indices
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.infer.objective import ChainELBO
from numpyro_pvmc.posterior.diagnostics import Health, health, refuse_integers, warn
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.posterior.resampling import Guide, resample_globals
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.tracebacks import warn_caller


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
    objective: ChainELBO,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    choices: dict[str, Any],
    sample_shape: tuple[int, ...] = (),
    resample: bool = False,
) -> Sampled:
    """Draw joint trajectories from the smoothed posterior, and global sites afresh for each.

    :param objective: has posteriors.
    :param choices: what else the posteriors of the objective take.
    :param resample: whether to draw the global sites from their posterior, see :mod:`numpyro_pvmc.posterior.resampling`.
    :return: ``{site: (*sample_shape, ...)}``, and what tells whether they can be believed.
    """
    structure = read_structure(model, arguments, params)
    indices = draw_indices(structure, model, arguments, params, rng_key)  # one for all draws
    params = params | indices

    def one(posterior_key, sample_key, values, sample_shape=()):
        posterior = objective.posterior(posterior_key, model, guide, arguments, params | values, **choices)
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
    advice: str,
) -> None:
    """Refuse draws that are no numbers, and say so if they should not be believed.

    :param drawn: draws, not traced.
    :param again: makes a posterior again, given its key and values.
    :param advice: what to do where they rest on few particles.
    :raises ValueError: naming what is not a number; or sites of integers that cannot be drawn.
    """
    found = jax.tree.map(np.asarray, drawn.health)
    if found.unknown.any():
        worst = found.unknown.argmax()
        explain(again(drawn.key[worst], drawn.indices | {name: x[worst] for name, x in drawn.values.items()}))
    refuse_integers(found)
    warn(found, advice)
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
