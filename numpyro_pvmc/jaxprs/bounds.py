"""Bound what a function returns, for inputs within bounds.

Interval arithmetic on the function's jaxpr. What operations do to whole intervals is known of those that programs use to make
the support of a count: sums and differences, products, clipping, rounding, choosing, and moving numbers about. What comes of
any other operation has no bounds, unless its operands are known exactly.

Bounds are computed by the operations of the function itself, in floating point: rounding is monotone, so bounds of whole
numbers stay bounds. They may be traced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


class Interval(NamedTuple):
    """Numbers that are not less than `lower` and not more than `upper`: floating point, of the shape of the numbers."""

    lower: jax.Array
    upper: jax.Array


Known = Interval | Any  # an array stands for itself


def unbounded(like: Any) -> Interval:
    """No bounds.

    :param like: an array, or its shape and type.
    """
    infinite = jnp.full(like.shape, jnp.inf)
    return Interval(jnp.zeros_like(infinite), jnp.ones_like(infinite)) if _is_bool(like) else Interval(-infinite, infinite)


def as_interval(known: Known) -> Interval:
    """Bounds of what may be known exactly.

    :param known: an interval, or an array.
    """
    if isinstance(known, Interval):
        return known
    known = jnp.asarray(known)
    if jnp.issubdtype(known.dtype, jax.dtypes.extended) or jnp.iscomplexobj(known):
        return unbounded(known)
    exact = lax.stop_gradient(known.astype(jnp.result_type(float)))
    return _interval(exact, exact)


def is_interval(leaf: Any) -> bool:
    """Whether a leaf of a pytree is an interval; for ``is_leaf``."""
    return isinstance(leaf, Interval)


def bounded(function: Callable, *like: Any) -> Callable:
    """A function of bounds in place of numbers.

    :param function: takes and returns pytrees of arrays.
    :param like: its arguments, or their shapes and types.
    :return: takes, for each leaf of the arguments, bounds or the array; returns for each leaf of the result bounds, or an array
        where it reads nothing of which there are bounds only.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.jaxprs.bounds import Interval, bounded
        >>> recruits = bounded(lambda n: jnp.maximum(n - 2, 0) + 5, jnp.array(0.0))
        >>> [float(end) for end in recruits(Interval(jnp.array(0.0), jnp.array(9.0)))]
        [5.0, 12.0]
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*like)
    # What is traced by somebody around this has no numbers here.
    consts = [unbounded(const) if isinstance(const, jax.core.Tracer) else const for const in program.consts]

    def of_bounds(*inputs):
        results = _evaluate(program.jaxpr, consts, jax.tree.leaves(inputs, is_leaf=is_interval))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return of_bounds


