"""Read the matrices of a linear-Gaussian chain off its program, or name the site by which it has none.

The program is asked, as any function. The distributions of its sites must be Normal; the slopes of their means along the states
must read no state, and are then the matrices; their covariances must not read the states either. A *state* is one vector for
each series: the latent sites of a step one after the other; before the first step, those of the initial step.
"""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from numpyro_pvmc.chain.chain import Chain, presence, read_chain, sites_after_scan, sites_at_start, sites_of_step
from numpyro_pvmc.jaxprs.dependence import changes_by_steps, follows_slope, influence
from numpyro_pvmc.ops.kalman import Matrices, block_diagonal, root_of
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import WRAPPERS
from numpyro_pvmc.program.handlers import Site
from numpyro_pvmc.program.structure import Latent, Structure, from_canonical, to_canonical


class Distribution(NamedTuple):
    """A Gaussian distribution of n numbers for each series, and the numbers. Those outside `mask` have no distribution."""

    mean: jax.Array  # (*plates, n)
    root: jax.Array  # (*plates, n, n), a square root of the covariance
    mask: jax.Array  # (*plates, n)
    value: jax.Array  # (*plates, n)


class Linear(NamedTuple):
    """A distribution whose mean is `mean`, plus `lag` times the state before, plus `now` times the present one, of U numbers
    each.
    """

    mean: jax.Array  # (*plates, n)
    lag: jax.Array  # (*plates, n, U)
    now: jax.Array  # (*plates, n, U)
    root: jax.Array  # (*plates, n, n)
    mask: jax.Array  # (*plates, n)
    value: jax.Array  # (*plates, n)


