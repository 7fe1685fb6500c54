"""Multiply the transitions of a chain block by block: about twice the root of T steps.

A chain is cut into C blocks of L transitions, through which one goes at once: L steps over arrays of C blocks, and C steps over
their ends. What joins the ends of a block is a matrix product in the log semiring, K times the work of a vector's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_pvmc.ops.semiring import logmatmulexp, logsumexp, shift_by_max


class Blocks(NamedTuple):
    """How the S transitions of a chain are cut. One block is the chain as it is, without an axis of blocks."""

    transitions: int
    number: int = 1

    @property
    def _length(self):
        return -(-self.transitions // self.number)

    def cut(self, x: Any) -> Any:
        """What belongs to transitions, one block beside the other; the last repeats its end until it is full.

        :param x: pytree with leading axis S.
        :return: with leading axes (L, C).
        """
        return x if self.number == 1 else jax.tree.map(self._cut, x)

    def _cut(self, x):
        absent = jnp.broadcast_to(x[-1:], (self.number * self._length - self.transitions, *x.shape[1:]))
        return jnp.concatenate([x, absent]).reshape(self.number, self._length, *x.shape[1:]).swapaxes(0, 1)

    def join(self, x: Any) -> Any:
        """The reverse of :meth:`cut`.

        :param x: pytree with leading axes (L, C).
        """
        back = lambda x: x.swapaxes(0, 1).reshape(self.number * self._length, *x.shape[2:])[: self.transitions]
        return x if self.number == 1 else jax.tree.map(back, x)

    def at_once(self, function: Callable[[Any], Array]) -> Callable[[Any], Array]:
        """A function of one transition, for those of all blocks.

        :param function: of what belongs to one transition.
        """
        return function if self.number == 1 else jax.vmap(function)

    def cut_mask(self, mask: Bool[Array, "T *batch"] | None, batch: tuple[int, ...]) -> Bool[Array, "L *blocks"] | None:
        """Which time steps after the first are present, cut.

        :param batch: shape of the batch.
        """
        if self.number == 1 or (mask is None and not self.transitions % self.number):
            return None if mask is None else self.cut(mask[1:])
        present = jnp.ones((self.transitions, *batch), bool) if mask is None else mask[1:]
        is_there = (jnp.arange(self.number * self._length) < self.transitions).reshape(self.number, self._length).T
        return self.cut(present) & is_there.reshape(is_there.shape + (1,) * len(batch))


def products(
    function: Callable[[Any], Float[Array, "*blocks K K"]],
    inputs: Any,
    node: Float[Array, "L *blocks K"],
    present: Bool[Array, "L *blocks"] | None,
) -> Float[Array, "*blocks K K"]:
    """The log of the weight of all ways from a particle before a block to one at its end, up to a constant of each block.

    :param function: the blocks of pairs of one step, of all blocks of the chain.
    :param inputs: what it reads, cut.
    :param node: potentials of the time steps, cut.
    :param present: which time steps are present, cut.
    """

    @jax.checkpoint
    def step(product, inputs):
        node, present, inputs = inputs
        matrix = function(inputs).astype(node.dtype) + node[..., None, :]
        if present is not None:
            # Neither may nan that stands in padding reach the product, nor, times zero, its gradient.
            matrix = jnp.where(present[..., None, None], matrix, 0.0)
        moved = shift_by_max(logmatmulexp(product, matrix), (-2, -1))[1]
        return moved if present is None else jnp.where(present[..., None, None], moved, product), None

    identity = jnp.where(jnp.eye(node.shape[-1], dtype=bool), jnp.zeros((), node.dtype), -jnp.inf)
    start = jnp.broadcast_to(identity, (*node.shape[1:], node.shape[-1]))
    return lax.scan(step, start, (node, present, inputs))[0]


def starts(first: Float[Array, "*batch K"], products: Float[Array, "C *batch K K"]) -> Float[Array, "C *batch K"]:
    """Alpha of the time step before each block.

    :param first: that of the first time step.
    :param products: of each block.
    """
    step = lambda alpha, product: (shift_by_max(logsumexp(alpha[..., :, None] + product, -2))[1], alpha)
    return lax.scan(step, first, products)[1]


def ends(products: Float[Array, "C *batch K K"]) -> Float[Array, "C *batch K"]:
    """Beta of the last time step of each block.

    :param products: of each block.
    """
    step = lambda beta, product: (shift_by_max(logsumexp(product + beta[..., None, :], -1))[1], beta)
    return lax.scan(step, jnp.zeros_like(products[0, ..., 0]), products, reverse=True)[1]
