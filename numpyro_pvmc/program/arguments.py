"""Keep what a program is called with: arrays are traced, anything else is static."""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array_of_numbers(leaf: Any) -> bool:
    """Whether an argument of a program is data, which may be other numbers in the next call.

    :raises TypeError: for a masked array of NumPy, whose mask JAX does not see.
    """
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"Among the arguments is a masked array of NumPy, of shape {leaf.shape}, whose mask would be lost. Fill its masked "
            "entries, give the mask as an argument of its own, `model(y.filled(0.0), ~np.ma.getmaskarray(y))`, and put "
            "`numpyro.handlers.mask(mask=seen_t)` around the site."
        )
    is_numpy = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufcV" and leaf.dtype.names is None
    return is_numpy or isinstance(leaf, jax.Array)


def check_static(leaf: Any) -> Any:
    """An argument of a program that is no array, and so keeps its value while a program is compiled.

    :raises TypeError: naming what it is, if it is not hashable.
    """
    if isinstance(leaf, Hashable) and (isinstance(leaf, np.generic) or not hasattr(leaf, "__array__")):
        return leaf
    kind, dtype = type(leaf), getattr(leaf, "dtype", None)
    what = f"a {kind.__module__}.{kind.__qualname__}" + ("" if dtype is None else f" of type {dtype}")
    if isinstance(leaf, np.ndarray):
        advice = "Take times as numbers, such as days since the first, and categories as integers from 0."
        advice = "If its elements are numbers, convert it with `y.astype(float)`." if leaf.dtype == object else advice
    else:
        advice = "Convert data with `jax.numpy.asarray`."
    raise TypeError(
        f"Arguments of the model and the guide must be arrays of numbers, or hashable Python values, but got {what}. {advice}"
    )


@jax.tree_util.register_pytree_node_class
class Arguments:
    """Positional and keyword arguments of a program: arrays are leaves, anything else is static.

    Python scalars, strings, ``None`` and callables keep their values under `jax.jit`: a length stays a number.

    :raises TypeError: when it is flattened with an argument that is neither an array nor hashable.
    """

    def __init__(self, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None):
        self.args, self.kwargs = tuple(args), dict(kwargs or {})

    def __call__(self, program: Callable) -> Any:
        return program(*self.args, **self.kwargs)

    def tree_flatten(self):
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        is_array = tuple(map(is_array_of_numbers, leaves))
        static = tuple(None if array else check_static(leaf) for leaf, array in zip(leaves, is_array, strict=True))
        arrays = tuple(leaf for leaf, array in zip(leaves, is_array, strict=True) if array)
        return arrays, (treedef, is_array, static)

    @classmethod
    def tree_unflatten(cls, aux, arrays):
        treedef, is_array, static = aux
        arrays = iter(arrays)
        leaves = [next(arrays) if array else leaf for leaf, array in zip(static, is_array, strict=True)]
        self = object.__new__(cls)
        self.args, self.kwargs = jax.tree.unflatten(treedef, leaves)
        return self


def signature(tree: Any) -> Hashable:
    """What of a pytree a compiled function is compiled for: its structure, shapes and types.

    :param tree: a pytree, such as :class:`Arguments`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def is_traced(tree: Any) -> bool:
    """Whether a pytree has arrays without numbers yet.

    :param tree: a pytree.
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


class _Frozen:
    """An array that equals those of the same numbers."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.key = self.array.shape, self.array.dtype.str, self.array.tobytes()

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, _Frozen) and self.key == other.key


@jax.tree_util.register_pytree_node_class
class Held(Arguments):
    """Arguments of a program, some of whose arrays keep their numbers under `jax.jit`: these are static.

    :param held: places of arrays among them, as :func:`places` names them; those that are not there are ignored.
    """

    def __init__(self, arguments: Arguments, held: Collection[str]):
        super().__init__(arguments.args, arguments.kwargs)
        self.held = tuple(held)

    def tree_flatten(self):
        frozen = lambda path, leaf: _Frozen(leaf) if jax.tree_util.keystr(path) in self.held else leaf
        args, kwargs = jax.tree.map_with_path(frozen, (self.args, self.kwargs))
        arrays, aux = Arguments(args, kwargs).tree_flatten()
        return arrays, (aux, self.held)

    @classmethod
    def tree_unflatten(cls, aux, arrays):
        aux, held = aux
        self = super().tree_unflatten(aux, arrays)
        thawed = jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, _Frozen) else leaf, (self.args, self.kwargs))
        (self.args, self.kwargs), self.held = thawed, held
        return self


def places(arguments: Arguments) -> list[str]:
    """Names of the places of the arrays among arguments, in the order of their leaves."""
    arrays = {id(leaf) for leaf in jax.tree.leaves(arguments)}
    everywhere = jax.tree.leaves_with_path((arguments.args, arguments.kwargs))
    return [jax.tree_util.keystr(path) for path, leaf in everywhere if id(leaf) in arrays]


def called(program: Callable) -> str:
    """What a program is called: the name of the function, or the class of the object."""
    return getattr(program, "__name__", type(program).__name__)
