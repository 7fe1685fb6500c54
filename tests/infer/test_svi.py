"""`PVMC` as users call it: what compiles when, what is static, cold starts, growth, resumption."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC
from numpyro_pvmc.infer.schedule import calls, growth
from numpyro_pvmc.infer.svi import Place
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.handlers import parameters_of
from oracles import kalman_filter

pytestmark = few_particles

Q, R = 1.0, 0.5


class CountedModel:
    """An autoregression in a plate, which counts how often it is traced."""

    def __init__(self):
        self.calls = 0

    def __call__(self, y=None, T=None, series=3):
        self.calls += 1
        a = numpyro.param("a", 0.5)
        plate = numpyro.plate("series", series)

        def step(x_prev, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(a * x_prev, Q))
                numpyro.sample("y", dist.Normal(x, R), obs=y_t)
            return x, None

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y, length=T)


def simulate(seed, length=50, series=3):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=series), []
    for _ in range(length):
        x = 0.9 * x + Q * rng.normal(size=series)
        y.append(x + R * rng.normal(size=series))
    return np.array(y, np.float32)


def test_second_run_on_other_data_compiles_nothing():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    pvmc.run(jax.random.key(0), 130, simulate(0, 6), progress_bar=False, grow=False)
    state = pvmc.init(jax.random.key(1), simulate(1, 6))
    pvmc.update(state, simulate(1, 6))
    pvmc.evaluate(state, simulate(1, 6))
    params = pvmc.get_params(state)
    pvmc.posterior(jax.random.key(0), params, simulate(1, 6))
    pvmc.sample_posterior(jax.random.key(0), params, simulate(1, 6), sample_shape=(3,))
    before = model.calls
    pvmc.update(state, simulate(2, 6))
    pvmc.evaluate(state, simulate(2, 6))
    pvmc.posterior(jax.random.key(1), params, simulate(2, 6))
    pvmc.sample_posterior(jax.random.key(1), params, simulate(2, 6), sample_shape=(3,))
    pvmc.run(jax.random.key(3), 250, simulate(3, 6), progress_bar=False, init_state=state)
    assert model.calls == before
    calls_of_init = _calls(model, lambda: pvmc.init(jax.random.key(4), simulate(4, 6)))
    calls_of_run = _calls(model, lambda: pvmc.run(jax.random.key(5), 40, simulate(5, 6), progress_bar=False, grow=False))
    assert calls_of_run <= calls_of_init + 2  # the names of its parameters


@pytest.mark.slow
def test_a_run_from_a_state_has_one_phase_of_its_own():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    pvmc.run(jax.random.key(0), 130, simulate(0, 6), progress_bar=False)
    state = pvmc.init(jax.random.key(1), simulate(1, 6))
    go_on = lambda: pvmc.run(jax.random.key(2), 70, simulate(2, 6), progress_bar=False, init_state=state)
    assert _calls(model, go_on) <= 20
    assert _calls(model, go_on) == 0
    calls_of_init = _calls(model, lambda: pvmc.init(jax.random.key(4), simulate(4, 6)))
    calls_of_run = _calls(model, lambda: pvmc.run(jax.random.key(5), 40, simulate(5, 6), progress_bar=False))
    assert calls_of_run <= calls_of_init + 2


def _calls(model, action):
    before = model.calls
    action()
    return model.calls - before


@pytest.mark.slow
def test_second_run_from_the_start_compiles_nothing(caplog):
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)

    def compilations(seed):
        caplog.clear()
        with jax.log_compiles(True):
            jax.block_until_ready(pvmc.run(jax.random.key(seed), 120, simulate(seed, 6), progress_bar=False))
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    assert compilations(0) > 10
    assert compilations(1) == 0


def test_a_watched_run_is_the_same_run(capsys, monkeypatch):
    """However its steps are cut into calls: the first third of them warm up."""
    pvmc, y = PVMC(CountedModel(), num_particles=2), simulate(0, 4)
    hidden = pvmc.run(jax.random.key(0), 40, y, progress_bar=False)
    monkeypatch.setattr("numpyro_pvmc.infer.svi.calls", lambda num_steps, watched: [1, 5, num_steps - 6])
    watched = pvmc.run(jax.random.key(0), 40, y)
    assert_array_equal(watched.losses, hidden.losses)
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert "bound: -" in shown
    assert "K = 2" in shown


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, [1, 1, 4, 4, 4, 4, 2]), (1.0, [1] * 20), (1e-5, [1, 1, 18])])
def test_a_watched_run_shows_progress_every_half_second(monkeypatch, seconds, expected):
    now, counts = 0.0, []
    monkeypatch.setattr("numpyro_pvmc.infer.schedule.time.perf_counter", lambda: now)
    for count in calls(20, watched=True):
        now += count * seconds + (0.0 if counts else 5.0)  # the first call compiles
        counts.append(count)
    assert counts == expected
    assert list(calls(300, watched=False)) == [128, 128, 44]


def test_constraints_that_read_the_data_are_those_of_the_data():
    def model(y):
        level = numpyro.param("level", 0.1, constraint=dist.constraints.interval(0.0, y.max()))
        scan(lambda x, y_t: (numpyro.sample("x", dist.Normal(x, 1.0)), None), level, y)

    pvmc = PVMC(model, lambda y: numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0)), num_particles=2)
    for largest in (1.0, 8.0):
        state = pvmc.init(jax.random.key(0), jnp.full(3, largest), init_params={"level": jnp.array(largest / 2)})
        assert pvmc.get_params(state)["level"] == pytest.approx(largest / 2, rel=1e-5)


def test_python_scalars_are_static_and_arrays_are_traced():
    seen = []

    def model(y, T, name):
        seen.append((type(T), type(name), isinstance(y, jax.core.Tracer)))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.5 * x_prev, 1.0))
            numpyro.sample(name, dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y, length=T)

    pvmc = PVMC(model, AutoNormal(model), num_particles=2, name="counts")
    state = pvmc.init(jax.random.key(0), np.ones(3), T=3)
    seen.clear()
    pvmc.update(state, np.ones(3), T=3)
    assert set(seen) == {(int, str, True)}


@pytest.mark.slow
def test_update_inside_the_users_own_jit_and_scan():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), optax.adam(0.05), num_particles=4)
    y = jnp.asarray(simulate(0, 6))
    state = pvmc.init(jax.random.key(0), y)

    @jax.jit
    def train(state, y):
        return jax.lax.scan(lambda state, _: pvmc.update(state, y), state, None, length=20)

    last, losses = train(state, y)
    step_by_step = []
    for _ in range(20):
        state, loss = pvmc.update(state, y)
        step_by_step.append(loss)
    assert_allclose(losses, step_by_step, rtol=1e-4)

    @jax.jit
    def everything(key, y):
        result = pvmc.run(key, 20, y, progress_bar=False)
        posterior = pvmc.posterior(key, result.params, y)
        return result.losses, posterior, pvmc.sample_posterior(key, result.params, y, sample_shape=(3,))

    losses, posterior, samples = everything(jax.random.key(0), y)
    assert np.isfinite(losses).all()
    assert posterior.sample(jax.random.key(1), (2,))["x"].shape == (2, 6, 3)
    assert samples["x"].shape == (3, 6, 3)


def test_vmap_over_seeds():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    y = jnp.asarray(simulate(0, 4))
    state = pvmc.init(jax.random.key(0), y)
    params = pvmc.get_params(state)
    posterior = jax.jit(jax.vmap(lambda key: pvmc.posterior(key, params, y)))(jax.random.split(jax.random.key(1), 5))
    assert posterior.log_normalizer.shape == (5, 3)


@pytest.mark.slow
def test_a_run_inside_a_compiled_function_is_the_same_run():
    """Mapped over seeds too; the data are the function's own, or its argument."""
    y, keys = jnp.asarray(simulate(0, 4)), jax.random.split(jax.random.key(0), 2)
    run = lambda key, y: PVMC(CountedModel(), num_particles=2).run(key, 40, y, progress_bar=False).losses
    plain = jnp.stack([run(key, y) for key in keys])
    for compiled in (
        jax.jit(jax.vmap(lambda key: run(key, y)))(keys),
        jax.vmap(lambda key: run(key, y))(keys),
        jnp.stack([jax.jit(lambda key: run(key, y))(key) for key in keys]),
        jnp.stack([jax.jit(run)(key, y) for key in keys]),
    ):
        assert_allclose(compiled, plain, rtol=1e-4)


