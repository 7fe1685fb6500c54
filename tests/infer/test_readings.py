"""A program is read once for what looks alike, and again where it may be another."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC, AutoSmoothedNormal
from numpyro_pvmc.chain import reading
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments

Y = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)


@pytest.fixture
def readings(monkeypatch):
    """A list that grows by one at each reading."""
    found, analyse = [], reading.analyse

    def counting(model, *args):
        found.append(model)
        return analyse(model, *args)

    monkeypatch.setattr(reading, "analyse", counting)
    return found


class Model:
    """Counts how often it is run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, y):
        self.runs += 1
        decay = numpyro.param("decay", 0.9)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(decay * x_prev, 0.3))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


@few_particles
@pytest.mark.parametrize(("guide", "most"), [(AutoNormal, 20), (AutoSmoothedNormal, 24)])
def test_a_run_reads_once_and_traces_the_model_a_few_times(guide, most, readings):
    model = Model()
    pvmc = PVMC(model, guide(model), num_particles=8)
    result = pvmc.run(jax.random.key(0), 40, Y, progress_bar=False)
    assert readings == [model]
    assert model.runs <= most
    pvmc.posterior(jax.random.key(0), result.params, Y)
    pvmc.sample_posterior(jax.random.key(0), result.params, Y)
    PVMC(model, guide(model), num_particles=8).run(jax.random.key(0), 40, Y + 1, progress_bar=False)
    assert readings == [model]
    pvmc.posterior(jax.random.key(0), {"decay": 0.5}, Y[:5], refine=1) if guide is AutoSmoothedNormal else None
    assert len(readings) == 1 + (guide is AutoSmoothedNormal)  # other shapes


def test_what_looks_other_is_read_again(readings):
    def model(y):
        loc = numpyro.param("loc", jnp.zeros(()))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, scale))
            numpyro.sample("y", dist.Normal(x + loc, 0.5).expand([3]), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    arguments = Arguments((jnp.zeros((4, 3)),))
    first = read_structure(model, arguments, {})
    assert read_structure(model, arguments, {"loc": jnp.ones(()), "of_a_guide": jnp.ones(7)}) is first
    assert len(readings) == 1
    read_structure(model, arguments, {"loc": jnp.ones(3)})
    assert len(readings) == 2  # of another shape
    read_structure(model, arguments, {"scale": 1.0})
    assert len(readings) == 3  # a site is given
    read_structure(model, Arguments((jnp.zeros((5, 3)),)), {})
    assert len(readings) == 4
    assert read_structure(model, arguments, {}) is first
    assert len(readings) == 4
    with jax.enable_x64(True):
        assert read_structure(model, Arguments((np.zeros((4, 3)),)), {}) is not first


def test_static_arguments_are_read_by_value(readings):
    def model(y, length):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 0.3))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y[:length])

    lengths = [read_structure(model, Arguments((Y, length)), {}).length for length in (3, 5, 3)]
    assert lengths == [3, 5, 3]
    assert len(readings) == 2


def test_numbers_that_bound_a_count_are_read_by_value():
    def model(totals, y):
        def step(n_prev, now):
            total, y_t = now
            n = numpyro.sample("n", dist.Binomial(total, 0.5))
            numpyro.sample("y", dist.Normal(n, 0.5), obs=y_t)
            return n, None

        scan(step, jnp.array(0), (totals, y))

    for totals in ([2, 3], [4, 1]):
        arguments = Arguments((jnp.asarray(totals), jnp.zeros(2)))
        (site,) = read_structure(model, arguments, {}).step_states or read_structure(model, arguments, {}).step_sites
        assert len(site.support) == max(totals) + 1


def test_errors_are_not_kept(readings):
    broken = [True]

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 0.3))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return (x if not broken else jnp.stack([x, x])), None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            read_structure(model, Arguments((Y,)), {})
    broken.clear()
    assert read_structure(model, Arguments((Y,)), {}).length == 12
    assert len(readings) == 3


def test_what_is_known_goes_with_the_model():
    model = Model()
    read_structure(model, Arguments((Y,)), {})
    known, gone = reading._known._known, weakref.ref(model)
    mine = id(model), id(None)
    assert mine in known
    del model
    gc.collect()
    assert gone() is None
    assert mine not in known


def test_a_method_is_read_once(readings):
    model = Model()
    for _ in range(2):
        read_structure(model.__call__, Arguments((Y,)), {})
    assert len(readings) == 1


def test_a_flag_that_the_program_reads(readings):
    reads_before = [False]

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.3))
            numpyro.sample("y", dist.Normal(x_prev if reads_before[0] else x, 0.5), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    arguments = Arguments((Y,))
    assert read_structure(model, arguments, {}).node_factors == ("y",)
    reads_before[0] = True
    assert read_structure(model, arguments, {}).edge_factors == ("x", "y")
    reads_before[0] = False
    assert read_structure(model, arguments, {}).node_factors == ("y",)
    assert len(readings) == 2


def test_what_becomes_of_a_value_is_seen_too(readings):
    """No operation differs here, but which value is which."""
    swapped = [False]

    def model(y):
        def step(carry, y_t):
            a, b = carry
            new = numpyro.sample("a", dist.Normal(a, 0.3)), numpyro.sample("b", dist.Normal(b, 0.3))
            numpyro.sample("y", dist.Normal(new[swapped[0]], 0.5), obs=y_t)
            return new, None

        scan(step, tuple(numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a_0", "b_0")), y)

    arguments = Arguments((Y,))
    for swapped[0] in (False, True, False, True):
        read_structure(model, arguments, {})
    assert len(readings) == 2


def test_an_error_of_a_changed_program_is_its_own():
    broken = []

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 0.3))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return (x, x) if broken else x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    read_structure(model, Arguments((Y,)), {})
    broken.append(True)
    with pytest.raises((TypeError, ValueError), match="carry"):
        read_structure(model, Arguments((Y,)), {})


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_numbers_that_the_program_closes_over(readings, kind):
    """By the numbers of an array it is told whether series read each other."""
    weights = [kind(np.array([1, 0, 2]))]

    def model(y):
        with numpyro.plate("series", 3):
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(x_prev, y_t):
            with numpyro.plate("series", 3):
                x = numpyro.sample("x", dist.Normal(x_prev[weights[0]], 0.3))
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, x_0, y)

    arguments = Arguments((jnp.zeros((4, 3)),))
    for _ in range(2):
        with pytest.raises(ValueError, match="series"):
            read_structure(model, arguments, {})
        weights[0] = kind(np.array([0, 1, 2]))
        first = read_structure(model, arguments, {})
        assert read_structure(model, arguments, {}) is first
        weights[0] = kind(np.array([1, 0, 2]))
