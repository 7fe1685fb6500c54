"""Look inside of the wrappers of a distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


def base_distribution(fn: dist.Distribution) -> dist.Distribution:
    """The distribution inside of those that only expand, mask or regroup the axes of another."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def base_support(fn: dist.Distribution) -> constraints.Constraint | None:
    """The constraint on single draws of a distribution, if there is one that its own parameters tell."""
    support = base_distribution(fn).support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return None if constraints.is_dependent(support) else support


def is_bounded(fn: dist.Distribution) -> bool:
    """Whether a distribution does not have all real numbers; angles count as if they had.

    Of a distribution that is transformed by several steps this is what the last step says, which may not know of the others.
    """
    # Bounds may be traced, and are not compared.
    return all(base_support(fn) is not free for free in (None, constraints.real, constraints.circular))


def mask_of(site: dict[str, Any]) -> jax.Array | bool | None:
    """The mask that handlers put on whole draws of a site.

    :return: a boolean array of the site's batch shape, or ``None``.
    """
    fn, mask = site["fn"], None
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            own = jnp.broadcast_to(fn._mask, fn.batch_shape)
            mask = own if mask is None else mask & own
        fn = fn.base_dist
    return None if mask is None else jnp.broadcast_to(mask, site["fn"].batch_shape)
