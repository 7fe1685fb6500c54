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

    The rows of `a` and the columns of `b` less their maxima have exponentials that can be multiplied as matrices. Where the
    maxima of a row and a column do not meet, all terms of an element may underflow, in float32 soon. If that happens anywhere,
    the terms are added one by one, each less the largest of its own sum; so the product is right always, and quick mostly.

    :param a: left factor.
    :param b: right factor.
    :return: the product.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.semiring import logmatmulexp
        >>> float(logmatmulexp(jnp.array([[0.0, -200.0]]), jnp.array([[-200.0], [0.0]]))[0, 0]).__round__(3)
        -199.307
    """
    if a.shape[-1] <= _FEW:
        return logsumexp(a[..., :, :, None] + b[..., None, :, :], -2)
    return _product(a, b, _fits(*lax.stop_gradient((a, b))))


_FEW = 8  # terms that are quicker added up than multiplied as a matrix
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _scaled(x, axis):
    """Exponentials that are at most 1, and the logarithm of their scale."""
    largest = lax.stop_gradient(finite(x.max(axis, keepdims=True)))
    return jnp.exp(x - largest), largest


def _fits(a, b):
    """Whether what underflows in a product of exponentials is nowhere more than rounding."""
    sums = _matmul(_scaled(a, -1)[0], _scaled(b, -2)[0])
    kind = jnp.finfo(sums.dtype)
    is_low = sums < 2 * a.shape[-1] * kind.tiny / kind.eps

    def without_mass():
        """Are these the elements that no term reaches?"""
        return ~jnp.any(is_low & (_matmul(*(jnp.asarray(x > -jnp.inf, x.dtype) for x in (a, b))) > 0))

    return lax.cond(jnp.any(is_low), without_mass, lambda: jnp.asarray(True))


@jax.custom_jvp
def _product(a, b, fits):
    (left, rows), (right, columns) = _scaled(a, -1), _scaled(b, -2)
    return lax.cond(fits, lambda: jnp.log(_matmul(left, right)) + rows + columns, lambda: _one_by_one(a, b))


@_product.defjvp
def _product_jvp(primals, tangents):
    """The tangent is the mean of those of the terms. It reads the product itself, so that derivatives of it do, too."""
    (a, b, fits), (a_dot, b_dot, _) = primals, tangents
    product = _product(a, b, fits)

    def as_matrices():
        (left, rows), (right, columns) = _scaled(a, -1), _scaled(b, -2)
        scale = jnp.exp(jnp.where(jnp.isneginf(product), 0.0, rows + columns - product))
        return scale * (_matmul(left * a_dot, right) + _matmul(left, right * b_dot))

    def one_by_one():
        add = lambda total, a, b, a_dot, b_dot: total + jnp.exp(a + b - finite(product)) * (a_dot + b_dot)
        return _over_terms(add, jnp.zeros_like(product), a, b, a_dot, b_dot)

    return product, lax.cond(fits, as_matrices, one_by_one)


def _one_by_one(a, b):
    none = jnp.zeros(jnp.broadcast_shapes(a[..., :1].shape, b[..., :1, :].shape), a.dtype)
    largest = finite(_over_terms(lambda largest, a, b: jnp.maximum(largest, a + b), none - jnp.inf, a, b))
    return jnp.log(_over_terms(lambda total, a, b: total + jnp.exp(a + b - largest), none, a, b)) + largest


def _over_terms(function, start, *factors):
    """A reduction over the terms of a matrix product, of which it never holds more than a few at once."""
    left, right = lambda x: jnp.moveaxis(x, -1, 0)[..., :, None], lambda x: jnp.moveaxis(x, -2, 0)[..., None, :]
    terms = [(left, right)[number % 2](x) for number, x in enumerate(factors)]
    step = jax.checkpoint(lambda total, term: (function(total, *term), None))
    return lax.scan(step, start, terms, unroll=8)[0]


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
