"""Summaries against NumPy on the same particles; trajectories against enumeration; forecasts against the Kalman filter."""

import dataclasses
import functools

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module
from numpyro.infer import Predictive

from conftest import few_particles
from models import BY_NAME
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from oracles import LinearGaussian, forecast, rts_smoother
from test_against_enumeration import enumerate_program

pytestmark = few_particles

SHAPES = {"autoregression_4": (), "vector": (2,), "matrix": (3, 2, 2)}  # plates and event of a site
by_shape = pytest.mark.parametrize("name", ["autoregression_4", pytest.param("vector", marks=pytest.mark.slow), "matrix"])


@pytest.fixture(scope="module", autouse=True)
def single_precision():
    """JAX may hand NumPy constants of another precision, from modules before this one, to programs of this one."""
    jax.clear_caches()


@functools.cache
def smoothed(name, num_particles=8):
    """A posterior of a small program without parameters."""
    program = BY_NAME[name]
    pvmc = PVMC(program.model, program.guide, num_particles=num_particles, particles="iid")
    return pvmc.posterior(jax.random.key(2), {}, *program.args, **program.kwargs)


def weighted(posterior, site):
    """Particles and weights of the same shape in float64, the particles' axis last."""
    axis = 0 if site == "x_0" else 1
    x, log_weights = (np.asarray(a[site], np.float64) for a in (posterior.particles, posterior.log_weights))
    weights = np.exp(log_weights).reshape(log_weights.shape + (1,) * (x.ndim - log_weights.ndim))
    return np.moveaxis(x, axis, -1), np.moveaxis(np.broadcast_to(weights, x.shape), axis, -1)


def weighted_quantile(x, w, q):
    """Each particle stands at the middle of its share of the mass; (*q.shape, ...)."""

    def one(x, w):
        order = np.argsort(x)
        return np.interp(q, np.cumsum(w[order]) - w[order] / 2, x[order])

    rows = [one(*pair) for pair in zip(x.reshape(-1, x.shape[-1]), w.reshape(-1, x.shape[-1]), strict=True)]
    return np.moveaxis(np.reshape(rows, (*x.shape[:-1], *np.shape(q))), range(x.ndim - 1), range(-x.ndim + 1, 0))


@by_shape
def test_mean_and_variance(name):
    posterior = smoothed(name)
    mean, variance = posterior.mean(), posterior.variance()
    assert set(mean) == set(variance) == {"x_0", "x"}
    for site in mean:
        steps = () if site == "x_0" else (BY_NAME[name].length,)
        assert mean[site].shape == variance[site].shape == (*steps, *SHAPES[name])
        x, w = weighted(posterior, site)
        expected = (w * x).sum(-1)
        assert_allclose(mean[site], expected, rtol=1e-4, atol=1e-5)
        assert_allclose(variance[site], (w * (x - expected[..., None]) ** 2).sum(-1), rtol=1e-4, atol=1e-5)


@by_shape
@pytest.mark.parametrize(
    "q", [0.3, np.array([0.0, 0.5, 0.9]), np.array([[0.05, 0.5], [0.8, 0.95]])], ids=["()", "(3,)", "(2, 2)"]
)
def test_quantile(name, q):
    posterior = smoothed(name)
    for site, quantile in posterior.quantile(q).items():
        steps = () if site == "x_0" else (BY_NAME[name].length,)
        assert quantile.shape == (*np.shape(q), *steps, *SHAPES[name])
        assert_allclose(quantile, weighted_quantile(*weighted(posterior, site), q), rtol=1e-4, atol=1e-4)


