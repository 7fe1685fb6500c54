"""Keep discrete sites within the limits of their supports.

The support of a count may read the state before, as that of survivors does. Values that lie outside of it have no mass there,
whatever a density says of them. So that nothing on the way is NaN, densities are evaluated at the nearest value inside.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from numpyro_pvmc.program.distributions import base_support, mask_of
from numpyro_pvmc.program.handlers import Site

_OUTSIDE = "_outside"
Limits = tuple[Any, Any]


def limits(fn: dist.Distribution, max_count: Any = None) -> Limits:
    """The least and the largest whole number that single draws of a discrete distribution can be.

    :param max_count: the largest number that counts, if one is declared.
    :return: numbers, or arrays that broadcast with its draws; infinite where there is none.
    """
    support = base_support(fn)
    lower, upper = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    if support is constraints.boolean:
        lower, upper = 0, 1
    lower, upper = -math.inf if lower is None else lower, math.inf if upper is None else upper
    return lower, upper if max_count is None else jnp.minimum(upper, max_count)


def declared_max_count(site: Site) -> int | tuple[int, ...] | None:
    """The largest count of a latent site that matters, as its ``infer={"max_count": n}`` says.

    :param site: a latent site.
    :return: a number for all its elements, or one for each, in order.
    :raises ValueError: if the site is continuous, or these are no whole numbers that are known when the program is read.
    """
    name, declared = site["name"], site["infer"].get("max_count")
    if declared is None:
        return None
    if site["fn"].support is None or not site["fn"].support.is_discrete:
        raise ValueError(f"Site '{name}' is continuous, and declares a `max_count`, which is for discrete sites. Remove it.")
    shape = jnp.shape(site["value"])
    wanted = f"a whole number of at least 0, or an array of them that broadcasts with the site's shape {shape}"
    if isinstance(declared, jax.core.Tracer):
        raise ValueError(
            f"The `max_count` of site '{name}' is traced, and has no number yet. Give it {wanted}: of Python or NumPy, not a "
            "parameter nor an array among the arguments of the model."
        )
    numbers = np.asarray(declared)
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.size == 0 or numbers.min() < 0:
        raise ValueError(f"The `max_count` of site '{name}' is {declared!r}. Give it {wanted}.")
    try:
        elements = np.broadcast_to(numbers, shape)
    except ValueError:
        raise ValueError(f"The `max_count` of site '{name}' has the shape {numbers.shape}. Give it {wanted}.") from None
    return int(numbers) if numbers.ndim == 0 else tuple(elements.ravel().tolist())


class Within(Messenger):
    """Gives sites of a program values, moved to the nearest one inside of their limits; remembers which lay outside.

    :param program: what it acts on.
    :param values: values of discrete sites, by name.
    :param ends: limits in place of those of a site's support, by name.
    """

    def __init__(self, program: Callable, values: dict[str, jax.Array], ends: Mapping[str, Limits]):
        self.values, self.ends = values, ends
        super().__init__(program)

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["name"] not in self.values or msg["is_observed"]:
            return
        name, max_count = msg["name"], msg["infer"].get("max_count")
        value, own = self.values[name], self.ends.get(name) or limits(msg["fn"], max_count)
        lower, upper = map(lax.stop_gradient, own)
        msg["value"] = jnp.clip(value, lower, jnp.maximum(lower, upper)).astype(value.dtype)
        msg["infer"] = msg["infer"] | {_OUTSIDE: (value < lower) | (value > upper)}


def without_mass(site: Site, log_density: jax.Array) -> jax.Array:
    """A log density of a site, or -inf where :class:`Within` has moved its value.

    :param log_density: its log density at the value that it was moved to, of its batch shape.
    """
    if _OUTSIDE not in site["infer"]:
        return log_density
    outside = jnp.broadcast_to(site["infer"][_OUTSIDE], site["fn"].shape())
    outside = outside.any(range(outside.ndim - site["fn"].event_dim, outside.ndim))
    mask = mask_of(site)
    return jnp.where(outside if mask is None else outside & mask, -jnp.inf, log_density)
