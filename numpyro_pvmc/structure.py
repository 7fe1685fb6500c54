"""A NumPyro program in, the structure of its Markov chain out, or an error that says what is not Markov about it.

What depends on what is asked of the program as of any function (`dependence`): which leaves of the carry are state and
which are clocks, which sites before the scan are the chain's beginning and which are global, which factors read the
previous state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random

from numpyro_pvmc.dependence import holds, influence
from numpyro_pvmc.program import Arguments, Site, is_latent, log_prob, mask_of, run, run_body
from numpyro_pvmc.survey import capture, check_continuous, choose_chain, first, survey


class Plate(NamedTuple):
    """A plate that encloses all latent sites of the chain: its elements are independent series."""

    name: str
    dim: int
    size: int


class Latent(NamedTuple):
    """One draw of a latent site: its shapes left and right of the border between batch and event axes."""

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch_shape + self.event_shape


class Structure(NamedTuple):
    """What of a program is its chain. Hashable Python values only: nothing here is traced.

    A *factor* is a site of which the chain has a log density: a latent site, or an observed one.
    """

    scan_index: int
    length: int
    plates: tuple[Plate, ...]
    initial_sites: tuple[Latent, ...]
    step_sites: tuple[Latent, ...]
    global_sites: tuple[str, ...]
    is_state: tuple[bool, ...]
    holding: bool
    masked: bool
    edge_factors: tuple[str, ...]
    node_factors: tuple[str, ...]
    initial_factors: tuple[str, ...]
    later_factors: tuple[str, ...]
    global_factors: tuple[str, ...]

    @property
    def initial(self) -> dict[str, Latent]:
        """Latent sites of the chain's beginning, by name."""
        return {site.name: site for site in self.initial_sites}

    @property
    def step(self) -> dict[str, Latent]:
        """Latent sites of one step, by name."""
        return {site.name: site for site in self.step_sites}

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of all sites that have a log density."""
        own = self.edge_factors + self.node_factors + self.initial_factors + self.later_factors
        return (*self.initial, *own, *self.global_sites, *self.global_factors)

    @property
    def sites(self) -> dict[str, Latent]:
        """Latent sites of the chain: the initial ones, then those of a step."""
        return {**self.initial, **self.step}


def analyse(model: Callable, arguments: Arguments, values: dict[str, Any]) -> Structure:
    """Find the Markov chain of a program.

    :param model: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of parameters; those not given take their initial values.
    :return: its structure.
    :raises ValueError: if the program has no chain, or several, or one that is not first-order Markov; the message names
        the site or the leaf of the carry and says what to write.
    """
    found = []

    def abstractly(values, arguments):
        found.append(_analyse(model, arguments, values))

    jax.eval_shape(abstractly, values, arguments)
    structure, hold_error = found[0]
    if structure.holding and not _is_hold(structure, model, arguments, values):
        raise ValueError(hold_error)
    return structure


def per_series(log_density: jax.Array, plates: tuple[Plate, ...]) -> jax.Array:
    """Sum a log density over all axes but those of the plates.

    :param log_density: an array of a site's batch shape.
    :param plates: plates, leftmost first.
    :return: an array of shape ``(*plates)``.
    """
    ndim = max([log_density.ndim] + [-plate.dim for plate in plates])
    log_density = log_density.reshape((1,) * (ndim - log_density.ndim) + log_density.shape)
    kept = {ndim + plate.dim for plate in plates}
    summed = log_density.sum([axis for axis in range(ndim) if axis not in kept])
    return jnp.broadcast_to(summed, tuple(plate.size for plate in plates))


def time_rows(site: Site, length: int, plates: tuple[Plate, ...]) -> jax.Array:
    """Log density of a site after the scan, by time.

    :param site: an observed site, with time as its leading axis.
    :param length: number of steps of the scan.
    :param plates: plates, leftmost first.
    :return: an array of shape ``(length, *plates)`` or ``(length + 1, *plates)``.
    :raises ValueError: if the site has no leading time axis.
    """
    fn, shift = site["fn"], 0
    while (not fn.batch_shape or fn.batch_shape[0] not in (length, length + 1)) and isinstance(fn, dist.Independent):
        shift += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    log_density = log_prob({**site, "fn": fn})
    if not log_density.ndim or log_density.shape[0] not in (length, length + 1):
        raise ValueError(
            f"Site '{site['name']}' reads the outputs of the chain's `scan`, but its log density of shape "
            f"{log_density.shape} has no leading axis of {length} or {length + 1} times. Observe it inside the body of the "
            "scan, or give it time as its first axis."
        )
    shifted = tuple(plate._replace(dim=plate.dim - shift) for plate in plates)
    return jax.vmap(lambda row: per_series(row, shifted))(log_density)


def _analyse(model, arguments, values):
    """The structure, and the message for the case that what looks like a hold is none."""
    found, outside = survey(model, arguments, values)
    chain = choose_chain(found)
    outside_latent = {name: site["value"] for name, site in outside.items() if is_latent(site)}
    for other in found:
        if other.index != chain.index:
            check_continuous(other.latent)
            outside_latent |= {n: jnp.stack([s["value"]] * other.length) for n, s in other.latent.items()}

    reads, paths = _carry_influence(model, arguments, values, chain)
    is_clock = _clocks(reads, len(paths))
    state = [str(i) for i in range(len(paths)) if not is_clock[i]]
    kept = [(int(i), j) for i in state for j in state if reads[j]["carry"][int(i)]]
    hold_error = _lag_message(kept[0], reads, paths, chain, state) if kept else ""

    outer = _outer_influence(model, arguments, values, chain, outside_latent)
    initial = _initial_sites(outer, is_clock)
    check_continuous({name: outside[name] for name in outside_latent if name in outside and name not in initial})
    observed = [name for name, site in outside.items() if site["type"] == "sample" and site["is_observed"]]
    later = _later_sites(model, arguments, values, chain, outside_latent, reads, state)
    initial_factors = tuple(
        name for name in observed if name not in later and any(outer[site]["laws"][name] for site in initial)
    )
    factors = {name: site for name, site in chain.sites.items() if site["type"] == "sample"}
    edge_factors = tuple(name for name in factors if any(reads[i]["factors"][name] for i in state))
    enclosed = factors | {name: outside[name] for name in (*initial, *initial_factors, *later)}
    plates = _series({name: outside[name] for name in initial} | chain.latent, {**outside, **chain.sites})
    _check_enclosed(enclosed, plates)
    structure = Structure(
        scan_index=chain.index,
        length=chain.length,
        plates=plates,
        initial_sites=tuple(_latent(outside[name]) for name in initial),
        step_sites=tuple(_latent(site) for site in chain.latent.values()),
        global_sites=tuple(name for name in outside_latent if name not in initial),
        is_state=tuple(not clock for clock in is_clock),
        holding=bool(kept),
        masked=any(mask_of(site) is not None for site in chain.latent.values()),
        edge_factors=edge_factors,
        node_factors=tuple(name for name in factors if name not in edge_factors),
        initial_factors=initial_factors,
        later_factors=later,
        global_factors=tuple(name for name in observed if name not in (*initial_factors, *later)),
    )
    return structure, hold_error


def _latent(site):
    shape = jnp.shape(site["value"])
    border = len(shape) - site["fn"].event_dim
    return Latent(site["name"], shape[:border], shape[border:], jnp.result_type(site["value"]))


def _carry_influence(model, arguments, values, chain):
    """What of a step reads which leaf of the carry, or the step's latent sites; and the leaves' names."""
    scan, _ = capture(model, arguments, values, chain.index)
    leaves, treedef = jax.tree.flatten_with_path(scan.init)
    parts = {str(i): leaf for i, (_, leaf) in enumerate(leaves)}
    parts["latent"] = {name: site["value"] for name, site in chain.latent.items()}

    def step(parts):
        carry = jax.tree.unflatten(treedef, [parts[str(i)] for i in range(len(leaves))])
        carry, output, sites = run_body(scan, 0, carry, first(scan.xs), parts["latent"], chain.length)
        factors = {name: log_prob(site) for name, site in sites.items() if site["type"] == "sample"}
        return {"carry": jax.tree.leaves(carry), "output": jax.tree.leaves(output), "factors": factors}

    return influence(step, parts), [f"carry{jax.tree_util.keystr(path)}" for path, _ in leaves]


def _clocks(reads, number_leaves):
    """Leaves that never read a latent site, not even by way of another leaf."""
    state = {i for i in range(number_leaves) if reads["latent"]["carry"][i]}
    while grown := {i for i in range(number_leaves) if any(reads[str(j)]["carry"][i] for j in state)} - state:
        state |= grown
    return [i not in state for i in range(number_leaves)]


def _lag_message(pair, reads, paths, chain, state):
    new, old = pair
    latent = sorted(chain.latent)
    begin = f"The scan over {latent} is not a first-order Markov chain: `{paths[new]}` after a step depends on "
    if not reads["latent"]["carry"][new]:
        return (
            f"{begin}`{paths[int(old)]}` before it and on no site of the step, so it keeps a second lag of the state. Scan "
            "over blocks of L steps with the block as the state, or give the lagged component noise of its own. (A bare lag "
            "in the state would make the transition singular.)"
        )
    if not any(reads[i]["factors"][name] for i in state for name in latent):
        return (
            f"{begin}`{paths[int(old)]}` before it and on {latent}, and the laws of {latent} do not read the carry: this is a "
            "non-centred recursion, in which the whole past enters every step. Write the centred form, with the new state "
            "itself as the sample site (and without `LocScaleReparam`)."
        )
    return (
        f"{begin}`{paths[int(old)]}` before it as well as on {latent}, so it accumulates the past. Make it part of the state "
        "with noise of its own, or compute it after inference from the sampled trajectories. For padded steps a "
        "`jnp.where(mask, new, old)` is understood."
    )


def _outer_influence(model, arguments, values, chain, outside_latent):
    """What of the program outside the scan's outputs reads which latent site outside the scan."""
    constant = {name: site["value"] for name, site in chain.latent.items()}

    def outer(latent):
        read = {}

        def at_scan(index, scan):
            if index != chain.index:
                return None
            leaves, treedef = jax.tree.flatten(scan.init)
            carry = jax.tree.unflatten(treedef, [jnp.zeros_like(leaf) for leaf in leaves])
            x = jax.tree.map(jnp.zeros_like, first(scan.xs))
            read["init"], read["xs"] = leaves, jax.tree.leaves(scan.xs)
            last, output, sites = run_body(scan, 0, carry, x, constant, chain.length)
            densities = [log_prob(site) for site in sites.values() if site["type"] == "sample"]
            read["body"] = [densities, jax.tree.leaves(last), jax.tree.leaves(output)]
            stacked = jax.tree.map(lambda leaf: jnp.zeros((chain.length, *jnp.shape(leaf)), jnp.result_type(leaf)), output)
            return carry, stacked

        sites = run(model, arguments, {**values, **latent}, random.key(0), at_scan)
        read["laws"] = {name: log_prob(site) for name, site in sites.items() if site["type"] == "sample"}
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
        name for name in initial if any(outer[name]["laws"].get(other) for other in outer if other not in initial)
    ]:
        initial = [name for name in initial if name not in read_by_global]
    return tuple(initial)