@by_shape
def test_quantile_of_equal_weights_is_that_of_numpy(name):
    posterior = smoothed(name)
    equal = {site: jnp.full_like(w, -np.log(8)) for site, w in posterior.log_weights.items()}
    q = np.array([0.1, 0.5, 0.77])
    for site, quantile in dataclasses.replace(posterior, log_weights=equal).quantile(q).items():
        assert_allclose(quantile, np.quantile(weighted(posterior, site)[0], q, axis=-1, method="hazen"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q", [-0.1, np.array([0.5, 1.1])])
def test_quantile_refuses_what_is_no_probability(q):
    with pytest.raises(ValueError, match="`q` must be between 0 and 1"):
        smoothed("autoregression_4").quantile(q)


@by_shape
def test_weights_sum_to_one_and_give_the_effective_sample_size(name):
    posterior = smoothed(name)
    for site, size in posterior.effective_sample_size().items():
        axis = 0 if site == "x_0" else 1
        for log_weights in (posterior.log_weights[site], posterior.log_filtering_weights[site]):
            assert_allclose(np.exp(log_weights).sum(axis), 1.0, rtol=1e-5)
        weights = np.exp(np.asarray(posterior.log_weights[site], np.float64))
        assert_allclose(size, 1 / (weights**2).sum(axis), rtol=1e-4)
        assert ((size >= 1) & (size <= 8)).all()


def particle_numbers(posterior, samples, site, n):
    """Which particle of its step each value of a trajectory is: (number of samples,) or (number of samples, T)."""
    axis = 0 if site == "x_0" else 1
    values, particles = np.asarray(samples[site])[..., *n], np.asarray(posterior.particles[site])[..., *n]
    is_it = np.expand_dims(values, axis + 1) == particles
    assert (is_it.sum(axis + 1) == 1).all()
    return is_it.argmax(axis + 1)


@pytest.mark.parametrize("name", ["two_coupled_sites", *(pytest.param(n, marks=pytest.mark.slow) for n in ("series", "held"))])
def test_trajectories_have_the_joint_distribution_of_the_potentials(name):
    """Neighbouring points, and the two ends, pair by pair; all sites of a point come from one particle."""
    program, posterior, number = BY_NAME[name], smoothed(name, 3), 20_000
    samples = posterior.sample(jax.random.key(0), (number,))

    def check(before, after, expected):
        frequency = np.zeros((3, 3))
        np.add.at(frequency, (before, after), 1 / number)
        error = np.sqrt(expected * (1 - expected) / number)  # at most 0.0036
        assert (abs(frequency - expected) < 5 * error + 2 / number).all()

    for n in np.ndindex(*program.plates):
        exact = enumerate_program(program, posterior, n)
        present = np.ones(program.length, bool) if program.present is None else program.present[:, *n]
        first = particle_numbers(posterior, samples, "x_0", n)
        points = np.vstack([first, particle_numbers(posterior, samples, "x", n).T[present]])
        for site in program.sites:
            assert_array_equal(particle_numbers(posterior, samples, site, n).T[present], points[1:])
        for before, after, expected in zip(points[:-1], points[1:], exact.pair_weights, strict=True):
            check(before, after, expected)
        onward = exact.pair_weights / exact.weights[:-1, :, None]
        check(points[0], points[-1], exact.weights[0][:, None] * functools.reduce(np.matmul, onward))


@by_shape
def test_samples_have_the_shapes_of_the_model(name):
    program, posterior = BY_NAME[name], smoothed(name)
    prior = Predictive(program.model, num_samples=5)(jax.random.key(0), *program.args, **program.kwargs)
    samples = posterior.sample(jax.random.key(0), (5,))
    assert {site: x.shape for site, x in samples.items()} == {site: prior[site].shape for site in ("x_0", "x")}


A, Q, R, T = 0.9, 0.5, 0.7, 6
LAW = LinearGaussian(*(np.array(x) for x in ([0.0], [[1.0]], [[A]], [0.0], [[Q**2]], [[1.0]], [[R**2]])))
Y = np.array([0.8, -0.3, 1.1, 1.9, 0.6, 1.4])
EXACT = rts_smoother(LAW, np.concatenate([[np.nan], Y])[:, None])


def model(y=None, T=None):
    slope = numpyro.param("slope", A)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(slope * x_prev, Q))
        numpyro.deterministic("level", 10 * x)
        numpyro.sample("y", dist.Normal(x, R), obs=y_t)
        return x, x

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y, length=T)


def guide(y):
    """The exact smoothing marginals."""
    distribution = dist.Normal(jnp.asarray(EXACT.means[:, 0]), jnp.asarray(EXACT.covariances[:, 0, 0]) ** 0.5)
    numpyro.sample("x_0", dist.Normal(distribution.loc[0], distribution.scale[0]))
    numpyro.sample("x", dist.Normal(distribution.loc[1:], distribution.scale[1:]))


PVMC_8 = PVMC(model, guide, num_particles=8)


