"""Small programs that once gave a wrong number without a word: each is answered right, or refused by name."""

import re

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from scipy import special, stats

from numpyro_pvmc import PVMC
from numpyro_pvmc.exact import exact_posterior
from tricky import Proposal, Tricky, emit, plates_of
from tricky_outcomes import outcome

Y3, Y2X2 = np.array([0.3, 1.4, -0.2]), np.array([[0.3, 0.1], [1.4, -1.0]])


def starting_from_an_integer(y):
    """The state is a number from 0 on; NumPyro's `scan` takes the 0 for 0.0."""

    def step(level, y_t):
        level = numpyro.sample("x", dist.Normal(0.9 * level, 0.5))
        emit(level, y_t)
        return level, level

    scan(step, 0, y)


def clock_from_an_integer(y):
    """Time goes on by 0.4, from 0."""

    def step(carry, y_t):
        level, hours = carry
        level = numpyro.sample("x", dist.Normal(0.9 * level + jnp.sin(2.0 * hours), 0.5))
        emit(level, y_t)
        return (level, hours + 0.4), level

    scan(step, (0.0, 0), y)


def held(by):
    """A state that is kept at some steps, though its site is drawn and scored at all."""

    def model(y):
        def step(kept, y_t):
            x = numpyro.sample("x", dist.Normal(0.8 * kept, 0.5))
            emit(x, y_t)
            return jnp.where(by(x, y_t), kept, x), x

        scan(step, 0.1, y)

    return model


def coupled(by):
    """Two series, each of which goes where all of them are."""

    def model(y):
        def step(before, y_t):
            with plates_of((2,)):
                x = numpyro.sample("x", dist.Normal(0.8 * before + by(before), 0.5))
                emit(x, y_t)
            return x, x

        with plates_of((2,)):
            first = numpyro.sample("x_0", dist.Normal(jnp.zeros(2), 1.0))
        scan(step, first, y)

    return model


def mixed_after_the_scan(y):
    """What is observed at a time reads the mean over all."""

    def step(before, _):
        x = numpyro.sample("x", dist.Normal(0.8 * before, 0.5))
        return x, x

    _, path = scan(step, 0.0, None, length=3)
    emit(path + lax.stop_gradient(path.mean()), y)


def one(kind, model, is_legitimate):
    return Tricky(kind, 0, (model.__name__,), is_legitimate, model, (Y3,), {"x": Proposal()}, 3, 3)


def two(model):
    sites = {"x_0": Proposal(True), "x": Proposal()}
    return Tricky("couplings", 0, (model.__name__,), False, model, (Y2X2,), sites, 2, 2, (2,))


PROGRAMS = {  # and what the refusal names
    "state from 0": (one("casts", starting_from_an_integer, True), None),
    "clock from 0": (one("casts", clock_from_an_integer, True), None),
    "held by value": (one("holds", held(lambda x, y_t: x > 0.3), False), "'x'.*`carry`"),
    "held by data": (one("holds", held(lambda x, y_t: y_t > 1.0), False), "'x'.*`carry`"),
    "compared with the mean": (two(coupled(lambda x: 1.0 * (x > x.mean()))), "Site 'x'.* plate 'series'"),
    "stopped mean": (two(coupled(lambda x: lax.stop_gradient(x.mean()))), "Site 'x'.* plate 'series'"),
    "mean over time": (one("couplings", mixed_after_the_scan, False), "Site 'y' after the scan mixes times"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_right_or_refused(x64, name):
    program, words = PROGRAMS[name]
    found = outcome(program)
    if found.what == "refused" and not program.is_legitimate:
        assert re.search(words, found.said, re.DOTALL)
    else:
        assert found.what == "right", found


# Counts


def recruited(y):
    """Three more can be there at each step."""

    def step(before, y_t):
        n = numpyro.sample("n", dist.Binomial(before + 3, 0.9))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=y_t)
        return n, n

    scan(step, 5, y)


def surviving(y):
    """Of at most 50, who are counted with error; nobody knows of how many."""

    def step(before, y_t):
        n = numpyro.sample("n", dist.Binomial(before, 0.9))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=y_t)
        return n, n

    scan(step, numpyro.sample("n_0", dist.Binomial(50, 0.8)), y)


def log_evidence_of_counts(log_start, total, y):
    """By the forward recursion over all counts that there may be."""
    n = np.arange(len(log_start))
    for y_t in y:
        log_moves = stats.binom.logpmf(n, total(n)[:, None], 0.9)
        log_start = special.logsumexp(log_start[:, None] + log_moves, 0) + stats.binom.logpmf(y_t, n, 0.5)
    return special.logsumexp(log_start)


def nothing(y):
    """A guide that leaves the counts out."""


COUNTS = {
    "recruits": (recruited, [3, 4, 5, 4, 5, 3], lambda n: np.where(n == 5, 0.0, -np.inf), lambda n: n + 3, -11.742),
    "survivors": (surviving, [20, 17, 15, 14, 13, 10, 11, 8], lambda n: stats.binom.logpmf(n, 50, 0.8), lambda n: n, -16.433),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("exact", [False, True], ids=["pvmc", "exact"])
def test_counts_are_right_or_refused(x64, name, exact):
    model, y, log_start, total, expected = COUNTS[name]
    right = log_evidence_of_counts(log_start(np.arange(60)), total, y)
    assert_allclose(right, expected, atol=1e-3)
    refusal = None
    try:
        posterior = (
            exact_posterior(model, {}, jnp.array(y))
            if exact
            else PVMC(model, nothing).posterior(random.key(0), {}, jnp.array(y))
        )
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert_allclose(posterior.log_normalizer, right, rtol=1e-9)
    else:
        assert re.search("'n'.*(support|max_count)", refusal, re.DOTALL), refusal
