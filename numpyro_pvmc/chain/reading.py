"""Read the structure of a program, once for all calls that look alike."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from numpyro_pvmc.program.analysis import analyse
from numpyro_pvmc.program.arguments import Arguments, Held, signature
from numpyro_pvmc.program.compiled import ForEachModel
from numpyro_pvmc.program.counts import list_values
from numpyro_pvmc.program.independence import check_independence
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.totals import read_through_sum

_known = ForEachModel()


class _Reading(NamedTuple):
    """A structure, and what of the values that it was read with the program has beside its parameters."""

    structure: Structure
    given: dict[str, Hashable]

    def holds_for(self, values: dict[str, Any]) -> bool:
        """Whether the structure is that of other values: these have parameters and sites of the same looks."""
        alike = all(signature(values[name]) == looks for name, looks in self.structure.parameters if name in values)
        return alike and _given(self.structure, values) == self.given


def read_structure(model: Callable, arguments: Arguments, values: dict[str, Any]) -> Structure:
    """Find the Markov chain of a program, and check that it is one.

    It is read once for arguments and values of the same structure, shapes and types, as a compiled function would be, and
    forgotten with the program. Errors are not kept.

    :param model: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of parameters; those not given take their initial values.
    :return: the structure of its chain.
    :raises ValueError: if it has none; see :func:`numpyro_pvmc.program.analysis.analyse` and
        :func:`numpyro_pvmc.program.independence.check_independence`.
    """
    of_model = _known.get(model, dict)
    readings = of_model.setdefault((signature(arguments), jax.config.jax_enable_x64), [])
    for reading in readings:
        if reading.holds_for(values):
            return reading.structure
    structure = list_values(analyse(model, arguments, values), model, arguments, values)
    structure = structure._replace(sum_of=read_through_sum(structure, model, arguments, values))
    check_independence(structure, model, arguments, values)
    if isinstance(arguments, Held) or not structure.by_value:  # else it is one for these numbers
        readings.append(_Reading(structure, _given(structure, values)))
    return structure


def _given(structure, values):
    others = {*structure.outside, *structure.latents, *structure.free, *structure.factors}
    return {name: signature(value) for name, value in values.items() if name in others}


def summed_structure(model: Callable, arguments: Arguments) -> Structure:
    """The structure of a program's chain, in which all discrete sites that can be are summed over their values.

    :param model: a NumPyro program.
    :param arguments: what it is called with.
    """
    structure = read_structure(model, arguments, {})
    return structure.summing(structure.finite)
