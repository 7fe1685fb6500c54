"""Nothing is compiled twice, and who waits for the compiler is told so."""

import gc
import io
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC
from numpyro_pvmc.program import waiting

KEY = jax.random.key(0)
Y = jnp.asarray(np.random.default_rng(0).normal(size=10), jnp.float32)


def autoregression(data=None):
    """A model of its own for each call, with its data as an argument or as numbers that it closes over."""

    def model(y=None):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), model.data if y is None else y)

    model.data = data
    return model


@pytest.fixture
def compiled():
    """Durations of the compilations since it was last cleared."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: found.append(duration) if event.endswith("backend_compile_duration") else None
    )
    return found


def all_of_it(model, *args, guide=None):
    pvmc = PVMC(model, guide, num_particles=4)
    result = pvmc.run(KEY, 20, *args, progress_bar=False)
    state, loss = pvmc.update(pvmc.init(KEY, *args), *args)
    draws = pvmc.sample_posterior(KEY, result.params, *args, sample_shape=(3,))
    return result.losses, loss, pvmc.evaluate(state, *args), draws, pvmc.posterior(KEY, result.params, *args).log_normalizer


def first_loss(model, *args):
    pvmc = PVMC(model, num_particles=4)
    return pvmc.evaluate(pvmc.init(KEY, *args), *args)


@few_particles
@pytest.mark.parametrize("guide_of", [lambda model: None, pytest.param(AutoNormal, marks=pytest.mark.slow)])
def test_a_fresh_inference_of_a_model_compiles_nothing(compiled, guide_of):
    model = autoregression()
    guide = guide_of(model)
    first = all_of_it(model, Y, guide=guide)
    assert len(compiled) > 3
    compiled.clear()
    again = all_of_it(model, Y, guide=guide)
    assert not compiled
    jax.tree.map(np.testing.assert_array_equal, again, first)
    first_loss(model, Y[:-1])
    assert compiled


@few_particles
def test_what_was_compiled_goes_with_the_model():
    model = autoregression()
    PVMC(model, num_particles=4).run(KEY, 5, Y, progress_bar=False)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@few_particles
def test_runs_end_with_the_program_of_updates(compiled):
    pvmc = PVMC(autoregression(), num_particles=4)
    pvmc.update(pvmc.init(KEY, Y), Y)
    pvmc.run(KEY, 5, Y, progress_bar=False)  # of which the losses are put together by small programs
    compiled.clear()
    pvmc.run(KEY, 20, Y, progress_bar=False)
    assert sum(compiled) < 0.1


@few_particles
def test_other_numbers_that_a_model_closes_over_are_another_program():
    """As constants these may be no part of the program's text."""
    model = autoregression(Y)
    first = first_loss(model)
    model.data = Y[::-1] + 1.0
    assert first_loss(model) != first
    assert_allclose(first_loss(model), first_loss(autoregression(), model.data), rtol=1e-5)


@few_particles
def test_optimisers_and_objectives_do_not_share():
    model = autoregression()
    losses = {
        (rate, gradient): PVMC(model, AutoNormal(model), numpyro.optim.SGD(rate), num_particles=4, gradient=gradient)
        .run(KEY, 10, Y, progress_bar=False, grow=False)
        .losses
        for rate in (0.001, 0.002)
        for gradient in ("reparam", "sticking")
    }
    assert len({tuple(np.asarray(found)) for found in losses.values()}) == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_says_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(waiting, "_PATIENCE", 0.01)
    monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with waiting.announced("outside"), waiting.announced("compiling updates"):
        time.sleep(0.2)
    assert "\rcompiling updates: 0 s" in sys.stderr.getvalue()
    assert "outside" not in sys.stderr.getvalue()
    assert sys.stderr.getvalue().endswith(" \r")
    pvmc = PVMC(autoregression(), num_particles=2)
    pvmc.run(KEY, 3, Y, progress_bar=False)
    assert "initial state" not in sys.stderr.getvalue()
    pvmc.posterior(KEY, pvmc.get_params(pvmc.init(KEY, Y)), Y)
    assert "compiling the posterior" in sys.stderr.getvalue()


def test_there_is_no_line_where_nobody_reads(monkeypatch):
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with waiting.announced("compiling updates"):
        time.sleep(0.05)
    assert not sys.stderr.getvalue()
