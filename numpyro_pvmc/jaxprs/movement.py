"""Say for the operations of JAX how their results are made of the elements of their operands.

Every function here is of NumPy arrays and of the parameters of one operation. What moves elements (`MOVES`) is applied to
whatever is known of them, one array at a time; what combines elements along axes says along which (`ALONG`); an operation on
elements, one by one, is in `ELEMENTWISE`, and where its values can be computed beforehand, in `COMPUTED`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt
    lt_to max min mul mulhi ne neg nextafter not optimization_barrier or polygamma population_count pow
    random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
ELEMENTWISE = frozenset(_NAMES.split())
# Their results change by steps, where derivatives see nothing.
STEPS = frozenset(
    {
        *("argmax", "argmin", "ceil", "eq", "floor", "ge", "gt", "is_finite", "le", "lt", "ne", "rem", "round", "sign", "sort"),
        *("stop_gradient", "top_k"),
    }
)
COMMUTATIVE = frozenset({"add", "and", "eq", "max", "min", "mul", "ne", "or", "xor"})


def _divide(x, y):
    return np.where(np.signbit(x) ^ np.signbit(y), -(np.abs(x) // np.abs(y)), np.abs(x) // np.abs(y))


COMPUTED: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "ceil": np.ceil,
    "convert_element_type": lambda x: x,
    "div": lambda x, y: _divide(x, y) if np.issubdtype(x.dtype, np.integer) else np.divide(x, y),
    "eq": np.equal,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "integer_pow": lambda x, y: np.power(x, y) if y >= 0 else 1 / np.power(x, -y),
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "sign": np.sign,
    "square": np.square,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def _broadcast(x, shape, broadcast_dimensions, **_):
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _slice(x, start_indices, limit_indices, strides, **_):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _pad(x, value, padding_config, **_):
    for axis, (low, high, interior) in enumerate(padding_config):
        size = x.shape[axis] + max(x.shape[axis] - 1, 0) * interior
        shape = list(x.shape)
        shape[axis] = max(low, 0) + size + max(high, 0)
        wide = np.full(shape, value, x.dtype)
        place = [slice(None)] * x.ndim
        place[axis] = slice(max(low, 0), max(low, 0) + size, interior + 1)
        wide[tuple(place)] = x
        place[axis] = slice(max(-low, 0), shape[axis] - max(-high, 0))
        x = wide[tuple(place)]
    return x


# With the values of the operands; each returns what is asked for of the result.
MOVES: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *xs, dimension, **_: np.concatenate(xs, dimension),
    "expand_dims": lambda x, dimensions, **_: np.expand_dims(x, dimensions),
    "pad": _pad,
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, dimensions, **_: np.flip(x, dimensions),
    "slice": _slice,
    "split": lambda x, sizes, axis, **_: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, dimensions, **_: x.squeeze(tuple(dimensions)),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis),
    "tile": lambda x, reps, **_: np.tile(x, reps),
    "transpose": lambda x, permutation, **_: x.transpose(permutation),
    "unstack": lambda x, axis, **_: [x.take(i, axis) for i in range(x.shape[axis])],
}

_axes = lambda axes, **_: tuple(map(int, axes))
_axis = lambda axis, **_: (int(axis),)
_last = lambda number: lambda shape, **_: tuple(range(len(shape) - number, len(shape)))

REDUCTIONS: dict[str, Callable | None] = {
    "argmax": np.argmax,
    "argmin": np.argmin,
    "reduce_and": np.all,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_or": np.any,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_xor": None,
}

# Along these axes of an operand every element of the result may read every element; the other axes stay as they are.
ALONG: dict[str, Callable[..., tuple[int, ...]]] = {
    "cumlogsumexp": _axis,
    "cummax": _axis,
    "cummin": _axis,
    "cumprod": _axis,
    "cumsum": _axis,
    "sort": lambda dimension, **_: (dimension,),
    "top_k": _axis,
    "cholesky": _last(2),
    "eig": _last(2),
    "eigh": _last(2),
    "hessenberg": _last(2),
    "householder_product": _last(2),
    "lu": _last(2),
    "lu_pivots_to_permutation": _last(1),
    "qr": _last(2),
    "schur": _last(2),
    "svd": _last(2),
    "symmetric_product": _last(2),
    "tridiagonal": _last(2),
    "tridiagonal_solve": _last(2),
    "fft": lambda shape, fft_lengths, **_: _last(len(fft_lengths))(shape),
}


def broadcast_trailing(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat along new axes at the end.

    :param shape: the shape to have.
    """
    return np.broadcast_to(x.reshape(x.shape + (1,) * (len(shape) - x.ndim)), shape)


