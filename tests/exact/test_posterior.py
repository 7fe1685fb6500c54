"""The exact posterior of linear-Gaussian programs, against NumPy; and what is refused.

One oracle integrates the hand-written densities of a test program, which are quadratic. The others are Kalman's recursions, and
the joint distribution of all states and observations in one solve.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive

import linear_gaussian
import models_blind
from conftest import DOUBLE, SINGLE, in_both_precisions
from models import BY_NAME
from numpyro_pvmc.exact import exact_posterior
from oracles import LinearGaussian, dense_smoother, forecast, gaussian_integral, kalman_filter, rts_smoother
from programs import observations

REFUSED = {
    "deterministic_start": r"Site 'x' has a Normal distribution whose mean is not affine in the latent sites of the step "
    "before",
    "two_sites": r"Site 'z' has a Normal distribution whose mean is not affine in the chain's latent sites",
    "global_sites": r"global sites \['slope', 'scale'\].*Give these in `params`, or with `numpyro.handlers.condition`",
    "matrix": r"Site 'y' has a Normal distribution whose mean is not affine in the chain's latent sites",
    "positive": r"Site 'x' has a Gamma distribution.*Use `PVMC.posterior`",
    "after_the_scan": r"Site 'y' has a Normal distribution whose mean is not affine",
    "after_the_scan_as_event": r"Site 'y' has a Normal distribution whose mean is not affine",
    "factor": r"Site 'smoothness' has a Unit distribution",
}
GLOBALS = {"slope": 0.6, "scale": 0.7}
VARIANTS = ("parameters", "no_inputs", "series", "padded", "autoregression_1", "after_the_scan_with_first", "conditioned")
SINGLES = ("two_coupled_sites", "vector", "held", "pair_emission", "after_the_scan_in_plates")
slow = pytest.mark.slow
QUICK = ("two_coupled_sites", "missing", "autoregression_4")
CASES = [
    *((DOUBLE, name) for name in QUICK),
    *(pytest.param(DOUBLE, n, marks=slow) for n in BY_NAME if n not in (*REFUSED, *VARIANTS, *QUICK) or n == "global_sites"),
    *(pytest.param(DOUBLE, name, marks=slow) for name in VARIANTS),
    *(pytest.param(SINGLE, name, marks=slow) for name in SINGLES),
]


def posterior_of(program, params):
    return exact_posterior(program.model, params, *program.args, **program.kwargs)


def integrate(program, n, globals_):
    """Log evidence, means and covariance of all latents of series `n`; and where each site has its numbers."""
    times = [t for t in range(program.length) if program.present is None or program.present[t][n]]
    size, places = int(np.prod(program.event)), {}
    first = [site.removesuffix("_0") for site in program.initial_sites]
    for point in (*((None, name) for name in first), *((t, name) for t in times for name in program.sites)):
        places[point] = slice(len(places) * size, (len(places) + 1) * size)

    def log_density(x):
        value = lambda t, name: x[places[t, name]].reshape(program.event)[()]
        prev = {name: value(None, name) for name in first} | globals_
        total = program.start(n, prev) if program.start else 0.0
        for t in times:
            now = {name: value(t, name) for name in program.sites} | globals_
            total += program.step(t, n, prev if first or t != times[0] else {}, now)
            prev = now
        return total

    return *gaussian_integral(log_density, size * len(places)), places


@pytest.mark.parametrize(("tolerance", "name"), CASES)
def test_programs_against_the_integral_of_their_densities(tolerance, name):
    program = BY_NAME[name]
    globals_ = GLOBALS if name == "global_sites" else {}
    posterior = posterior_of(program, globals_)
    means, variances = posterior.mean(), posterior.variance()
    assert means.keys() == variances.keys() == {*program.sites, *program.initial_sites}
    for n in np.ndindex(*program.plates):
        log_evidence, mean, covariance, places = integrate(program, n, globals_)
        assert_allclose(posterior.log_normalizer[n], log_evidence, atol=100 * tolerance)
        for (t, site), place in places.items():
            key, index = (f"{site}_0", n) if t is None else (site, (t, *n))
            assert_allclose(np.ravel(means[key][index]), mean[place], atol=tolerance)
            assert_allclose(np.ravel(variances[key][index]), np.diag(covariance)[place], atol=tolerance)
            shared = covariance[place, place]
            assert_allclose(posterior.covariances[key][index], shared, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_are_refused(name, x64):
    with pytest.raises(ValueError, match=REFUSED[name]):
        posterior_of(BY_NAME[name], {})


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (models_blind.poisson_counts, (60,), "Site 'y' has a Poisson distribution"),
        (models_blind.two_sites, (60,), "Site 'y' has a StudentT distribution"),
        pytest.param(
            models_blind.tracking, (60, 2), "Site 'bearing' has a Normal distribution whose mean is not affine", marks=slow
        ),
        pytest.param(models_blind.epidemic, (60,), "Site 'state' has a Dirichlet distribution", marks=slow),
        pytest.param(models_blind.constrained, (60, 2), "Site 'rate' has a Gamma distribution", marks=slow),
    ],
)
def test_larger_programs_are_refused(model, shape, message, x64):
    with pytest.raises(ValueError, match=message):
        exact_posterior(model, {}, jnp.ones(shape))


@pytest.mark.slow
def test_a_panel_with_two_sites_a_step(x64):
    """Thirty series with a level and a slope, against Kalman's recursions."""
    y = observations(60, 30)
    posterior = exact_posterior(models_blind.panel, {}, y)
    A, Q = np.array([[0.9, 0.0], [0.9, 0.98]]), np.array([[0.01, 0.01], [0.01, 0.1]])
    distribution = LinearGaussian(
        np.zeros(2), np.diag([0.04, 1.0]), A, np.zeros(2), Q, np.array([[0.0, 1.0]]), 0.25 * np.eye(1)
    )
    for n in (0, 29):
        expected = rts_smoother(distribution, unseen_start(y[:, n, None]))
        assert_allclose(posterior.log_normalizer[n], expected.log_evidence, rtol=1e-10)
        assert_allclose(posterior.mean()["slope"][:, n], expected.means[1:, 0], atol=1e-9)
        assert_allclose(posterior.mean()["level"][:, n], expected.means[1:, 1], atol=1e-9)


