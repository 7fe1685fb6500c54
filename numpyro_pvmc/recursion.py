"""Chain potentials in; what one pass forwards or backwards over the points tells out.

Alpha is the weight of all ways to a particle, beta that of all ways on from it. The arguments are those of
:mod:`numpyro_pvmc.smoothing`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_pvmc.semiring import finite, logsumexp


class Edges(NamedTuple):
    """Transition potentials that are computed when they are needed, one transition at a time.

    ``function(inputs[t])`` is the block ``edge[t]`` of shape ``(*batch, K, K)``; `inputs` is a pytree with leading axis S.
    A scan over `inputs` never holds more than one block, forward or backward.
    """

    function: Callable[[Any], Array]
    inputs: Any


def forward(
    node: Float[Array, "T *batch K"], edge: Float[Array, "S *batch K K"] | Edges, mask: Bool[Array, "T *batch"] | None
) -> tuple[Float[Array, "*batch"], Float[Array, "T *batch K"]]:
    """Forwards over the points.

    :param node: potentials of the points.
    :param edge: potentials of the transitions.
    :param mask: which points are present.
    :return: the log normalizer; alpha, the log of the total weight of all beginnings of trajectories up to each particle, up to
        a constant of each point.
    """
    function, inputs = lazy(edge)
    present = jnp.ones(node.shape[:-1], bool) if mask is None else mask

    @jax.checkpoint  # without it the backward pass would keep all S blocks of K x K
    def step(carry, inputs):
        log_z, alpha = carry
        node, present, edge_inputs = inputs
        edge = function(edge_inputs).astype(node.dtype)
        if mask is not None:
            # What stands in padding may be nan, and nan times a cotangent of zero is nan.
            node, edge = jnp.where(present[..., None], node, 0.0), jnp.where(present[..., None, None], edge, 0.0)
        gain, moved = scaled(node + logsumexp(alpha[..., :, None] + edge, -2))
        log_z, alpha = jnp.where(present, log_z + gain, log_z), jnp.where(present[..., None], moved, alpha)
        return (log_z, alpha), alpha

    start = scaled(node[0])
    (log_z, _), rest = scan_reading_ahead(step, start, (node[1:], present[1:], inputs))
    # A chain that ends without mass has no weights, whatever the points before the end had.
    log_z = jnp.where(jnp.isneginf(log_z), -jnp.inf, log_z)
    return log_z, jnp.concatenate([start[1][None], rest])


def sequential(
    node: Float[Array, "T *batch K"], edge: Float[Array, "S *batch K K"] | Edges, mask: Bool[Array, "T *batch"] | None
) -> Float[Array, "*batch"]:
    """The log normalizer, by one pass forwards; its gradient, by one pass backwards.

    The gradient with respect to the potential of a transition is the smoothing weight of the pair, and that is the weight of
    the later particle times the share of the earlier one in what reached it:

        W_t[j, k] = W_t[k] softmax_j(alpha_{t-1}[j] + edge_t[j, k]),    W_{t-1}[j] = sum_k W_t[j, k].

    No term exceeds 1, so nothing is rescaled; and there is one exponential a pair, where the derivative of the forward pass has
    two.

    :param node: potentials of the points.
    :param edge: potentials of the transitions.
    :param mask: which points are present.
    :return: the log normalizer of each chain of the batch. It has derivatives of any order, in reverse mode.
    """
    if len(node) == 1:
        return logsumexp(node[0], -1)
    function, inputs = lazy(edge)
    function, constants = jax.closure_convert(function, jax.tree.map(lambda leaf: leaf[0], inputs))
    leaves, treedef = jax.tree.flatten((inputs, jnp.ones(node.shape[:-1], bool)[1:] if mask is None else mask[1:]))
    is_real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    real, fixed = ([leaf for leaf, is_kind in zip(leaves, is_real, strict=True) if is_kind == kind] for kind in (True, False))

    def merged(real, fixed):
        real, fixed = iter(real), iter(fixed)
        return jax.tree.unflatten(treedef, [next(real) if is_kind else next(fixed) for is_kind in is_real])

    def forwards(node, real, constants, fixed):
        inputs, present = merged(real, fixed)
        present = None if mask is None else jnp.concatenate([jnp.ones_like(present[:1]), present])
        return forward(node, Edges(lambda one: function(one, *constants), inputs), present)

    @jax.custom_vjp
    def evaluate(*arguments):
        return forwards(*arguments)[0]

    def keep(*arguments):
        log_z, alpha = forwards(*arguments)
        return log_z, (arguments, log_z, alpha)

    def pull_back(kept, cotangent):
        (_, real, constants, fixed), log_z, alpha = kept

        @jax.checkpoint  # for derivatives of the derivative
        def step(carry, inputs):
            weights, of_constants = carry
            alpha, real, fixed = inputs
            _, present = merged(real, fixed)

            def block(real, constants):
                edge = function(merged(real, fixed)[0], *constants).astype(alpha.dtype)
                return edge if mask is None else jnp.where(present[..., None, None], edge, 0.0)

            edge, pull = jax.vjp(block, real, constants)
            joint = alpha[..., :, None] + edge
            shares = jnp.exp(joint - finite(joint.max(-2, keepdims=True)))
            total = shares.sum(-2)
            pairs, own = shares * jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)[..., None, :], weights
            if mask is not None:
                pairs, own = jnp.where(present[..., None, None], pairs, 0.0), jnp.where(present[..., None], weights, 0.0)
            of_real, more = pull(pairs)
            before = pairs.sum(-1) if mask is None else jnp.where(present[..., None], pairs.sum(-1), weights)
            return (before, jax.tree.map(jnp.add, of_constants, more)), (own, of_real)

        # A chain without a possible trajectory has no weights.
        last = jnp.where(jnp.isneginf(log_z), 0.0, cotangent)[..., None] * jnp.exp(alpha[-1])
        start = last, jax.tree.map(jnp.zeros_like, constants)
        kept = alpha[:-1], real, fixed
        (first, of_constants), (rest, of_real) = scan_reading_ahead(step, start, kept, reverse=True)
        of_fixed = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in fixed]
        return jnp.concatenate([first[None], rest]), of_real, of_constants, of_fixed

    evaluate.defvjp(keep, pull_back)
    return evaluate(node, real, constants, fixed)


def backward(
    node: Float[Array, "T *batch K"], edge: Float[Array, "S *batch K K"] | Edges, mask: Bool[Array, "T *batch"] | None
) -> Float[Array, "T *batch K"]:
    """Backwards over the points, for losses on the weights.

    Differentiated through `jax.grad`, the gradient of :func:`sequential` would keep all S blocks of K x K, checkpointed or not.

    :param node: potentials of the points.
    :param edge: potentials of the transitions.
    :param mask: which points are present.
    :return: beta, the log of the total weight of all ends of trajectories from each particle on, up to a constant of each
        point.
    """
    function, inputs = lazy(edge)
    present = jnp.ones(node.shape[:-1], bool) if mask is None else mask

    @jax.checkpoint
    def step(beta, inputs):
        node, present, edge_inputs = inputs
        edge = function(edge_inputs)
        if mask is not None:
            node, edge = jnp.where(present[..., None], node, 0.0), jnp.where(present[..., None, None], edge, 0.0)
        _, moved = scaled(logsumexp(edge + (node + beta)[..., None, :], -1))
        beta = jnp.where(present[..., None], moved, beta)
        return beta, beta

    last = jnp.zeros_like(node[0])
    _, rest = scan_reading_ahead(step, last, (node[1:], present[1:], inputs), reverse=True)
    return jnp.concatenate([rest, last[None]])


def scan_reading_ahead(step: Callable, start: Any, inputs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.scan`, but that on a CPU the inputs of a step are read by the step before it.

    A step that slices its inputs itself has XLA do so in the loop over its pairs, which is then not vectorised: the number of
    the step is read anew for each pair, since the compiler cannot know that writing a result leaves it as it is.

    :param step: as for `lax.scan`.
    :param start: the carry of the first step.
    :param inputs: what the steps read, a pytree with leading axis S.
    :param reverse: whether to go from the last step to the first.
    :return: the last carry, and what the steps return.
    """
    if not len(jax.tree.leaves(inputs)[0]) or jax.default_backend() != "cpu":
        return lax.scan(step, start, inputs, reverse=reverse)

    def step_and_read(carry, later):
        state, now = carry
        state, result = step(state, now)
        return (state, later), result

    first = jax.tree.map(lambda x: x[-1 if reverse else 0], inputs)
    shifted = jax.tree.map(lambda x: jnp.roll(x, 1 if reverse else -1, 0), inputs)
    (last, _), results = lax.scan(step_and_read, (start, first), shifted, reverse=reverse)
    return last, results


def scaled(alpha: Float[Array, "*any K"]) -> tuple[Float[Array, "*any"], Float[Array, "*any K"]]:
    """The log of the sum of alpha, and alpha without it.

    Carried with its scale, alpha would grow with T, and in float32 the differences between its elements, which are all that the
    gradient reads, would drown in its rounding.

    :param alpha: logs of weights.
    """
    total = logsumexp(alpha, -1)
    return total, alpha - finite(total)[..., None]


def lazy(edge: Float[Array, "S *batch K K"] | Edges) -> Edges:
    """Potentials of transitions, to be computed one transition at a time.

    :param edge: an array of them, or a function.
    """
    return edge if isinstance(edge, Edges) else Edges(lambda block: block, edge)
