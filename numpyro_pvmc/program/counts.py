"""List the values that the discrete sites of a chain can have, where their supports are not constants of the program.

The largest value of a count whose support reads the state before moves from step to step. One table of values serves all: up to
the largest bound of any step, which :mod:`numpyro_pvmc.jaxprs.bounds` proves, or which is declared as
``infer={"max_count": n}``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_pvmc.jaxprs.bounds import Interval, as_interval, bounded, unbounded
from numpyro_pvmc.jaxprs.dependence import influence
from numpyro_pvmc.program.arguments import Arguments, places
from numpyro_pvmc.program.find_chain import capture, first, survey
from numpyro_pvmc.program.handlers import Sites, is_latent, run_body
from numpyro_pvmc.program.limits import limits
from numpyro_pvmc.program.structure import Latent, Structure
from numpyro_pvmc.program.tracebacks import warn_caller

_TELLING = 1e-6  # the probability of a largest count that says that there are others above it


class Bounds(NamedTuple):
    """The least and the largest value of each element of a site, and the largest without regard to what is declared.

    Those of sites of a step have a leading time axis.
    """

    lower: jax.Array
    upper: jax.Array
    support: jax.Array


def list_values(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> Structure:
    """Give discrete sites the values that they can have at any step.

    :param arguments: what it is called with; numbers among them that are not traced may bound a count.
    :param values: values of parameters. They bound none, for they are to be trained.
    :return: the structure, with the values of sites that have bounds, and the reason why the others have none.
    """
    if not any(map(_is_open, (*structure.initial_latents, *structure.step_latents))):
        return structure
    program = structure, model, arguments, values
    numbers, found = _least_numbers(program)

    def listed(site):
        if not _is_open(site):
            return site
        of_site = found[site.name]
        least, most = np.ceil(of_site.lower.min()), np.floor(of_site.upper.max())
        if not np.isfinite(most - least):
            return site._replace(unlisted=_reason(site, *program))
        support = range(int(least), int(max(least, most)) + 1)
        return site._replace(support=support, moves=True, is_cut=bool((of_site.support > of_site.upper).any()))

    return structure._replace(
        initial_sites=tuple(map(listed, structure.initial_sites)),
        step_sites=tuple(map(listed, structure.step_sites)),
        by_value=tuple(place for place, number in zip(places(arguments), numbers, strict=True) if number is not None),
    )


def _is_open(site):
    return site.is_discrete and site.support is None and not site.unlisted


def _least_numbers(program):
    """As few numbers of the arguments, ``None`` in place of others, as bound as many sites as all do; and the bounds."""
    leaves = jax.tree.leaves(program[2])
    numbers = [None] * len(leaves)
    found = _evaluated(program, numbers)
    given = [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in leaves]
    if _finite(found) == len(found) or all(leaf is None for leaf in given):
        return numbers, found
    with_given = _evaluated(program, given)
    if _finite(with_given) == _finite(found):
        return numbers, found
    numbers, found = given, with_given
    for i in range(len(leaves)):
        fewer = [None if j == i else number for j, number in enumerate(numbers)]
        of_fewer = _evaluated(program, fewer)
        if _finite(of_fewer) == _finite(found):
            numbers, found = fewer, of_fewer
    return numbers, found


def _finite(found):
    return sum(bool(np.isfinite(one.lower).all() and np.isfinite(one.upper).all()) for one in found.values())


def _evaluated(program, numbers):
    with jax.core.eval_context():
        return jax.tree.map(np.asarray, jax.jit(lambda numbers: bounds_of_counts(*program, numbers))(numbers))


def warn_of_cut(
    structure: Structure,
    model: Callable,
    arguments: Arguments,
    values: dict[str, Any],
    probabilities: dict[str, jax.Array],
) -> None:
    """Say so if a declared largest count leaves out counts that matter.

    :param probabilities: of the values of each summed site, as :func:`numpyro_pvmc.chain.enumeration.probabilities` has them.
    """
    suspects = {site.name: _mass_at_the_end(site, structure, probabilities[site.name]) for site in structure.states.values()}
    suspects = {name: mass for name, mass in suspects.items() if mass > _TELLING}
    if not suspects:
        return
    found = _evaluated((structure, model, arguments, values), jax.tree.leaves(arguments))
    for name, mass in suspects.items():
        if (found[name].support > found[name].upper).any():
            warn_caller(
                f"The count '{name}' is its `max_count` with the smoothed probability {mass:.2g}, so what lies above, and is "
                "left out, is not negligible. Raise `max_count`.",
            )


def _mass_at_the_end(site, structure, probabilities):
    """The largest probability, over times and elements, of the largest count that was declared."""
    if not site.is_cut:
        return 0.0
    declared = np.reshape(site.max_count, site.shape if isinstance(site.max_count, tuple) else ())
    plates = [len(site.batch_shape) + plate.dim for plate in structure.plates]
    declared = np.moveaxis(np.broadcast_to(declared, site.shape), plates, range(len(plates)))
    *shape, number = probabilities.shape
    place = np.clip(declared - min(site.support), 0, number - 1)
    place = np.broadcast_to(place.reshape(shape[int(site in structure.step_states) :]), shape)
    return float(np.take_along_axis(np.asarray(probabilities), place[..., None], -1).max())


def reads_numbers(model: Callable, arguments: Arguments) -> bool:
    """Whether a discrete latent site has a support that is no constant of the program: arguments may bound it."""
    found = []

    def look(arguments):
        scans, outside = survey(model, arguments, {})
        sites = [site for sites in (outside, *(scan.latent for scan in scans)) for site in sites.values() if is_latent(site)]
        found.extend(site["fn"] for site in sites if site["fn"].support is not None and site["fn"].support.is_discrete)

    try:
        jax.eval_shape(look, arguments)
    except jax.errors.ConcretizationTypeError:
        return False  # whoever reads the program says why it cannot be
    return any(isinstance(end, jax.core.Tracer) for fn in found for end in limits(fn))


def bounds_of_counts(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], numbers: list[Any] | None = None
) -> dict[str, Bounds]:
    """Bounds of the counts of a chain, step by step.

    :param values: values of parameters, which are not looked at.
    :param numbers: the leaves of `arguments` that are looked at, ``None`` in place of others; all by default.
    :return: bounds of those discrete sites whose support is no constant of the program, by name. They are traced if the
        arguments are.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    numbers = leaves if numbers is None else numbers
    known = [unbounded(_like(leaf)) if number is None else number for leaf, number in zip(leaves, numbers, strict=True)]

    def reach(rng_key, values, leaves, initial):
        arguments = jax.tree.unflatten(treedef, leaves)
        return capture(model, arguments, {**values, **initial}, structure, rng_key)

    def at_start(*given):
        scan, sites = reach(*given)
        return jax.tree.map(jnp.asarray, (jax.tree.leaves(scan.init), jax.tree.leaves(scan.xs))), _ends(sites, structure)

    def at_step(*given_and_now):
        *given, t, carry, x, latent = given_and_now
        scan, _ = reach(*given)
        carry, x = (jax.tree.unflatten(jax.tree.structure(full), part) for full, part in ((scan.init, carry), (scan.xs, x)))
        carry, _, sites = run_body(scan, t, carry, x, latent, structure.length)
        return jax.tree.leaves(carry), _ends(sites, structure)

    # The key is unknown, so no draw is taken for a number of the program.
    like = [*jax.tree.map(_like, (random.key(0), values, leaves)), _like_sites(structure.initial_latents)]
    hidden = [*jax.tree.map(unbounded, like[:2]), known]
    start = bounded(at_start, *like)
    (carry, xs), initial, of_start = _narrowed(lambda initial: start(*hidden, initial), structure.initial_latents)
    carry_like, xs_like = jax.eval_shape(at_start, *like)[0]
    x_like = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs_like]
    advance = bounded(at_step, *like, jnp.zeros((), int), carry_like, x_like, _like_sites(structure.step_latents))

    def step(carry, t_and_x):
        given = *hidden, initial, t_and_x[0], carry, t_and_x[1]
        carry, _, of_step = _narrowed(lambda latent: advance(*given, latent), structure.step_latents)
        return list(map(as_interval, carry)), of_step

    _, of_steps = lax.scan(step, list(map(as_interval, carry)), (jnp.arange(structure.length), xs))
    return of_start | of_steps


