"""The tricky programs are what they say: their functions read what they should, and they run in NumPyro."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from scipy import special, stats

import tricky_couplings
from tricky import Proposal, Tricky, emit, right_values, stock_error
from tricky_casts import random_cast
from tricky_counts import random_count
from tricky_couplings import random_coupling
from tricky_holds import random_hold

ROWS, TRIALS = 3, 12


def reads_other_rows(function, event, base):
    """Whether some row moves where another row of the input does."""
    rng = np.random.default_rng(0)
    value = jax.jit(function)
    for trial in range(TRIALS):
        rows = rng.normal(size=(ROWS, *event)) + base
        moved = rows.copy()
        moved[trial % ROWS] += 2 * rng.normal(size=event)
        others = np.arange(ROWS) != trial % ROWS
        if not np.array_equal(np.asarray(value(rows))[others], np.asarray(value(moved))[others]):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("event", [(), (2,)], ids=["number", "vector"])
def test_functions_read_their_own_row_or_others(x64, event):
    own = tricky_couplings.OWN | (tricky_couplings.OWN_EVENT if event else {})
    for name, function in own.items():
        assert not reads_other_rows(function, event, 0.0), name
    for name, function in (tricky_couplings.OTHERS | tricky_couplings.MIXES).items():
        assert reads_other_rows(function, event, tricky_couplings.base_of(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("make", [random_cast, random_hold, random_coupling, random_count])
def test_both_kinds_are_made_and_numpyro_runs_them(x64, make):
    made = [make(seed) for seed in range(60)]
    assert 15 < sum(program.is_legitimate for program in made) < 45
    if make is not random_cast:
        errors = {str(program): stock_error(program) for program in made}
        assert not any(errors.values()), errors


def test_the_sum_over_trajectories(x64):
    """Of a random walk it is the forward recursion, in SciPy."""

    def model(y):
        def step(before, y_t):
            x = numpyro.sample("x", dist.Normal(before, 0.7))
            emit(x, y_t)
            return x, x

        scan(step, 0.5, y)

    y, particles = np.array([0.3, 1.4, -0.2]), np.random.default_rng(0).normal(size=(3, 2))
    program = Tricky("casts", 0, (), True, model, (y,), {"x": Proposal()}, 2, 3)
    loc, scale = program.proposal_of("x")
    before, log_alpha = np.array([0.5]), np.zeros(1)
    for t, x in enumerate(particles):
        log_alpha = special.logsumexp(log_alpha[:, None] + stats.norm.logpdf(x, before[:, None], 0.7), 0)
        log_alpha += stats.norm.logpdf(y[t], x, 0.5) - stats.norm.logpdf(x, loc[t], scale) - np.log(2)
        before = x
    assert_allclose(right_values(program, {"x": particles}), [special.logsumexp(log_alpha)], rtol=1e-12)