def _evaluate(program: Jaxpr, consts, inputs):
    known = dict(zip([*program.constvars, *program.invars], [*consts, *inputs], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    for equation in program.eqns:
        known.update(zip(equation.outvars, _results(equation, [read(atom) for atom in equation.invars]), strict=True))
    return [read(atom) for atom in program.outvars]


def called_program(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The program that an operation does nothing but run, and its constants.

    :param equation: an operation.
    :return: ``None`` if it is an operation in its own right.
    """
    keys = _CALLS.get(equation.primitive.name, ())
    called = next((equation.params[key] for key in keys if key in equation.params), None)
    return (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else called and (called, ())


def _results(equation, operands):
    """Bounds of the results of one operation, or their values."""
    name, params, results = equation.primitive.name, equation.params, [result.aval for result in equation.outvars]
    if (called := called_program(equation)) is not None:
        return _evaluate(*called, operands)
    if not any(map(is_interval, operands)):
        values = equation.primitive.bind(*operands, **params)
        return values if equation.primitive.multiple_results else [values]
    if name == "cond":
        branches = [_evaluate(branch.jaxpr, branch.consts, operands[1:]) for branch in params["branches"]]
        return [_hull(map(as_interval, several)) for several in zip(*branches, strict=True)]
    return [_interval(*_RULES[name](equation, operands))] if name in _RULES else [unbounded(result) for result in results]


def _interval(lower, upper):
    lower, upper = (jnp.asarray(end, jnp.result_type(float)) for end in (lower, upper))
    # What no rule can tell, such as infinity less infinity, has no bounds.
    return Interval(jnp.where(jnp.isnan(lower), -jnp.inf, lower), jnp.where(jnp.isnan(upper), jnp.inf, upper))


def _hull(intervals):
    lowers, uppers = zip(*intervals, strict=True)
    return Interval(functools.reduce(jnp.minimum, lowers), functools.reduce(jnp.maximum, uppers))


def _monotone(equation, operands):
    """Of an operation that rises with each operand."""
    lowers, uppers = zip(*map(as_interval, operands), strict=True)
    return tuple(equation.primitive.bind(*ends, **equation.params) for ends in (lowers, uppers))


def _subtract(equation, operands):
    a, b = map(as_interval, operands)
    return a.lower - b.upper, a.upper - b.lower


def _negate(equation, operands):
    (a,) = map(as_interval, operands)
    return -a.upper, -a.lower


def _multiply(equation, operands):
    a, b = map(as_interval, operands)
    # What is unbounded is a number all the same, and zero times a number is zero.
    products = [jnp.where((x == 0) | (y == 0), 0.0, x * y) for x in a for y in b]
    return functools.reduce(jnp.minimum, products), functools.reduce(jnp.maximum, products)


def _divide(equation, operands):
    a, b = map(as_interval, operands)
    quotients = [x / y for x in a for y in b]
    if not _is_float(equation.outvars[0].aval):
        quotients = [jnp.trunc(x) for x in quotients]
    has_zero = (b.lower <= 0) & (b.upper >= 0)
    lower, upper = functools.reduce(jnp.minimum, quotients), functools.reduce(jnp.maximum, quotients)
    return jnp.where(has_zero, -jnp.inf, lower), jnp.where(has_zero, jnp.inf, upper)


def _absolute(equation, operands):
    (a,) = map(as_interval, operands)
    return jnp.maximum(jnp.maximum(a.lower, -a.upper), 0.0), jnp.maximum(-a.lower, a.upper)


def _convert(equation, operands):
    (a,), before, after = map(as_interval, operands), equation.invars[0].aval, equation.outvars[0].aval
    if _is_bool(after):
        return (a.lower > 0) | (a.upper < 0), (a.lower != 0) | (a.upper != 0)
    return a if _is_float(after) or not _is_float(before) else (jnp.trunc(a.lower), jnp.trunc(a.upper))


def _select(equation, operands):
    which, *cases = map(as_interval, operands)
    anywhere = _hull(cases)
    if len(cases) > 2:
        return anywhere
    no, yes = cases
    choose = lambda one, other, either: jnp.where(which.lower > 0, one, jnp.where(which.upper < 1, other, either))
    return choose(yes.lower, no.lower, anywhere.lower), choose(yes.upper, no.upper, anywhere.upper)


def _less(equation, operands, strictly=True):
    a, b = map(as_interval, operands)
    return (a.upper < b.lower, a.lower < b.upper) if strictly else (a.upper <= b.lower, a.lower <= b.upper)


def _equal(equation, operands):
    a, b = map(as_interval, operands)
    return (a.lower == a.upper) & (b.lower == b.upper) & (a.lower == b.lower), (a.lower <= b.upper) & (b.lower <= a.upper)


def _unequal(equation, operands):
    lower, upper = _equal(equation, operands)
    return ~upper, ~lower


def _not(equation, operands):
    (a,) = map(as_interval, operands)
    return 1 - a.upper, 1 - a.lower


def _both(function):
    def rule(equation, operands):
        a, b = map(as_interval, operands)
        return function(a.lower, b.lower), function(a.upper, b.upper)

    return rule


def _logical(function):
    def rule(equation, operands):
        if not _is_bool(equation.outvars[0].aval):
            return unbounded(equation.outvars[0].aval)  # the bits of numbers
        return function(equation, operands)

    return rule


def _pick(equation, operands):
    """Of a part of an array: where it is not known which, of the whole array."""
    array, *where = operands
    ends, shape = as_interval(array), equation.outvars[0].aval.shape
    if any(map(is_interval, where)):
        lower, upper = ends.lower.min(initial=jnp.inf), ends.upper.max(initial=-jnp.inf)
        if "FILL" in str(equation.params.get("mode")):
            # Outside of the array there is another value: the one given, or the least integer.
            fill = equation.params["fill_value"]
            is_signed = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.signedinteger)
            lower = jnp.minimum(lower, -jnp.inf if fill is None else fill)
            upper = jnp.maximum(upper, fill if fill is not None else -jnp.inf if is_signed else jnp.inf)
        return jnp.full(shape, lower), jnp.full(shape, upper)
    return tuple(equation.primitive.bind(end, *where, **equation.params) for end in ends)


def _put(equation, operands):
    """Of an array in which a part is replaced: where it is not known which, of both."""
    array, part, *where = operands
    array, part = as_interval(array), as_interval(part)
    if any(map(is_interval, where)):
        return jnp.minimum(array.lower, part.lower.min()), jnp.maximum(array.upper, part.upper.max())
    return tuple(equation.primitive.bind(*ends, *where, **equation.params) for ends in zip(array, part, strict=True))


def _scatter(function):
    def rule(equation, operands):
        array, where, part = operands
        if is_interval(where):
            return unbounded(equation.outvars[0].aval)
        params = equation.params
        how = {"indices_are_sorted": params["indices_are_sorted"], "unique_indices": params["unique_indices"]}
        scatter = lambda array, part: function(array, where, part, params["dimension_numbers"], mode=params["mode"], **how)
        return tuple(map(scatter, as_interval(array), as_interval(part)))

    return rule


def _reversed(rule):
    return lambda equation, operands: rule(equation, operands[::-1])


def _is_bool(like):
    return like.dtype == bool


def _is_float(like):
    return jnp.issubdtype(like.dtype, jnp.inexact)


_MONOTONE = (
    *("add", "max", "min", "clamp", "floor", "ceil", "round", "sign", "copy", "copy_p", "stop_gradient"),
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "concatenate", "stack", "transpose", "rev", "pad"),
    *("reduce_sum", "reduce_max", "reduce_min", "cumsum", "cummax", "cummin"),
)
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), ("jaxpr", "call_jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), ("call_jaxpr", "fun_jaxpr")),
    "custom_vmap_call": ("call",),
}
_RULES: dict[str, Callable] = {
    **dict.fromkeys(_MONOTONE, _monotone),
    "sub": _subtract,
    "neg": _negate,
    "mul": _multiply,
    "div": _divide,
    "abs": _absolute,
    "convert_element_type": _convert,
    "select_n": _select,
    "lt": _less,
    "le": functools.partial(_less, strictly=False),
    "gt": _reversed(_less),
    "ge": _reversed(functools.partial(_less, strictly=False)),
    "eq": _equal,
    "ne": _unequal,
    "not": _logical(_not),
    "and": _logical(_both(jnp.minimum)),
    "or": _logical(_both(jnp.maximum)),
    "gather": _pick,
    "dynamic_slice": _pick,
    "dynamic_update_slice": _put,
    "scatter": _scatter(lax.scatter),
    "scatter-add": _scatter(lax.scatter_add),
}
