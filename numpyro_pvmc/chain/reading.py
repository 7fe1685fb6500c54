"""Read the structure of a program, once for all calls that look alike."""

import re
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random

from numpyro_pvmc.program.analysis import analyse
from numpyro_pvmc.program.arguments import Arguments, Held, signature
from numpyro_pvmc.program.compiled import ForEachModel, digest
from numpyro_pvmc.program.counts import list_values
from numpyro_pvmc.program.distributions import base_distribution
from numpyro_pvmc.program.find_chain import first, length_of, stacked_zeros
from numpyro_pvmc.program.handlers import batch_shapes, log_prob, run, run_body
from numpyro_pvmc.program.independence import check_independence
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.totals import read_through_sum

_known = ForEachModel()


class _Reading(NamedTuple):
    """A structure, and what of the values that it was read with the program has beside its parameters.

    `program` is what the program did at that time: it may read what is no argument of it, and change with that.
    """

    structure: Structure
    given: dict[str, Hashable]
    program: Hashable
    traced: list[tuple[weakref.ref, ...]]  # arguments for which the program was seen to be the same

    def holds_for(self, model: Callable, arguments: Arguments, values: dict[str, Any]) -> bool:
        """Whether the structure is that of other values: these have parameters and sites of the same looks."""
        alike = all(signature(values[name]) == looks for name, looks in self.structure.parameters if name in values)
        if not alike or _given(self.structure, values) != self.given:
            return False
        tracers = _tracers(arguments)
        # While one function is being traced, the program stays as it is.
        if tracers and any(len(seen) == len(tracers) and all(map(_is, seen, tracers)) for seen in self.traced):
            return True
        try:
            is_same = _fingerprint(model, arguments, {name: values[name] for name in self.given}) == self.program
        except Exception:
            return False  # it is another now: what is wrong with it the reading says
        if is_same and tracers:
            self.traced[:] = [seen for seen in self.traced if seen[0]() is not None] + [tuple(map(weakref.ref, tracers))]
        return is_same


def read_structure(model: Callable, arguments: Arguments, values: dict[str, Any], carried: bool = False) -> Structure:
    """Find the Markov chain of a program, and check that it is one.

    It is read once for arguments and values of the same structure, shapes and types, for which the program does the same, and
    forgotten with the program. Errors are not kept.

    :param values: values of parameters; those not given take their initial values.
    :param carried: whether the carry may hold what is computed from the old carry and the sites of the step.
    :return: the structure of its chain.
    :raises ValueError: if it has none; see :func:`numpyro_pvmc.program.analysis.analyse` and
        :func:`numpyro_pvmc.program.independence.check_independence`.
    """
    of_model = _known.get(model, dict)
    readings = of_model.setdefault((signature(arguments), jax.config.jax_enable_x64, carried), [])
    for reading in readings:
        if reading.holds_for(model, arguments, values):
            return reading.structure
    structure = list_values(analyse(model, arguments, values, carried), model, arguments, values)
    if not structure.carried:
        structure = structure._replace(sum_of=read_through_sum(structure, model, arguments, values))
    check_independence(structure, model, arguments, values)
    if isinstance(arguments, Held) or not structure.by_value:  # else it is one for these numbers
        given = _given(structure, values)
        program = _fingerprint(model, arguments, {name: values[name] for name in given})
        tracers = _tracers(arguments)
        readings.append(_Reading(structure, given, program, [tuple(map(weakref.ref, tracers))] if tracers else []))
    return structure


def _fingerprint(model, arguments, values):
    """What a program does, in one step of each of its scans: its operations, its sites, and what becomes of them."""
    names = []

    def look(arguments, values):
        found = []

        def at_scan(index, scan):
            length = length_of(scan)
            carry, output, sites = run_body(scan, 0, scan.init, first(scan.xs), {}, length)
            names.append((index, length, scan.reverse, scan.history, scan.is_marked))
            found.append((scan.init, carry, output, densities(sites)))
            return carry, stacked_zeros(output, length), batch_shapes(sites, length)

        outside = run(model, arguments, values, random.key(0), at_scan)
        return found, densities(outside)

    def densities(sites):
        results = []
        for name, site in sites.items():
            kind, infer = site["type"], site.get("infer") or {}
            plates = tuple((frame.name, frame.dim, frame.size) for frame in site.get("cond_indep_stack", ()))
            names.append((name, kind, site.get("is_observed"), plates, str(infer.get("max_count"))))
            if kind == "sample":
                names.append((type(base_distribution(site["fn"])).__name__, site["fn"].batch_shape, site["fn"].event_shape))
                results.append(log_prob(site))
            results += [leaf for leaf in jax.tree.leaves(site["value"]) if isinstance(leaf, jax.Array | np.ndarray)]
        return results

    closed = jax.make_jaxpr(look)(arguments, values)
    # A reader goes by the numbers of constants.
    return tuple(names), re.sub("0x[0-9a-f]+", "", str(closed)), digest(closed)


def _is(reference, tracer):
    return reference() is tracer


def _tracers(arguments):
    return [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.core.Tracer)]


def _given(structure, values):
    others = {*structure.outside, *structure.latents, *structure.free, *structure.factors}
    return {name: signature(value) for name, value in values.items() if name in others}


def summed_structure(model: Callable, arguments: Arguments) -> Structure:
    """The structure of a program's chain, in which all discrete sites that can be are summed over their values."""
    structure = read_structure(model, arguments, {})
    return structure.summing(structure.finite)