def test_a_level_in_the_thousands(tolerance):
    y = 1000.0 + 150.0 * observations(60)
    distribution = scalar_distribution(a=1.0, q=1600.0, r=14400.0, m_0=1000.0, p_0=250000.0)
    posterior = exact_posterior(models_blind.local_level, {}, y)
    assert_equals(posterior, rts_smoother(distribution, unseen_start(y[:, None])), tolerance, start="level_0", site="level")


@pytest.mark.slow
def test_padded_steps_hold_the_state(x64):
    program = BY_NAME["held"]
    posterior = posterior_of(program, {})
    assert_array_equal(posterior.present, program.present)
    for values in (posterior.mean(), posterior.sample(jax.random.key(0))):
        held = [values["x_0"], *values["x"]]
        for t, n in zip(*np.nonzero(~program.present), strict=True):
            assert_allclose(held[t + 1][n], held[t][n], rtol=1e-9)


def log_normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


@pytest.mark.slow
def test_what_is_held_is_the_carry_of_the_last_step(x64):
    """The carry is another function of the site at every step, and at the start; it is held over a gap."""
    u, y, present = observations(5, seed=1), observations(5, seed=2), np.array([True, True, False, False, True])

    def model(u, y, present):
        def step(carry, inputs):
            u_t, y_t, present_t = inputs
            with handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.4 * carry, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return jnp.where(present_t, 2.0 * u_t * x + u_t, carry), None

        scan(step, -3.0 * numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (u, y, present))

    def log_density(x):
        total, carry, numbers = log_normal(x[0], 0.0, 1.0), -3.0 * x[0], iter(x[1:])
        for t in np.flatnonzero(present):
            x_t = next(numbers)
            total += log_normal(x_t, 0.4 * carry, 0.5) + log_normal(y[t], x_t, 0.7)
            carry = 2.0 * u[t] * x_t + u[t]
        return total

    log_evidence, mean, covariance = gaussian_integral(log_density, 4)
    posterior = exact_posterior(model, {}, u, y, present)
    assert_allclose(posterior.log_normalizer, log_evidence, rtol=1e-10)
    assert_allclose(posterior.mean()["x"][present], mean[1:], atol=1e-10)
    assert_allclose(posterior.variance()["x"][present], np.diag(covariance)[1:], rtol=1e-10)


