"""Arrange what a chain observes as arrays, for networks."""

import jax
import jax.numpy as jnp

from numpyro_pvmc.chain.chain import Chain, at_all_steps
from numpyro_pvmc.program.distributions import mask_of


def observations(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """What a chain observes, by step: the elements of its observed sites one after the other, E of them.

    The observations of the first row are those made at the chain's initial step. If they have as many elements as those of a
    step they are taken to be of the same kind, and otherwise have elements of their own.

    :return: values, of shape ``(T + 1, *plates, E)``, zero where there are none; and where there are some: not masked, and
        finite.
    """
    structure = chain.structure
    plates = tuple(plate.size for plate in structure.plates)

    def at_step(sites):
        observed = [site for site in sites.values() if site["type"] == "sample" and site["is_observed"]]
        return _join([_elements(site, structure, 0) for site in observed], plates)

    absent = lambda pair: jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x]), pair)
    parts = [absent(at_all_steps(chain, at_step))]
    for name in structure.later_factors:
        rows = _elements(chain.outside[name], structure, 1)
        parts.append(absent(rows) if len(rows[0]) == structure.length else rows)
    values, present = _join(parts, (structure.length + 1, *plates))
    initial = [_elements(chain.outside[name], structure, 0) for name in structure.initial_factors]
    first_values, first_present = _join(initial, plates)
    if first_values.shape[-1] == values.shape[-1] and not structure.later_factors:
        return values.at[0].set(first_values), present.at[0].set(first_present)
    rest = lambda x: jnp.zeros((structure.length, *x.shape), x.dtype)
    own = [jnp.concatenate([x[None], rest(x)]) for x in (first_values, first_present)]
    return _join([(values, present), tuple(own)], (structure.length + 1, *plates))


def _elements(site, structure, leading):
    """Values of an observed site, ``(*leading, *plates, E)``, and where there are some."""
    shape, event_dim = site["fn"].shape(), site["fn"].event_dim
    border = len(shape) - event_dim
    value, mask = jnp.broadcast_to(site["value"], shape), mask_of(site)
    present = jnp.isfinite(value)
    if mask is not None:
        present = present & mask.reshape(mask.shape + (1,) * event_dim)
    kept = [*range(leading), *(border + plate.dim for plate in structure.plates)]
    order = kept + [axis for axis in range(len(shape)) if axis not in kept]

    def flat(x):
        return x.transpose(order).reshape(*(shape[axis] for axis in kept), -1)

    return flat(jnp.where(present, value, 0).astype(jnp.result_type(float))), flat(present)


def _join(parts, shape):
    empty = jnp.zeros((*shape, 0)), jnp.zeros((*shape, 0), bool)
    return tuple(jnp.concatenate(arrays, -1) for arrays in zip(empty, *parts, strict=True))