def test_growth_uses_all_steps_and_ends_with_all_particles():
    for number in (1, 2, 7, 100, 6000):
        for K in (1, 2, 3, 16, 32, 1000):
            phases = growth(number, K)
            assert sum(steps for _, steps in phases) == number
            assert phases[-1][0] == K
            assert all(few < many for (few, _), (many, _) in itertools.pairwise(phases))


def test_model_parameters_rest_while_there_is_one_particle():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=16)
    assert growth(3, 16)[0] == (1, 1)
    state = pvmc.init(jax.random.key(0), simulate(0, 6))
    parts = state, pvmc._constraints((), {}), arguments_of(simulate(0, 6)), Place(5, 0, None)
    with_one, _ = pvmc._compiled_updates(*parts, num_particles=1, frozen=("a",), stable=False)
    assert pvmc.get_params(with_one)["a"] == 0.5
    assert (pvmc.get_params(with_one)["x_auto_loc"] != pvmc.get_params(state)["x_auto_loc"]).all()
    assert parameters_of(model, arguments_of(simulate(0, 6)), {}) == {"a"}


def arguments_of(*args):
    return Arguments(args)


def test_a_run_goes_on_from_a_state_and_from_parameters():
    model = CountedModel()
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    y = simulate(0, 6)
    first = pvmc.run(jax.random.key(0), 150, y, progress_bar=False, grow=False)
    on = pvmc.run(jax.random.key(9), 50, y, progress_bar=False, init_state=first.state)
    whole = pvmc.run(jax.random.key(0), 200, y, progress_bar=False, grow=False)
    assert_allclose(jnp.concatenate([first.losses, on.losses]), whole.losses, rtol=1e-5)
    started = pvmc.init(jax.random.key(1), y, init_params={"a": jnp.array(0.7)})
    assert pvmc.get_params(started)["a"] == pytest.approx(0.7)