# --- Kalman's recursions


def assert_equals(posterior, expected, tolerance, start="x_0", site="x", series=()):
    """Moments of one series; a row of `expected` more than steps is that of the start."""
    assert_allclose(posterior.log_normalizer[series], expected.log_evidence, rtol=tolerance)
    scale = np.abs(expected.means).max()
    flat = lambda x: np.asarray(x).reshape(expected.means.shape[1:])
    for t, (mean, covariance) in enumerate(zip(expected.means[1:], expected.covariances[1:], strict=True)):
        assert_allclose(flat(posterior.mean()[site][(t, *series)]), mean, atol=tolerance * scale)
        assert_allclose(flat(posterior.variance()[site][(t, *series)]), np.diag(covariance), rtol=10 * tolerance)
    if start in posterior.mean():
        assert_allclose(flat(posterior.mean()[start][series]), expected.means[0], atol=tolerance * scale)


def unseen_start(y):
    return np.concatenate([np.full_like(y[:1], np.nan), y])


def scalar_distribution(a=0.9, b=0.0, q=0.25, r=0.49, m_0=0.0, p_0=1.0):
    one = np.eye(1)
    return LinearGaussian(np.full(1, m_0), p_0 * one, a * one, np.full(1, b), q * one, one, r * one)


def autoregression(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, x

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


@pytest.mark.parametrize("length", [1, 30])
def test_autoregression(length, tolerance):
    y = observations(length)
    posterior = exact_posterior(autoregression, {}, y)
    expected = rts_smoother(scalar_distribution(), unseen_start(y[:, None]))
    assert posterior.kind == "linear-Gaussian"
    assert_equals(posterior, expected, tolerance)
    filtered = kalman_filter(scalar_distribution(), unseen_start(y[:, None]))
    assert_allclose(posterior.filtering_mean()["x"], filtered.means[1:, 0], atol=10 * tolerance)
    assert_allclose(posterior.filtering_variance()["x"], filtered.covariances[1:, 0, 0], rtol=10 * tolerance)


@pytest.mark.slow
@in_both_precisions
def test_panel_of_vectors_whose_start_is_observed(tolerance):
    x, y = linear_gaussian.simulate(linear_gaussian.distribution(), 12, 3)
    posterior = exact_posterior(linear_gaussian.model, {"decay": 0.3}, y)
    assert posterior.mean()["x"].shape == (12, 3, 5)
    for n in range(3):
        assert_equals(posterior, dense_smoother(linear_gaussian.distribution(0.3), y[:, n]), tolerance, series=(n,))


@pytest.mark.slow
@in_both_precisions
def test_sites_of_one_step_that_read_each_other(tolerance):
    """A local linear trend: the level reads the slope of its own step. Of an observation one element may be missing."""
    y = observations(20, 2, seed=3)
    y[4:7, 0], y[6, 1] = np.nan, np.nan
    loading = np.array([[1.0, 0.0], [0.4, 2.0]])

    def model(y):
        def step(carry, y_t):
            slope = numpyro.sample("slope", dist.Normal(0.9 * carry[1], 0.1))
            level = numpyro.sample("level", dist.Normal(carry[0] + slope, 0.3))
            mean = jnp.asarray(loading) @ jnp.stack([slope, level])
            with numpyro.plate("sensors", 2), handlers.mask(mask=~jnp.isnan(y_t)):
                numpyro.sample("y", dist.Normal(mean, jnp.array([0.5, 0.8])), obs=y_t)
            return (level, slope), None

        level = numpyro.sample("level_0", dist.Normal(1.0, 1.0))
        scan(step, (level, numpyro.sample("slope_0", dist.Normal(0.0, 0.2))), y)

    posterior = exact_posterior(model, {}, y)
    # The state (slope, level); a sensor that is missing is an observation without precision, and its constant is taken out.
    A, Q = np.array([[0.9, 0.0], [0.9, 1.0]]), np.array([[0.01, 0.01], [0.01, 0.1]])
    lost, log_constant = np.isnan(y), np.isnan(y).sum() * (np.log(1e6) + 0.5 * np.log(2 * np.pi))
    R = [np.diag(np.where(lost_t, 1e12, [0.25, 0.64])) for lost_t in lost]
    start = np.array([0.0, 1.0]), np.diag([0.04, 1.0])
    moments = time_varying(*start, A, Q, loading, R, np.where(lost, 0.0, y))
    assert_allclose(posterior.log_normalizer, moments[0] + log_constant, rtol=max(tolerance, 1e-8))
    for number, site in enumerate(("slope", "level")):
        assert_allclose(posterior.filtering_mean()[site], moments[1][:, number], atol=max(tolerance, 1e-8) * 10)
    assert_allclose(posterior.mean()["level"][-1], moments[1][-1, 1], atol=max(tolerance, 1e-8) * 10)


def time_varying(m, P, A, Q, C, R, y):
    """Kalman's filter with a covariance of the observation for each time; the start is not observed."""
    log_evidence, means = 0.0, []
    for R_t, y_t in zip(R, y, strict=True):
        m, P = A @ m, A @ P @ A.T + Q
        one = LinearGaussian(m, P, A, 0 * m, Q, C, R_t)
        log_step, (m,), (P,) = kalman_filter(one, y_t[None])
        log_evidence, means = log_evidence + log_step, [*means, m]
    return log_evidence, np.array(means)


@pytest.mark.slow
@in_both_precisions
def test_time_varying_inputs_and_clocks(tolerance):
    """All that may change with time does: slopes, shifts and noise of both distributions, by inputs and by a clock."""
    u, y = observations(6, seed=5), observations(6, seed=6)

    def model(u, y):
        def step(carry, inputs):
            x_prev, t = carry
            u_t, y_t = inputs
            x = numpyro.sample("x", dist.Normal((0.5 + 0.1 * t) * x_prev + u_t, 0.4 + 0.1 * t))
            numpyro.sample("y", dist.Normal(u_t * x - t, jnp.exp(0.2 * u_t)), obs=y_t)
            return (x, t + 1), None

        scan(step, (numpyro.sample("x_0", dist.Normal(0.3, 1.2)), 0), (u, y))

    def log_density(x):
        total = log_normal(x[0], 0.3, 1.2)
        for t in range(6):
            total += log_normal(x[t + 1], (0.5 + 0.1 * t) * x[t] + u[t], 0.4 + 0.1 * t)
            total += log_normal(y[t], u[t] * x[t + 1] - t, np.exp(0.2 * u[t]))
        return total

    log_evidence, mean, covariance = gaussian_integral(log_density, 7)
    posterior = exact_posterior(model, {}, u, y)
    assert_allclose(posterior.log_normalizer, log_evidence, rtol=tolerance)
    assert_allclose(posterior.mean()["x"], mean[1:], atol=10 * tolerance)
    assert_allclose(posterior.variance()["x"], np.diag(covariance)[1:], rtol=10 * tolerance)


@in_both_precisions
def test_deterministic_start(tolerance):
    """The start is a number, and the step has more numbers than the start has."""
    y = observations(8, 2)
    A, start = np.array([[0.8, 0.3], [-0.2, 0.7]]), np.array([1.0, -2.0])

    def model(y):
        def step(x_prev, y_t):
            noise = jnp.array([[0.6, 0.0], [0.0, 0.0]])[:, :1]
            distribution = dist.LowRankMultivariateNormal(jnp.asarray(A) @ x_prev, noise, jnp.array([0.1, 0.3]))
            x = numpyro.sample("x", distribution)
            numpyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.asarray(start), y)

    distribution = LinearGaussian(start, 1e-14 * np.eye(2), A, np.zeros(2), np.diag([0.46, 0.3]), np.eye(2), 0.49 * np.eye(2))
    assert_equals(exact_posterior(model, {}, y), dense_smoother(distribution, unseen_start(y)), tolerance)


