"""Hold arguments of a program by value, so that what is compiled for them is compiled for their numbers."""

from collections.abc import Collection

import jax
import numpy as np

from numpyro_pvmc.program.handlers import Arguments


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

    :param arguments: arguments.
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
    """Names of the places of the arrays among arguments, in the order of their leaves.

    :param arguments: arguments.
    """
    arrays = {id(leaf) for leaf in jax.tree.leaves(arguments)}
    everywhere = jax.tree.leaves_with_path((arguments.args, arguments.kwargs))
    return [jax.tree_util.keystr(path) for path, leaf in everywhere if id(leaf) in arrays]