def test_stable_updates_survive_what_is_not_finite():
    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            numpyro.factor("bad", jnp.where(x > -1e9, jnp.nan, 0.0))
            return x, None

        scan(step, 0.0, y)

    pvmc = PVMC(model, lambda y: numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.zeros(3)), 1.0)), num_particles=2)
    with pytest.warns(UserWarning, match="5 of 5 updates were not finite, and were skipped"):
        result = pvmc.run(jax.random.key(0), 5, jnp.ones(3), progress_bar=False, stable_update=True)
    assert np.isnan(result.losses).all()
    assert_array_equal(result.params["m"], np.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cold_start(seed, trained):
    """Stock AutoNormal from its usual start, defaults, K = 16: the bound is at the evidence."""
    result, bounds, exact = trained(seed)
    error = bounds.std() / np.sqrt(len(bounds))
    assert error < 0.015
    assert bounds.mean() > exact - 0.05
    assert bounds.mean() < exact + 4 * error
    assert abs(result.params["a"] - 0.9) < 0.1


@pytest.fixture(scope="module")
def trained():
    model, y = CountedModel(), simulate(1)
    pvmc = PVMC(model, AutoNormal(model), num_particles=16)
    bound = jax.jit(jax.vmap(lambda key, params: -pvmc.loss.loss(key, params, model, pvmc.guide, y), in_axes=(0, None)))

    def train(seed):
        result = pvmc.run(jax.random.key(seed), 6000, y, progress_bar=False)
        one, a = np.eye(1), np.full((1, 1), float(result.params["a"]))
        distribution = (np.zeros(1), one, a, np.zeros(1), Q**2 * one, one, R**2 * one)
        unobserved = np.full((1, 1), np.nan)
        exact = sum(kalman_filter(distribution, np.concatenate([unobserved, y[:, i : i + 1]])).log_evidence for i in range(3))
        bounds = np.asarray(bound(jax.random.split(jax.random.key(100 + seed), 200), result.params), np.float64)
        return result, bounds, exact

    return train