@in_both_precisions
def test_ragged_panel_with_holes_observed_after_the_scan(tolerance):
    y = observations(7, 4, seed=8)
    last = np.array([6, 3, 5, 1])
    y[2, 0] = np.nan
    present = np.arange(7)[:, None] <= last
    y = np.where(present, y, np.nan)

    def model(y, present):
        series = numpyro.plate("series", 4)

        def step(x_prev, present_t):
            with series, handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.2 + 0.9 * x_prev, 0.5))
            return jnp.where(present_t, x, x_prev), 2.0 * x

        with series:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        _, twice = scan(step, x_0, present)
        with series, numpyro.plate("time", 7, dim=-2), handlers.mask(mask=~jnp.isnan(y)):
            numpyro.sample("y", dist.Normal(twice, 1.4), obs=y)

    posterior = exact_posterior(model, {}, y, present)
    assert posterior.log_normalizer.shape == (4,)
    for n in range(4):
        expected = rts_smoother(scalar_distribution(b=0.2), unseen_start(y[: last[n] + 1, n, None] / 2))
        log_evidence = expected.log_evidence - np.log(2.0) * np.isfinite(y[:, n]).sum()
        assert_allclose(posterior.log_normalizer[n], log_evidence, rtol=tolerance)
        assert_allclose(posterior.mean()["x"][: last[n] + 1, n], expected.means[1:, 0], atol=10 * tolerance)
        assert_allclose(posterior.mean()["x"][last[n] :, n], expected.means[-1, 0], atol=10 * tolerance)


