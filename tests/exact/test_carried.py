"""Linear-Gaussian programs with components that have no noise of their own, against dense algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from gaussian_programs import random_program
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.exact import exact_posterior, marginalize
from numpyro_pvmc.exact.evidence import log_evidence
from numpyro_pvmc.program.arguments import Arguments

KEY = jax.random.key(0)
QUICK = 6
SEEDS = [seed if seed < QUICK else pytest.param(seed, marks=pytest.mark.slow) for seed in range(100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs(x64, seed):
    program = random_program(seed)
    posterior = exact_posterior(program.model, {}, jnp.asarray(program.y))
    log_z, means, covariances = program.dense()
    assert_allclose(posterior.log_normalizer, log_z.reshape(program.series), rtol=1e-8, atol=1e-8)
    found, spread = posterior.mean(), posterior.covariances
    n = means.shape[-1]
    if program.way == "sites":
        mean = np.stack([found[f"x{i}"] for i in range(n)], -1)
        variance = np.stack([spread[f"x{i}"][..., 0, 0] for i in range(n)], -1)
    else:
        mean, variance = found["x"], np.diagonal(spread["x"], axis1=-2, axis2=-1)
    by_series = lambda x: np.moveaxis(np.asarray(x).reshape(len(program.g), -1, n), 1, 0)
    assert_allclose(by_series(mean), means, atol=1e-8)
    assert_allclose(by_series(variance), np.diagonal(covariances, axis1=-2, axis2=-1), atol=1e-8)


def test_evidence_by_time(x64):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    found = exact_posterior(windows, {}, y).log_evidence_by_time
    until = [exact_posterior(windows, {}, y[:t]).log_normalizer for t in range(1, 6)]
    assert_allclose(found[0], 0.0)
    assert_allclose(jnp.cumsum(found[1:], 0), until, rtol=1e-10)


@pytest.mark.parametrize(
    "seed", [5, pytest.param(2, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 16))]
)
def test_derivatives_of_the_evidence(x64, seed):
    program, y = random_program(seed), jnp.asarray(random_program(seed).y)
    arguments = lambda scale: Arguments((y,), {"scale": scale})
    structure = read_structure(program.model, arguments(jnp.ones(())), {}, carried=True)
    value = jax.jit(lambda scale: log_evidence(program.model, structure, arguments(scale), {}).sum())
    exact = lambda scale: program.dense(scale)[0].sum()
    h = 1e-4
    assert_allclose(jax.grad(value)(1.0), (exact(1 + h) - exact(1 - h)) / (2 * h), rtol=1e-6, atol=1e-6)
    second = (exact(1 + h) - 2 * exact(1.0) + exact(1 - h)) / h**2
    assert_allclose(jax.hessian(value)(1.0), second, rtol=1e-3, atol=1e-3)


def velocity(form):
    """Noise on the velocity only."""

    def model(y, mask=None):
        def step(carry, inputs):
            position, speed = carry
            y_t, mask_t = inputs
            position = position + speed
            if form == "delta":
                position = numpyro.sample("position", dist.Delta(position))
            speed = numpyro.sample("speed", dist.Normal(speed, 0.3))
            with handlers.mask(mask=mask_t):
                numpyro.sample("y", dist.Normal(position, 1.0), obs=y_t)
            return (position, speed), position

        scan(step, (0.0, numpyro.sample("speed_0", dist.Normal(1.0, 1.0))), (y, mask), length=len(y))

    return model


@pytest.mark.parametrize("form", ["carry", "delta"])
def test_single_precision_of_a_long_series(form):
    """Positions have no noise; in double precision the same program is the reference."""
    y = np.cumsum(1 + 0.3 * np.sin(np.arange(1000.0))) + np.random.default_rng(0).normal(size=1000)
    mask = np.random.default_rng(1).random(1000) < 0.8
    single = exact_posterior(velocity(form), {}, jnp.asarray(y, jnp.float32), jnp.asarray(mask))
    assert single.log_normalizer.dtype == jnp.float32
    with jax.enable_x64(True):
        double = exact_posterior(velocity(form), {}, jnp.asarray(y), jnp.asarray(mask))
        spread = np.sqrt(double.variance()["speed"])
        assert_allclose(single.log_normalizer, double.log_normalizer, atol=0.02)
        assert (np.abs(single.mean()["speed"] - double.mean()["speed"]) < 1e-3 * spread).all()
        assert_allclose(np.sqrt(single.variance()["speed"]), spread, rtol=1e-3)
        mean = np.asarray(double.mean()["speed"])
    draws = single.sample(KEY, (500,))
    assert all(jnp.isfinite(x).all() for x in draws.values())
    assert (abs(np.asarray(draws["speed"]).mean(0) - mean) < 5.5 * spread / np.sqrt(500)).all()


def test_draws_of_a_delta_site_follow_the_carry(x64):
    y = jnp.arange(8.0)
    draws = exact_posterior(velocity("delta"), {}, y, jnp.ones(8, bool)).sample(KEY, (50,))
    before = jnp.concatenate([draws["speed_0"][:, None], draws["speed"][:, :-1]], 1)
    assert_allclose(draws["position"], jnp.cumsum(before, 1), atol=1e-8)


def held(y, present):
    """A local trend, of series that end: where they have, the trend is held."""

    def step(carry, inputs):
        level, slope = carry
        y_t, present_t = inputs
        with numpyro.plate("series", y.shape[1]), handlers.mask(mask=present_t):
            new = numpyro.sample("slope", dist.Normal(slope, 0.2))
            numpyro.sample("y", dist.Normal(level + slope, 0.5), obs=y_t)
        return (jnp.where(present_t, level + slope, level), jnp.where(present_t, new, slope)), None

    with numpyro.plate("series", y.shape[1]):
        first = numpyro.sample("slope_0", dist.Normal(jnp.zeros(y.shape[1]), 1.0))
    scan(step, (jnp.zeros(y.shape[1]), first), (y, present))


def test_padded_series_are_the_shorter_ones(x64):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    lengths = [6, 4, 1]
    present = jnp.arange(6)[:, None] < jnp.asarray(lengths)
    together = exact_posterior(held, {}, y, present)
    for n, length in enumerate(lengths):
        alone = exact_posterior(held, {}, y[:length, n : n + 1], present[:length, n : n + 1])
        assert_allclose(together.log_normalizer[n], alone.log_normalizer[0], rtol=1e-10)
        assert_allclose(together.mean()["slope"][:length, n], alone.mean()["slope"][:, 0], atol=1e-10)


def windows(y, square=False, mixing=False):
    """Three lags in a carry, of two series."""

    def step(lags, inputs):
        y_t, t = inputs
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(0.5 * lags[:, 0] - 0.2 * lags[:, 2], 1.0))
            lags = jnp.concatenate([x[:, None], lags[:, :-1]], 1)
            lags = lags[::-1] if mixing else lags**2 if square else lags
            numpyro.sample("y", dist.Normal(lags[:, 1], 1.0), obs=y_t)
        return lags, None

    with numpyro.plate("series", 2):
        first = numpyro.sample("x_0", dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1))
    scan(step, first, (y, jnp.arange(len(y))))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"square": True}, "The carry of the scan is not affine in the carry before"),
        ({"mixing": True}, "plates? .*'series'.* read each other|'series' read each other"),
    ],
)
def test_what_is_refused(choice, message):
    y = jnp.zeros((5, 2))
    exact_posterior(windows, {}, y)
    with pytest.raises(ValueError, match=message):
        exact_posterior(lambda y: windows(y, **choice), {}, y)


def test_pvmc_names_the_engine_that_can():
    with pytest.raises(ValueError, match=r"window of lags.*`numpyro_pvmc.exact.exact_posterior` and `marginalize`"):
        PVMC(windows, num_particles=4).init(KEY, jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"`Delta` distribution.*`numpyro_pvmc.exact.exact_posterior` and `marginalize`"):
        PVMC(velocity("delta"), num_particles=4).init(KEY, jnp.zeros(5), jnp.ones(5, bool))


def test_marginalized_programs_have_the_same_evidence(x64):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    with handlers.trace() as sites:
        marginalize(windows)(y)
    assert_allclose(sites["x_log_evidence"]["fn"].log_factor, exact_posterior(windows, {}, y).log_normalizer, rtol=1e-12)
