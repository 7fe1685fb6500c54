"""Arrays of logarithms in, their sums and matrix products in the log semiring out.

In the log semiring "plus" is ``logaddexp`` and "times" is ``+``. Nothing here clamps or adds an epsilon: the sum of no
mass is ``-inf`` and passes back a gradient of zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def logsumexp(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Log of the sum of exponentials along one axis, with a gradient that is zero where there is no mass.

    :param x: logarithms of non-negative numbers; ``-inf`` is the logarithm of zero.
    :param axis: the axis to sum over.
    :return: ``x`` without `axis`.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_pvmc.semiring import logsumexp
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

    The maximum is taken over each sum's own terms. Shifting by the rows of `a` and the columns of `b`, which would allow
    a real matrix product, loses the terms whose row and column maxima do not meet: in float32 every term may underflow.

    :param a: left factor.
    :param b: right factor.
    :return: the product.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.semiring import logmatmulexp
        >>> float(logmatmulexp(jnp.array([[0.0, -200.0]]), jnp.array([[-200.0], [0.0]]))[0, 0]).__round__(3)
        -199.307
    """
    return logsumexp(a[..., :, :, None] + b[..., None, :, :], -2)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zero in place of the logarithm of zero, so that it can be subtracted from itself.

    :param x: logarithms of non-negative numbers.
    """
    return jnp.where(jnp.isneginf(x), 0.0, x)


def less_largest(x: Float[Array, "*any"], axis: int | tuple[int, ...] = -1) -> tuple[Float[Array, "..."], Float[Array, "*any"]]:
    """The largest element, and the elements less it, as constants: where they are added up again, they cancel in a gradient.

    Weights carried with their scale grow with the length of a chain, and in float32 the differences between them, which are all
    that a gradient reads, would drown in the rounding.

    :param x: logarithms of non-negative numbers.
    :param axis: axes to look along.
    :return: without these axes, the largest, or zero where there is no mass; the elements.
    """
    largest = lax.stop_gradient(finite(x.max(axis, keepdims=True)))
    return largest.squeeze(axis), x - largest
