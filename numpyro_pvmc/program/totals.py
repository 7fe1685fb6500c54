"""Find two counts of a step that are read through their sum only, such as the survivors and the recruits of a population."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal

from numpyro_pvmc.jaxprs.bounds import called_program
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.find_chain import capture, first
from numpyro_pvmc.program.handlers import log_prob, run_body
from numpyro_pvmc.program.structure import Structure

_SAME_NUMBERS = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "stop_gradient")


def read_through_sum(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> tuple[str, ...]:
    """Names of two counts of a step of which everything but their own densities reads the sum, and nothing else.

    It is read off the program: what does with the two anything but add them is taken to read them apart.

    :return: first the one whose density may read the state before, then the other, whose density reads neither that nor the
        first; nothing if there are no such two.
    """
    sites = {site.name: site for site in structure.step_latents}
    if len(sites) != 2 or len(structure.edge_factors) != 1 or structure.masked or structure.holding:
        return ()
    if not all(_is_one_count(site, structure) for site in sites.values()) or structure.edge_factors[0] not in sites:
        return ()
    (mover,) = structure.edge_factors
    (other,) = set(sites) - {mover}
    leaves, treedef = jax.tree.flatten(arguments)

    def look(values, leaves, latent):
        scan, _ = capture(model, jax.tree.unflatten(treedef, leaves), values, structure)
        carry, output, seen = run_body(scan, 0, scan.init, first(scan.xs), latent, structure.length)
        own = {name: log_prob(seen[name]) for name in (mover, other)}
        factors = [log_prob(seen[name]) for name in structure.node_factors if name != other]
        states = [leaf for leaf, is_state in zip(jax.tree.leaves(carry), structure.is_state, strict=True) if is_state]
        outputs = output if structure.later_factors else ()  # of which nobody reads anything otherwise
        return {"of mover": own[mover], "of other": own[other], "rest": [factors, states, outputs]}

    latent = {name: jax.ShapeDtypeStruct(site.shape, site.dtype) for name, site in sites.items()}
    program, shapes = jax.make_jaxpr(look, return_shape=True)(values, leaves, latent)
    treedef_found = jax.tree.structure(shapes)

    def readers(*names):
        inputs = jax.tree.leaves((jax.tree.map(lambda _: _NONE, (values, leaves)), _marked(latent, names)), is_leaf=_is_mark)
        return jax.tree.unflatten(treedef_found, [bool(mark.names) for mark in _marks(program.jaxpr, inputs)])

    is_apart = readers(other)["of mover"] or readers(mover)["of other"] or any(jax.tree.leaves(readers(mover, other)["rest"]))
    return () if is_apart else (mover, other)


class _Mark(NamedTuple):
    """Which of the counts a number reads; whether it is one of them, in another shape or type."""

    names: frozenset[str] = frozenset()
    is_same: bool = True


_NONE = _Mark()


def _is_mark(leaf):
    return isinstance(leaf, _Mark)


def _marked(latent, names):
    return {name: _Mark(frozenset({name})) if name in names else _NONE for name in latent}


def _is_one_count(site, structure):
    support = site.support
    is_range = support is not None and tuple(support) == tuple(range(min(support), max(support) + 1))
    return site.moves and is_range and site.elements(structure.plates) == 1


def _marks(program: Jaxpr, inputs: list[_Mark]) -> list[_Mark]:
    """Marks of the outputs of a program. Two counts that are added to each other leave none."""
    marks = dict.fromkeys(program.constvars, _NONE) | dict(zip(program.invars, inputs, strict=True))
    read = lambda atom: _NONE if isinstance(atom, Literal) else marks[atom]
    for equation in program.eqns:
        operands, results = [read(atom) for atom in equation.invars], equation.outvars
        names, name = frozenset().union(*(mark.names for mark in operands)), equation.primitive.name
        if (called := called_program(equation)) is not None:
            found = _marks(called[0], operands)
        elif name == "add" and len(names) == 2 and all(mark.names and mark.is_same for mark in operands):
            found = [_NONE]
        else:
            is_same = name in _SAME_NUMBERS and operands[0].is_same and results[0].aval.dtype != bool
            found = [_Mark(names, is_same or not names)] * len(results)
        marks.update(zip(results, found, strict=True))
    return [read(atom) for atom in program.outvars]
