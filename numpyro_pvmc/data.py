"""A program, its structure and numbers in; an error out if the numbers are none, or a mask is not padding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.chain import at_all_steps, is_nan, presence, read_chain, unmasked
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
    nan, nan_outside, observed, present = jax.tree.map(np.asarray, _look(structure, model, arguments, values))
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
    if present is None:
        return
    resumes = ~present[:-1] & present[1:]
    starts_late = ~present[0]
    if not structure.holding and (resumes.any() or (starts_late & present.any(0)).any()):
        first_time = int(np.argmax(resumes.reshape(len(resumes), -1).any(-1)) + 1) if resumes.any() else int(
            np.argmax(present.reshape(len(present), -1).all(-1))
        )  # fmt: skip
        raise ValueError(
            f"The latent sites {sorted(structure.step)} are masked at some steps and unmasked at a later one (time "
            f"{first_time} of the scan), and the state in between has no meaning. Hold it: return "
            "`jnp.where(mask, x, x_prev)` as the new carry. (To skip a missing observation, mask the emission only.)"
        )
    lost = ~present & (observed > 0)
    if lost.any():
        raise ValueError(
            f"At time {int(np.argmax(lost.reshape(len(lost), -1).any(-1)))} of the scan the latent sites "
            f"{sorted(structure.step)} are masked, but an observation is not. A step without a state observes nothing: put "
            "the emission under the same mask."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(structure, model, arguments, values):
    """NaN by site and time; NaN by site outside the scan; number of observations, and presence, by time and series."""
    chain = read_chain(structure, model, arguments, values)

    def at_step(sites):
        observed = {name: site for name, site in sites.items() if site["type"] == "sample" and site["is_observed"]}
        nan = {name: is_nan(site).sum() for name, site in observed.items()}
        none = jnp.zeros([plate.size for plate in structure.plates], jnp.int32)
        return nan, sum((unmasked(site, chain) for site in observed.values()), start=none)

    nan, observed = at_all_steps(chain, at_step)
    outside = (*structure.initial_factors, *structure.later_factors, *structure.global_factors)
    nan_outside = {name: is_nan(chain.outside[name]) for name in outside}
    observed = observed + sum(_seen_after_scan(chain.outside[name], structure) for name in structure.later_factors)
    present = presence(chain)
    return nan, nan_outside, observed, None if present is None else functools.reduce(jnp.logical_or, present.values())


def _seen_after_scan(site, structure):
    """Where a site after the scan is not masked, by time and series."""
    mask = mask_of(site)
    if mask is None or mask.ndim == 0 or mask.shape[0] not in (structure.length, structure.length + 1):
        return 1
    rows = jax.vmap(lambda row: per_series(row.astype(jnp.int32), structure.plates))(mask)
    return rows[-structure.length :] > 0