@pytest.mark.slow
@in_both_precisions
def test_emissions_with_time_in_the_event(tolerance):
    y = observations(5)

    def model(y):
        def step(x_prev, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
            return x, x

        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        _, x = scan(step, x_0, None, length=4)
        numpyro.sample("y", dist.Normal(jnp.concatenate([x_0[None], x]), 0.7).to_event(1), obs=y)

    assert_equals(exact_posterior(model, {}, y), dense_smoother(scalar_distribution(), y[:, None]), tolerance)


@pytest.mark.slow
@in_both_precisions
def test_two_plates_and_series_that_differ(tolerance):
    y, slopes = observations(5, 2, 3), np.linspace(-0.5, 0.9, 6).reshape(2, 3)

    def model(y):
        rows, columns = numpyro.plate("rows", 2, dim=-2), numpyro.plate("columns", 3, dim=-1)

        def step(x_prev, y_t):
            with rows, columns:
                x = numpyro.sample("x", dist.Normal(jnp.asarray(slopes) * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        with rows, columns:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    posterior = exact_posterior(model, {}, y)
    for n in np.ndindex(2, 3):
        expected = rts_smoother(scalar_distribution(a=slopes[n]), unseen_start(y[(slice(None), *n)][:, None]))
        assert_equals(posterior, expected, tolerance, series=n)


def test_a_wide_prior_in_single_precision():
    """Where the data are a thousand times as precise as the prior, and far from zero."""
    y = 3000.0 + np.cumsum(observations(100, seed=1))

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1e3)), y)

    posterior = exact_posterior(model, {}, y)
    expected = rts_smoother(scalar_distribution(a=1.0, q=1.0, p_0=1e6), unseen_start(y[:, None]))
    assert_allclose(posterior.log_normalizer, expected.log_evidence, atol=5e-3)
    assert_allclose(posterior.mean()["x"], expected.means[1:, 0], atol=5e-3)


