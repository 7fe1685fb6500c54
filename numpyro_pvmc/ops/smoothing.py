"""Sum over all trajectories of a chain: log normalizer, marginals, draws.

A chain of T time steps has K particles at each time step. The weight of the trajectory through particles ``k_1 .. k_T`` is the
exponential of ``sum_t node[t, k_t] + sum_t edge[t, k_t, k_{t+1}]``. The log normalizer is the log of the sum of the weights
of all K^T trajectories, by the recursion

    alpha[t + 1, k] = node[t + 1, k] + logsumexp_j(alpha[t, j] + edge[t, j, k])

and everything else is its gradient: smoothing weights with respect to `node`, pairwise weights with respect to `edge`. (The
logarithms of the former have a recursion of their own, which also holds what is too small for a number.)
An absent time step (`mask` false: padding) holds alpha.

Shapes: T time steps, S = T - 1 transitions, K particles; `edge[t, i, j]` goes from particle i at t to particle j at t + 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from numpyro_pvmc.ops import associative as tree
from numpyro_pvmc.ops.forward_backward import (
    Edges,
    backward,
    forward,
    lazy,
    log_sum_and_weights,
    log_sum_of_trajectories,
    scaled,
    scan_reading_ahead,
)

METHODS = ("auto", "sequential", "blocked", "associative")


class Marginals(NamedTuple):
    """What the chain says of each time step: weights are logarithms of numbers that sum to 1 over particles."""

    log_normalizer: Float[Array, "*batch"]
    log_weights: Float[Array, "T *batch K"]
    log_filtering_weights: Float[Array, "T *batch K"]


def log_normalizer(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None = None,
    method: str = "auto",
) -> Float[Array, "*batch"]:
    """Log of the sum of the weights of all K^T trajectories.

    :param node: potentials of the time steps.
    :param edge: potentials of the transitions, as an array or as :class:`Edges`.
    :param mask: which time steps are present; absent ones are held. All are present by default; the first one always is.
    :param method: ``"sequential"``, a scan of T steps of work K^2, memory O(T K); ``"blocked"``, about twice the root of T
        steps, of work T K^3 in all, memory O(T K) and a matrix for each block, or O(T K^2) for derivatives of weights;
        ``"associative"``, a tree of matrix products of work T K^3 and depth log T, memory O(T K^2); ``"auto"`` takes the
        first, but on a CPU the second for a long chain of at most four particles, and elsewhere the last for at most 32.
    :return: the log normalizer of each chain of the batch.
    :raises ValueError: for an unknown method.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.ops.smoothing import log_normalizer
        >>> float(jnp.exp(log_normalizer(jnp.zeros((4, 3)), jnp.zeros((3, 3, 3))))).__round__(3)      # 3^4 trajectories
        81.0
    """
    node = _at_least_single(node)
    method = _choose(method, node)
    if method == "associative":
        return tree.total(node[0], tree.products(node, edge, mask))
    return log_sum_of_trajectories(node, edge, mask, _number_of_blocks(method, node))


def check_method(method: str) -> None:
    """Refuse an unknown method.

    :param method: a name.
    :raises ValueError: if there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, but got {method!r}.")


def marginals(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None = None,
    method: str = "auto",
) -> Marginals:
    """Smoothing and filtering weights of every time step.

    Absent time steps repeat the weights of the last time step that is present. In a chain without any possible trajectory all
    log weights are ``-inf``.

    :param node: potentials of the time steps.
    :param edge: potentials of the transitions.
    :param mask: which time steps are present.
    :param method: as for :func:`log_normalizer`.
    :return: log normalizer, log smoothing weights, log filtering weights.
    """
    node = _at_least_single(node)
    method = _choose(method, node)
    if method == "associative":
        levels = tree.products(node, edge, mask)
        log_z, alpha, beta = (of(node[0], levels) for of in (tree.total, tree.alphas, tree.betas))
        alpha = scaled(alpha)[1]
    else:
        blocks = _number_of_blocks(method, node)
        (log_z, alpha), beta = forward(node, edge, mask, blocks), backward(node, edge, mask, blocks)
    return Marginals(log_z, scaled(alpha + beta)[1], alpha)


def log_normalizer_and_weights(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None = None,
    method: str = "auto",
) -> tuple[Float[Array, ""], Float[Array, "T *batch K"]]:
    """The log normalizer, summed over chains, and the log smoothing weights, for the price of one gradient.

    The gradient is computed along with the value and kept, so it is there when it is asked for; it cannot be differentiated
    again, and the weights are constants.

    :param node: potentials of the time steps.
    :param edge: potentials of the transitions.
    :param mask: which time steps are present.
    :param method: as for :func:`log_normalizer`.
    :return: sum of the log normalizers, log smoothing weights.
    """
    node = _at_least_single(node)
    method = _choose(method, node)
    if method != "associative":
        return log_sum_and_weights(node, edge, mask, _number_of_blocks(method, node))
    levels = tree.products(node, edge, mask)
    first, fixed = lax.stop_gradient((node[0], levels))
    return tree.total(node[0], levels).sum(), scaled(tree.alphas(first, fixed) + tree.betas(first, fixed))[1]


