"""Evaluate the Markov chain of a program, one particle and one step at a time.

A chain is an initial step, `begin`, that gives the log density and the state of one particle of the initial sites; and a step,
`step`, that gives for one particle before it and one after it the log density that reads both (*edge*), the log density that
reads the particle after only (*node*), the new state and the outputs. A deterministic start is an initial step without sites.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_pvmc.jaxprs.dependence import influence
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import mask_of
from numpyro_pvmc.program.find_chain import capture, first
from numpyro_pvmc.program.handlers import Scan, Site, Sites, log_prob, run, run_body
from numpyro_pvmc.program.limits import Limits, Within, without_mass
from numpyro_pvmc.program.structure import Structure, per_series, time_rows


class Chain(NamedTuple):
    """A program read at given parameters and global sites.

    `inputs` is what a step reads beside the states: time index, inputs of the scan, clock leaves of the carry; all with a
    leading time axis. `outside` holds the sites outside the scan. `gradient_scale` has what the gradient of the log density
    of a site is multiplied by, where that is not 1.
    """

    structure: Structure
    model: Callable
    arguments: Arguments
    values: dict[str, Any]
    scan: Scan
    outside: Sites
    inputs: Any
    gradient_scale: dict[str, Any]


class Presence(NamedTuple):
    """Where a chain is present: arrays of booleans of shape ``(T, *plates)``.

    `sites` is false where a latent site is masked, by name. `steps` is false where all of them are, and nothing is observed.
    """

    sites: dict[str, jax.Array]
    steps: jax.Array


class Step(NamedTuple):
    """One step for one pair of particles: densities of shape ``(*plates)``."""

    edge: jax.Array
    node: jax.Array
    state: list[jax.Array]
    output: Any


def read_chain(
    structure: Structure,
    model: Callable,
    arguments: Arguments,
    values: dict[str, Any],
    gradient_scale: Mapping[str, Any] = MappingProxyType({}),
) -> Chain:
    """Read the chain of a program at given values.

    :param gradient_scale: what the gradient of a site's log density is multiplied by, by name.
    :return: the chain.
    """
    # Nothing here reads the chain's latent sites, so they may be drawn, from their own distributions: a constant might lie
    # outside.
    scan, outside = capture(model, arguments, values, structure)
    treedef = jax.tree.structure(scan.init)
    state, clocks = split(structure, scan.init)
    times = jnp.arange(structure.length)

    def tick(clocks, t_and_x):
        t, x = t_and_x
        carry = _merge(structure, treedef, state, clocks)
        carry, _, _ = run_body(scan, t, carry, x, {}, structure.length)
        _, new = split(structure, carry)
        return [n.astype(c.dtype) for n, c in zip(new, clocks, strict=True)], clocks

    clock_inputs = lax.scan(tick, clocks, (times, scan.xs))[1] if clocks else []
    inputs = times, scan.xs, clock_inputs
    return Chain(structure, model, arguments, values, scan, outside, inputs, dict(gradient_scale))


def begin(chain: Chain, initial: dict[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The initial step of a chain, for one particle.

    :param initial: values of the initial sites.
    :return: log density of the initial sites and of the sites observed with them, shape ``(*plates)``; state leaves of the
        first carry.
    """
    structure = chain.structure
    state, sites = sites_at_start(chain, initial)
    names = [site.name for site in structure.initial_latents]
    return log_density(chain, sites, (*names, *structure.initial_factors)), state


def sites_at_start(chain: Chain, initial: dict[str, jax.Array]) -> tuple[list[jax.Array], Sites]:
    """The sites outside the scan, for one particle.

    :param initial: values of the initial sites.
    :return: state leaves of the first carry; sites, of which those after the scan have no meaning.
    """
    counts = {name: value for name, value in initial.items() if chain.structure.latents[name].moves}
    model = Within(chain.model, counts, {}) if counts else chain.model
    others = {name: value for name, value in initial.items() if name not in counts}
    scan, sites = capture(model, chain.arguments, {**chain.values, **others}, chain.structure)
    state, _ = split(chain.structure, scan.init)
    return state, sites