def test_without_observations_it_is_the_forecast(x64):
    def model(length, y=None):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.3, 1.0)), y, length=length)

    posterior = exact_posterior(model, {}, 5)
    x_mean, x_covariance, _, y_covariance = forecast(scalar_distribution(m_0=0.3), np.full((1, 1), np.nan), 5)
    assert_allclose(posterior.log_normalizer, 0.0, atol=1e-12)
    assert_allclose(posterior.mean()["x"], x_mean[:, 0])
    assert_allclose(posterior.variance()["x"], x_covariance[:, 0, 0])
    draws = posterior.sample(jax.random.key(0), (20_000,))["y"]
    assert_allclose(draws.var(0), y_covariance[:, 0, 0], rtol=0.06)  # six standard errors


# --- what can be done with it


def test_it_is_compiled_mapped_and_differentiated(x64):
    ys = observations(3, 6)
    ys[1, 2] = np.nan

    def model(y):
        slope, scale = numpyro.param("slope", 0.5), numpyro.param("scale", 0.3)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev, scale))
            with handlers.mask(mask=~jnp.isnan(y_t)):
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    def log_evidence(params, y):
        return exact_posterior(model, params, y).log_normalizer

    params = {"slope": jnp.array(0.8), "scale": jnp.array(0.5)}
    mapped = jax.jit(jax.vmap(log_evidence, (None, 0)))(params, jnp.asarray(ys))
    distributions = lambda slope, scale: scalar_distribution(a=slope, q=scale**2, p_0=0.0)
    expected = [kalman_filter(distributions(0.8, 0.5), unseen_start(y[:, None])).log_evidence for y in ys]
    assert_allclose(mapped, expected, rtol=1e-9)
    gradient = jax.grad(log_evidence)(params, jnp.asarray(ys[1]))
    by_hand = lambda *distribution: kalman_filter(distributions(*distribution), unseen_start(ys[1][:, None])).log_evidence
    step = 1e-5
    assert_allclose(gradient["slope"], (by_hand(0.8 + step, 0.5) - by_hand(0.8 - step, 0.5)) / (2 * step), rtol=1e-6)
    assert_allclose(gradient["scale"], (by_hand(0.8, 0.5 + step) - by_hand(0.8, 0.5 - step)) / (2 * step), rtol=1e-6)
    y = jnp.asarray(ys[0])
    posterior = jax.jit(lambda y: exact_posterior(model, params, y))(y)
    of_its_own_data = jax.jit(lambda: exact_posterior(model, params, y))()
    assert_allclose(of_its_own_data.log_normalizer, posterior.log_normalizer, rtol=1e-12)
    assert posterior.mean()["x"].shape == (6,)
    assert posterior.kind == "linear-Gaussian"


@pytest.mark.slow
def test_samples_are_joint_draws_that_predictive_takes(x64):
    y = observations(4)

    def model(y=None, length=4):
        level = numpyro.param("level", 0.5)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
            numpyro.deterministic("shifted", x + level)
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y, length=length)

    posterior = exact_posterior(model, {"level": 2.0}, y)
    samples = posterior.sample(jax.random.key(0), (100, 200))
    assert samples["x"].shape == samples["shifted"].shape == (100, 200, 4)
    assert_allclose(samples["shifted"], samples["x"] + 2.0)
    states = np.concatenate([samples["x_0"][..., None], samples["x"]], -1).reshape(-1, 5)
    _, mean, covariance, _ = integrate(BY_NAME["autoregression_4"], (), {})
    error = np.sqrt(np.diag(covariance) / len(states))
    assert error.max() < 0.005, "too blunt to see anything"
    assert (np.abs(states.mean(0) - mean) < 4 * error).all()
    assert_allclose(np.cov(states.T), covariance, atol=0.02)
    first = {name: x[0] for name, x in samples.items()}
    ahead = Predictive(model, first, params={"level": 2.0})(jax.random.key(1), length=6)
    assert ahead["y"].shape == (200, 6)
    assert posterior.sample(jax.random.key(0))["x"].shape == (4,)


