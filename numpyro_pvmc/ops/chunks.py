"""Evaluate a function of one step at all steps, a few at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

_BYTES_AT_ONCE = 2**25  # half of it and four times as much are as fast on two cores, a quarter is slower


def at_all_steps(function: Callable[[Any], Any], inputs: Any) -> Any:
    """`jax.vmap`, but that on a CPU steps that compute much on the way are taken a few at a time.

    A network makes a thousand numbers on the way to two. Those of all steps at once would go to main memory and back for each
    of its layers; those of a few steps stay in the caches, and the backward pass computes them anew.

    :param function: of the inputs of one step.
    :param inputs: a pytree with leading axis T.
    :return: a pytree with leading axis T.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(jax.tree.map(lambda x: x[0], inputs))
    length = len(jax.tree.leaves(inputs)[0])
    steps = max(_BYTES_AT_ONCE // max(_bytes_on_the_way(program), 1), 1)

    def of_step(inputs):
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(inputs)))

    if steps >= length or jax.default_backend() != "cpu":
        return jax.vmap(of_step)(inputs)
    return in_parts(jax.checkpoint(jax.vmap(of_step)), inputs, steps)


def in_parts(function: Callable[[Any], Any], inputs: Any, size: int) -> Any:
    """A function of many steps, of a few at a time.

    :param function: of the inputs of any number of steps, with these as leading axis.
    :param inputs: a pytree with leading axis T.
    :param size: how many steps at a time, at most.
    :return: a pytree with leading axis T.
    """
    length = len(jax.tree.leaves(inputs)[0])
    number = -(-length // size)
    size = -(-length // number)

    def cut(x):
        # What the last part lacks is the last step again: nothing new can happen there.
        return jnp.concatenate([x, jnp.repeat(x[-1:], number * size - length, 0)]).reshape(number, size, *x.shape[1:])

    results = lax.map(function, jax.tree.map(cut, inputs))
    return jax.tree.map(lambda x: x.reshape(number * size, *x.shape[2:])[:length], results)


def _bytes_on_the_way(program: Jaxpr | ClosedJaxpr) -> int:
    """Of the results of all operations."""
    total = 0
    for equation in program.eqns:
        total += sum(result.aval.size * result.aval.dtype.itemsize for result in equation.outvars)
        for value in equation.params.values():
            inner = value if isinstance(value, tuple) else (value,)
            total += sum(_bytes_on_the_way(one) for one in inner if isinstance(one, Jaxpr | ClosedJaxpr))
    return total
