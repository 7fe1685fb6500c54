"""Follow through a traced program what each element of each array reads, is known to be, and is equal to.

A program is a jaxpr. Elements of its inputs carry marks, bits of an integer, and an element of any array reads the marks of all
elements that its value may depend on: by comparison, rounding, sorting or a branch as well as by a slope. Beside the marks go
values that are known beforehand, so that a choice by a constant is the choice of one of its cases; and, if asked for, numbers
that two elements share only if they are equal, whatever the inputs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from numpyro_pvmc.jaxprs.element_rules import either, move, rule_of, said, together
from numpyro_pvmc.jaxprs.facts import Aval, Book, Value
from numpyro_pvmc.jaxprs.movement import STEPS, broadcast_trailing

_STEPS = 20_000  # operations of a scan that are followed one by one


class Follower:
    """Goes through programs.

    `strange` collects the names of operations of which it is not known how they mix elements that carry marks: there every
    result reads every operand.

    :param book: numbers of equal elements, if these are asked for.
    :param steps: a mark for what is computed from marked elements by operations that change by steps, and have no slope.
    """

    def __init__(self, book: Book | None = None, steps: int = 0):
        self.book, self.strange, self.steps = book or Book(), set(), np.uint64(steps)

    def run(self, program: Jaxpr | ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Go through a program.

        :param program: a jaxpr.
        :param inputs: what is said of its inputs.
        :return: what can be said of its outputs.
        """
        constants = program.consts if isinstance(program, ClosedJaxpr) else ()
        program = program.jaxpr if isinstance(program, ClosedJaxpr) else program
        given = [*map(self.book.constant, constants), *inputs]
        of = dict(zip((*program.constvars, *program.invars), map(self.book.with_assumed, given), strict=True))
        read = lambda variable: self.book.constant(variable.val) if isinstance(variable, Literal) else of[variable]
        for equation in program.eqns:
            operands = [read(variable) for variable in equation.invars]
            results = self._apply(equation, operands)
            results = [self.book.with_assumed(self._numbered(equation, operands, *x)) for x in enumerate(results)]
            of |= dict(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in program.outvars]

    def _apply(self, equation, values):
        name, params, out = equation.primitive.name, equation.params, [variable.aval for variable in equation.outvars]
        if name in _CONTROL:
            return _CONTROL[name](self, params, out, values)
        if (rule := rule_of(name)) is not None:
            results = rule(self.book, params, out, values)
            is_marked = self.steps and _changes_by_steps(equation) and any((v.marks != 0).any() for v in values)
            return [value._replace(reads=value.marks | self.steps) for value in results] if is_marked else results
        if (inner := _called(equation)) is not None:
            return self.run(inner, values)
        if any(value.reads is not None and value.reads.any() for value in values):
            self.strange.add(name)
        return together(out, values)

    def _numbered(self, equation, operands, index, result):
        """A result with numbers: if its rule has none, the same for the same operation on equal operands."""
        if not self.book.numbered or result.number is not None:
            return result
        name = equation.primitive.name
        if rule_of(name) is None:
            return result._replace(number=self.book.fresh(result).number)
        how = f"{index} {sorted(equation.params.items())}"
        return result._replace(number=self.book.numbers_of_whole(name, how, result.shape, operands))

    def _cond(self, params, out, values):
        (which, *values), branches = values, params["branches"]
        if which.is_sure:
            return self.run(branches[int(np.clip(which.known, 0, len(branches) - 1))], values)
        results = zip(*(self.run(branch, values) for branch in branches), strict=True)
        return [either(aval, [which.reads, *(part.reads for part in parts)]) for aval, parts in zip(out, results, strict=True)]

    def _while(self, params, out, values):
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        cond, body, carry = values[:of_cond], values[of_cond : of_cond + of_body], values[of_cond + of_body :]

        def step(carry):
            (goes_on,) = self.run(params["cond_jaxpr"], [*cond, *carry])
            after = self.run(params["body_jaxpr"], [*body, *carry])
            # Under `vmap` there is one condition for each element of the batch.
            return [new.marks | broadcast_trailing(goes_on.marks, new.shape) for new in after]

        return self._until_it_stays(step, carry)

    def _scan(self, params, out, values):
        of_consts, of_carry = params["num_consts"], params["num_carry"]
        consts, carry, xs = values[:of_consts], values[of_consts : of_consts + of_carry], values[of_consts + of_carry :]
        body, length = params["jaxpr"], params["length"]
        if not self.book.numbered and all(value.reads is None for value in values):
            return [said(aval) for aval in out]
        if not length or length * len(body.jaxpr.eqns) > _STEPS:
            # All steps at once: each reads what any step reads.
            at_any = [self.book.fresh(Aval(x.shape[1:], x.dtype), np.bitwise_or.reduce(x.marks, 0)) for x in xs]
            step = lambda carry: [new.marks for new in self.run(body, [*consts, *carry, *at_any])[:of_carry]]
            carry = self._until_it_stays(step, carry)
            ys = self.run(body, [*consts, *carry, *at_any])[of_carry:]
            return carry + [said(aval, y.reads) for aval, y in zip(out[of_carry:], ys, strict=True)]
        stacked = []
        for t in reversed(range(length)) if params["reverse"] else range(length):
            at_t = [move(lambda x, t=t: x[t], [Aval(x.shape[1:], x.dtype)], [x])[0] for x in xs]
            results = self.run(body, [*consts, *carry, *at_t])
            carry = results[:of_carry]
            stacked.append(results[of_carry:])
        stacked = zip(*(stacked[::-1] if params["reverse"] else stacked), strict=True)
        stack = lambda *arrays: np.stack(arrays)
        return carry + [move(stack, [aval], ys)[0] for aval, ys in zip(out[of_carry:], stacked, strict=True)]

    def _until_it_stays(self, step, carry):
        """The carry of a loop of which the number of steps is not known."""
        marks = [value.marks for value in carry]
        while True:
            carry = [self.book.fresh(value, of_value) for value, of_value in zip(carry, marks, strict=True)]
            more = [new | old for new, old in zip(step(carry), marks, strict=True)]
            if all(map(np.array_equal, more, marks)):
                return carry
            marks = more

    def _linear_solve(self, params, out, values):
        lengths = params["const_lengths"]
        before = lengths.matvec + lengths.vecmat
        consts, right = values[before : before + lengths.solve], values[before + lengths.solve + lengths.transpose_solve :]
        return self.run(params["jaxprs"].solve, [*consts, *right])


_CONTROL = {
    "cond": Follower._cond,
    "custom_linear_solve": Follower._linear_solve,
    "scan": Follower._scan,
    "while": Follower._while,
}


def _changes_by_steps(equation: Any) -> bool:
    to = equation.params.get("new_dtype")
    is_cut = to is not None and not np.issubdtype(to, np.inexact) and np.issubdtype(equation.invars[0].aval.dtype, np.inexact)
    return equation.primitive.name in STEPS or is_cut


def _called(equation: Any) -> Jaxpr | ClosedJaxpr | None:
    """The program that an operation calls with its operands, such as that of a `jax.jit`, if it has one."""
    shapes = lambda variables: [variable.aval.shape for variable in variables]
    for program in equation.params.values():
        if isinstance(program, Jaxpr | ClosedJaxpr):
            inner = program.jaxpr if isinstance(program, ClosedJaxpr) else program
            ends = (inner.invars, equation.invars), (inner.outvars, equation.outvars)
            if all(shapes(own) == shapes(of_caller) for own, of_caller in ends):
                return program
    return None