def test_quantiles_are_those_of_normals(x64):
    y = np.random.default_rng(2).normal(size=(5, 3))
    posterior = exact_posterior(panel, {}, y)
    levels = np.array([[0.1, 0.5], [0.9, 0.99]])
    found = posterior.quantile(levels)
    for name, mean in posterior.mean().items():
        sd = np.sqrt(posterior.variance()[name])
        expected = scipy.stats.norm.ppf(levels).reshape(2, 2, *(1,) * mean.ndim) * sd + mean
        assert_allclose(found[name], expected, rtol=1e-9)
        assert_allclose(posterior.quantile(0.5)[name], mean)
    with pytest.raises(ValueError, match="`q` must be between 0 and 1"):
        posterior.quantile([0.5, 1.2])


def test_arviz(x64):
    y = np.random.default_rng(2).normal(size=(5, 3))
    posterior = exact_posterior(panel, {}, y)
    data = posterior.to_arviz(num_samples=400)
    assert data["posterior"]["x"].dims == ("chain", "draw", "time", "series")
    assert data["observed_data"]["y"].dims == ("time", "series")
    assert_allclose(data["smoothing"]["x_mean"], posterior.mean()["x"])
    assert_allclose(data["smoothing"]["log_normalizer"], posterior.log_normalizer)
    error = np.sqrt(posterior.variance()["x"] / 400)
    assert (np.abs(data["posterior"]["x"].mean(("chain", "draw")) - posterior.mean()["x"]) < 5 * error).all()


def panel(y):
    with numpyro.plate("series", 3):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x_prev, y_t):
        with numpyro.plate("series", 3):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.4))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x_0, y)


@pytest.mark.slow
def test_samples_have_the_shapes_of_the_model(x64):
    program = BY_NAME["held"]
    samples = posterior_of(program, {}).sample(jax.random.key(0), (2,))
    assert samples["x"].shape == (2, 4, 3)
    assert samples["x_0"].shape == (2, 3)


# --- refusals


def chain(distribution=None, emission=None, carry=lambda x, x_prev: x, body=lambda x: None):
    """A random walk with one thing changed."""

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", distribution(x_prev) if distribution else dist.Normal(x_prev, 1.0))
            body(x)
            numpyro.sample("y", emission(x) if emission else dist.Normal(x, 1.0), obs=y_t)
            return carry(x, x_prev), None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    return model


