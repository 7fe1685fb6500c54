"""Multiply matrices with all digits of their precision.

On a GPU that has tensor cores JAX multiplies float32 matrices by the first eleven bits of their elements, unless it is told not
to: three digits, where log densities and weights need seven. What users' programs multiply is theirs to choose, with
``jax.config.update("jax_default_matmul_precision", ...)``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Multiply matrices in full precision, in the derivatives of the function, too.

    :param function: of arrays. If it calls a user's program, what that multiplies is in full precision, too.
    :return: the same function.
    """

    @functools.wraps(function)
    def in_full(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return in_full
