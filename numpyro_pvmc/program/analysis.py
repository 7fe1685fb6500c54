"""Find the structure of the Markov chain of a program, or say what is not Markov about it.

What depends on what is asked of the program as of any function (`dependence`): which leaves of the carry are state and
which are clocks, which sites before the scan are the chain's initial step and which are global, which factors read the
previous state, which sites nothing reads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random

from numpyro_pvmc.jaxprs.dependence import influence
from numpyro_pvmc.program.arguments import Arguments, signature
from numpyro_pvmc.program.distributions import base_distribution, is_bounded, mask_of
from numpyro_pvmc.program.find_chain import capture, check_continuous, choose_chain, first, survey, unknown, with_carry_dtypes
from numpyro_pvmc.program.handlers import is_latent, log_prob, run, run_body
from numpyro_pvmc.program.holds import check_masks
from numpyro_pvmc.program.limits import declared_max_count, limits
from numpyro_pvmc.program.structure import Latent, Plate, Structure

_WITHOUT_NOISE = (
    " (If the chain is linear and Gaussian, a component without noise of its own is no matter to "
    "`numpyro_pvmc.exact.exact_posterior` and `marginalize`, which take the program as it is.)"
)


def analyse(model: Callable, arguments: Arguments, values: dict[str, Any], carried: bool = False) -> Structure:
    """Find the Markov chain of a program.

    :param values: values of parameters; those not given take their initial values.
    :param carried: whether the carry may hold what is computed from the old carry and the sites of the step.
    :return: its structure.
    :raises ValueError: if the program has no chain, or several, or one that is not first-order Markov; the message names
        the site or the leaf of the carry and says what to write.
    """
    found = []

    def abstractly(values, arguments):
        found.append(_analyse(model, arguments, values, carried))

    try:
        jax.eval_shape(abstractly, values, arguments)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "The program needs the value of an array to go on, in a Python `if`, `float(...)` or `range(...)`: see the line of "
            "the model in the error above. Inside a step write `jnp.where` or `jax.lax.cond`; numbers that shape the program, "
            "such as a length, are passed as Python numbers."
        ) from error
    structure, unread, messages = found[0]
    if structure.holding or structure.masked:
        reason = check_masks(structure, model, arguments, values, unread)
        if reason is not None and not carried:
            raise ValueError(messages[reason] + _WITHOUT_NOISE)
        if reason is not None:
            structure = structure._replace(carried=True, holding=False)
    return structure


def _analyse(model, arguments, values, carried):
    """The structure; which state leaves nothing reads; messages for the case that what looks like a hold is none."""
    found, outside = survey(model, arguments, values)
    chain = choose_chain(found)
    fixed = [name for name, site in chain.latent.items() if isinstance(base_distribution(site["fn"]), dist.Delta)]
    if fixed and not carried:
        raise ValueError(
            f"Latent site '{fixed[0]}' of the scan has a `Delta` distribution: a step without noise has no density, and no "
            "particle but its own can be reached. Give every component of the state some noise, or compute it from the "
            "sampled trajectories after inference." + _WITHOUT_NOISE
        )
    outside_latent = {name: site["value"] for name, site in outside.items() if is_latent(site)}
    for other in found:
        if other.scan_index != chain.scan_index:
            check_continuous(other.latent)
            outside_latent |= {n: jnp.stack([s["value"]] * other.length) for n, s in other.latent.items()}
    observed = [name for name, site in outside.items() if site["type"] == "sample" and site["is_observed"]]

    reads, paths = _carry_influence(model, arguments, values, chain)
    free = _free_sites(reads, chain, bool(observed))
    drawn_freely = [_latent(chain.latent[name]) for name in free]
    chain = chain._replace(latent={name: site for name, site in chain.latent.items() if name not in free})
    reads["latent"] = _any_of([reads[f"latent {name}"] for name in chain.latent])
    is_clock = _clocks(reads, len(paths))
    state = [str(i) for i in range(len(paths)) if not is_clock[i]]
    kept = [(int(i), j) for i in state for j in state if reads[j]["carry"][int(i)]]
    messages = _messages_of_kept(kept[0], reads, paths, chain, state) if kept else {}
    unread = tuple(not any(jax.tree.leaves(_by_others(reads[i], int(i)))) for i in state)

    outer = _outer_influence(model, arguments, values, chain, outside_latent)
    initial = _initial_sites(outer, is_clock)
    later, imputed, lagged = _later_sites(model, arguments, values, chain, outside_latent, reads, state, outer)
    if lagged and not carried:
        raise ValueError(
            f"Site '{lagged[0]}' after the scan reads an output of the scan that depends on the state before the step. "
            "Observe it inside the body of the scan, where it may read both."
        )
    drawn_freely += [_latent(outside[name]) for name in imputed]
    global_sites = tuple(name for name in outside_latent if name not in initial and name not in imputed)
    check_continuous({name: outside[name] for name in global_sites if name in outside})
    initial_factors = tuple(
        name for name in observed if name not in later and any(outer[site]["distributions"][name] for site in initial)
    )
    factors = {name: site for name, site in chain.sites.items() if site["type"] == "sample" and name not in free}
    edge_factors = tuple(name for name in factors if any(reads[i]["factors"][name] for i in state))
    enclosed = factors | {name: outside[name] for name in (*initial, *initial_factors, *later)}
    plates = _series({name: outside[name] for name in initial} | chain.latent, {**outside, **chain.sites})
    _check_enclosed(enclosed, plates)
    structure = Structure(
        scan_index=chain.scan_index,
        length=chain.length,
        carry_dtypes=chain.carry_dtypes,
        plates=plates,
        initial_sites=tuple(_latent(outside[name]) for name in initial),
        step_sites=tuple(_latent(site) for site in chain.latent.values()),
        global_sites=global_sites,
        is_state=tuple(not clock for clock in is_clock),
        holding=bool(kept),
        masked=any(mask_of(site) is not None for site in chain.latent.values()),
        edge_factors=edge_factors,
        node_factors=tuple(name for name in factors if name not in edge_factors),
        initial_factors=initial_factors,
        later_factors=later,
        global_factors=tuple(name for name in observed if name not in (*initial_factors, *later)),
        free_sites=tuple(drawn_freely),
        parameters=tuple((name, signature(site["value"])) for name, site in outside.items() if site["type"] == "param"),
        outside=tuple(name for name, site in outside.items() if site["type"] != "param"),
        carried=bool(fixed or lagged),
        subsampled=tuple(n for n, s in outside.items() if s["type"] == "plate" and s["args"][1] not in (None, s["args"][0])),
    )
    return structure, unread, messages


def _latent(site):
    fn, shape = site["fn"], jnp.shape(site["value"])
    border, max_count = len(shape) - fn.event_dim, declared_max_count(site)
    is_discrete = fn.support is not None and fn.support.is_discrete
    unlisted = ""
    if is_discrete and base_distribution(fn).event_shape:
        unlisted = "is one of vectors"
    elif is_discrete and max_count is None and limits(fn)[1] is math.inf:
        unlisted = "has no end"
    return Latent(
        name=site["name"],
        batch_shape=shape[:border],
        event_shape=shape[border:],
        dtype=jnp.result_type(site["value"]),
        support=None if max_count is not None else _support(fn),
        is_bounded=is_bounded(fn),
        is_discrete=is_discrete,
        max_count=max_count,
        unlisted=unlisted,
    )


def _support(fn):
    """The values of one element of a discrete distribution, if they are finitely many, and constants of the program."""
    fn = base_distribution(fn)
    if not fn.has_enumerate_support or fn.event_shape:
        return None
    try:
        with jax.ensure_compile_time_eval():
            return tuple(int(value) for value in np.ravel(fn.enumerate_support(expand=False)))
    except (NotImplementedError, jax.errors.ConcretizationTypeError):
        return None


def _carry_influence(model, arguments, values, chain):
    """What of a step reads which leaf of the carry, and which latent site of the step; and the leaves' names."""
    scan, _ = capture(model, arguments, values, chain)
    leaves, treedef = jax.tree.flatten_with_path(scan.init)
    parts, x = {str(i): unknown(leaf) for i, (_, leaf) in enumerate(leaves)}, unknown(first(scan.xs))
    parts |= {f"latent {name}": site["value"] for name, site in chain.latent.items()}

    def step(parts):
        carry = jax.tree.unflatten(treedef, [parts[str(i)] for i in range(len(leaves))])
        latent = {name: parts[f"latent {name}"] for name in chain.latent}
        carry, output, sites = run_body(scan, 0, carry, x, latent, chain.length)
        factors = {name: log_prob(site) for name, site in sites.items() if site["type"] == "sample"}
        return {"carry": jax.tree.leaves(carry), "output": jax.tree.leaves(output), "factors": factors}

    return influence(step, parts), [f"carry{jax.tree_util.keystr(path)}" for path, _ in leaves]