@pytest.mark.parametrize("sample_shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ((), (5,))), (2, 3)])
def test_samples_have_the_sample_shape_and_deterministic_sites(sample_shape):
    samples = PVMC_8.posterior(jax.random.key(0), {"slope": A}, Y).sample(jax.random.key(1), sample_shape)
    at_once = PVMC_8.sample_posterior(jax.random.key(0), {"slope": A}, Y, sample_shape=sample_shape)
    for draws in (samples, at_once):
        shapes = {"x_0": sample_shape, "x": (*sample_shape, T), "level": (*sample_shape, T)}
        assert {site: x.shape for site, x in draws.items()} == shapes
        assert_allclose(draws["level"], 10 * draws["x"], rtol=1e-6)


def test_global_sites_are_one_draw_in_a_posterior_and_fresh_draws_in_its_samples():
    program, posterior = BY_NAME["global_sites"], smoothed("global_sites")
    assert set(posterior.globals) == {"slope", "scale"}
    assert_array_equal(posterior.sample(jax.random.key(0), (4,))["slope"], np.full(4, posterior.globals["slope"]))

    pvmc = PVMC(program.model, program.guide, num_particles=8)
    samples = pvmc.sample_posterior(jax.random.key(0), {}, *program.args, sample_shape=(2, 5))
    assert {site: x.shape for site, x in samples.items()} == dict.fromkeys(("slope", "scale", "x_0"), (2, 5)) | {"x": (2, 5, 4)}
    for site in samples:
        assert len(np.unique(samples[site])) == samples[site].size


def test_a_posterior_comes_out_of_jit():
    plain = PVMC_8.posterior(jax.random.key(0), {"slope": A}, Y)
    jitted = jax.jit(lambda key, slope, y: PVMC_8.posterior(key, {"slope": slope}, y))(jax.random.key(0), A, Y)
    assert jax.tree.structure(jitted) == jax.tree.structure(plain)
    for ours, theirs in zip(jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    samples = [posterior.sample(jax.random.key(1), (5,)) for posterior in (plain, jitted)]
    inside = jax.jit(lambda posterior: posterior.sample(jax.random.key(1), (5,)))(plain)
    for site in ("x_0", "x", "level"):
        assert_allclose(samples[1][site], samples[0][site], rtol=1e-6)
        assert_allclose(inside[site], samples[0][site], rtol=1e-6)


def assert_mean(samples, expected, *, at_most_standard_error):
    standard_error = samples.std(0) / np.sqrt(len(samples))
    assert (standard_error < at_most_standard_error).all(), f"too blunt to see anything: standard error {standard_error}"
    assert (abs(samples.mean(0) - expected) < 4 * standard_error).all()


def test_forecasts_continue_each_trajectory_from_its_last_state():
    """Draws from one posterior share its K particles, so the unit of the error bars is a posterior: 400 of 16 draws each."""
    posteriors, draws, horizon = 400, 16, 4
    pvmc = PVMC(model, guide, num_particles=128)
    one = lambda key: pvmc.sample_posterior(key, {"slope": A}, Y, sample_shape=(draws,))
    samples = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), posteriors))
    together = {site: x.reshape(-1, *x.shape[2:]) for site, x in samples.items()}
    predict = Predictive(model, together, params={"slope": A}, return_sites=["x", "y"])
    predicted = predict(jax.random.key(1), T=T + horizon)
    assert_array_equal(predicted["x"][:, :T], together["x"])

    # In units of standard deviations of the exact distribution.
    mean, variance = (moment.reshape(horizon) for moment in forecast(LAW, np.concatenate([[np.nan], Y])[:, None], horizon)[2:])
    z = (np.asarray(predicted["y"][:, T:], np.float64) - mean) / np.sqrt(variance)
    last_variance = EXACT.covariances[-1, 0, 0]
    last = (np.asarray(together["x"][:, -1:], np.float64) - EXACT.means[-1, 0]) / np.sqrt(last_variance)
    correlation = A ** np.arange(1, horizon + 1) * np.sqrt(last_variance / variance)
    by_posterior = lambda x: x.reshape(posteriors, draws, horizon).mean(1)
    assert_mean(by_posterior(z), 0.0, at_most_standard_error=0.02)
    assert_mean(by_posterior(z**2), 1.0, at_most_standard_error=0.02)
    assert_mean(by_posterior(z * last), correlation, at_most_standard_error=0.02)


def test_arviz(tmp_path):
    posterior = smoothed("matrix")
    dates = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], "datetime64[ns]")
    made = posterior.to_arviz(jax.random.key(0), num_samples=7, time=dates)
    made.to_netcdf(str(tmp_path / "posterior.nc"))
    for data in (made, arviz.from_netcdf(str(tmp_path / "posterior.nc"))):
        assert data["posterior"]["x"].dims == ("chain", "draw", "time", "series", "x_dim_0", "x_dim_1")
        assert data["posterior"]["x_0"].dims == ("chain", "draw", "series", "x_0_dim_0", "x_0_dim_1")
        assert data["posterior"].sizes["draw"] == 7
        assert data["observed_data"]["y"].dims == ("time", "series")
        smoothing = data["smoothing"]
        assert smoothing["log_normalizer"].dims == smoothing["x_0_effective_sample_size"].dims == ("series",)
        assert smoothing["x_effective_sample_size"].dims == ("time", "series")
        assert smoothing["x_mean"].dims == ("time", "series", "x_mean_dim_0", "x_mean_dim_1")
        for group in ("posterior", "observed_data", "smoothing"):
            assert_array_equal(data[group]["time"], dates)
            assert_array_equal(data[group]["series"], range(3))
        assert_array_equal(data["posterior"]["x"][0], posterior.sample(jax.random.key(0), (7,))["x"])
        assert_allclose(data["observed_data"]["y"], BY_NAME["matrix"].args[0], rtol=1e-6)
        assert_allclose(smoothing["x_sd"], np.sqrt(posterior.variance()["x"]), rtol=1e-5)
        assert_array_equal(smoothing["log_normalizer"], posterior.log_normalizer)


