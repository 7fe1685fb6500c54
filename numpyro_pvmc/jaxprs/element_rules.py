"""Say what an operation on arrays makes of what is known of its operands' elements.

Every rule takes a :class:`numpyro_pvmc.jaxprs.facts.Book`, the parameters of the operation, the shapes and types of its
results, and what is said of its operands. A result may lack numbers: then the same operation on equal operands gives the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numpyro_pvmc.jaxprs.facts import LARGE, Value
from numpyro_pvmc.jaxprs.movement import (
    ALONG,
    COMPUTED,
    ELEMENTWISE,
    MOVES,
    REDUCTIONS,
    broadcast_trailing,
    gather_positions,
    scatter_positions,
    union,
)

_DECIDES = {"mul": 0, "and": False, "or": True}  # an operand of this value is the result, whatever the other
_LEAVES = {"mul": 1, "add": 0, "sub": 0, "and": True, "or": False}  # one of this value leaves the other as it is
_SAME = ("copy", "copy_p", "optimization_barrier", "stop_gradient")
_MOST = 2**22  # elements of a product that are looked at one by one


def rule_of(name: str) -> Callable[..., list[Value]] | None:
    """The rule of an operation, if there is one.

    :return: takes a book, parameters, results, operands; returns what is said of the results.
    """
    if name in MOVES:
        return lambda book, params, out, values: move(lambda *arrays: MOVES[name](*arrays, **params), out, values)
    kinds = ((ELEMENTWISE, _elementwise), (REDUCTIONS, _reduction), (ALONG, _along_axes))
    for names, rule in kinds:
        if name in names:
            return lambda *args, rule=rule: rule(name, *args)
    if name.startswith("scatter"):
        return lambda *args: _scatter(name, *args)
    return _OTHERS.get(name)


def move(function: Callable[..., Any], out: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """What a function says that moves elements: marks, values and numbers go the same way.

    :param function: of as many NumPy arrays as there are operands; returns one, or a list of several.
    :param out: shapes and types of the results.
    :param values: the operands.
    """

    def each(arrays):
        result = function(*arrays)
        return result if isinstance(result, list) else [result]

    reads = known = sure = number = [None] * len(out)
    if any(value.reads is not None for value in values):
        reads = each([value.marks for value in values])
    if any(value.known is not None for value in values) and all(aval.size <= LARGE for aval in out):
        known = each([np.zeros(v.shape, v.dtype) if v.known is None else v.known for v in values])
        sure = each([np.zeros(v.shape, bool) if v.sure is None else v.sure for v in values])
    if all(value.number is not None for value in values):
        number = each([value.number for value in values])
    parts = zip(out, reads, known, sure, number, strict=True)
    return [Value(tuple(aval.shape), aval.dtype, *rest) for aval, *rest in parts]


def said(aval: Any, reads: np.ndarray | None = None) -> Value:
    """A result of which nothing is known but its marks, without numbers yet.

    :param aval: anything with a shape and a type.
    :param reads: marks, which are broadcast.
    """
    return Value(tuple(aval.shape), aval.dtype, None if reads is None else np.broadcast_to(reads, aval.shape))


def together(out: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Results of which every element reads every element of every operand.

    :param out: shapes and types of the results.
    :param values: the operands.
    """
    marks = [np.bitwise_or.reduce(value.marks, None) for value in values if value.reads is not None]
    return [said(aval, union(marks) if marks else None) for aval in out]


def either(aval: Any, reads: Sequence[np.ndarray | None]) -> Value:
    """A result that reads all that is given, element by element.

    :param aval: its shape and type.
    :param reads: marks, which are broadcast.
    """
    reads = [np.broadcast_to(x, aval.shape) for x in reads if x is not None]
    return said(aval, union(reads) if reads else None)


def _elementwise(name, book, params, out, values):
    return [_of_elements(name, book, params, aval, values) for aval in out]