def check_linear_gaussian(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> None:
    """Refuse a chain that is not linear-Gaussian.

    :raises ValueError: naming the site whose distribution is another, or whose mean is not affine, or whose covariance reads
        the states.
    """

    def means(states, arguments, values):
        distributions = _distributions(read_chain(structure, model, arguments, values), states, states)
        return {name: distribution.mean for name, distribution in distributions.items()}

    def slopes(parts):
        distributions = linearise(read_chain(structure, model, arguments, values), parts["states"])
        return {name: distribution._asdict() for name, distribution in distributions.items()}

    states = np.zeros(shape_of_states(structure), jnp.result_type(float))
    check_affine(means, slopes, states, arguments, values, structure)


def check_affine(
    means: Callable,
    slopes: Callable,
    states: Any,
    arguments: Arguments,
    values: dict[str, Any],
    structure: Structure,
    carries: Collection[str] = (),
) -> None:
    """Refuse distributions whose means are not affine in the states, or of which anything else reads these.

    :param means: takes states, arguments and values, and returns means by name.
    :param slopes: takes ``{"states": states}``, and returns the fields of :class:`Linear` by name.
    :param states: arrays.
    :param carries: names among these that are of no site, but of the carry.
    :raises ValueError: naming the site, or the carry.
    """
    try:
        reads = influence(slopes, {"states": states})["states"]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(
            "The model applies a function with a `jax.custom_vjp` to the chain's latent sites, whose slopes cannot be taken "
            "forwards, so whether the chain is linear-Gaussian is not known. Use `jax.custom_jvp`, or `PVMC.posterior`."
        ) from error
    follows = follows_slope(means, states, arguments, values)
    steps = changes_by_steps(lambda states: means(states, arguments, values), states)
    for name, read in reads.items():
        if name in carries:
            if read["lag"] or read["now"] or steps[name] or not follows[name]:
                raise ValueError(
                    "The carry of the scan is not affine in the carry before and the latent sites of the step, so the chain is "
                    "not linear-Gaussian, and has no exact posterior here."
                )
            continue
        if read["root"]:
            raise _refusal(name, "has a Normal distribution whose covariance reads the chain's latent sites")
        if read["mask"]:
            raise _refusal(name, "has a mask that reads the chain's latent sites")
        if read["lag"]:
            raise _refusal(name, "has a Normal distribution whose mean is not affine in the latent sites of the step before")
        if read["now"] or steps[name] or not follows[name]:
            raise _refusal(name, "has a Normal distribution whose mean is not affine in the chain's latent sites")
        if read["value"] and name not in structure.sites:
            raise _refusal(name, "is observed at a value that reads the chain's latent sites")


def _refusal(name, why):
    return ValueError(
        f"Site '{name}' {why}, so the chain is not linear-Gaussian, and has no exact posterior here. Use "
        "`PVMC.posterior`, which approximates that of any chain."
    )


def linearise(chain: Chain, states: jax.Array) -> dict[str, Linear]:
    """Distributions of all sites of the chain, and the slopes of their means.

    :param states: states, shape ``(T + 1, *plates, U)``, at which slopes are taken.
    :return: the distributions at each time, by name, with a leading time axis except for sites of the initial step.
    """

    def means(before, now):
        distributions = _distributions(chain, before, now)
        return {name: distribution.mean for name, distribution in distributions.items()}, distributions

    _, lag, _ = jax.linearize(lambda before: means(before, states), states, has_aux=True)
    _, now, distributions = jax.linearize(lambda now: means(states, now), states, has_aux=True)

    def along(direction):
        # One number of the state moves at all times and in all series at once: none of these reads another.
        direction = jnp.broadcast_to(direction, states.shape)
        return lag(direction), now(direction)

    lags, nows = jax.vmap(along, out_axes=-1)(jnp.eye(states.shape[-1]))
    return {
        name: Linear(distribution.mean, lags[name], nows[name], *distribution[1:])
        for name, distribution in distributions.items()
    }


def matrices(chain: Chain) -> tuple[Matrices, jax.Array | None, dict[str, jax.Array]]:
    """The matrices of a linear-Gaussian chain.

    :param chain: a chain that has passed :func:`check_linear_gaussian`.
    :return: matrices, with axes ``(T + 1, *plates, ...)``, whose states begin with those of :func:`by_site`; where steps are
        present, shape ``(T, *plates)``, or ``None`` if they all are; which latent sites are masked in part: an element of
        theirs has no distribution, and what is computed from the matrices is NaN.
    """
    structure, shape = chain.structure, shape_of_states(chain.structure)
    linear = linearise(chain, jnp.zeros(shape))
    there = presence(chain)
    present = jnp.ones(shape[:-1], bool) if there is None else jnp.ones(shape[:-1], bool).at[1:].set(there.steps)
    partly = {name: present[1:, ..., None] & ~linear[name].mask for name in structure.step}
    partly |= {name: ~linear[name].mask for name in structure.initial}
    linear |= {n: linear[n]._replace(mean=jnp.where(where, jnp.nan, linear[n].mean)) for n, where in partly.items()}
    is_lagged = any(name in structure.edge_factors for name in emissions(structure))
    transition = _transition(linear, structure, present)
    observed = emission(linear, structure, (shape[-1], shape[-1]), is_lagged)
    transition = _with_lag(*transition, present) if is_lagged else transition
    partly = {name: where.any() for name, where in partly.items()}
    return Matrices(*transition, *observed), present[1:] if structure.masked else None, partly


def by_site(states: jax.Array, structure: Structure) -> dict[str, jax.Array]:
    """Sort the numbers of states by site.

    :param states: an array of shape ``(T + 1, *plates, U)``.
    :return: ``{site: (T, *plates, *event)}``, without the time axis for initial sites.
    """
    return _split(states[0], structure.initial_sites, structure) | _split(states[1:], structure.step_sites, structure)


def covariances_by_site(covariances: jax.Array, structure: Structure) -> dict[str, jax.Array]:
    """Sort covariances of states by site, leaving out those between sites.

    :param covariances: an array of shape ``(T + 1, *plates, U, U)``.
    :return: ``{site: (T, *plates, n, n)}``, without the time axis for initial sites.
    """
    found = {}
    for sites, block in ((structure.initial_sites, covariances[0]), (structure.step_sites, covariances[1:])):
        for site, own in zip(sites, _places(sites, structure), strict=True):
            found[site.name] = block[..., own, own]
    return found


def native(states: jax.Array, structure: Structure) -> dict[str, jax.Array]:
    """Sort the numbers of states by site, in the shapes and types that the model gives the sites.

    :param states: an array of shape ``(T + 1, *plates, U)``.
    :return: ``{site: (T, ...)}``, without the time axis for initial sites.
    """
    tidied = by_site(states, structure)
    return {name: from_canonical(tidied[name], site, structure).astype(site.dtype) for name, site in structure.sites.items()}


def shape_of_states(structure: Structure) -> tuple[int, ...]:
    """Shape of the states, ``(T + 1, *plates, U)``: a time step with fewer numbers than another has spare ones that nothing
    reads.
    """
    sizes = [sum(_size(site, structure) for site in sites) for sites in (structure.initial_sites, structure.step_sites)]
    return structure.length + 1, *(plate.size for plate in structure.plates), max(sizes)


def _size(site, structure):
    return math.prod(site.shape) // math.prod(plate.size for plate in structure.plates)


def _places(sites, structure):
    ends = np.cumsum([0, *(_size(site, structure) for site in sites)])
    return [slice(int(begin), int(end)) for begin, end in itertools.pairwise(ends)]


def _split(states, sites, structure):
    parts = {}
    for site, own in zip(sites, _places(sites, structure), strict=True):
        event = to_canonical(np.empty(site.shape), site, structure).shape[len(structure.plates) :]
        parts[site.name] = states[..., own].reshape(states.shape[:-1] + event)
    return parts


def emissions(structure: Structure) -> tuple[str, ...]:
    """Names of the observed sites of a step."""
    return tuple(name for name in (*structure.edge_factors, *structure.node_factors) if name not in structure.step)


def _distributions(chain, before, now):
    """Distributions of all sites of the chain, given in one array the states before each step and in another the states
    there.
    """
    structure = chain.structure
    before, now = native(before, structure), native(now, structure)
    pick = lambda values, sites: {name: values[name] for name in sites}
    first, _ = sites_at_start(chain, pick(before, structure.initial))
    latent = pick(before, structure.step)
    if structure.holding:
        # A held state is that of an earlier step.
        advance = lambda state, step: (sites_of_step(chain, step[0], state, step[1])[0],) * 2
        _, states = lax.scan(advance, first, (chain.inputs, latent))
    else:
        states = jax.vmap(lambda inputs, latent: sites_of_step(chain, inputs, first, latent)[0])(chain.inputs, latent)
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), first, states)

    def at_step(inputs, state, latent):
        _, output, sites = sites_of_step(chain, inputs, state, latent)
        return output, {name: distribution_of(sites[name], structure) for name in (*structure.step, *emissions(structure))}

    outputs, distributions = jax.vmap(at_step)(chain.inputs, states, pick(now, structure.step))
    _, sites = sites_at_start(chain, pick(now, structure.initial))
    distributions |= {
        name: distribution_of(sites[name], structure) for name in (*structure.initial, *structure.initial_factors)
    }
    if structure.later_factors:
        sites = sites_after_scan(chain, pick(now, structure.initial), outputs)
        distributions |= {name: distribution_of(sites[name], structure, leading=1) for name in structure.later_factors}
    return distributions