def _free_sites(reads, chain, is_observed_later):
    """Latent sites of a step that no state and no other factor reads, such as missing observations."""
    free = ()
    while True:
        others = [name for name in reads[f"latent {next(iter(chain.latent))}"]["factors"] if name not in free]

        def is_read(name, others=others):
            read = reads[f"latent {name}"]
            by_output = is_observed_later and any(read["output"])
            return by_output or any(read["carry"]) or any(read["factors"][other] for other in others if other != name)

        grown = tuple(name for name in chain.latent if not is_read(name))
        if grown == free or len(grown) == len(chain.latent):
            return free
        free = grown


def _any_of(reads):
    return jax.tree.map(lambda *read: any(read), *reads)


def _clocks(reads, number_leaves):
    """Leaves that never read a latent site, not even by way of another leaf."""
    state = {i for i in range(number_leaves) if reads["latent"]["carry"][i]}
    while grown := {i for i in range(number_leaves) if any(reads[str(j)]["carry"][i] for j in state)} - state:
        state |= grown
    return [i not in state for i in range(number_leaves)]


def _by_others(read, own):
    """What reads a leaf of the carry, but for that leaf after the step."""
    return read | {"carry": [is_read for leaf, is_read in enumerate(read["carry"]) if leaf != own]}


def _messages_of_kept(pair, reads, paths, chain, state):
    """What is said of a leaf that reads another, or itself, from before the step, by the way in which it keeps it."""
    new, old = pair
    latent = sorted(chain.latent)
    begin = f"The scan over {latent} is not a first-order Markov chain: `{paths[new]}` after a step depends on "
    blocks = (
        "Scan over blocks of L steps with the block as the state, or give the lagged component noise of its own. (A bare lag "
        "in the state would make the transition singular.)"
    )
    window = (
        f"{begin}elements of `{paths[int(old)]}` before it, moved to other places beside {latent}: it is a window of lags. "
        f"{blocks}"
    )
    if not reads["latent"]["carry"][new]:
        begin += f"`{paths[int(old)]}` before it and on no site of the step, so it keeps a second lag of the state. "
        return {"window": begin + blocks, "other": begin + blocks}
    if not any(reads[i]["factors"][name] for i in state for name in latent):
        other = (
            f"{begin}`{paths[int(old)]}` before it and on {latent}, and the distributions of {latent} do not read the carry: "
            "this is a non-centred recursion, in which the whole past enters every step. Write the centred form, with the new "
            "state itself as the sample site (and without `LocScaleReparam`)."
        )
        return {"window": window, "other": other}
    other = (
        f"{begin}`{paths[int(old)]}` before it as well as on {latent}, so it accumulates the past. Make it part of the state "
        "with noise of its own, or compute it after inference from the sampled trajectories. For padded steps a "
        "`jnp.where(mask, new, old)` is understood where the latent sites stand under that very mask, "
        "`numpyro.handlers.mask(mask=mask)`, and the mask does not read them."
    )
    return {"window": window, "other": other}


