"""What a test program is: a NumPyro model and guide, with the same chain written a second time by hand in NumPy.

Arrays that both halves read are NumPy's, and a program converts them where it uses them: where one process runs in two
precisions, JAX 0.10 may hand a NumPy constant of one of them to a program compiled for the other.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats


class Program(NamedTuple):
    """The hand-written half is four log densities of one series `n` (an index, `()` without plates), with t from 0:

    start(n, first): the initial sites and what is observed of them. None: the start is a constant.
    step(t, n, prev, now): the latents of step t given the state before it, and what is observed of them.
    propose_start(n, first), propose(t, n, now): the guide.

    `first`, `prev`, `now` map names to values of one particle; an initial site `x_0` is called `x` here; global sites
    are in all of them. With a constant start `prev` is empty before the first step. `present[t, n]` is false where a
    step is absent: padding, or a gap over which the state is held.
    """

    name: str
    model: Callable
    guide: Callable
    args: tuple
    step: Callable
    propose: Callable
    length: int
    start: Callable | None = None
    propose_start: Callable | None = None
    kwargs: Mapping[str, Any] = MappingProxyType({})
    plates: tuple[int, ...] = ()
    event: tuple[int, ...] = ()
    present: np.ndarray | None = None
    log_prior: Callable = lambda g: 0.0
    propose_globals: Callable = lambda g: 0.0
    sites: tuple[str, ...] = ("x",)
    initial_sites: tuple[str, ...] = ("x_0",)

    def __repr__(self):
        return self.name


def normal(value, mean, scale):
    return stats.norm.logpdf(value, mean, scale).sum()


SERIES = 3


def series_plate():
    """Three independent series; construct it once in a program, and enter it wherever a site belongs to a series."""
    return numpyro.plate("series", SERIES, dim=-1)


def guide_means(length, plates=()):
    """Some means for the guide, different at each step and series."""
    return np.sin(1.0 + np.arange(length * int(np.prod(plates)))).reshape((length, *plates)) * 0.6


def normal_guide(length, plates=(), start=True):
    """A guide of independent Normals for scalar sites `x_0` and `x`, and its log densities."""
    means = guide_means(length, plates)

    def sample():
        if start:
            numpyro.sample("x_0", dist.Normal(0.2, 1.1))
        numpyro.sample("x", dist.Normal(jnp.asarray(means), 0.8))

    def guide(*args, **kwargs):
        if plates:
            with series_plate():
                sample()
        else:
            sample()

    return {
        "guide": guide,
        "propose": lambda t, n, now: normal(now["x"], means[t][n], 0.8),
        "propose_start": (lambda n, first: normal(first["x"], 0.2, 1.1)) if start else None,
        "initial_sites": ("x_0",) if start else (),
        "length": length,
        "plates": plates,
    }


def observations(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def counts(*shape, seed=0):
    return np.random.default_rng(seed).poisson(2.0, size=shape)