def _of_elements(name, book, params, aval, values):
    shape, wide = tuple(aval.shape), lambda x: np.broadcast_to(x, aval.shape)
    if name in _SAME or (name == "convert_element_type" and aval.dtype == values[0].dtype):
        is_hidden = name == "optimization_barrier"
        return values[0]._replace(known=None, sure=None) if is_hidden else values[0]
    number = book.numbers_of(name, str(sorted(params.items())), aval, values)
    result = Value(shape, aval.dtype, number=number)
    if all(value.known is not None for value in values) and name in COMPUTED and aval.size <= LARGE:
        sure = np.logical_and.reduce([wide(value.sure) for value in values])
        with np.errstate(all="ignore"):
            how = {"y": params["y"]} if name == "integer_pow" else {}
            known = wide(COMPUTED[name](*(value.known for value in values), **how))
            if np.issubdtype(known.dtype, np.inexact) and not np.issubdtype(aval.dtype, np.inexact):
                sure = sure & np.isfinite(known)  # what becomes of others depends on the machine
            known = known.astype(aval.dtype)
        result = result._replace(known=known, sure=sure)
    reads = [None if value.reads is None else wide(value.reads) for value in values]
    for one, other in ((0, 1), (1, 0)) if len(values) == 2 else ():
        given = values[one]
        if given.known is None or aval.size > LARGE:
            continue
        if name in _DECIDES:
            decided = wide(given.sure & (given.known == _DECIDES[name]))
            reads = [None if x is None else np.where(decided, np.uint64(0), x) for x in reads]
            known = decided & False if result.known is None else result.known
            sure = decided if result.sure is None else result.sure | decided
            known = np.where(decided, np.asarray(_DECIDES[name], aval.dtype), known).astype(aval.dtype)
            result = result._replace(known=known, sure=sure)
        if book.numbered and name in _LEAVES and not (name == "sub" and one == 0) and values[other].dtype == aval.dtype:
            left = wide(given.sure & (given.known == _LEAVES[name]))
            result = result._replace(number=np.where(left, wide(values[other].number), result.number))
    reads = [x for x in reads if x is not None]
    return result._replace(reads=union(reads) if reads else None)


def _reduction(name, book, params, out, values):
    (aval,), (value,), axes = out, values, tuple(map(int, params["axes"]))
    if all(value.shape[axis] == 1 for axis in axes) and aval.dtype == value.dtype:
        return move(lambda x: x.squeeze(axes), out, values)
    result = said(aval, None if value.reads is None else np.bitwise_or.reduce(value.marks, axes))
    function = REDUCTIONS[name]
    if not value.is_sure or function is None or not value.known.size:
        return [result]
    known = np.asarray(function(value.known, axes[0] if function in (np.argmax, np.argmin) else axes)).astype(aval.dtype)
    return [result._replace(known=known, sure=np.ones(known.shape, bool))]


def _along_axes(name, book, params, out, values):
    axes, ndim = ALONG[name](shape=values[0].shape, **params), len(values[0].shape)
    marked = [value.marks for value in values if value.reads is not None]
    if not marked:
        return [said(aval) for aval in out]
    if sorted(axes) == list(range(ndim - len(axes), ndim)):
        # Operands, and results, may have other numbers of axes after those of the batch.
        of_batch = union([np.bitwise_or.reduce(x, tuple(range(ndim - len(axes), x.ndim))) for x in marked])
        return [said(aval, broadcast_trailing(of_batch, aval.shape)) for aval in out]
    return [said(aval, union([np.bitwise_or.reduce(x, axes, keepdims=True) for x in marked])) for aval in out]


def _iota(book, params, out, values):
    (aval,) = out
    if aval.size > LARGE or values:
        return [said(aval)]
    where = [1] * len(aval.shape)
    where[params["dimension"]] = -1
    numbers = np.arange(aval.shape[params["dimension"]]).reshape(where)
    return [book.constant(np.broadcast_to(numbers, aval.shape).astype(aval.dtype))]


