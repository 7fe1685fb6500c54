"""Find the scan that is the chain of a program, or say why there is none.

One abstract run, in which every scan is one step of its body: it shows the sites, not how they depend on each other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.handlers import seed

from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.handlers import AtScan, Scan, Site, Sites, batch_shapes, is_latent, run, run_body, under_handlers

_KEY = 0  # the seed of abstract runs, whose draws are never used


class Found(NamedTuple):
    """One scan as the survey met it: its sites are those of one step, its carry has the types that it has after the first."""

    scan_index: int
    length: int
    carry_dtypes: tuple[Any, ...]
    is_marked: bool
    reverse: bool
    history: int
    latent: Sites
    sites: Sites


def survey(model: Callable, arguments: Arguments, values: dict[str, Any]) -> tuple[list[Found], Sites]:
    """Run a program abstractly, one step of every scan.

    :return: its scans in order, and the sites outside of them.
    :raises ValueError: if an observed value does not fit its distribution, or a scan its inputs.
    """
    met = []

    def at_scan(index, scan):
        length, x = length_of(scan), unknown(first(scan.xs))
        one_step = lambda scan: run_body(scan, 0, unknown(scan.init), x, {}, length)
        carry, output, sites = one_step(scan)
        dtypes = _promoted_dtypes(scan.init, carry)
        if dtypes != tuple(map(jnp.result_type, jax.tree.leaves(scan.init))):
            scan = with_carry_dtypes(scan, dtypes)
            carry, output, sites = one_step(scan)
        for site in sites.values():
            _check_observation(site)
        if any(map(is_latent, sites.values())):
            _check_carry(scan.init, carry)
        met.append((scan, length, dtypes, sites))
        return carry, stacked_zeros(output, length), batch_shapes(sites, length)

    outside = run(model, arguments, values, random.key(_KEY), at_scan)
    found = []
    for index, (scan, length, dtypes, sites) in enumerate(met):
        sites = under_handlers(sites, scan, 0)
        latent = {name: site for name, site in sites.items() if is_latent(site)}
        found.append(Found(index, length, dtypes, scan.is_marked, scan.reverse, scan.history, latent, sites))
    return found, outside


def choose_chain(found: list[Found]) -> Found:
    """The scan that is the chain: the one marked with `markov`, or else the only one with latent sites.

    :param found: the scans of a program.
    :return: one of them.
    :raises ValueError: if there is none, or more than one, or its form is not that of a first-order chain.
    """
    marked = [scan for scan in found if scan.is_marked]
    latent = [scan for scan in found if scan.latent]
    if len(marked) > 1:
        raise ValueError(f"The model marks {len(marked)} scans with `markov`. Mark one: it is the chain.")
    if marked and not marked[0].latent:
        raise ValueError("The scan marked with `markov` has no latent sites. Mark the one whose latent sites are the chain.")
    if not marked and len(latent) > 1:
        names = " and ".join(str(sorted(scan.latent)) for scan in latent)
        raise ValueError(
            f"The model has {len(latent)} scans with latent sites: {names}. Put the processes into one step function, or "
            "say which is the chain by writing `numpyro_pvmc.markov(...)` in place of that `scan(...)`; the latent sites "
            "of the others are then global."
        )
    if not latent:
        raise ValueError(
            "The model has no `numpyro.contrib.control_flow.scan` with latent sites, so it has no chain. Write the loop over "
            "time as `scan(step, x_0, y, length=T)`, where `step(x_prev, y_t)` samples the latent site and returns it as "
            "the new carry."
        )
    chain = (marked or latent)[0]
    _check_form(chain)
    return chain


def capture(
    model: Callable, arguments: Arguments, values: dict[str, Any], chain: Found | Any, rng_key: jax.Array | None = None
) -> tuple[Scan, Sites]:
    """Run a program up to its chain, and past it with outputs of zero.

    :param values: values of parameters and of sites outside the scan.
    :param chain: which of its scans, in order, and the types of its carry: as found, or a structure.
    :param rng_key: random key of what is not given, where that matters.
    :return: the scan, and the sites outside of it.
    """
    captured = []
    at_scan = functools.partial(_in_place_of_chain, chain, captured)
    sites = run(model, arguments, values, random.key(_KEY) if rng_key is None else rng_key, at_scan)
    return captured[0], sites


def without_chain(model: Callable, chain: Found | Any) -> Callable:
    """The program that goes past its chain with outputs of zero.

    :param chain: as for :func:`capture`.
    """
    return seed(AtScan(model, functools.partial(_in_place_of_chain, chain, [])), _KEY)


def _in_place_of_chain(chain, captured, index, scan):
    if index != chain.scan_index:
        return None
    scan = with_carry_dtypes(scan, chain.carry_dtypes)
    captured.append(scan)
    length, shapes = length_of(scan), {}

    def one():
        _, output, sites = run_body(scan, 0, scan.init, first(scan.xs), {}, length)
        shapes.update(batch_shapes(sites, length))
        return output

    return scan.init, stacked_zeros(jax.eval_shape(one), length), shapes


def first(xs: Any) -> Any:
    """The inputs of the first step.

    :param xs: a pytree of arrays with a leading time axis.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], xs)