def test_arviz_counts_time_from_zero_and_checks_its_length():
    data = smoothed("autoregression_4").to_arviz(num_samples=3)
    assert data["posterior"]["x"].dims == ("chain", "draw", "time")
    assert_array_equal(data["posterior"]["time"], range(4))
    with pytest.raises(ValueError, match=r"`time` must have shape \(4,\), but it has shape \(3,\)"):
        smoothed("autoregression_4").to_arviz(time=range(3))


@pytest.mark.slow
def test_mutable_state_of_the_model_survives():
    """A batch normalisation of the inputs: it learns their moments while training, and keeps them afterwards."""

    def model(y, u, training=True):
        norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0), use_running_average=not training, momentum=0.5)
        inputs = nnx_module("norm", norm)(u)

        def step(x_prev, now):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev + now[1].sum(), 0.5))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=now[0])
            return x, x

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (y, inputs))

    u = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (30, 2))
    y = jnp.sin(jnp.arange(30.0))
    pvmc = PVMC(model, num_particles=8)
    params = pvmc.run(jax.random.key(1), 30, y, u, progress_bar=False).params
    learned = params["norm$state"]["state"]
    assert_allclose(learned["mean"], u.mean(0), rtol=1e-4)
    assert_allclose(learned["var"], u.var(0), rtol=1e-4)
    own, batch = (pvmc.posterior(jax.random.key(2), params, y, u, training) for training in (False, True))
    assert_allclose(own.log_normalizer, batch.log_normalizer, rtol=1e-4)
    assert_allclose(own.params["norm$state"]["state"]["mean"], learned["mean"])
    # The state is what counts when nothing is learned any more: other inputs are read in the old units.
    moved = pvmc.posterior(jax.random.key(2), params, y, u + 10.0, False)
    assert moved.log_normalizer < own.log_normalizer - 10
    samples = pvmc.sample_posterior(jax.random.key(3), params, y, u, False, sample_shape=(3,))
    assert samples["x"].shape == (3, 30)


def test_arviz_draws_global_sites_afresh():
    """The draws are those of `sample_posterior`; the summaries are given the one draw of the posterior."""
    program, posterior = BY_NAME["global_sites"], smoothed("global_sites")
    data = posterior.to_arviz(jax.random.key(5), num_samples=6)
    pvmc = PVMC(program.model, program.guide, num_particles=8, particles="iid")
    samples = pvmc.sample_posterior(jax.random.key(5), {}, *program.args, sample_shape=(6,))
    for site in ("slope", "scale", "x_0", "x"):
        assert_allclose(data["posterior"][site][0], samples[site], rtol=1e-5)
    assert (arviz.summary(data, ["slope", "scale"], kind="stats")["sd"] > 0).all()
    assert_array_equal(data["smoothing"]["x_mean"], posterior.mean()["x"])
    assert "given one draw of the global sites 'scale', 'slope'" in repr(posterior)


def test_a_posterior_is_shown_in_a_few_lines():
    shown = repr(smoothed("matrix"))
    assert shown.startswith("SmoothedPosterior of 'x_0', 'x': T = 3 steps, 3 series of plate 'series', K = 8 particles\n")
    least = min(float(size.min()) for size in smoothed("matrix").effective_sample_size().values())
    assert f"log evidence {float(smoothed('matrix').log_normalizer.sum()):.6g} in all" in shown
    assert f"least effective sample size {least:.3g}" in shown
    assert len(shown) < 300
    seen = []
    jax.eval_shape(lambda posterior: seen.append(repr(posterior)), smoothed("matrix"))
    assert seen[0].endswith("K = 8 particles")


def test_a_guide_that_cannot_be_hashed():
    class Own:
        __hash__ = None

        def __call__(self, y):
            guide(y)

    own, loss, traces = Own(), ImportanceSmoothedELBO(2), []
    again = jax.jit(lambda posterior: traces.append(1) or posterior.mean())
    for seed in range(2):
        again(PVMC(model, own, loss=loss).posterior(jax.random.key(seed), {"slope": A}, Y))
    assert len(traces) == 1  # what is of the same guide and loss is of one kind
