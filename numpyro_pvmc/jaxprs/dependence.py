"""Ask of a function which of its outputs read which of its inputs.

`influence` asks whether an output reads an input at all: it does if `jax.vmap` over that input maps the output. `mixes_rows`
asks whether rows of the output read other rows of the input, and follows these through the operations of the function. Neither
needs numbers, and both see every way to read a value, with a slope or without. `follows_slope` asks whether the output is its
value at zero plus its derivative there, and computes both.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from numpyro_pvmc.jaxprs.provenance import Follower


def influence(function: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Which outputs of `function` depend on which of its named inputs.

    :param function: takes the dictionary `inputs`, returns a pytree of arrays.
    :param inputs: a pytree of arrays for each name.
    :return: for each name a pytree like the output of `function`, of booleans: whether that leaf reads that input.

    .. doctest::

        >>> from numpyro_pvmc.jaxprs.dependence import influence
        >>> influence(lambda v: {"sum": v["a"] + v["b"], "twice": 2 * v["b"]}, {"a": 1.0, "b": 1.0})
        {'a': {'sum': True, 'twice': False}, 'b': {'sum': True, 'twice': True}}
    """
    return {name: _readers(function, inputs, name) for name in inputs}


def _readers(function, inputs, name):
    if not jax.tree.leaves(inputs[name]):
        return jax.tree.map(lambda leaf: False, jax.eval_shape(lambda: function(inputs)))
    readers, treedefs = set(), []

    def watch(index, leaf):
        @custom_vmap
        def watched(leaf):
            return leaf

        @watched.def_vmap
        def _(axis_size, in_batched, leaf):
            if in_batched[0]:
                readers.add(index)
            return leaf, in_batched[0]

        return watched(leaf)

    def run(value):
        leaves, treedef = jax.tree.flatten(function({**inputs, name: value}))
        treedefs.append(treedef)
        return [watch(index, jnp.asarray(leaf)) for index, leaf in enumerate(leaves)]

    jax.eval_shape(jax.vmap(run), jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), inputs[name]))
    return jax.tree.unflatten(treedefs[0], [index in readers for index in range(treedefs[0].num_leaves)])


def mixes_rows(function: Callable[..., Any], rows: Any, *others: Any) -> tuple[Any, set[str]]:
    """Which outputs of `function` have a row that reads another row of the input, whatever the values are.

    What it reads is followed through the operations of the traced function, element by element
    (:mod:`numpyro_pvmc.jaxprs.provenance`). Every pair of rows is told apart by some bit of their numbers, so two marks a bit
    do.

    :param function: takes `rows` and `others`, returns a pytree of arrays.
    :param rows: a pytree of arrays with the same leading axis, whose values do not matter.
    :param others: further pytrees of arrays, whose values do not matter either.
    :return: a pytree like the output of `function`, whose leaves have the leading axis of `rows`, of booleans; and the names of
        operations of which it is not known how they mix elements, which count as if they mixed all.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.jaxprs.dependence import mixes_rows
        >>> mixes_rows(lambda x: {"own": jnp.sin(x), "above": x > x.mean()}, jnp.arange(3.0))
        ({'above': True, 'own': False}, set())
    """
    size = len(jax.tree.leaves(rows)[0])
    program, out = jax.make_jaxpr(function, return_shape=True)(rows, *others)
    if size == 1:
        return jax.tree.map(lambda _: False, out), set()
    marks = marks_of_rows(size)
    of_rows = lambda ndim: marks.reshape(-1, *(1,) * (ndim - 1))
    follower = Follower()
    numbers = len(jax.tree.leaves(rows))
    inputs = [
        follower.book.fresh(aval, of_rows(len(aval.shape)) if i < numbers else None) for i, aval in enumerate(program.in_avals)
    ]
    results = follower.run(program, inputs)
    mixed = [bool((value.marks & ~of_rows(len(value.shape))).any()) for value in results]
    return jax.tree.unflatten(jax.tree.structure(out), mixed), follower.strange


def marks_of_rows(size: int) -> np.ndarray:
    """Marks of which no two rows have the same: for each bit of a row's number one if it is set, and another if not.

    :param size: number of rows.
    """
    bits = np.arange(max(math.ceil(math.log2(size)), 1))
    is_set = (np.arange(size)[:, None] >> bits) & 1
    return (np.uint64(1) << (2 * bits + is_set).astype(np.uint64)).sum(-1, dtype=np.uint64)


