"""Pass once through a chain, forwards or backwards.

Alpha is the weight of all ways to a particle, beta that of all ways on from it. The arguments are those of
:mod:`numpyro_pvmc.ops.smoothing`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Bool, Float

from numpyro_pvmc.ops.blocked import Blocks, ends, products, starts
from numpyro_pvmc.ops.semiring import finite, logsumexp, shift_by_max


class Edges(NamedTuple):
    """Transition potentials that are computed when they are needed, one transition at a time.

    ``function(inputs[t])`` is the block ``edge[t]`` of shape ``(*batch, K, K)``; `inputs` is a pytree with leading axis S.
    A scan over `inputs` never holds more than one block, forward or backward.
    """

    function: Callable[[Any], Array]
    inputs: Any


def forward(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None,
    number_of_blocks: int = 1,
) -> tuple[Float[Array, "*batch"], Float[Array, "T *batch K"]]:
    """Forwards over the time steps.

    :return: the log normalizer; alpha, the log of the total weight of all first parts of trajectories up to each particle,
        normalised.
    """
    log_z, alpha, _ = _forward(node, *lazy(edge), mask, Blocks(len(node) - 1, number_of_blocks))
    return log_z, scaled(alpha)[1]


def _forward(node, function, inputs, mask, blocks):
    """The log normalizer, alpha up to a constant of each time step, and the blocks' products, if there are several."""
    first, start = shift_by_max(node[0])
    function, inputs = blocks.at_once(function), blocks.cut(inputs)
    nodes, present = blocks.cut(node[1:]), blocks.cut_mask(mask, node.shape[1:-1])
    of_blocks = None if blocks.number == 1 else products(function, inputs, nodes, present)
    before = start if of_blocks is None else starts(start, of_blocks)

    @jax.checkpoint  # without it the backward pass would keep all S blocks of K x K
    def step(alpha, inputs):
        node, present, edge_inputs = inputs
        edge = function(edge_inputs).astype(node.dtype)
        node, edge = _without_absent(present, node, edge)
        gain, moved = shift_by_max(node + logsumexp(alpha[..., :, None] + edge, -2))
        if present is not None:
            gain, moved = jnp.where(present, gain, 0.0), jnp.where(present[..., None], moved, alpha)
        return moved, (moved, gain)

    last, (rest, gains) = scan_reading_ahead(step, before, (nodes, present, inputs))
    last = last if of_blocks is None else last[-1]
    # XLA adds up an array in a tree. A total that grew from step to step would be rounded T times: in float32, at 200,000
    # steps, half a nat. A chain that ends without mass has no weights, whatever the time steps before the end had: then this
    # is -inf.
    log_z = first + blocks.join(gains).sum(0) + logsumexp(last, -1)
    return log_z, jnp.concatenate([start[None], blocks.join(rest)]), of_blocks


def _without_absent(present, node, edge):
    """What stands in padding may be nan, and nan times a cotangent of zero is nan."""
    if present is None:
        return node, edge
    return jnp.where(present[..., None], node, 0.0), jnp.where(present[..., None, None], edge, 0.0)


def log_sum_of_trajectories(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None,
    number_of_blocks: int = 1,
) -> Float[Array, "*batch"]:
    """The log normalizer, by one pass forwards; its gradient, by one pass backwards.

    The gradient with respect to the potential of a transition is the smoothing weight of the pair, and that is the weight of
    the earlier particle times the share of the later one in all ways on from it:

        W_t[j, k] = W_{t-1}[j] softmax_k(edge_t[j, k] + node_t[k] + beta_t[k]),    W_t[k] ~ exp(alpha_t[k] + beta_t[k]).

    No factor exceeds 1; and there is one exponential a pair, where the derivative of the forward pass has two.

    :return: the log normalizer of each chain of the batch. It has derivatives of any order, in reverse mode.
    """
    if len(node) == 1:
        return logsumexp(node[0], -1)
    arguments, there, back = _both_ways(node, edge, mask, Blocks(len(node) - 1, number_of_blocks))
    evaluate = jax.custom_vjp(lambda *arguments: there(*arguments)[0])
    evaluate.defvjp(there, lambda kept, cotangent: back(kept, cotangent)[0])
    return evaluate(*arguments)