class Positions(NamedTuple):
    """Where elements of windows stand in an array: an index for each axis.

    Those along the axes of `anywhere` are not known, and are 0. `is_inside` says that no window had to be moved to fit.
    """

    index: tuple[np.ndarray, ...]
    anywhere: tuple[int, ...]
    is_inside: bool


def gather_positions(
    shape: tuple[int, ...], starts: np.ndarray, sure: np.ndarray, out: tuple[int, ...], params: dict[str, Any]
) -> Positions:
    """Where the elements of what `gather` returns come from.

    :param shape: of the operand.
    :param starts: values of its indices, as far as they are known.
    :param sure: where they are.
    :param out: shape of the result.
    :return: positions in the operand, for an array of shape `out`.
    """
    numbers = params["dimension_numbers"]
    windows = [
        axis for axis in range(len(shape)) if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    return _positions(
        shape,
        starts,
        sure,
        out,
        dict(zip(windows, numbers.offset_dims, strict=True)),
        dict(zip(numbers.start_index_map, range(len(numbers.start_index_map)), strict=True)),
        dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)),
        dict(enumerate(params["slice_sizes"])),
    )


def scatter_positions(
    shape: tuple[int, ...], starts: np.ndarray, sure: np.ndarray, of: tuple[int, ...], params: dict[str, Any]
) -> Positions:
    """Where the elements of what `scatter` writes go to.

    :param shape: of the operand.
    :param starts: values of its indices, as far as they are known.
    :param sure: where they are.
    :param of: shape of the updates.
    :return: positions in the operand, for an array of shape `of`.
    """
    numbers = params["dimension_numbers"]
    left_out = (*map(int, numbers.inserted_window_dims), *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(shape)) if axis not in left_out]
    of_window = dict(zip(windows, numbers.update_window_dims, strict=True))
    starting = map(int, numbers.scatter_dims_to_operand_dims)
    return _positions(
        shape,
        starts,
        sure,
        of,
        of_window,
        {axis: column for column, axis in enumerate(starting)},
        dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)),
        {axis: of[of_window[axis]] if axis in of_window else 1 for axis in range(len(shape))},
    )


def _positions(shape, starts, sure, out, of_window, columns, batching, sizes):
    grid = np.indices(out, sparse=True)
    batch = [axis for axis in range(len(out)) if axis not in of_window.values()]

    def at_batch(x):
        """An array with the axes of the indices, but the last, as one with those of the result."""
        where = [1] * len(out)
        for axis, size in zip(batch, x.shape, strict=True):
            where[axis] = size
        return x.reshape(where)

    index, anywhere, is_inside = [], [], True
    for axis, size in enumerate(shape):
        place = np.zeros((1,) * len(out), int)
        if axis in batching:
            place = grid[batch[batching[axis]]]
        elif axis in columns:
            column = columns[axis]
            if not sure[..., column].all():
                anywhere.append(axis)
                index.append(place)
                continue
            place = np.clip(starts[..., column], 0, size - sizes[axis])
            is_inside = is_inside and bool((place == starts[..., column]).all())
            place = at_batch(place)
        if axis in of_window:
            place = place + grid[of_window[axis]]
        index.append(place)
    return Positions(tuple(np.broadcast_to(place, out) for place in index), tuple(anywhere), is_inside)


union = functools.partial(functools.reduce, np.bitwise_or)
