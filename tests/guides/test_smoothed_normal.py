"""`AutoSmoothedNormal`: moments that the objective moves, under PVMC and under stock NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoGuideList, AutoNormal

from conftest import initial_params
from numpyro_pvmc import PVMC, AutoSmoothedNormal, ImportanceSmoothedELBO, SupervisedELBO
from numpyro_pvmc.infer.svi import Place

T = 40


def counts(y=None, length=T):
    a = numpyro.param("a", 0.5, constraint=dist.constraints.unit_interval)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(a * x_prev, 0.5))
        numpyro.sample("y", dist.Poisson(jnp.exp(1.0 + x)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y, length=length)


def constrained_panel(y):
    """Two series; a positive site and a share a step."""
    plate = numpyro.plate("series", 2)

    def step(state, y_t):
        rate, share = state
        with plate:
            rate = numpyro.sample("rate", dist.LogNormal(0.8 * jnp.log(rate), 0.3))
            share = numpyro.sample("share", dist.Dirichlet(1.0 + 10 * share))
            numpyro.sample("y", dist.Normal(rate[..., None] * share, 0.2).to_event(1), obs=y_t)
        return (rate, share), None

    scan(step, (jnp.ones(2), jnp.full((2, 3), 1 / 3)), y)


Y = Predictive(counts, num_samples=1, params={"a": 0.9})(random.key(3))["y"][0]
PANEL = jnp.abs(random.normal(random.key(0), (5, 2, 3)))
STATE = ["auto_initial_mean", "auto_initial_factor", "auto_steps_mean", "auto_steps_factor"]


@pytest.mark.slow
@pytest.mark.parametrize("covariance", [pytest.param("diagonal", marks=pytest.mark.slow), "full"])
def test_training_from_a_blind_start(covariance):
    guide = AutoSmoothedNormal(counts, covariance=covariance)
    pvmc = PVMC(counts, guide, optax.adam(0.05), num_particles=64)
    result = pvmc.run(random.key(0), 100, Y, progress_bar=False)
    posterior = pvmc.posterior(random.key(1), result.params, Y)
    assert posterior.effective_sample_size()["x"].min() > 55
    assert posterior.effective_sample_size()["x_0"] > 55
    refined = PVMC(counts, num_particles=512).posterior(random.key(2), {"a": result.params["a"]}, Y, refine=8)
    assert_allclose(posterior.log_normalizer, refined.log_normalizer, atol=0.15)
    assert result.losses[-20:].mean() < -refined.log_normalizer + 0.3


def test_a_model_parameter_rests_while_the_guide_warms_up():
    pvmc = PVMC(counts, AutoSmoothedNormal(counts), optax.sgd(0.1), num_particles=8)
    state = pvmc.init(random.key(0), Y)
    arguments = pvmc._arguments((Y,), {})
    chosen = {"num_particles": None, "frozen": (), "stable": False}
    constraints = pvmc._constraints((Y,), {})
    warm, _ = pvmc._compiled_updates(state, constraints, arguments, Place(5, 3, rounds=10), **chosen)
    assert pvmc.get_params(warm)["a"] == pvmc.get_params(state)["a"]
    assert (pvmc.get_params(warm)["auto_steps_mean"] != pvmc.get_params(state)["auto_steps_mean"]).all()
    done, _ = pvmc._compiled_updates(state, constraints, arguments, Place(8, 3, rounds=10), **chosen)
    assert pvmc.get_params(done)["a"] != pvmc.get_params(state)["a"]


def test_stock_svi_carries_the_moments():
    def run(cls, loss, **kwargs):
        guide = AutoSmoothedNormal(counts)
        return cls(counts, guide, optax.adam(0.05), loss).run(random.key(0), 20, Y, progress_bar=False, **kwargs)

    stock = run(SVI, ImportanceSmoothedELBO(16))
    ours = run(PVMC, ImportanceSmoothedELBO(16), grow=False)
    assert sorted(stock.state.mutable_state) == sorted(STATE)
    assert_allclose(stock.losses, ours.losses, rtol=1e-4)
    for name, value in (stock.params | stock.state.mutable_state).items():
        assert_allclose(ours.params[name], value, rtol=1e-3, atol=1e-4)
    pvmc = PVMC(counts, AutoSmoothedNormal(counts), num_particles=16)
    assert pvmc.posterior(random.key(1), stock.params | stock.state.mutable_state, Y).log_normalizer > -stock.losses[0]


@pytest.mark.slow
def test_it_is_a_guide_like_any_other():
    guide = AutoSmoothedNormal(counts)
    result = SVI(counts, guide, optax.adam(0.05), Trace_ELBO()).run(random.key(0), 5, Y, progress_bar=False)
    assert np.isfinite(result.losses).all()
    params = result.params | result.state.mutable_state
    draws = Predictive(guide, num_samples=3, params=params)(random.key(0), Y)
    assert draws["x"].shape == (3, T)
    assert Predictive(counts, guide=guide, num_samples=3, params=params)(random.key(0), length=T)["y"].shape == (3, T)


@pytest.mark.slow
def test_global_sites_have_a_guide_of_their_own():
    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(-1.0, 1.0))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
            numpyro.sample("y", dist.Poisson(jnp.exp(1.0 + x)), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    with pytest.raises(ValueError, match=r"does not sample \['scale'\].*AutoGuideList"):
        PVMC(model, AutoSmoothedNormal(model), num_particles=8).init(random.key(0), Y)
    guide = AutoGuideList(model)
    guide.append(AutoNormal(numpyro.handlers.block(numpyro.handlers.seed(model, 0), expose=["scale"]), prefix="global"))
    guide.append(AutoSmoothedNormal(model))
    pvmc = PVMC(model, guide, optax.adam(0.03), num_particles=32)
    result = pvmc.run(random.key(0), 200, Y, progress_bar=False)
    posterior = pvmc.posterior(random.key(1), result.params, Y, refine=2)
    assert posterior.effective_sample_size()["x"].min() > 20
    assert 0.05 < posterior.globals["scale"] < 2.0
    samples = pvmc.sample_posterior(random.key(2), result.params, Y, sample_shape=(7,))
    assert samples["x"].shape == (7, T)
    assert len(np.unique(samples["scale"])) == 7


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["diagonal", pytest.param("full", marks=pytest.mark.slow)])
def test_proposal_in_the_manner_of_automatic_guides(covariance):
    guide = AutoSmoothedNormal(constrained_panel, covariance=covariance)
    pvmc = PVMC(constrained_panel, guide, num_particles=64)
    params = pvmc.run(random.key(0), 12, PANEL, progress_bar=False).params
    median = guide.median(params)
    assert median["rate"].shape == (5, 2)
    assert median["share"].shape == (5, 2, 3)
    assert_allclose(median["share"].sum(-1), 1.0, rtol=1e-5)
    low, high = guide.quantiles(params, [0.1, 0.9])["rate"]
    assert (low < median["rate"]).all()
    assert (median["rate"] < high).all()
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(4000,))
    assert draws["rate"].shape == (4000, 5, 2)
    assert_allclose(np.median(draws["rate"], 0), median["rate"], rtol=0.05)
    assert_allclose((draws["rate"] < high).mean(0), 0.9, atol=0.025)


def test_where_it_starts():
    at = jnp.linspace(-1.0, 1.0, T)
    place = init_to_value(values={"x": at, "x_0": jnp.asarray(0.3)})
    guide = AutoSmoothedNormal(counts, init_loc_fn=place, init_scale=0.25)
    pvmc = PVMC(counts, guide, num_particles=8)
    params = initial_params(pvmc, random.key(0), Y)
    assert_allclose(guide.median(params)["x"], at)
    assert_allclose(guide.median(params)["x_0"], 0.3)
    assert_allclose(params["auto_steps_factor"], 0.25)
    blind = AutoSmoothedNormal(counts)
    pvmc = PVMC(counts, blind, num_particles=8)
    params = initial_params(pvmc, random.key(0), Y)
    assert_allclose(params["auto_initial_factor"], 1.0, rtol=0.25)  # the prior's
    assert_allclose(params["auto_steps_factor"][5:].mean(), 0.5 / np.sqrt(1 - 0.25), rtol=0.1)


@pytest.mark.slow
def test_a_start_at_the_mode():
    known = {"a": jnp.asarray(0.9)}
    guides = [AutoSmoothedNormal(counts, init=init) for init in ("prior", "laplace")]
    sizes = [
        PVMC(counts, guide, num_particles=64).posterior(random.key(0), known, Y).effective_sample_size()["x"]
        for guide in guides
    ]
    assert sizes[0].min() < 30
    assert sizes[1].min() > 50


@pytest.mark.slow
def test_a_supervised_loss_refits_too():
    truth = SupervisedELBO(lambda y: {"x": jnp.zeros(T)}, 64)
    pvmc = PVMC(counts, AutoSmoothedNormal(counts), optax.sgd(0.0), truth)
    result = pvmc.run(random.key(0), 15, Y, progress_bar=False)
    assert pvmc.posterior(random.key(1), result.params, Y).effective_sample_size()["x"].min() > 50


def test_known_parameters_decide_where_a_blind_start_is():
    def model(y):
        level = numpyro.param("level", 0.0)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(level + 0.5 * (x_prev - level), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(level, 1.0)), y)

    posterior = PVMC(model, num_particles=64).posterior(random.key(0), {"level": 500.0}, jnp.full(6, 500.2))
    assert_allclose(posterior.mean()["x"], 500.15, atol=0.2)


def test_moments_belong_to_one_data_set():
    pvmc = PVMC(counts, AutoSmoothedNormal(counts), num_particles=8)
    params = initial_params(pvmc, random.key(0), Y)
    with pytest.raises(ValueError, match=r"Gaussians for \(steps, \*series\) of \(40,\), but these data have \(10,\)"):
        pvmc.posterior(random.key(0), params, Y[:10], 10)
    known = {"a": params["a"]}
    assert pvmc.posterior(random.key(0), known, Y[:10], 10, refine=3).particles["x"].shape == (10, 8)


def test_errors():
    for arguments, message in [
        ({"covariance": "low_rank"}, "`covariance` must be one of"),
        ({"init": "map"}, "`init` must be one of"),
        ({"rate": 0.0}, "`rate` must be above 0"),
        ({"init_scale": -1.0}, "`init_scale` must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoSmoothedNormal(counts, **arguments)
    guide = AutoSmoothedNormal(counts)
    with pytest.raises(ValueError, match=r"parameters lack the guide's state.*mutable_state"):
        guide.median({})
    with pytest.raises(ValueError, match="has not seen the data of these parameters"):
        guide.median(dict.fromkeys(STATE, jnp.ones(3)))


@pytest.mark.slow
def test_two_precisions_agree_on_a_long_series():
    """The same seeds: quasi-random points are the same to the last bits of single precision."""
    key, length = random.key(0), 2500
    y = np.asarray(Predictive(counts, num_samples=1, params={"a": 0.9})(key, length=length)["y"][0])
    bounds = []
    for is_double in (False, True):
        with jax.enable_x64(is_double):
            params = {"a": jnp.asarray(0.9)}
            posterior = PVMC(counts, num_particles=64).posterior(key, params, jnp.asarray(y), length, refine=4)
            assert posterior.log_normalizer.dtype == (jnp.float64 if is_double else jnp.float32)
            bounds.append(float(posterior.log_normalizer))
    assert abs(bounds[0] / bounds[1] - 1) < 1e-3