def changes_by_steps(function: Callable[..., Any], inputs: Any) -> Any:
    """Which outputs of `function` read the inputs by comparing, rounding or stopping gradients, where derivatives see nothing.

    :param function: takes `inputs`, returns a pytree of arrays.
    :param inputs: a pytree of arrays, whose values do not matter.
    :return: a pytree like the output of `function`, of booleans.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.jaxprs.dependence import changes_by_steps
        >>> changes_by_steps(lambda x: {"line": 2 * x, "far away": x + 1.0 * (x > 1e9)}, jnp.ones(3))
        {'far away': True, 'line': False}
    """
    program, out = jax.make_jaxpr(function, return_shape=True)(inputs)
    follower = Follower(steps=2)
    marked = [follower.book.fresh(aval, np.ones((), np.uint64)) for aval in program.in_avals]
    found = [bool((value.marks & follower.steps).any()) for value in follower.run(program, marked)]
    return jax.tree.unflatten(jax.tree.structure(out), found)


def follows_slope(function: Callable[..., Any], value: Any, *others: Any, scales: tuple[float, ...] = (1.0, -30.0, 1e3)) -> Any:
    """Which outputs of `function` are their values at zero plus their derivatives there, at arbitrary points.

    Whether a derivative reads `value` is a question for :func:`influence`, and needs no numbers. But rounding, and what stops
    gradients, have constant derivatives too: they show here.

    :param function: takes `value` and `others`, returns a pytree of arrays. It closes over nothing traced.
    :param value: a pytree of arrays, whose numbers do not matter.
    :param others: further pytrees of arrays.
    :param scales: how far from zero the points are.
    :return: a pytree like the output of `function`, of booleans.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.jaxprs.dependence import follows_slope
        >>> follows_slope(lambda x: {"line": 2 * x + 1, "steps": jnp.floor(x)}, jnp.ones(3))
        {'line': True, 'steps': False}
    """

    def gap(point, others):
        at = lambda point: function(point, *others)
        origin, slope = jax.jvp(at, (jax.tree.map(jnp.zeros_like, point),), (point,))

        def departs(there, origin, slope):
            size = jnp.abs(there) + jnp.abs(origin) + jnp.abs(slope)
            tolerance = 10 * jnp.sqrt(jnp.finfo(size.dtype).eps) * jnp.max(size, initial=0.0, where=jnp.isfinite(size))
            return jnp.any(jnp.abs(there - origin - slope) > tolerance)

        return jax.tree.map(departs, at(point), origin, slope)

    with jax.ensure_compile_time_eval():
        point, others = _stand_ins(value, 0, always=True), _stand_ins(others, 1, always=False)
        points = jax.tree.map(lambda leaf: np.multiply.outer(np.asarray(scales, leaf.dtype), leaf), point)
    gaps = _computed(jax.vmap(gap, (0, None)), points, others)
    return jax.tree.map(lambda leaf: not np.any(leaf), gaps)


def _computed(function, *args):
    """What a function returns for arrays, as arrays of NumPy, also while a program around it is traced.

    It is compiled outside of `ensure_compile_time_eval`, where every constant of the function would be compiled by itself.
    """
    leaves, treedef = jax.tree.flatten(args)
    with jax.disable_jit(False):  # a program compiled beforehand refuses to run where nothing is to be compiled
        compiled = jax.jit(lambda leaves: function(*jax.tree.unflatten(treedef, leaves))).lower(leaves).compile()
        with jax.ensure_compile_time_eval():
            return jax.tree.map(np.asarray, compiled(leaves))


def _stand_ins(tree, seed, *, always):
    """Arbitrary arrays of the same shapes for the leaves that are traced, or for all."""
    rng = np.random.default_rng(seed)

    def stand_in(leaf):
        leaf = jnp.asarray(leaf) if not isinstance(leaf, jax.Array) else leaf
        if not (always or isinstance(leaf, jax.core.Tracer)):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)
        values = rng.uniform(0.3, 0.7, leaf.shape)
        if leaf.ndim >= 2 and leaf.shape[-1] == leaf.shape[-2]:
            # A square matrix may be asked for its Cholesky factor.
            values = np.eye(leaf.shape[-1]) + 0.1 * (values + values.swapaxes(-1, -2)) / leaf.shape[-1]
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(stand_in, tree)