def _later_sites(model, arguments, values, chain, outside_latent, reads, state):
    """Observed sites after the scan that read its outputs."""
    scan, _ = capture(model, arguments, {**values, **outside_latent}, chain.index)
    leaves, treedef = jax.tree.flatten(scan.init)
    _, output, _ = run_body(scan, 0, scan.init, first(scan.xs), {}, chain.length)
    outputs, output_tree = jax.tree.flatten(output)
    parts = {"last": [leaves[int(i)] for i in state]}
    parts |= {i: jnp.stack([output] * chain.length) for i, output in enumerate(outputs)}
    latent = {}

    def after(parts):
        carry = list(leaves)
        for i, leaf in zip(state, parts["last"], strict=True):
            carry[int(i)] = leaf
        stacked = jax.tree.unflatten(output_tree, [parts[i] for i in range(len(outputs))])
        given = jax.tree.unflatten(treedef, carry), stacked
        sites = run(
            model, arguments, {**values, **outside_latent}, random.key(0), lambda i, _: given if i == chain.index else None
        )
        latent.update({name: is_latent(site) for name, site in sites.items() if site["type"] == "sample"})
        return {name: log_prob(site) for name, site in sites.items() if name in latent}

    read = influence(after, parts)
    for name in latent:
        if read["last"][name]:
            raise ValueError(
                f"Site '{name}' after the scan reads the last carry of the chain. Only the stacked outputs, which have a "
                "time axis, can be read after the scan: observe it inside the body, masked except at the last step."
            )
    later = tuple(name for name in latent if any(read[i][name] for i in range(len(outputs))))
    for name in later:
        if latent[name]:
            raise ValueError(
                f"Latent site '{name}' after the scan reads the outputs of the chain. Sample it inside the body of the scan."
            )
        lagged = [i for i in range(len(outputs)) if read[i][name] and any(reads[j]["output"][i] for j in state)]
        if lagged:
            raise ValueError(
                f"Site '{name}' after the scan reads an output of the scan that depends on the state before the step. "
                "Observe it inside the body of the scan, where it may read both."
            )
    return later