def log_sum_and_weights(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None,
    number_of_blocks: int = 1,
) -> tuple[Float[Array, ""], Float[Array, "T *batch K"]]:
    """The log normalizer, summed over chains, and log smoothing weights, by one pass forwards and one backwards.

    The gradient is computed along with the value and kept. It cannot be differentiated again, and the weights are constants.

    :return: the sum of the log normalizers, log weights.
    """
    if len(node) == 1:
        return logsumexp(node[0], -1).sum(), lax.stop_gradient(scaled(node)[1])
    arguments, there, back = _both_ways(node, edge, mask, Blocks(len(node) - 1, number_of_blocks))

    def evaluate_and_keep(*arguments):
        log_z, kept = there(*arguments)
        gradient, log_weights = back(kept, jnp.ones_like(log_z))
        return (log_z.sum(), log_weights), gradient

    evaluate = jax.custom_vjp(lambda *arguments: evaluate_and_keep(*arguments)[0])
    evaluate.defvjp(evaluate_and_keep, lambda gradient, cotangents: jax.tree.map(lambda leaf: cotangents[0] * leaf, gradient))
    log_z, log_weights = evaluate(*arguments)
    return log_z, lax.stop_gradient(log_weights)


def _both_ways(node, edge, mask, blocks):
    """Arguments of a pass forwards, the pass, which returns the log normalizer and what is kept, and one backwards.

    The latter takes what was kept and a cotangent, and returns those of the arguments and the log smoothing weights.
    """
    function, inputs = lazy(edge)
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    function, constants, held = _converted(function, first)
    leaves, treedef = jax.tree.flatten(inputs)
    is_real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    real, fixed = ([leaf for leaf, is_kind in zip(leaves, is_real, strict=True) if is_kind == kind] for kind in (True, False))

    def of_transition(real, fixed, constants, held):
        real, fixed = iter(real), iter(fixed)
        inputs = jax.tree.unflatten(treedef, [next(real) if is_kind else next(fixed) for is_kind in is_real])
        return function(constants, held, inputs)

    def there(node, real, constants, fixed, held, mask):
        edge = lambda one: of_transition(*one, constants, held)
        log_z, alpha, of_blocks = _forward(node, edge, (real, fixed), mask, blocks)
        last = jnp.zeros_like(node[0]) if of_blocks is None else ends(of_blocks)
        return log_z, (node, real, constants, fixed, held, mask, alpha, last)

    def back(kept, cotangent):
        node, real, constants, fixed, held, mask, alpha, last = kept

        @jax.checkpoint  # for derivatives of the derivative
        def step(carry, given):
            beta, *of_constants = carry
            node, alpha, present, real, fixed = given

            def block(real, constants):
                edge = blocks.at_once(lambda one: of_transition(*one, constants, held))((real, fixed)).astype(alpha.dtype)
                return edge if present is None else jnp.where(present[..., None, None], edge, 0.0)

            edge, pull = jax.vjp(block, real, constants)
            node, edge = _without_absent(present, node, edge)
            largest, on = shift_by_max(edge + (node + beta)[..., None, :])
            shares = jnp.exp(on)
            total = shares.sum(-1)
            some = jnp.where(total > 0, total, 1.0)
            _, before = shift_by_max(jnp.where(total > 0, largest + jnp.log(some), -jnp.inf))
            before = before if present is None else jnp.where(present[..., None], before, beta)
            log_weights = scaled(alpha + before)[1]
            pairs = shares * (cotangent[..., None] * jnp.exp(log_weights) / some)[..., None]
            pairs = pairs if present is None else jnp.where(present[..., None, None], pairs, 0.0)
            of_real, more = pull(pairs)
            return (before, *_plus(*of_constants, more)), (log_weights, of_real)

        nothing = jax.tree.map(jnp.zeros_like, constants)
        given = (
            blocks.cut(node[1:]),
            blocks.cut(alpha[:-1]),
            blocks.cut_mask(mask, alpha.shape[1:-1]),
            *map(blocks.cut, (real, fixed)),
        )
        (_, of_constants, lost), results = scan_reading_ahead(step, (last, nothing, nothing), given, reverse=True)
        of_constants = jax.tree.map(jnp.add, of_constants, lost)
        log_weights, of_real = blocks.join(results)
        log_weights = jnp.concatenate([log_weights, scaled(alpha[-1:])[1]])
        of_node = cotangent[..., None] * jnp.exp(log_weights)
        if mask is not None:
            of_node = jnp.where(mask.at[0].set(True)[..., None], of_node, 0.0)
        return (of_node, of_real, of_constants, None, None, None), log_weights

    return (node, real, constants, fixed, held, mask), there, back