def step(
    chain: Chain,
    inputs: Any,
    state: list[jax.Array],
    latent: dict[str, jax.Array],
    ends: Mapping[str, Limits] = MappingProxyType({}),
) -> Step:
    """One step of a chain, for one particle before and one after.

    :param inputs: one step of ``chain.inputs``.
    :param state: state leaves of the carry before the step.
    :param latent: values of the latent sites of the step.
    :param ends: limits of counts, by name, in place of those that their supports have given this very state.
    :return: log densities, new state, output. Under `jax.vmap` over `latent` alone, what reads `latent` alone is computed
        once for each.
    """
    new_state, output, sites = sites_of_step(chain, inputs, state, latent, ends)
    edge = log_density(chain, sites, chain.structure.edge_factors)
    node = log_density(chain, sites, chain.structure.node_factors)
    return Step(edge, node, new_state, output)


def sites_of_step(
    chain: Chain,
    inputs: Any,
    state: list[jax.Array],
    latent: dict[str, jax.Array],
    ends: Mapping[str, Limits] = MappingProxyType({}),
) -> tuple[list[jax.Array], Any, Sites]:
    """The sites of one step, for one particle before and one after.

    The arguments are those of :func:`step`.

    :return: new state, output, sites.
    """
    counts = {name: value for name, value in latent.items() if chain.structure.latents[name].moves}
    if counts:
        chain = chain._replace(scan=chain.scan._replace(body=Within(chain.scan.body, counts, ends)))
        latent = {name: value for name, value in latent.items() if name not in counts}
    carry, output, sites = _run_step(chain, inputs, state, latent)
    new_state, _ = split(chain.structure, carry)
    return [new.astype(old.dtype) for new, old in zip(new_state, state, strict=True)], output, sites


def presence(chain: Chain) -> Presence | None:
    """At which steps the chain has its latent sites.

    :return: where sites and steps are present; ``None`` if no site is ever masked.
    """
    structure = chain.structure
    if not structure.masked:
        return None

    def at_step(sites):
        latent = {site.name: unmasked(sites[site.name], chain) > 0 for site in structure.step_latents}
        steps = functools.reduce(jnp.logical_or, latent.values())
        if not structure.holding:
            # Nothing holds the state of a masked step, so its value is given, and observed sites may still read it.
            observed = [site for site in sites.values() if site["type"] == "sample" and site["is_observed"]]
            steps = functools.reduce(jnp.logical_or, [unmasked(site, chain) > 0 for site in observed], steps)
        return Presence(latent, steps)

    return at_all_steps(chain, at_step)


def after_scan(chain: Chain, initial: dict[str, jax.Array], outputs: Any) -> jax.Array:
    """Log density of the observed sites after the scan, for the outputs of one particle at each time.

    :param initial: values of the initial sites.
    :param outputs: stacked outputs of the scan.
    :return: an array of shape ``(T + 1, *plates)``, whose first row reads `initial`.
    """
    structure = chain.structure
    sites = sites_after_scan(chain, initial, outputs)
    total = jnp.zeros([structure.length + 1, *(plate.size for plate in structure.plates)])
    for name in structure.later_factors:
        rows = time_rows(sites[name], structure.length, structure.plates)
        rows = with_gradient_scale(chain, name, rows) / structure.scale
        total = total.at[structure.length + 1 - len(rows) :].add(rows)
    return total


def sites_after_scan(chain: Chain, initial: dict[str, jax.Array], outputs: Any) -> Sites:
    """The sites outside the scan, for the outputs of one particle at each time.

    The arguments are those of :func:`after_scan`.

    :return: sites.
    """

    def at_scan(index, scan):
        return (scan.init, outputs, {}) if index == chain.structure.scan_index else None

    return run(chain.model, chain.arguments, {**chain.values, **initial}, random.key(0), at_scan)


def global_log_density(chain: Chain) -> jax.Array:
    """Log density of the global sites, and of the observed sites that read nothing of the chain, summed."""
    names = (*chain.structure.global_sites, *chain.structure.global_factors)
    return sum((with_gradient_scale(chain, name, log_prob(chain.outside[name])).sum() for name in names), start=jnp.zeros(()))


