"""A program, its structure and numbers in; an error out if the numbers are none, or a mask is not padding."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_pvmc.chain import at_all_steps, begin, is_nan, presence, read_chain, step, unmasked
from numpyro_pvmc.program import Arguments, mask_of
from numpyro_pvmc.structure import Structure, per_series


def check_data(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> None:
    """Look at the numbers: refuse data that are not numbers, and masks that are not padding.

    :param structure: the structure of the program's chain.
    :param model: a NumPyro program.
    :param arguments: what it is called with, not traced.
    :param values: values of parameters; those not given take their initial values.
    :raises ValueError: naming the site and the first time.
    """
    nan, nan_outside, masks = jax.tree.map(np.asarray, _look(structure, model, arguments, values))
    for name, count in nan.items():
        if count.any():
            raise ValueError(
                f"The data of site '{name}' contain NaN, first at time {np.argmax(count > 0)} of the scan. Missing values need "
                "a mask: replace nothing, and put `numpyro.handlers.mask(mask=~jnp.isnan(y_t))` around the site."
            )
    for name, missing in nan_outside.items():
        if missing.any():
            raise ValueError(
                f"The data of site '{name}' contain NaN, first at index {tuple(int(i) for i in np.argwhere(missing)[0])}. "
                "Missing values need a mask: put `numpyro.handlers.mask` around the site."
            )
    if masks is not None:
        _check_masks(structure, masks)


class _Masks(NamedTuple):
    """By time and series: whether the step has latent sites, whether it is a point of the chain, how many observations it has
    in the body and after the scan, and whether these, or the next step, read its latent sites at all.
    """

    latent: jax.Array
    steps: jax.Array
    observed: jax.Array
    observed_later: jax.Array
    read: jax.Array


def _check_masks(structure, masks):
    names = sorted(site.name for site in structure.step_latents)
    first = lambda where: int(np.argmax(where.reshape(len(where), -1).any(-1)))
    resumes, starts_late = ~masks.steps[:-1] & masks.steps[1:], ~masks.steps[0]
    if not structure.holding and (resumes.any() or (starts_late & masks.steps.any(0)).any()):
        time = first(resumes) + 1 if resumes.any() else int(np.argmax(masks.steps.reshape(len(masks.steps), -1).all(-1)))
        raise ValueError(
            f"The latent sites {names} are masked at some steps and unmasked at a later one (time {time} of the scan), and the "
            "state in between has no meaning. Hold it: return `jnp.where(mask, x, x_prev)` as the new carry. (To skip a "
            "missing observation, mask the emission only.)"
        )
    lost = ~masks.latent & (masks.observed > 0) & (structure.holding | masks.read)
    lost = lost | (~masks.steps & (masks.observed_later > 0))
    if lost.any():
        raise ValueError(
            f"At time {first(lost)} of the scan the latent sites {names} are masked, but an observation is not. A step without "
            "a state observes nothing: put the emission under the same mask."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(structure, model, arguments, values):
    """NaN by site and time; NaN by site outside the scan; masks by time and series, if latent sites have any."""
    chain = read_chain(structure, model, arguments, values)
    plates = [plate.size for plate in structure.plates]

    def at_step(sites):
        observed = {name: site for name, site in sites.items() if site["type"] == "sample" and site["is_observed"]}
        nan = {name: is_nan(site).sum() for name, site in observed.items()}
        return nan, sum((unmasked(site, chain) for site in observed.values()), start=jnp.zeros(plates, jnp.int32))

    nan, observed = at_all_steps(chain, at_step)
    outside = (*structure.initial_factors, *structure.later_factors, *structure.global_factors)
    nan_outside = {name: is_nan(chain.outside[name]) for name in outside}
    present = presence(chain)
    if present is None:
        return nan, nan_outside, None
    seen_later = [_seen_after_scan(chain.outside[name], structure) for name in structure.later_factors]
    later = sum(seen_later, start=jnp.zeros_like(observed))
    latent = functools.reduce(jnp.logical_or, present.sites.values())
    return nan, nan_outside, _Masks(latent, present.steps, observed, later, _reads_latent(chain))


def _reads_latent(chain):
    """Where the densities of a step and the next are others for other draws of its latent sites, by time and series."""
    _, state = begin(chain, {site.name: chain.outside[site.name]["value"] for site in chain.structure.initial_latents})
    after = jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), chain.inputs)

    def densities(seed):
        drawn = chain._replace(scan=chain.scan._replace(rng_key=random.key(seed)))

        def two_steps(inputs, following):
            now = step(drawn, inputs, state, {})
            return now.edge + now.node + step(chain, following, now.state, {}).edge

        return jax.vmap(two_steps)(chain.inputs, after)

    one, *others = [densities(seed) for seed in range(3)]
    differs = [(other != one) & ~(jnp.isnan(other) & jnp.isnan(one)) for other in others]
    return functools.reduce(jnp.logical_or, differs)


def _seen_after_scan(site, structure):
    """Where a site after the scan is not masked, by time and series."""
    mask, plates = mask_of(site), tuple(plate.size for plate in structure.plates)
    if mask is None or mask.ndim == 0 or mask.shape[0] not in (structure.length, structure.length + 1):
        return jnp.ones((structure.length, *plates), jnp.int32)
    rows = jax.vmap(lambda row: per_series(row.astype(jnp.int32), structure.plates))(mask)
    return rows[-structure.length :]
