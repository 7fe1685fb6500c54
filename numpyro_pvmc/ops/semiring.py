"""Sum and multiply in the log semiring.

In the log semiring "plus" is ``logaddexp`` and "times" is ``+``. Nothing here clamps or adds an epsilon: the sum of no
mass is ``-inf`` and passes back a gradient of zero.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_pvmc.ops.chunks import in_parts
from numpyro_pvmc.ops.full_precision import full_precision


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def logsumexp(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Log of the sum of exponentials along one axis, with a gradient that is zero where there is no mass.

    :param x: logarithms of non-negative numbers; ``-inf`` is the logarithm of zero.
    :param axis: the axis to sum over.
    :return: ``x`` without `axis`.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_pvmc.ops.semiring import logsumexp
        >>> impossible = jnp.full(3, -jnp.inf)
        >>> float(logsumexp(impossible, 0)), jax.grad(logsumexp)(impossible, 0).tolist()
        (-inf, [0.0, 0.0, 0.0])
    """
    # A slice without mass has the maximum -inf, and -inf - (-inf) is nan.
    largest = finite(jnp.max(x, axis, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(x - largest), axis)) + jnp.squeeze(largest, axis)


@logsumexp.defjvp
def _logsumexp_jvp(axis, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    log_sum = logsumexp(x, axis)
    shares = jnp.exp(x - jnp.expand_dims(finite(log_sum), axis))
    return log_sum, jnp.sum(shares * x_dot, axis)


def logmatmulexp(a: Float[Array, "*batch I J"], b: Float[Array, "*batch J K"]) -> Float[Array, "*batch I K"]:
    """Matrix product in the log semiring: ``c[i, k] = logsumexp_j(a[i, j] + b[j, k])``.

    The rows of `a` and the columns of `b` less their maxima have exponentials that can be multiplied as matrices. Where the
    maxima of a row and a column do not meet, all terms of an element may underflow, in float32 soon. If that happens anywhere,
    the largest term of each sum is taken off instead, which is slower. On a CPU a few matrices are multiplied at a time, as
    many as stay in its caches, and those few alone are slower.

    :param a: left factor.
    :param b: right factor.
    :return: the product.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.ops.semiring import logmatmulexp
        >>> float(logmatmulexp(jnp.array([[0.0, -200.0]]), jnp.array([[-200.0], [0.0]]))[0, 0]).__round__(3)
        -199.307
    """
    if a.shape[-1] <= _FEW:
        return logsumexp(a[..., :, :, None] + b[..., None, :, :], -2)
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    together = max(_NUMBERS_AT_ONCE // max(math.prod(a.shape[-2:]), math.prod(b.shape[-2:])), 1)
    if math.prod(batch) <= together or jax.default_backend() != "cpu":
        return _product((a, b))
    factors = tuple(jnp.broadcast_to(x, batch + x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    product = in_parts(jax.checkpoint(_product), factors, together)
    return product.reshape(batch + product.shape[1:])


_FEW = 8  # terms that are quicker added up than multiplied as a matrix
_NUMBERS_AT_ONCE = 2**14  # of each factor


def _product(factors):
    a, b = factors
    (left, rows), (right, columns) = _scaled(a, -1), _scaled(b, -2)
    sums = _matmul(left, right)
    return lax.cond(_fits(a, b, sums), lambda: _log(sums) + rows + columns, lambda: _row_by_row(a, b))


def _scaled(x, axis):
    """Exponentials that are at most 1, and the logarithm of their scale."""
    largest = lax.stop_gradient(finite(x.max(axis, keepdims=True)))
    return jnp.exp(x - largest), largest


_matmul = full_precision(jnp.matmul)


def _fits(a, b, sums):
    """Whether what underflowed in a product of exponentials is nowhere more than rounding."""
    kind = jnp.finfo(sums.dtype)
    is_low = lax.stop_gradient(sums) < 2 * a.shape[-1] * kind.tiny / kind.eps

    def without_mass():
        """Are these the elements that no term reaches?"""
        number = _matmul(*((x > -jnp.inf).astype(sums.dtype) for x in (a, b)))
        return ~_anywhere(is_low & (number > 0))

    return lax.cond(_anywhere(is_low), without_mass, lambda: jnp.asarray(True))


@jax.custom_batching.custom_vmap
def _anywhere(is_so):
    return jnp.any(is_so)


@_anywhere.def_vmap
def _anywhere_in_a_batch(axis_size, in_batched, is_so):
    """One answer for all of it, so that `lax.cond` remains a choice: with one for each, both branches would be computed."""
    return _anywhere(is_so), False


@jax.custom_jvp
def _log(x):
    return jnp.log(x)


@_log.defjvp
def _log_jvp(primals, tangents):
    """In terms of the logarithm: the square of the inverse of a number that is not too small may be too large."""
    log = _log(*primals)
    return log, tangents[0] * jnp.exp(-finite(log))


def _row_by_row(a, b):
    row = jax.checkpoint(lambda row: logsumexp(row[..., :, None] + b, -2))
    return jnp.moveaxis(lax.map(row, jnp.moveaxis(a, -2, 0)), 0, -2)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zero in place of the logarithm of zero, so that it can be subtracted from itself.

    :param x: logarithms of non-negative numbers.
    """
    return jnp.where(jnp.isneginf(x), 0.0, x)


def shift_by_max(x: Float[Array, "*any"], axis: int | tuple[int, ...] = -1) -> tuple[Float[Array, "..."], Float[Array, "*any"]]:
    """The largest element, and the elements less it, as constants: where they are added up again, they cancel in a gradient.

    Weights carried with their scale grow with the length of a chain, and in float32 the differences between them, which are all
    that a gradient reads, would drown in the rounding.

    :param x: logarithms of non-negative numbers.
    :param axis: axes to look along.
    :return: without these axes, the largest, or zero where there is no mass; the elements.
    """
    largest = lax.stop_gradient(finite(x.max(axis, keepdims=True)))
    return largest.squeeze(axis), x - largest
