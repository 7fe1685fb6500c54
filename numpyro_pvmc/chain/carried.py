"""Read the matrices of a linear-Gaussian chain whose carry has components without noise of their own.

Positions, lags, seasons, accumulators: what of the new carry is computed from the old one. With x the latent sites of a step
and z the state leaves of the carry, one after the other, the program is asked for

.. math:: x_t = m_t + L_t z_{t-1} + N_t x_t + \\varepsilon_t, \\qquad z_t = a_t + B_t z_{t-1} + C_t x_t,

N strictly lower triangular, and the *state* is :math:`(x_t, z_{t-1})`, of which each observation is an affine function with
noise. What has no noise is no trouble to :mod:`numpyro_pvmc.ops.kalman`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_pvmc.chain.chain import Chain, presence, read_chain, sites_after_scan, sites_at_start, sites_of_step, split
from numpyro_pvmc.chain.linear_gaussian import (
    Distribution,
    Linear,
    check_affine,
    distribution_of,
    emission,
    emissions,
    join,
    native,
    padded,
    shape_of_states,
)
from numpyro_pvmc.jaxprs.dependence import mixes_rows
from numpyro_pvmc.ops.kalman import Matrices
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.find_chain import capture, unknown
from numpyro_pvmc.program.structure import Latent, Structure, from_canonical, to_canonical


class Carry(NamedTuple):
    """The state leaves of a carry: which of their axes are plates."""

    leaves: tuple[Latent, ...]
    sizes: tuple[int, ...]  # numbers of each, for one series

    @property
    def width(self) -> int:
        return sum(self.sizes)

    def numbers(self, state: list[jax.Array], structure: Structure) -> jax.Array:
        """The leaves one after the other, ``(..., *plates, W)``."""
        flat = []
        for value, leaf in zip(state, self.leaves, strict=True):
            leading = value.ndim - len(leaf.shape) + len(structure.plates)
            tidied = to_canonical(value, leaf, structure)
            flat.append(tidied.reshape(*tidied.shape[:leading], -1).astype(jnp.result_type(float)))
        return jnp.concatenate(flat, -1)

    def state(self, numbers: jax.Array, structure: Structure) -> list[jax.Array]:
        """Undo :meth:`numbers`."""
        state, ends = [], np.cumsum([0, *self.sizes])
        for leaf, (begin, end) in zip(self.leaves, itertools.pairwise(ends), strict=True):
            event = to_canonical(np.empty(leaf.shape), leaf, structure).shape[len(structure.plates) :]
            own = numbers[..., begin:end].reshape(*numbers.shape[:-1], *event)
            state.append(from_canonical(own, leaf, structure).astype(leaf.dtype))
        return state


def matrices(chain: Chain) -> tuple[Matrices, jax.Array | None, dict[str, jax.Array]]:
    """The matrices of a chain that has passed :func:`check_carried`, as :func:`numpyro_pvmc.chain.linear_gaussian.matrices`."""
    structure, carry = chain.structure, carry_of(chain.structure, chain.model, chain.arguments, chain.values)
    length, *plates, U = shape_of_states(structure)
    before, now = jnp.zeros((length - 1, *plates, carry.width)), jnp.zeros((length, *plates, U))
    linear = linearise(chain, carry, before, now)

    start, later = linear.pop("carry at first"), linear.pop("carry")
    none = jnp.zeros((*plates, carry.width, carry.width))
    slopes = jnp.concatenate([jnp.concatenate([start.now, none], -1)[None], jnp.concatenate([later.now, later.lag], -1)])
    offset = jnp.concatenate([start.mean[None], later.mean])

    def of_sites(sites, leading):
        one = join([linear[site.name] for site in sites], (*leading, *plates), (carry.width, U))
        size = one.mean.shape[-1]
        hold = jnp.eye(U)[:size] * ~one.mask[..., None]
        there = lambda x: jnp.where(one.mask.reshape(*one.mask.shape, *[1] * (x.ndim - one.mask.ndim)), x, 0.0)
        own = jnp.eye(size) - there(one.now)[..., :size]
        right = jnp.concatenate([there(one.lag), hold, there(one.mean)[..., None], there(one.root)], -1)
        right = lax.linalg.triangular_solve(own, right, left_side=True, lower=True, unit_diagonal=True)
        right, W = padded(right, U - size, -2), carry.width
        return right[..., :W], right[..., W : W + U], right[..., W + U], padded(right[..., W + U + 1 :], U - size, -1)

    lag, hold, mean, root = (
        jnp.concatenate([x[None], y])
        for x, y in zip(of_sites(structure.initial_sites, ()), of_sites(structure.step_sites, (structure.length,)), strict=True)
    )
    # Row t reads what row t - 1 says of the carry; the first row reads nothing.
    step = lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x])
    Z, a = step(slopes[:-1]), step(offset[:-1])
    own = lag @ Z + padded(hold, carry.width, -1).at[0].set(0.0)
    F = jnp.concatenate([own, Z], -2)
    # A site that is masked has no value that anything may read; and an initial one has none to hold.
    absent = _absent(linear, structure, (length, *plates, U))
    reads = lambda slope, absent: ((slope != 0) & absent[..., None, :]).any((-1, -2))
    within = lambda sites, absent: reads(
        jnp.concatenate([linear[site.name].now * linear[site.name].mask[..., None] for site in sites], -2), absent
    )
    wrong = jnp.concatenate([absent[:1].any(-1), reads(slopes[:-1, ..., :U], absent[:-1])])
    if structure.initial_sites:
        wrong = wrong.at[0].set(wrong[0] | within(structure.initial_sites, absent[0]))
    if structure.step_sites:
        wrong = wrong.at[1:].set(wrong[1:] | within(structure.step_sites, absent[1:]))
    c = jnp.concatenate([(lag @ a[..., None])[..., 0] + mean, a], -1)
    c = jnp.where(wrong[..., None], jnp.nan, c)
    root_Q = padded(padded(root, carry.width, -2), carry.width, -1)

    H, d, root_R, y = emission(linear, structure, (carry.width, U), is_lagged=True)
    d = jnp.where(reads(H[..., :U] * ~jnp.isnan(y)[..., None], absent)[..., None], jnp.nan, d)
    rows = Matrices(F, c, root_Q, H, d, root_R, y)
    there = presence(chain)
    return rows, None if there is None else there.steps, {n: (~linear[n].mask).any() for n in structure.initial}


def check_carried(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> None:
    """Refuse a chain that is not linear-Gaussian, or whose series read each other.

    :raises ValueError: naming the site, or the leaf of the carry, and what is wrong with it.
    """
    carry = carry_of(structure, model, arguments, values)
    length, *plates, U = shape_of_states(structure)
    dtype = jnp.result_type(float)
    states = np.zeros((length - 1, *plates, carry.width), dtype), np.zeros((length, *plates, U), dtype)

    def means(states, arguments, values):
        found = _distributions(read_chain(structure, model, arguments, values), carry, *states)
        return {name: one.mean for name, one in found.items()}

    def slopes(parts):
        found = linearise(read_chain(structure, model, arguments, values), carry, *parts["states"])
        return {name: one._asdict() for name, one in found.items()}

    check_affine(means, slopes, states, arguments, values, structure, ("carry at first", "carry"))


def carry_of(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> Carry:
    """The state leaves of a chain's carry.

    :raises ValueError: if the series of a plate cannot be told in one of them, or read each other.
    """
    init = jax.eval_shape(lambda *given: split(structure, capture(model, *given, structure)[0].init)[0], arguments, values)
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in init):
        raise ValueError("The carry of the scan has complex numbers. Carry their real and imaginary parts, as two arrays.")
    scan_paths = [f"carry[{i}]" for i in range(len(init))]
    choices = [
        [leaf for events in range(len(one.shape), -1, -1) if (leaf := _leaf(name, one, events, structure)) is not None]
        for name, one in zip(scan_paths, init, strict=True)
    ]
    for leaves in itertools.islice(itertools.product(*choices), 64):
        series = math.prod(plate.size for plate in structure.plates)
        carry = Carry(leaves, tuple(math.prod(leaf.shape) // series for leaf in leaves))
        if not structure.plates or not _mixes_series(structure, carry, model, arguments, values):
            return carry
    plates = sorted(plate.name for plate in structure.plates)
    raise ValueError(
        f"The carry of the scan lets the elements of the plates {plates} read each other, or has a part without an axis for "
        "them. The plates enclose all latent sites of the chain, which makes their elements independent series: give each part "
        "of the carry their axes, at their places."
    )


def _leaf(name, one, events, structure):
    """A leaf whose last axes are those of its event, if the plates fit the others."""
    border = len(one.shape) - events
    fits = all(border + plate.dim >= 0 and one.shape[border + plate.dim] == plate.size for plate in structure.plates)
    return Latent(name, tuple(one.shape[:border]), tuple(one.shape[border:]), one.dtype) if fits else None


def _mixes_series(structure, carry, model, arguments, values):
    """Whether, at any step, the numbers of one series read those of another."""
    _, *plates, U = shape_of_states(structure)
    before = np.zeros((*plates, carry.width), jnp.result_type(float))
    now = np.zeros((*plates, U), jnp.result_type(float))
    for axis in range(len(plates)):

        def by_series(rows, values, arguments, axis=axis):
            before, now = (jnp.moveaxis(part, 0, axis) for part in rows)
            chain = read_chain(structure, model, arguments, values)
            inputs = jax.tree.map(lambda leaf: unknown(leaf[0]), chain.inputs)
            named = native(jnp.stack([now] * (structure.length + 1)), structure)
            initial = {name: named[name] for name in structure.initial}
            first, outside = sites_at_start(chain, initial)
            latent = {name: named[name][0] for name in structure.step}
            new, output, sites = sites_of_step(chain, inputs, carry.state(before, structure), latent)
            means = [distribution_of(sites[name], structure).mean for name in (*structure.step, *emissions(structure))]
            means += [distribution_of(outside[n], structure).mean for n in (*structure.initial, *structure.initial_factors)]
            if structure.later_factors:
                outputs = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * structure.length), output)
                outside = sites_after_scan(chain, initial, outputs)
                means += [distribution_of(outside[name], structure, leading=1).mean[-1] for name in structure.later_factors]
            numbers = [carry.numbers(state, structure) for state in (first, new)]
            return [jnp.moveaxis(x, axis, 0) for x in (*numbers, *means)]

        mixed, _ = mixes_rows(by_series, (np.moveaxis(before, axis, 0), np.moveaxis(now, axis, 0)), values, arguments)
        if any(mixed):
            return True
    return False


def linearise(chain: Chain, carry: Carry, before: jax.Array, now: jax.Array) -> dict[str, Linear]:
    """Distributions of all sites, and the carry, with the slopes of their means.

    :param before: the carry before each step, shape ``(T, *plates, W)``, at which slopes are taken.
    :param now: sites, shape ``(T + 1, *plates, U)``.
    """

    def means(before, now):
        found = _distributions(chain, carry, before, now)
        return {name: one.mean for name, one in found.items()}, found

    _, lag, _ = jax.linearize(lambda before: means(before, now), before, has_aux=True)
    _, own, found = jax.linearize(lambda now: means(before, now), now, has_aux=True)
    along = lambda slope, x: jax.vmap(lambda direction: slope(jnp.broadcast_to(direction, x.shape)), out_axes=-1)
    lags, nows = along(lag, before)(jnp.eye(before.shape[-1])), along(own, now)(jnp.eye(now.shape[-1]))
    return {name: Linear(one.mean, lags[name], nows[name], *one[1:]) for name, one in found.items()}


def _distributions(chain, carry, before, now):
    """Distributions of all sites, by name; the new carry, and the first, as distributions without noise."""
    structure = chain.structure
    now = native(now, structure)
    initial = {name: now[name] for name in structure.initial}
    first, sites = sites_at_start(chain, initial)
    found = {name: distribution_of(sites[name], structure) for name in (*structure.initial, *structure.initial_factors)}

    def at_step(inputs, numbers, latent):
        new, output, sites = sites_of_step(chain, inputs, carry.state(numbers, structure), latent)
        named = {name: distribution_of(sites[name], structure) for name in (*structure.step, *emissions(structure))}
        return carry.numbers(new, structure), output, named

    latent = {name: now[name] for name in structure.step}
    later, outputs, of_steps = jax.vmap(at_step)(chain.inputs, before, latent)
    found |= of_steps
    if structure.later_factors:
        sites = sites_after_scan(chain, initial, outputs)
        found |= {name: distribution_of(sites[name], structure, leading=1) for name in structure.later_factors}
    start = carry.numbers(first, structure)
    return found | {"carry at first": _without_noise(start), "carry": _without_noise(later)}


def _without_noise(numbers):
    nothing = jnp.zeros((*numbers.shape, 0))
    return Distribution(numbers, nothing, jnp.ones(numbers.shape, bool), jnp.zeros_like(numbers))


def _absent(linear, structure, shape):
    """Where numbers of sites are masked."""
    absent = jnp.zeros(shape, bool)
    for sites, rows in ((structure.initial_sites, slice(0, 1)), (structure.step_sites, slice(1, None))):
        if sites:
            mask = jnp.concatenate([linear[site.name].mask for site in sites], -1)
            absent = absent.at[rows, ..., : mask.shape[-1]].set(~mask)
    return absent