def _series(latent, sites):
    """Plates around all latent sites of the chain, leftmost first."""
    stacks = [set(site["cond_indep_stack"]) for site in latent.values()]
    frames = sorted(set.intersection(*stacks), key=lambda frame: frame.dim)
    for frame in frames:
        plate = sites.get(frame.name)
        if plate is not None and plate["type"] == "plate" and plate["args"][0] != frame.size:
            raise ValueError(
                f"The plate '{frame.name}' around the chain is subsampled ({frame.size} of {plate['args'][0]}), which this "
                "version does not handle. Pass the minibatch as data, and build the plate with its size."
            )
    return tuple(Plate(*frame) for frame in frames)


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


def _is_hold(structure, model, arguments, values):
    def step(state, values, arguments, latent):
        scan, _ = capture(model, arguments, values, structure.scan_index)
        leaves, treedef = jax.tree.flatten(scan.init)
        state = iter(state)
        leaves = [next(state) if is_state else leaf for leaf, is_state in zip(leaves, structure.is_state, strict=True)]
        carry = jax.tree.unflatten(treedef, leaves)
        carry, _, _ = run_body(scan, 0, carry, first(scan.xs), latent, structure.length)
        return [x for x, is_state in zip(jax.tree.leaves(carry), structure.is_state, strict=True) if is_state]

    shapes = jax.eval_shape(lambda: jax.tree.leaves(capture(model, arguments, values, structure.scan_index)[0].init))
    state = [jnp.zeros(x.shape, x.dtype) for x, is_state in zip(shapes, structure.is_state, strict=True) if is_state]
    latent = {name: jnp.zeros(site.shape, site.dtype) for name, site in structure.step.items()}
    return holds(step, state, values, arguments, latent)
