"""A function in, which of its outputs read which of its inputs out.

Four questions are asked of a function without looking inside it. `influence` asks whether an output reads an input at
all, and needs no numbers: it does if `jax.vmap` over that input maps the output. `couples` asks whether rows of the output
read other rows of the input, and asks it of directional derivatives. `holds` asks whether the output is the input itself
wherever it reads it. `follows_slope` asks whether the output is its value at zero plus its derivative there.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap


def influence(function: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Which outputs of `function` depend on which of its named inputs.

    :param function: takes the dictionary `inputs`, returns a pytree of arrays.
    :param inputs: a pytree of arrays for each name.
    :return: for each name a pytree like the output of `function`, of booleans: whether that leaf reads that input.

    .. doctest::

        >>> from numpyro_pvmc.dependence import influence
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


def couples(function: Callable[..., Any], rows: Any, *others: Any) -> Any:
    """Which outputs of `function` have a row that reads another row of the input.

    Every pair of rows is told apart by some bit of their numbers, so two directional derivatives a bit see every coupling.
    Inputs that are traced, and have no numbers yet, are replaced by arbitrary ones: a coupling holds almost everywhere or
    nowhere.

    :param function: takes `rows` and `others`, returns a pytree of arrays. It closes over nothing traced.
    :param rows: a pytree of arrays with the same leading axis.
    :param others: further pytrees of arrays.
    :return: a pytree like the output of `function`, whose leaves have the leading axis of `rows`, of booleans.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.dependence import couples
        >>> couples(lambda x: {"own": jnp.sin(x), "mean": x - x.mean()}, jnp.arange(3.0))
        {'mean': True, 'own': False}
    """
    size = len(jax.tree.leaves(rows)[0])
    number_bits = math.ceil(math.log2(size)) if size > 1 else 0
    bits = (np.arange(size) >> np.arange(number_bits)[:, None]) & 1
    chosen = np.concatenate([bits, 1 - bits]).astype(bool)

    def leak(rows, others, chosen):
        of_rows = lambda leaf: chosen.reshape((size,) + (1,) * (leaf.ndim - 1))
        smooth = [leaf for leaf in jax.tree.leaves(rows) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        directions = [jnp.where(of_rows(leaf), 1.0 + 0.1 * jnp.cos(leaf), 0.0) for leaf in smooth]

        def moved(smooth, is_flipped):
            smooth = iter(smooth)
            # An integer has no direction: 0 becomes 1, and 1 becomes 0.
            flip = lambda leaf: jnp.where(of_rows(leaf) & is_flipped, 1 - leaf, leaf)
            is_smooth = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
            given = jax.tree.map(lambda leaf: next(smooth) if is_smooth(leaf) else flip(leaf), rows)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), function(given, *others))

        value, change = jax.jvp(lambda smooth: moved(smooth, False), (smooth,), (directions,))
        if len(smooth) < len(jax.tree.leaves(rows)):
            # What is not a number on both sides is no evidence either, nor is rounding: the two are compiled apart.
            difference = jax.tree.map(_difference, value, moved(smooth, True))
            change = jax.tree.map(lambda a, b: jnp.where(jnp.isnan(b), a, jnp.abs(a) + jnp.abs(b)), change, difference)
        # An undefined derivative (nan) is no evidence of a coupling.
        seen = lambda leaf: jnp.any(jnp.where(of_rows(leaf), False, (leaf != 0) & ~jnp.isnan(leaf)))
        return jax.tree.map(seen, change)

    with jax.ensure_compile_time_eval():
        rows, others = _stand_ins(rows, 0, always=True), _stand_ins(others, 1, always=False)
        if not number_bits:
            return jax.tree.map(lambda _: False, jax.eval_shape(function, rows, *others))
    found = _computed(jax.vmap(leak, (None, None, 0)), rows, others, chosen)
    return jax.tree.map(lambda leaf: bool(np.any(leaf)), found)


def _difference(a, b):
    rounding = 64 * jnp.finfo(a.dtype).eps * (1 + jnp.abs(a))
    return jnp.where((a == b) | (jnp.abs(b - a) <= rounding), 0.0, b - a)


def holds(function: Callable[..., Any], value: Any, *others: Any, trials: int = 8) -> bool:
    """Whether `function` returns, in each place, either `value` unchanged or something that does not read it.

    :param function: takes `value` and `others`, returns a pytree like `value`. It closes over nothing traced.
    :param value: a pytree of arrays.
    :param others: further pytrees of arrays, among them the masks by which `function` chooses.
    :param trials: how many arbitrary `others` to try, so that masks fall both ways.
    :return: ``True`` if so in all trials.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.dependence import holds
        >>> mask, old, new = jnp.array(True), jnp.array(0.0), jnp.array(1.0)
        >>> holds(lambda old, mask, new: jnp.where(mask, new, old), old, mask, new)
        True
        >>> holds(lambda old, mask, new: jnp.where(mask, old + new, old), old, mask, new)
        False
    """

    def held(first, second, others):
        new_first, new_second = function(first, *others), function(second, *others)
        same = jax.tree.map(
            lambda a, b, x, y: jnp.all((a == b) | ((a == x) & (b == y)) | (jnp.isnan(a) & jnp.isnan(b))),
            new_first, new_second, first, second,
        )  # fmt: skip
        return jnp.all(jnp.stack(jax.tree.leaves(same)))

    with jax.ensure_compile_time_eval():
        first, second = _stand_ins(value, 0, always=True), _stand_ins(value, 1, always=True)
        tried = [_stand_ins(others, 2 + trial, always=True) for trial in range(trials)]
        others = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tried)
    return bool(np.all(_computed(jax.vmap(held, (None, None, 0), axis_size=trials), first, second, others)))


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
        >>> from numpyro_pvmc.dependence import follows_slope
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