LAG = "Site 'x' has a Normal distribution whose mean is not affine in the latent sites of the step before"
NOW = "Site 'y' has a Normal distribution whose mean is not affine in the chain's latent sites"


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(emission=dist.Poisson), "Site 'y' has a Poisson distribution"),
        (chain(distribution=lambda x: dist.StudentT(4.0, x)), "Site 'x' has a StudentT distribution"),
        (chain(emission=lambda x: dist.Normal(0.0, jnp.exp(x))), "Site 'y' has a Normal distribution whose covariance reads"),
        (chain(distribution=lambda x: dist.Normal(x, 1.0 + x**2)), "Site 'x' has a Normal distribution whose covariance reads"),
        (chain(distribution=lambda x: dist.Normal(jnp.sin(x), 1.0)), LAG),
        (chain(carry=lambda x, _: x**3), LAG),
        (chain(emission=lambda x: dist.Normal(jnp.where(x > 1e6, 2 * x, x), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(x + 1e-12 * x**2, 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(jnp.floor(x), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(jnp.sign(x), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(jax.lax.stop_gradient(x), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(x + 1.0 * (x > 1e6), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(jnp.fmod(x, 86400.0), 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(x + jnp.argsort(jnp.stack([x, jnp.array(1e6)]))[0], 1.0)), NOW),
        (chain(emission=lambda x: dist.Normal(x, 1.0).mask(x > 0)), "Site 'y' has a mask that reads"),
        (chain(body=lambda x: numpyro.sample("r", dist.Normal(0.0, 1.0), obs=1 - x)), "Site 'r' is observed at a value"),
        (chain(body=lambda x: numpyro.factor("f", -(x**2))), "Site 'f' has a Unit distribution"),
        (chain(body=lambda x: numpyro.sample("r", dist.Normal(numpyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=0.3)),
         "Site 'z' has a BernoulliProbs distribution"),
        (chain(emission=lambda x: dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(x * jnp.ones(2), 1.0))),
         "Site 'y' has a MixtureSameFamily distribution"),
        (handlers.scale(chain(), scale=2.0), "Site 'x' is scaled"),
    ],
)  # fmt: skip
def test_what_is_not_linear_gaussian_is_refused_by_name(model, message, traced, x64):
    evidence = lambda y: exact_posterior(model, {}, y).log_normalizer
    with pytest.raises(ValueError, match=message):
        (jax.jit(evidence) if traced else evidence)(jnp.ones(3))


def test_refusal_while_traced(x64):
    model = chain(emission=lambda x: dist.Normal(jnp.sign(x), 1.0))
    with pytest.raises(ValueError, match=NOW):
        jax.jit(lambda y: exact_posterior(model, {}, y).log_normalizer)(jnp.ones(3))


def test_refusal_of_scaled_sites(x64):
    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            with handlers.scale(scale=2.0):
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"Site 'y' is scaled, by `numpyro.handlers.scale`"):
        exact_posterior(model, {}, jnp.ones(3))


@pytest.mark.slow
def test_refusal_of_latent_sites_masked_in_part(x64):
    def model(y, mask):
        def step(x_prev, inputs):
            y_t, mask_t = inputs
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0).mask(mask_t).to_event(1))
            numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), (y, mask))

    mask = jnp.ones((3, 2), bool)
    assert np.isfinite(exact_posterior(model, {}, jnp.ones(3), mask).log_normalizer)
    mask = mask.at[1, 0].set(False)
    with pytest.raises(ValueError, match=r"Latent site 'x' is masked while other elements"):
        exact_posterior(model, {}, jnp.ones(3), mask)
    assert np.isnan(jax.jit(lambda mask: exact_posterior(model, {}, jnp.ones(3), mask).log_normalizer)(mask))


def test_nan_under_no_mask(x64):
    y = jnp.array([1.0, jnp.nan, 2.0])
    with pytest.raises(ValueError, match=r"data of site 'y' contain NaN, first at time 1"):
        exact_posterior(autoregression, {}, y)
    assert np.isnan(jax.jit(lambda y: exact_posterior(autoregression, {}, y).log_normalizer)(y))


def test_global_sites_given_by_condition(x64):
    program = BY_NAME["global_sites"]
    conditioned = handlers.condition(program.model, GLOBALS)
    posterior = exact_posterior(conditioned, {}, *program.args)
    given = posterior_of(program, GLOBALS)
    assert_allclose(posterior.log_normalizer, given.log_normalizer, rtol=1e-12)
    assert given.globals == GLOBALS
    assert given.sample(jax.random.key(0), (3,))["slope"].shape == (3,)


def test_draws_of_a_finite_chain_have_its_global_sites():
    """Without them `Predictive` would draw them anew."""

    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))

        def step(z_prev, y_t):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.7, 0.3], [0.2, 0.8]])[z_prev]))
            numpyro.sample("y", dist.Normal(level + z, 1.0), obs=y_t)
            return z, None

        scan(step, 0, y)

    posterior = exact_posterior(model, {"level": 0.3}, jnp.zeros(4))
    assert posterior.globals == {"level": 0.3}
    samples = posterior.sample(jax.random.key(0), (3,))
    assert_allclose(samples["level"], 0.3)
    assert samples["z"].shape == (3, 4)