def distribution_of(site: Site, structure: Structure, leading: int = 0) -> Distribution:
    """The distribution of a site, with `leading` axes of time."""
    name, fn, shape, border = site["name"], site["fn"], site["fn"].shape(), len(site["fn"].batch_shape)
    scale = site["scale"]
    # That of a minibatch is one of whole series, whose evidence is scaled.
    if not (scale is None or (isinstance(scale, int | float) and math.isclose(scale, structure.scale))):
        raise _refusal(name, "is scaled, by `numpyro.handlers.scale`")
    mask = jnp.ones(shape, bool)
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            own = jnp.broadcast_to(fn._mask, fn.batch_shape)
            mask = mask & own.reshape(own.shape + (1,) * fn.event_dim)
        fn = fn.base_dist
    # The last axis of a root is that of independent noise.
    if isinstance(fn, dist.Normal):
        # A covariance would not see the sign of a scale that is none.
        root = jnp.broadcast_to(jnp.where(fn.scale < 0, jnp.nan, fn.scale), shape)[..., None]
    elif isinstance(fn, dist.Delta):
        root = jnp.zeros((*shape, 1))
    elif isinstance(fn, dist.MultivariateNormal):
        # A singular covariance has no Cholesky factor that NumPyro could have computed.
        root = root_of(fn.covariance_matrix) if "covariance_matrix" in vars(fn) else fn.scale_tril
        root = jnp.broadcast_to(root, (*shape, shape[-1]))
    elif isinstance(fn, dist.LowRankMultivariateNormal):
        root = jnp.broadcast_to(root_of(fn.covariance_matrix), (*shape, shape[-1]))
    else:
        raise _refusal(name, f"has a {type(fn).__name__} distribution")
    # Time may be the first axis of the event.
    row = Latent(name, shape[leading : max(border, leading)], shape[max(border, leading) :], jnp.result_type(float))

    def flat(x):
        kept = x.ndim - len(row.shape) + len(structure.plates)
        tidied = to_canonical(x, row, structure)
        return tidied.reshape(*tidied.shape[:kept], math.prod(tidied.shape[kept:]))

    mean = fn.mean
    if isinstance(fn, dist.Delta):  # a factor that it may have is not one of a Gaussian
        own = jnp.asarray(fn.log_density)
        own = own.reshape(own.shape + (1,) * fn.event_dim)
        mean = jnp.where(own == 0, mean, jnp.nan)
    mean, mask, value = (flat(jnp.broadcast_to(x, shape)) for x in (mean, mask, site["value"]))
    size, block = mean.shape[-1], root.shape[-1]
    root = flat(jnp.moveaxis(root, -1, 0))
    root = jnp.moveaxis(root.reshape(*root.shape[:-1], size // block, block), 0, -1)
    # [..., block, row, column] becomes [..., block, row, block, column], zero between one block and another.
    root = (root[..., None, :] * jnp.eye(size // block)[:, None, :, None]).reshape(*mean.shape, size)
    return Distribution(mean.astype(row.dtype), root.astype(row.dtype), mask, value.astype(row.dtype))


def _transition(linear, structure, present):
    """F, c and the root of Q."""
    plates, width = present.shape[1:], shape_of_states(structure)[-1]

    def solved(names, leading):
        distribution = join([linear[name] for name in names], (*leading, *plates), (width, width))
        size = distribution.mean.shape[-1]
        # A site may read those before it: x = mean + lag x_before + now x + noise, and `now` is strictly lower triangular.
        own = jnp.eye(size) - distribution.now[..., :size]
        right = jnp.concatenate([distribution.lag, distribution.mean[..., None], distribution.root], -1)
        right = lax.linalg.triangular_solve(own, right, left_side=True, lower=True, unit_diagonal=True)
        right = padded(right, width - size, -2)
        # Spare numbers are independent noise, so that no covariance is singular.
        spare = jnp.broadcast_to(jnp.eye(width)[:, size:], (*right.shape[:-1], width - size))
        return right[..., :width], right[..., width], jnp.concatenate([right[..., width + 1 :], spare], -1)

    first, rest = solved(structure.initial, ()), solved(structure.step, (structure.length,))
    F, c, root = (jnp.concatenate([x[None], y]) for x, y in zip(first, rest, strict=True))
    there = present[..., None]
    return (
        jnp.where(there[..., None], F, jnp.eye(width)),
        jnp.where(there, c, 0.0),
        jnp.where(there[..., None], root, 0.0),
    )


def _with_lag(F, c, root, present):
    """The same for states that hold the state before as well, which some emission reads."""
    none, one = jnp.zeros_like(F), jnp.zeros_like(F) + jnp.eye(F.shape[-1])
    is_first = (jnp.arange(len(F)) == 0).reshape(-1, *(1,) * (F.ndim - 1))
    there, zero_first = present[..., None, None], jnp.where(is_first, 0.0, one)
    below = jnp.concatenate([jnp.where(there, zero_first, 0.0), jnp.where(there, 0.0, one)], -1)
    F = jnp.concatenate([jnp.concatenate([F, none], -1), below], -2)
    return F, padded(c, c.shape[-1], -1), block_diagonal([root, jnp.where(is_first, one, none)])


def emission(
    linear: dict[str, Linear], structure: Structure, widths: tuple[int, int], is_lagged: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """H, d, the root of R, and y.

    :param widths: as for :func:`join`.
    :param is_lagged: whether the states hold what was before a step, after what is there.
    """
    _, *plates, _ = shape_of_states(structure)
    initial = join([linear[name] for name in structure.initial_factors], plates, widths)
    body = join([linear[name] for name in emissions(structure)], (structure.length, *plates), widths)
    size = max(initial.mean.shape[-1], body.mean.shape[-1], 1)
    initial, body = fill(initial, size), fill(body, size)
    distributions = [jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), initial, body)]
    for name in structure.later_factors:
        # Of T rows there is none for the initial step.
        missing = structure.length + 1 - len(linear[name].mean)
        distributions.append(jax.tree.map(lambda x, n=missing: jnp.pad(x, [(n, 0)] + [(0, 0)] * (x.ndim - 1)), linear[name]))
    distribution = join(distributions, (structure.length + 1, *plates), widths)
    H = jnp.concatenate([distribution.now, distribution.lag], -1) if is_lagged else distribution.now
    # The data are in d, where a NaN under no mask stays one: in y it means that there is nothing.
    return H, distribution.mean - distribution.value, distribution.root, jnp.where(distribution.mask, 0.0, jnp.nan)


def join(distributions: list[Linear], shape: tuple[int, ...], widths: tuple[int, int]) -> Linear:
    """Distributions one after the other.

    :param shape: ``(*plates)``, with time in front where they have it.
    :param widths: how many numbers those of the step before have, and those of the step.
    """
    empty = lambda *ends: jnp.zeros((*shape, 0, *ends))
    none = Linear(empty(), empty(widths[0]), empty(widths[1]), empty(0), empty().astype(bool), empty())
    mean, lag, now, root, mask, value = zip(none, *distributions, strict=True)
    join = jnp.concatenate
    return Linear(join(mean, -1), join(lag, -2), join(now, -2), block_diagonal(root), join(mask, -1), join(value, -1))


def fill(distribution: Linear, size: int) -> Linear:
    """A distribution of `size` numbers, of which those added are masked."""
    added = size - distribution.mean.shape[-1]
    mean, mask, value = (padded(x, added, -1) for x in (distribution.mean, distribution.mask, distribution.value))
    lag, now = (padded(x, added, -2) for x in (distribution.lag, distribution.now))
    return Linear(mean, lag, now, padded(padded(distribution.root, added, -2), added, -1), mask, value)


def padded(x: jax.Array, added: int, axis: int) -> jax.Array:
    """Zeros at the end of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, added)
    return jnp.pad(x, widths)
