"""Multiply the transitions of a chain in about log T steps.

Neighbours are multiplied, then neighbouring products, until one is left; on the way back down each half of a product learns
what lies beyond its ends. What goes down are vectors of logarithms. The gradient of the log normalizer goes the same way as
numbers, and a weight of 1e-1000, which still tells a refitted proposal where to go, would be zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_pvmc.ops.forward_backward import Edges, lazy
from numpyro_pvmc.ops.semiring import logmatmulexp, logsumexp, shift_by_max


class Level(NamedTuple):
    """Products of neighbouring matrices: constants, and the matrices less them."""

    constants: Float[Array, "P *batch"]
    matrices: Float[Array, "P *batch K K"]


def products(
    node: Float[Array, "T *batch K"], edge: Float[Array, "S *batch K K"] | Edges, mask: Bool[Array, "T *batch"] | None
) -> list[Level]:
    """Products of the matrices that take alpha from one time step to the next: of one, of two, of four, .. of all.

    :return: a level for each power of two; none for a chain of one time step.
    """
    if len(node) == 1:
        return []
    function, inputs = lazy(edge)
    matrices = jax.vmap(function)(inputs).astype(node.dtype) + node[1:, ..., None, :]
    if mask is not None:
        identity = jnp.where(jnp.eye(node.shape[-1], dtype=bool), jnp.zeros((), node.dtype), -jnp.inf)
        matrices = jnp.where(mask[1:, ..., None, None], matrices, identity)
    levels = [Level(*shift_by_max(jnp.broadcast_to(matrices, (*node[1:].shape, node.shape[-1])), (-2, -1)))]
    while len(levels[-1].matrices) > 1:
        constants, matrices = levels[-1]
        gain, product = shift_by_max(logmatmulexp(matrices[:-1:2], matrices[1::2]), (-2, -1))
        alone = 2 * len(product)
        joined = constants[:-1:2] + constants[1::2] + gain
        levels.append(Level(*(jnp.concatenate(pair) for pair in ((joined, constants[alone:]), (product, matrices[alone:])))))
    return levels


def total(first: Float[Array, "*batch K"], levels: list[Level]) -> Float[Array, "*batch"]:
    """The log normalizer.

    :param first: alpha of the first time step.
    :param levels: products of the matrices.
    """
    if not levels:
        return logsumexp(first, -1)
    constants, (product,) = levels[-1]
    return constants[0] + logsumexp(first + logsumexp(product, -1), -1)


def alphas(first: Float[Array, "*batch K"], levels: list[Level]) -> Float[Array, "T *batch K"]:
    """The log of the weight of all ways to a particle, up to a constant of each time step.

    :param first: that of the first time step.
    :param levels: products of the matrices.
    """
    move = lambda alpha, matrices: shift_by_max(logsumexp(alpha[..., :, None] + matrices, -2))[1]
    before = first[None]
    for _, matrices in reversed(levels[:-1]):
        pairs = len(matrices) // 2
        before = _side_by_side(before[:pairs], move(before[:pairs], matrices[:-1:2]), before[pairs:])
    return jnp.concatenate([before, move(before[-1:], levels[0].matrices[-1:])]) if levels else before


def betas(first: Float[Array, "*batch K"], levels: list[Level]) -> Float[Array, "T *batch K"]:
    """The log of the weight of all ways on from a particle, up to a constant of each time step.

    :param first: alpha of the first time step, which says the shape.
    :param levels: products of the matrices.
    """
    move = lambda beta, matrices: shift_by_max(logsumexp(matrices + beta[..., None, :], -1))[1]
    after = jnp.zeros_like(first)[None]
    for _, matrices in reversed(levels[:-1]):
        pairs = len(matrices) // 2
        after = _side_by_side(move(after[:pairs], matrices[1::2]), after[:pairs], after[pairs:])
    return jnp.concatenate([move(after[:1], levels[0].matrices[:1]), after]) if levels else after


def _side_by_side(left, right, alone):
    """The ends of a level's products, from those of each pair and of the one without a neighbour, if there is one."""
    pairs = jnp.stack([left, right], 1)
    return jnp.concatenate([pairs.reshape(2 * len(left), *left.shape[1:]), alone])