def _select(book, params, out, values):
    (aval,), (which, *cases) = out, values
    wide = lambda x: np.broadcast_to(x, aval.shape)
    if which.known is None:
        result = either(aval, [value.reads for value in values])
        return [_numbered_choice(book, result, values, np.zeros(aval.shape, bool), lambda arrays: wide(arrays[0]))]
    number, sure = wide(which.known).astype(int), wide(which.sure)
    choose = lambda arrays: np.choose(np.where(sure, number, 0), [wide(x) for x in arrays])
    result = said(aval)
    if any(value.reads is not None for value in values):
        unsure = union([wide(value.marks) for value in values])
        result = result._replace(reads=np.where(sure, choose([case.marks for case in cases]), unsure))
    if any(case.known is not None for case in cases) and aval.size <= LARGE:
        known = choose([np.zeros(case.shape, aval.dtype) if case.known is None else case.known for case in cases])
        is_known = choose([np.zeros(case.shape, bool) if case.sure is None else case.sure for case in cases])
        result = result._replace(known=known, sure=sure & is_known)
    return [_numbered_choice(book, result, values, sure, choose)]


def _numbered_choice(book, result, values, sure, choose):
    """Where the choice is sure an element is equal to that of the case, and where all cases are equal, too."""
    if not book.numbered:
        return result
    _, *cases = values
    equal = np.logical_and.reduce([np.broadcast_to(case.number == cases[0].number, result.shape) for case in cases])
    number = book.numbers_of("select_n", "", result, values)
    return result._replace(number=np.where(sure | equal, choose([case.number for case in cases]), number))


def _dot(book, params, out, values):
    (aval,), sides = out, [_Side.of(*side) for side in zip(values, *params["dimension_numbers"], strict=True)]
    reads = []
    for own, other, is_turned in ((*sides, False), (*sides[::-1], True)):
        if own.marks is None:
            continue
        kept = np.bitwise_or.reduce(own.marks, -1)[..., None]
        if other.is_zero is not None and own.marks.size * other.free < _MOST:
            # A known zero, of a permutation or a selection, lets nothing through.
            kept = np.bitwise_or.reduce(np.where(other.is_zero[:, None], np.uint64(0), own.marks[:, :, None]), -1)
        kept = np.broadcast_to(kept, (*kept.shape[:2], other.free))
        reads.append(kept.swapaxes(1, 2) if is_turned else kept)
    return [said(aval, union(reads).reshape(aval.shape) if reads else None)]


class _Side(NamedTuple):
    """One operand of a product of matrices, with axes of the batch, free ones, and contracted ones, each as one."""

    marks: np.ndarray | None
    is_zero: np.ndarray | None
    free: int

    @classmethod
    def of(cls, value, contracted, batch):
        axes = [axis for axis in range(len(value.shape)) if axis not in (*contracted, *batch)]
        size = lambda axes: math.prod(value.shape[axis] for axis in axes)
        flat = lambda x: x.transpose(*batch, *axes, *contracted).reshape(size(batch), size(axes), size(contracted))
        is_zero = None if value.known is None else (value.known == 0) & value.sure
        is_zero = flat(is_zero) if is_zero is not None and is_zero.any() else None
        return cls(None if value.reads is None else flat(value.marks), is_zero, size(axes))


def _triangular_solve(book, params, out, values):
    """A column of the solution reads the matrix and the same column of the right side; a row, if the matrix is on the right."""
    matrix, right = values
    axis = -2 if params["left_side"] else -1
    of_matrix = None if matrix.reads is None else np.bitwise_or.reduce(matrix.marks, (-2, -1), keepdims=True)
    of_right = None if right.reads is None else np.bitwise_or.reduce(right.marks, axis, keepdims=True)
    return [either(out[0], [of_matrix, of_right])]


def _convolution(book, params, out, values):
    (aval,), (left, right), numbers = out, values, params["dimension_numbers"]
    if right.reads is not None or params["batch_group_count"] != 1:
        return together(out, values)
    of_batch = np.moveaxis(left.marks, numbers.lhs_spec[0], 0)
    of_batch = np.bitwise_or.reduce(of_batch.reshape(len(of_batch), -1), -1)
    where = [1] * len(aval.shape)
    where[numbers.out_spec[0]] = -1
    return [said(aval, of_batch.reshape(where))]


