"""Mark a scan as the Markov chain of a program."""

import functools
from collections.abc import Callable
from typing import Any

from numpyro.contrib.control_flow import scan as numpyro_scan


def markov(step: Callable, init: Any = None, xs: Any = None, length: int | None = None) -> tuple[Any, Any]:
    """NumPyro's `scan`, marked as the Markov chain of the program.

    It means what :func:`numpyro.contrib.control_flow.scan` means under every inference. A program with one `scan` that has
    latent sites needs no mark; in one with several, the mark says which is the chain, and the latent sites of the others
    are global.

    :param step: takes ``(carry, x)``, returns ``(carry, y)``.
    :param init: the first carry.
    :param xs: inputs, with a leading time axis.
    :param length: number of steps, if `xs` is ``None``.
    :return: the last carry, and the stacked outputs.
    :raises TypeError: if it is used as an iterator, ``for t in markov(range(T))``.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_pvmc import markov
        >>> def step(x, _):
        ...     x = numpyro.sample("x", dist.Normal(x, 1.0))
        ...     return x, x
        >>> with numpyro.handlers.seed(rng_seed=0):
        ...     last, xs = markov(step, 0.0, length=5)
        >>> xs.shape
        (5,)
    """
    if not callable(step):
        raise TypeError(
            f"`markov` takes a step function, but got a {type(step).__name__}. It does not loop over `range(T)`; write the "
            "loop's body as a function, and scan over it:\n\n"
            "    def step(x_prev, y_t):\n"
            '        x = numpyro.sample("x", dist.Normal(x_prev, sigma))\n'
            '        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)\n'
            "        return x, x\n\n"
            "    markov(step, x_0, y, length=T)"
        )

    @functools.wraps(step)
    def marked(carry, x):
        return step(carry, x)

    marked.is_markov = True
    return numpyro_scan(marked, init, xs, length=length)
