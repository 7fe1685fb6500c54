"""What a tricky program is: built to be first-order with independent series or not to be, with the value that is right for it.

The value is the sum over all trajectories through the posterior's particles, those of all series together, each scored by
NumPyro's own `log_density`: a program whose series read each other has a right value too. Nothing here imports the library.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro import handlers
from numpyro.infer.util import log_density

Y = "y"
AT_MOST = 5000  # trajectories of all series together


class Chooser:
    """A generator of random numbers that writes down what it chose."""

    def __init__(self, *seed):
        self.rng, self.made = np.random.default_rng(seed), []

    def pick(self, what, options, weights=None):
        """One of the options; of a mapping one of its values."""
        names = list(options)
        weights = None if weights is None else np.array(weights) / np.sum(weights)
        name = names[self.rng.choice(len(names), p=weights)]
        self.made.append(f"{what}: {name}")
        return options[name] if isinstance(options, Mapping) else name

    def chance(self, what, probability):
        happens = bool(self.rng.random() < probability)
        if happens:
            self.made.append(what)
        return happens

    def numbers(self, *shape, scale=0.7):
        return np.round(self.rng.normal(size=shape) * scale, 2)


class Proposal(NamedTuple):
    """A Normal for a site of the chain at each step, or at its start."""

    at_start: bool = False
    event: tuple[int, ...] = ()
    loc: float = 0.2
    scale: float = 0.9


class Tricky(NamedTuple):
    """`is_legitimate`: built so that a step reads one step before, and a series itself alone.

    present: {site: (T, *plates)}, false where the model masks a latent site: there the guide's density does not count. None:
    no site is ever masked. right: the program and the posterior's particles in, right values out; None: `right_values`.
    """

    kind: str
    seed: int
    choices: tuple[str, ...]
    is_legitimate: bool
    model: Callable
    args: tuple
    proposals: dict[str, Proposal]
    K: int
    T: int
    plates: tuple[int, ...] = ()
    present: dict[str, np.ndarray] | None = None
    right: Callable | None = None

    def guide(self, *args):
        self.propose({})

    def propose(self, masks):
        """A guide that is independent over time, with masks on the sites that have one."""
        with plates_of(self.plates):
            for name, proposal in self.proposals.items():
                loc, scale = self.proposal_of(name)
                fn = dist.Normal(jnp.asarray(loc), scale).to_event(len(proposal.event))
                numpyro.sample(name, fn.mask(jnp.asarray(masks[name])) if name in masks else fn)

    def proposal_of(self, name):
        """Location, of the shape of the site, and scale of its Normal in the guide."""
        proposal = self.proposals[name]
        shape = (*self.plates, *proposal.event) if proposal.at_start else (self.T, *self.plates, *proposal.event)
        first = 1.0 + list(self.proposals).index(name)
        return proposal.loc + 0.3 * np.sin(first + np.arange(np.prod(shape, dtype=int)).reshape(shape)), proposal.scale

    def __str__(self):
        legitimate = "legitimate" if self.is_legitimate else "not legitimate"
        return f"{self.kind} {self.seed} ({legitimate}, K={self.K}, T={self.T}): " + "; ".join(self.choices)


@contextlib.contextmanager
def plates_of(sizes):
    """Plates named `series`, or `outer` and `series`."""
    with contextlib.ExitStack() as stack:
        for name, size, dim in zip(("series", "outer"), reversed(sizes), (-1, -2), strict=False):
            stack.enter_context(numpyro.plate(name, size, dim=dim))
        yield


def emit(mean, y_t, scale=0.5):
    """Observe the sum over event axes that the plates do not have."""
    extra = jnp.ndim(mean) - jnp.ndim(y_t)
    numpyro.sample(Y, dist.Normal(mean.sum(tuple(range(-extra, 0))) if extra else mean, scale), obs=y_t)


def stock_error(program: Tricky) -> Exception | None:
    """What NumPyro itself raises on a program."""
    try:
        jax.eval_shape(lambda: log_density(handlers.seed(program.model, random.key(0)), program.args, {}, {})[0])
    except Exception as error:
        return error
    return None


def right_values(program: Tricky, particles: dict[str, Any]) -> list[float]:
    """The log evidence of all series by enumeration; where sites are masked, without and with the guide's density there.

    particles: {site: (T, K, *plates, *event)}, and without T for sites of the start.
    """
    values = _trajectories(program, {name: np.asarray(x) for name, x in particles.items()})
    points = program.T + any(proposal.at_start for proposal in program.proposals.values())
    series = int(np.prod(program.plates, dtype=int))
    guides = [program.guide] if program.present is None else [lambda *args: program.propose(program.present), program.guide]

    def weigh(guide):
        score = lambda given: log_density(program.model, program.args, {}, given)[0] - log_density(guide, (), {}, given)[0]
        return np.logaddexp.reduce(np.asarray(jax.jit(jax.vmap(score))(values))) - series * points * np.log(program.K)

    return [float(weigh(guide)) for guide in guides]


def _trajectories(program, particles):
    """{site: (N, T, *plates, *event)}: every choice of a particle at each point, by each series."""
    starts = any(proposal.at_start for proposal in program.proposals.values())
    points, series = program.T + starts, int(np.prod(program.plates, dtype=int))
    assert program.K ** (points * series) <= AT_MOST, "too many trajectories to visit"
    every = np.array(list(itertools.product(range(program.K), repeat=points * series))).reshape(-1, series, points)
    values = {}
    for name, proposal in program.proposals.items():
        leading = (program.K,) if proposal.at_start else (program.T, program.K)
        x = particles[name].reshape(*leading, series, *proposal.event)
        if proposal.at_start:
            rows = [x[every[:, s, 0], s] for s in range(series)]
            values[name] = np.stack(rows, 1).reshape(-1, *program.plates, *proposal.event)
        else:
            times = np.arange(program.T)
            rows = [x[times, every[:, s, starts:], s] for s in range(series)]
            values[name] = np.stack(rows, 2).reshape(-1, program.T, *program.plates, *proposal.event)
    return values