def _plus(total, lost, more):
    """A sum with one more term, and what rounding has taken from it so far (Knuth 1969, theorem 4.2.2B).

    Sums of what all steps say of one constant grow as long as the chain.
    """
    added = jax.tree.map(jnp.add, total, more)

    def taken(total, more, added):
        of_more = added - total
        rounding = (total - (added - of_more)) + (more - of_more)
        return lax.stop_gradient(jnp.where(jnp.isfinite(added), rounding, 0.0))  # inf - inf is nan

    return added, jax.tree.map(lambda lost, *terms: lost + taken(*terms), lost, total, more, added)


def _converted(function, example):
    """A function of what it closes over as well, if that is traced: first what has derivatives, then what has none.

    The backward pass outlives the trace that such a tracer belongs to. `jax.closure_convert` passes on the former only, not a
    random key, and never forgets the function, nor what that closes over.
    """
    program = jax.make_jaxpr(function)(example)
    kinds = [
        isinstance(x, jax.core.Tracer) and ("constants" if jnp.issubdtype(x.dtype, jnp.inexact) else "held")
        for x in program.consts
    ]

    def of_all(constants, held, inputs):
        given = {"constants": iter(constants), "held": iter(held)}
        consts = [next(given[kind]) if kind else known for kind, known in zip(kinds, program.consts, strict=True)]
        (result,) = jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))(*jax.tree.leaves(inputs))
        return result

    of_kind = lambda kind: [x for x, own in zip(program.consts, kinds, strict=True) if own == kind]
    return of_all, of_kind("constants"), of_kind("held")


def backward(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None,
    number_of_blocks: int = 1,
) -> Float[Array, "T *batch K"]:
    """Backwards over the time steps, for losses on the weights.

    Differentiated through `jax.grad`, the gradient of :func:`log_sum_of_trajectories` would keep all S blocks of K x K,
    checkpointed or not.

    :return: beta, the log of the total weight of all ends of trajectories from each particle on, up to a constant of each
        time step.
    """
    blocks = Blocks(len(node) - 1, number_of_blocks)
    function, inputs = lazy(edge)
    function, inputs = blocks.at_once(function), blocks.cut(inputs)
    nodes, present = blocks.cut(node[1:]), blocks.cut_mask(mask, node.shape[1:-1])

    @jax.checkpoint
    def step(beta, inputs):
        node, present, edge_inputs = inputs
        edge = function(edge_inputs)
        node, edge = _without_absent(present, node, edge)
        _, moved = shift_by_max(logsumexp(edge + (node + beta)[..., None, :], -1))
        moved = moved if present is None else jnp.where(present[..., None], moved, beta)
        return moved, moved

    last = jnp.zeros_like(node[0]) if blocks.number == 1 else ends(products(function, inputs, nodes, present))
    _, rest = scan_reading_ahead(step, last, (nodes, present, inputs), reverse=True)
    return jnp.concatenate([blocks.join(rest), jnp.zeros_like(node[:1])])


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

    :param alpha: logs of weights.
    """
    total = logsumexp(alpha, -1)
    return total, alpha - finite(total)[..., None]


def lazy(edge: Float[Array, "S *batch K K"] | Edges) -> Edges:
    """Potentials of transitions, to be computed one transition at a time.

    :param edge: an array of them, or a function.
    """
    return edge if isinstance(edge, Edges) else Edges(lambda block: block, edge)