def _outer_influence(model, arguments, values, chain, outside_latent):
    """What of the program outside the scan's outputs reads which latent site outside the scan."""
    constant = {name: site["value"] for name, site in chain.latent.items()}

    def outer(latent):
        read = {}

        def at_scan(index, scan):
            if index != chain.scan_index:
                return None
            scan = with_carry_dtypes(scan, chain.carry_dtypes)
            leaves, treedef = jax.tree.flatten(scan.init)
            carry = jax.tree.unflatten(treedef, [unknown(jnp.zeros_like(leaf)) for leaf in leaves])
            x = unknown(jax.tree.map(jnp.zeros_like, first(scan.xs)))
            read["init"], read["xs"] = leaves, jax.tree.leaves(scan.xs)
            last, output, sites = run_body(scan, 0, carry, x, constant, chain.length)
            densities = [log_prob(site) for site in sites.values() if site["type"] == "sample"]
            read["body"] = [densities, jax.tree.leaves(last), jax.tree.leaves(output)]
            stacked = jax.tree.map(lambda leaf: jnp.zeros((chain.length, *jnp.shape(leaf)), jnp.result_type(leaf)), output)
            return carry, stacked, {}

        sites = run(model, arguments, {**values, **latent}, random.key(0), at_scan)
        read["distributions"] = {name: log_prob(site) for name, site in sites.items() if site["type"] == "sample"}
        return read

    return influence(outer, outside_latent)