def pairwise_marginals(
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"],
    mask: Bool[Array, "T *batch"] | None = None,
    method: str = "auto",
) -> Float[Array, "S *batch K K"]:
    """Smoothing weights of every pair of particles of neighbouring time steps.

    :param node: potentials of the time steps.
    :param edge: potentials of the transitions.
    :param mask: which time steps are present; the pair weights into an absent time step are zero.
    :param method: as for :func:`log_normalizer`.
    :return: for each transition weights that sum to 1 over both particles.
    """
    return jax.grad(lambda edge: log_normalizer(node, edge, mask, method).sum())(edge)


def sample_trajectories(
    rng_key: Key[Array, ""] | UInt32[Array, "2"],
    node: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None = None,
    sample_shape: tuple[int, ...] = (),
) -> Int[Array, "..."]:
    """Draw whole trajectories, each with probability proportional to its weight.

    :param rng_key: random key.
    :param node: potentials of the time steps.
    :param edge: potentials of the transitions.
    :param mask: which time steps are present; an absent time step repeats the particle's number of the time step before.
    :param sample_shape: how many to draw.
    :return: numbers of particles, shape ``(*sample_shape, T, *batch)``.
    """
    _, alpha = forward(_at_least_single(node), edge, mask)
    return sample_backward(rng_key, alpha, edge, mask, sample_shape)


def sample_backward(
    rng_key: Key[Array, ""] | UInt32[Array, "2"],
    log_filtering_weights: Float[Array, "T *batch K"],
    edge: Float[Array, "S *batch K K"] | Edges,
    mask: Bool[Array, "T *batch"] | None = None,
    sample_shape: tuple[int, ...] = (),
) -> Int[Array, "..."]:
    """Draw whole trajectories from the last time step backwards, given filtering weights (Godsill, Doucet & West 2004).

    :param rng_key: random key.
    :param log_filtering_weights: as in :class:`Marginals`; any constant may be added to each time step.
    :param edge: potentials of the transitions.
    :param mask: which time steps are present.
    :param sample_shape: how many to draw.
    :return: numbers of particles, shape ``(*sample_shape, T, *batch)``.
    """
    function, inputs = lazy(edge)
    batch = log_filtering_weights.shape[1:-1]
    present = jnp.ones(log_filtering_weights.shape[:-1], bool) if mask is None else mask
    key_last, key_rest = jax.random.split(rng_key)
    last = jax.random.categorical(key_last, log_filtering_weights[-1], shape=(*sample_shape, *batch))

    def step(later, inputs):
        key, alpha, present, edge_inputs = inputs
        log_joint = alpha[..., None, :] + jnp.moveaxis(function(edge_inputs), -1, -2)  # [later, earlier]
        largest = log_joint.max(-1, keepdims=True)
        cumulative = jnp.cumsum(jnp.exp(log_joint - jnp.where(jnp.isneginf(largest), 0.0, largest)), -1)
        # One table of K x K serves all draws, each of which needs one uniform number.
        cumulative = jnp.broadcast_to(cumulative, (*sample_shape, *cumulative.shape))
        cumulative = jnp.take_along_axis(cumulative, later[..., None, None], -2)[..., 0, :]
        uniform = jax.random.uniform(key, later.shape, cumulative.dtype)[..., None] * cumulative[..., -1:]
        earlier = jnp.minimum((cumulative <= uniform).sum(-1), cumulative.shape[-1] - 1)
        earlier = jnp.where(present, earlier, later)
        return earlier, earlier

    keys = jax.random.split(key_rest, len(log_filtering_weights) - 1)
    given = keys, log_filtering_weights[:-1], present[1:], inputs
    _, rest = scan_reading_ahead(step, last, given, reverse=True)
    return jnp.moveaxis(jnp.concatenate([rest, last[None]]), 0, len(sample_shape))


def _at_least_single(node):
    """Potentials in half precision are summed in single: alpha carries the sum of all before."""
    return node.astype(jnp.promote_types(node.dtype, jnp.float32))


def _choose(method, node):
    check_method(method)
    return _best_method(len(node), math.prod(node.shape[1:-1]), node.shape[-1]) if method == "auto" else method


def _best_method(length, series, num_particles):
    """On a CPU by what docs/speed.rst shows; on an accelerator nothing was measured, and a tree spreads its work the most."""
    if jax.default_backend() != "cpu":
        return "associative" if num_particles <= 32 else "sequential"
    return "blocked" if length >= 500 and num_particles <= 4 and series * num_particles <= 8 else "sequential"


def _number_of_blocks(method, node):
    """As many blocks as a block has steps, which makes the fewest steps in all."""
    return max(round(math.sqrt(len(node) - 1)), 1) if method == "blocked" else 1