def unknown(tree: Any) -> Any:
    """The same arrays without their values, in a program that is being traced: neither Python nor a reader may go by them.

    The values of the first carry and the first inputs are those of one step, and say nothing of the others.

    :param tree: a pytree of arrays and numbers.
    """
    return jax.tree.map(lax.optimization_barrier, tree)


def with_carry_dtypes(scan: Scan, dtypes: tuple[Any, ...]) -> Scan:
    """A scan whose first carry has the types that `jax.lax.scan` gives it.

    :param dtypes: types of the leaves of its carry.
    """
    leaves, treedef = jax.tree.flatten(scan.init)
    typed = lambda leaf, dtype: lax.convert_element_type(leaf, dtype) if jnp.result_type(leaf) != dtype else jnp.asarray(leaf)
    return scan._replace(init=jax.tree.unflatten(treedef, map(typed, leaves, dtypes)))


def length_of(scan: Scan) -> int:
    """Number of steps of a scan.

    :raises ValueError: if its inputs and its `length` disagree, or there are no steps.
    """
    leaves = jax.tree.leaves(scan.xs)
    if strange := [type(leaf).__name__ for leaf in leaves if not _is_array(leaf)]:
        raise ValueError(f"The inputs of `scan` must be arrays of numbers, but among them is a {strange[0]}.")
    if numbers := [leaf for leaf in leaves if isinstance(leaf, np.generic | int | float | complex)]:
        raise ValueError(
            f"Among the inputs of `scan` are {len(numbers)} single numbers, as of a list, but they must be arrays with a "
            "leading time axis. Convert a list of numbers with `jax.numpy.asarray(y)` before it is given to the model."
        )
    if not leaves and scan.length is None:
        raise ValueError(
            "The `scan` has neither inputs nor a `length`: the model seems to have been called without its data. Pass these as "
            "the model takes them, `run(rng_key, num_steps, y)` or `posterior(rng_key, params, y)`."
        )
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in map(jnp.asarray, leaves)}
    lengths |= set() if scan.length is None else {scan.length}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(
            "The inputs of `scan` must have one leading time axis of at least one step, but their lengths, and `length`, "
            f"are {sorted(lengths)}. Pass arrays of the same length, or `length=` alone."
        )
    return lengths.pop()


def _is_array(leaf):
    try:
        jnp.asarray(leaf)
    except TypeError:
        return False
    return True


def stacked_zeros(one: Any, length: int) -> Any:
    """Zeros like what a step returns, with a leading time axis.

    :param one: a pytree of arrays and numbers.
    """
    return jax.tree.map(lambda leaf: jnp.zeros((length, *jnp.shape(leaf)), jnp.result_type(leaf)), one)