def _starts(starts, sizes, shape):
    """Where slices begin, by axis: a number, or `None` where that is not known."""
    starts = [0 if size == whole else start for start, size, whole in zip(starts, sizes, shape, strict=True)]
    is_known = lambda start: isinstance(start, int) or start.is_sure
    at = lambda start: start if isinstance(start, int) else int(start.known)
    limits = [whole - size for size, whole in zip(sizes, shape, strict=True)]
    return [min(max(at(s), 0), limit) if is_known(s) else None for s, limit in zip(starts, limits, strict=True)]


def _dynamic_slice(book, params, out, values):
    value, *indices = values
    starts = _starts(indices, params["slice_sizes"], value.shape)
    anywhere = tuple(axis for axis, start in enumerate(starts) if start is None)
    sizes = zip(starts, params["slice_sizes"], strict=True)
    place = tuple(slice(None) if start is None else slice(start, start + size) for start, size in sizes)
    if all(_is_alike(value.number, axis) for axis in anywhere):
        # Where all elements along an axis are equal, it does not matter which are taken.
        first = zip(place, params["slice_sizes"], strict=True)
        place = tuple(slice(0, size) if axis in anywhere else part for axis, (part, size) in enumerate(first))
        return move(lambda x: x[place], out, [value])
    read = None if value.reads is None else np.bitwise_or.reduce(value.marks[place], anywhere, keepdims=True)
    return [either(out[0], [read, *(index.reads for index in indices)])]


def _is_alike(number, axis):
    return number is not None and bool((number == np.take(number, [0], axis)).all())


def _dynamic_update_slice(book, params, out, values):
    value, update, *indices = values
    starts = _starts(indices, update.shape, value.shape)
    anywhere = tuple(axis for axis, start in enumerate(starts) if start is None)
    sizes = zip(starts, update.shape, strict=True)
    place = tuple(slice(None) if start is None else slice(start, start + size) for start, size in sizes)

    def put(x, update):
        x = x.copy()
        x[place] = update
        return x

    if not anywhere:
        return move(put, out, [value, update])
    written = np.zeros(value.shape, np.uint64)
    if update.reads is not None:
        written[place] = np.bitwise_or.reduce(update.marks, anywhere, keepdims=True)
    return [either(out[0], [value.reads, written, *(index.reads for index in indices)])]


def _indices(value):
    blank = np.zeros(value.shape, int)
    return (blank, blank.astype(bool)) if value.known is None else (value.known, value.sure)


def _gather(book, params, out, values):
    (aval,), (value, indices) = out, values
    places = gather_positions(value.shape, *_indices(indices), tuple(aval.shape), params)
    if not places.anywhere and indices.reads is None:
        (moved,) = move(lambda x: x[places.index], out, [value])
        return [moved if places.is_inside else said(aval, moved.reads)]
    read = value.reads
    if read is not None:
        read = np.bitwise_or.reduce(value.marks, places.anywhere, keepdims=True)[places.index]
    of_window = params["dimension_numbers"].offset_dims
    where = [1 if axis in of_window else size for axis, size in enumerate(aval.shape)]
    of_index = None if indices.reads is None else np.bitwise_or.reduce(indices.marks, -1).reshape(where)
    return [either(aval, [read, of_index])]


def _scatter(name, book, params, out, values):
    value, indices, update = values
    if indices.reads is not None:
        return together(out, values)
    places = scatter_positions(value.shape, *_indices(indices), update.shape, params)

    def put(x, update):
        x = x.copy()
        x[places.index] = update
        return x

    if name == "scatter" and not places.anywhere and places.is_inside and params["unique_indices"]:
        return move(put, out, [value, update])
    written = np.zeros([1 if axis in places.anywhere else size for axis, size in enumerate(value.shape)], np.uint64)
    if update.reads is not None:
        np.bitwise_or.at(written, places.index, update.marks)
    return [either(out[0], [value.reads, written])]


_OTHERS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "select_n": _select,
    "triangular_solve": _triangular_solve,
}