def _initial_sites(outer, is_clock):
    """Sites that reach the program only through state leaves of the first carry, and each other."""

    def is_initial(read):
        through_state = [reached for reached, clock in zip(read["init"], is_clock, strict=True) if not clock]
        through_clock = [reached for reached, clock in zip(read["init"], is_clock, strict=True) if clock]
        return any(through_state) and not any(through_clock + jax.tree.leaves((read["xs"], read["body"])))

    initial = [name for name, read in outer.items() if is_initial(read)]
    while read_by_global := [
        name for name in initial if any(outer[name]["distributions"].get(other) for other in outer if other not in initial)
    ]:
        initial = [name for name in initial if name not in read_by_global]
    return tuple(initial)


def _later_sites(model, arguments, values, chain, outside_latent, reads, state, outer):
    """Observed sites after the scan that read its outputs; and latent ones that nothing else reads."""
    scan, _ = capture(model, arguments, {**values, **outside_latent}, chain)
    leaves, treedef = jax.tree.flatten(scan.init)
    _, output, _ = run_body(scan, 0, unknown(scan.init), unknown(first(scan.xs)), {}, chain.length)
    outputs, output_tree = jax.tree.flatten(output)
    parts = {"last": [leaves[int(i)] for i in state]}
    parts |= {i: jnp.stack([output] * chain.length) for i, output in enumerate(outputs)}
    latent = {}

    def after(parts):
        carry = list(leaves)
        for i, leaf in zip(state, parts["last"], strict=True):
            carry[int(i)] = leaf
        stacked = jax.tree.unflatten(output_tree, [parts[i] for i in range(len(outputs))])
        given = jax.tree.unflatten(treedef, carry), stacked, {}
        sites = run(
            model, arguments, {**values, **outside_latent}, random.key(0), lambda i, _: given if i == chain.scan_index else None
        )
        latent.update({name: is_latent(site) for name, site in sites.items() if site["type"] == "sample"})
        return {name: log_prob(site) for name, site in sites.items() if name in latent}

    read = influence(after, parts)
    later = tuple(name for name in latent if any(read[i][name] for i in range(len(outputs))))
    imputed = tuple(
        name for name in later if latent[name] and not any(jax.tree.leaves(_without_own_distribution(outer[name], name)))
    )
    later = tuple(name for name in later if name not in imputed)
    for name in latent:
        if read["last"][name]:
            raise ValueError(
                f"Site '{name}' after the scan reads the last carry of the chain. Only the stacked outputs, which have a "
                "time axis, can be read after the scan: observe it inside the body, masked except at the last step."
            )
    lagged = []
    for name in later:
        if latent[name]:
            raise ValueError(
                f"Latent site '{name}' after the scan reads the outputs of the chain. Sample it inside the body of the scan."
            )
        if any(read[i][name] and any(reads[j]["output"][i] for j in state) for i in range(len(outputs))):
            lagged.append(name)
    return later, imputed, lagged


def _without_own_distribution(read, name):
    return read | {"distributions": {other: is_read for other, is_read in read["distributions"].items() if other != name}}


def _series(latent, sites):
    """Plates around all latent sites of the chain, leftmost first."""
    stacks = [set(site["cond_indep_stack"]) for site in latent.values()]
    frames = sorted(set.intersection(*stacks), key=lambda frame: frame.dim)
    total = {frame.name: sites[frame.name]["args"][0] if frame.name in sites else frame.size for frame in frames}
    return tuple(Plate(*frame, total[frame.name]) for frame in frames)


def _check_enclosed(sites, plates):
    for name, site in sites.items():
        around = {frame.name for frame in site["cond_indep_stack"]}
        for plate in plates:
            if plate.name not in around:
                raise ValueError(
                    f"Site '{name}' stands outside the plate '{plate.name}', which encloses all latent sites of the chain and "
                    f"makes its {plate.size} elements independent series. Enter the plate around '{name}' too, or, if "
                    "the series share it, leave the plate out of the model."
                )