def _promoted_dtypes(old, new):
    """Types of the carry: as in `jax.lax.scan` those of Python numbers, `0` or `0.5`, give way to what the step returns."""
    leaves = jax.tree.leaves(old), jax.tree.leaves(new)
    if len(leaves[0]) != len(leaves[1]):
        return tuple(map(jnp.result_type, leaves[0]))
    is_weak = lambda leaf: jax.typeof(jnp.asarray(leaf)).weak_type
    return tuple(jnp.result_type(a, b) if is_weak(a) else jnp.result_type(a) for a, b in zip(*leaves, strict=True))


def _check_carry(old, new):
    structures = jax.tree.structure(old), jax.tree.structure(new)
    if structures[0] != structures[1]:
        raise ValueError(
            f"The carry of `scan` must keep its structure, but it starts as {structures[0]} and the step returns "
            f"{structures[1]}, where each * is an array. Return what the scan starts from: the same tuples, lists and names."
        )
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(carry)] for carry in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The carry of `scan` must keep its shapes, but it starts with shapes {shapes[0]} and the step returns "
            f"{shapes[1]}. Start from arrays of the shapes that the step returns; inside a plate, these have its axis too."
        )
    for (path, before), after in zip(jax.tree.flatten_with_path(old)[0], jax.tree.leaves(new), strict=True):
        types = jnp.result_type(before), jnp.result_type(after)
        if types[0] != types[1]:
            raise TypeError(
                f"The carry of `scan` must keep its types, as in NumPyro, but `carry{jax.tree_util.keystr(path)}` starts as "
                f"{types[0]} and the step returns {types[1]}. Start it as an array of {types[1]}, or convert what the step "
                f"returns with `.astype({types[0]})`."
            )


def _check_observation(site: Site) -> None:
    if site["type"] != "sample" or not site["is_observed"]:
        return
    if jnp.iscomplexobj(site["value"]):
        raise ValueError(
            f"Site '{site['name']}' is observed with complex numbers, of which distributions have no density. Pass two sites."
        )
    value_shape, distribution_shape = jnp.shape(site["value"]), tuple(site["fn"].shape())
    try:
        # NumPyro broadcasts what is short of axes, but stacked over time more axes than the distribution's would be other axes.
        fits = jnp.broadcast_shapes(value_shape, distribution_shape) == value_shape and len(value_shape) == len(
            distribution_shape
        )
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"Site '{site['name']}' is observed with a value of shape {value_shape}, but its distribution has shape "
            f"{distribution_shape}. The data of one step need the shape of one step; time is the leading axis of the inputs "
            "of `scan`."
        )


def _check_form(chain):
    names = sorted(chain.latent)
    if chain.reverse:
        raise ValueError(
            f"The scan over {names} has `reverse=True`. NumPyro substitutes values in the order of execution, so its draws "
            "would come back in the wrong order. Scan over reversed inputs, `xs[::-1]`, instead."
        )
    if chain.history != 1:
        raise ValueError(
            f"The scan over {names} has `history={chain.history}`, and a first-order Markov chain has `history=1`. Scan over "
            "blocks of as many steps, with the block as the state."
        )
    for name, site in chain.sites.items():
        if site["type"] == "param":
            raise ValueError(
                f"The body of the scan over {names} declares the parameter '{name}'. NumPyro does not substitute "
                "parameters inside `scan`. Call `numpyro.param` before the scan and use its value in the body."
            )
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
            raise ValueError(
                f"The subsampled plate '{name}' is built inside the body of the scan, where it would draw new indices at "
                "every step. Build it once, before the scan, and enter it in the body."
            )


def check_continuous(latent: Sites) -> None:
    """Refuse discrete latent sites.

    :param latent: latent sites.
    :raises ValueError: naming the first one that is discrete.
    """
    for name, site in latent.items():
        if site["fn"].support is not None and site["fn"].support.is_discrete:
            raise ValueError(
                f"Latent site '{name}' is discrete ({type(site['fn']).__name__}), and outside the chain this version handles "
                "continuous latent sites only. Sum it out of the model, as with `dist.MixtureSameFamily`."
            )