def _narrowed(evaluate, sites):
    """What `evaluate` returns of bounds of sites, these bounds, and those of the counts among them.

    The support of a site may read another one of the same step: so there are as many rounds as counts.
    """
    latent = {site.name: _of_support(site) for site in sites}
    counts = [site.name for site in sites if _is_count(site)]
    for _ in range(len(counts) + 1):
        result, ends = evaluate(latent)
        found = {name: Bounds(*map(as_interval, ends[name])) for name in counts}
        found = {name: Bounds(one.lower.lower, one.upper.upper, one.support.upper) for name, one in found.items()}
        # Where a support is empty there is no count, and no bound of it is wrong.
        latent = latent | {name: Interval(one.lower, jnp.maximum(one.lower, one.upper)) for name, one in found.items()}
    return result, latent, found


def _of_support(site):
    like = _like_sites([site])[site.name]
    if site.support is None or _is_count(site):
        return unbounded(like)
    return Interval(jnp.full(like.shape, float(min(site.support))), jnp.full(like.shape, float(max(site.support))))


def _is_count(site):
    return _is_open(site) or site.moves


def _ends(sites: Sites, structure: Structure) -> dict[str, list[jax.Array]]:
    """Of the counts among some sites: the least value, the largest, and the largest without regard to what is declared."""
    found = {}
    for site in (*structure.initial_latents, *structure.step_latents):
        if site.name in sites and _is_count(site):
            fn = sites[site.name]["fn"]
            ends = *limits(fn, sites[site.name]["infer"].get("max_count")), limits(fn)[1]
            found[site.name] = [jnp.broadcast_to(end, site.shape) for end in ends]
    return found


def _like(leaf):
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def _like_sites(sites):
    return {site.name: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in sites}


def _reason(site: Latent, structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> str:
    """What the support of a site reads, of which no bound is known."""
    scan, outside = capture(model, arguments, values, structure)
    varying = [name for name, other in outside.items() if other["type"] == "param" or name in structure.global_sites]
    parts = {
        "the state before": scan.init,
        "the inputs of the scan": first(scan.xs),
        "parameters or global sites": {name: outside[name]["value"] for name in varying},
        "arguments of the model": jax.tree.leaves(arguments),
    }

    def look(parts):
        there = jax.tree.unflatten(jax.tree.structure(arguments), parts["arguments of the model"])
        varying = {**values, **parts["parameters or global sites"]}
        scan, sites = capture(model, there, varying, structure)
        before, x = parts["the state before"], parts["the inputs of the scan"]
        _, _, of_step = run_body(scan, 0, before, x, {}, structure.length)
        return _ends({**sites, **of_step}, structure)[site.name]

    reads = [what for what, read in influence(look, parts).items() if any(read)]
    return f"reads {' and '.join(reads)}, of which no bound is known" if reads else "has no bound that is known"