def supports(chain: Chain) -> dict[str, Any]:
    """Constraints on the values of the chain's latent sites, by name.

    :raises ValueError: naming a site whose constraint is not the same at all times and for all parameters.
    """
    structure = chain.structure
    state, _ = split(structure, chain.scan.init)
    of_site = _supports(chain, first(chain.inputs), state)
    if not jax.tree.leaves(of_site):
        return of_site
    outside = [name for name, site in chain.outside.items() if site["type"] == "param" or name in structure.global_sites]
    parts = {
        "the state before": state,
        "the inputs of the scan": first(chain.inputs),
        "parameters or global sites": {name: chain.outside[name]["value"] for name in outside},
    }

    def look(parts):
        there = read_chain(structure, chain.model, chain.arguments, {**chain.values, **parts["parameters or global sites"]})
        found = _supports(there, parts["the inputs of the scan"], parts["the state before"])
        return {name: [jnp.asarray(x) for x in jax.tree.leaves(support)] for name, support in found.items()}

    asked = {what: part for what, part in parts.items() if jax.tree.leaves(part)}
    for what, reads in influence(lambda asked: look(parts | asked), asked).items():
        for name, read in reads.items():
            if any(read) and not (name in structure.initial and what != "parameters or global sites"):
                raise ValueError(
                    f"The support of site '{name}' reads {what}: it has no unconstrained coordinates of its own, in which to "
                    "propose. Sample an unconstrained site and transform it in the model, or write a guide for it."
                )
    return of_site


def _supports(chain, inputs, state):
    _, _, sites = _run_step(chain, inputs, state, {})
    return {name: {**chain.outside, **sites}[name]["fn"].support for name in chain.structure.sites}


def mutable_state(chain: Chain) -> dict[str, Any]:
    """Mutable state that the program left behind, by name."""
    return {name: site["value"] for name, site in chain.outside.items() if site["type"] == "mutable"}


def unmasked(site: Site, chain: Chain) -> jax.Array:
    """How many elements of a site are not masked, for each series."""
    mask = mask_of(site)
    return per_series(jnp.ones((), jnp.int32) if mask is None else mask.astype(jnp.int32), chain.structure.plates)


def at_all_steps(chain: Chain, function: Callable[[Sites], Any]) -> Any:
    """`function` of the sites of every step, whose latent values have no meaning.

    :param function: takes the sites of one step.
    :return: what it returns, with a leading time axis.
    """
    state, _ = split(chain.structure, chain.scan.init)
    return jax.vmap(lambda inputs: function(_run_step(chain, inputs, state, {})[2]))(chain.inputs)


def _run_step(chain, inputs, state, latent):
    t, x, clocks = inputs
    carry = _merge(chain.structure, jax.tree.structure(chain.scan.init), state, clocks)
    return run_body(chain.scan, t, carry, x, latent, chain.structure.length)


def log_density(chain: Chain, sites: Sites, names: Iterable[str]) -> jax.Array:
    """Log density of some sites, summed over all axes but those of the plates.

    :param sites: sites of one step, or outside the scan.
    :param names: which of them.
    :return: an array of shape ``(*plates)``.
    """
    plates, scale = chain.structure.plates, chain.structure.scale
    # The scale of a minibatch is one of the bound, not of the densities of a series.
    own = {name: without_mass(sites[name], log_prob(sites[name])) for name in names}
    densities = [per_series(with_gradient_scale(chain, name, own[name]), plates) / scale for name in names]
    return sum(densities[1:], start=densities[0]) if densities else jnp.zeros([plate.size for plate in plates])


def with_gradient_scale(chain: Chain, name: str, log_density: jax.Array) -> jax.Array:
    """A log density of a site, whose gradient is multiplied by what was asked for.

    :param name: the site.
    :param log_density: an array.
    """
    return _scale_gradient(log_density, chain.gradient_scale[name]) if name in chain.gradient_scale else log_density


@jax.custom_jvp
def _scale_gradient(x, scale):
    """x, with a gradient that is multiplied by `scale`."""
    return x


@_scale_gradient.defjvp
def _(primals, tangents):
    x, scale = primals
    return x, (scale * tangents[0]).astype(x.dtype)


def split(structure: Structure, carry: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """State leaves and clock leaves of a carry."""
    leaves = list(zip(map(jnp.asarray, jax.tree.leaves(carry)), structure.is_state, strict=True))
    return [leaf for leaf, is_state in leaves if is_state], [leaf for leaf, is_state in leaves if not is_state]


def _merge(structure, treedef, state, clocks):
    state, clocks = iter(state), iter(clocks)
    return jax.tree.unflatten(treedef, [next(state) if is_state else next(clocks) for is_state in structure.is_state])
