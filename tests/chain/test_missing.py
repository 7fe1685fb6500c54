"""What is observed in part: series of many lengths, holes, imputation, states that are known at some times."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats

from conftest import few_particles, initial_params
from numpyro_pvmc import PVMC
from numpyro_pvmc.chain.chain import presence, read_chain
from numpyro_pvmc.chain.densities import Particles
from numpyro_pvmc.chain.potentials import weigh
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.checks import check_guide, proposal_log_densities
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.program.arguments import Arguments
from oracles import log_gaussian

pytestmark = few_particles

SLOPE, NOISE, SPREAD = 0.8, 0.4, 0.6


def masked(y, present, seen):
    series = numpyro.plate("series", y.shape[1])
    slope = numpyro.param("slope", SLOPE)

    def step(x_prev, now):
        y_t, present_t, seen_t = now
        with series, handlers.mask(mask=present_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev, NOISE))
            with handlers.mask(mask=seen_t):
                numpyro.sample("y", dist.Normal(x, SPREAD), obs=y_t)
        return jnp.where(present_t, x, x_prev), x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, (y, present, seen))


def places(y, present, seen):
    """A guide whose particles do not depend on how many series there are, nor on padding."""
    loc = numpyro.param("loc", jnp.asarray(0.3))
    known = jnp.where(present & seen, y, 0.0)
    with numpyro.plate("series", y.shape[1]):
        numpyro.sample("x_0", dist.Normal(0.1, 1.0))
        numpyro.sample("x", dist.Normal(loc * known, 0.8))


def ragged(number, most, least=5, holes=0.2):
    rng = np.random.default_rng(0)
    lengths = rng.integers(least, most + 1, number)
    y = rng.normal(size=(most, number)).cumsum(0) * 0.3
    present = np.arange(most)[:, None] < lengths
    seen = present & (rng.random((most, number)) > holes)
    return lengths, np.where(seen, y, np.nan), present, seen


@pytest.mark.parametrize(("number", "most"), [(8, 20), pytest.param(200, 120, marks=pytest.mark.slow)])
def test_a_ragged_panel_is_its_series_one_by_one(x64, number, most):
    """At the same particles each series alone, without its padding and holes, has the same log normalizer."""
    lengths, y, present, seen = ragged(number, most)
    arguments = tuple(map(jnp.asarray, (y, present, seen)))
    pvmc = PVMC(masked, places, num_particles=16)
    params = initial_params(pvmc, jax.random.key(0), *arguments)
    panel = pvmc.posterior(jax.random.key(1), params, *arguments)

    def alone(n, length):
        """Forwards through the particles of one series, in NumPy."""
        x_0, x = np.asarray(panel.particles["x_0"])[:, n], np.asarray(panel.particles["x"])[:length, :, n]
        alpha = stats.norm.logpdf(x_0) - stats.norm.logpdf(x_0, 0.1) - np.log(len(x_0))
        for t in range(length):
            before = x_0 if t == 0 else x[t - 1]
            alpha = np.logaddexp.reduce(alpha[:, None] + stats.norm.logpdf(x[t], SLOPE * before[:, None], NOISE), 0)
            alpha = alpha - stats.norm.logpdf(x[t], 0.3 * y[t, n] if seen[t, n] else 0.0, 0.8) - np.log(len(x_0))
            alpha = alpha + stats.norm.logpdf(y[t, n], x[t], SPREAD) if seen[t, n] else alpha
        return np.logaddexp.reduce(alpha)

    expected = [alone(n, length) for n, length in enumerate(lengths)]
    assert_allclose(panel.log_normalizer, expected, rtol=1e-10)


@pytest.mark.parametrize(("number", "most"), [(8, 20), pytest.param(200, 120, marks=pytest.mark.slow)])
def test_nothing_of_a_ragged_panel_is_nan(number, most):
    _, y, present, seen = ragged(number, most)
    arguments = tuple(map(jnp.asarray, (y, present, seen)))
    pvmc = PVMC(masked, places, num_particles=16)
    params = initial_params(pvmc, jax.random.key(0), *arguments)
    loss = jax.jit(lambda params, y: pvmc.loss.loss(jax.random.key(1), params, masked, places, y, *arguments[1:]))
    value, (of_params, of_y) = jax.value_and_grad(loss, (0, 1))(params, arguments[0])
    assert np.isfinite(value)
    assert all(np.isfinite(slope) & (slope != 0) for slope in of_params.values())
    assert_array_equal(of_y != 0, seen)


def weights_of_masked(arguments, particles, key, *methods):
    params = {"slope": jnp.asarray(SLOPE), "loc": jnp.asarray(0.3)}
    structure = read_structure(masked, arguments, params)
    chain = read_chain(structure, masked, arguments, params)
    where, form = presence(chain), check_guide(structure, places, arguments, params)
    log_q = proposal_log_densities(structure, places, arguments, params, key, particles, where, form)
    potentials = weigh(chain, particles, log_q, where)
    return [marginals(*potentials, method) for method in methods]


@pytest.mark.parametrize(
    ("compiled", "most", "methods", "same"),
    [
        # What XLA fuses, a model's own densities too, it rounds as its shape has it; and the tree rounds anew.
        pytest.param(True, 12, ("sequential", "associative"), partial(assert_allclose, rtol=1e-12), id="compiled"),
        pytest.param(False, 7, ("sequential",), assert_array_equal, marks=pytest.mark.slow, id="operation by operation"),
    ],
)
def test_padding_changes_nothing(x64, compiled, most, methods, same):
    """Two series, each against itself without its padding, at the same particles: operation by operation bit for bit."""
    lengths, y, present, seen = ragged(2, most, least=1)
    assert sorted(lengths)[0] < sorted(lengths)[1] < most
    key = jax.random.key(0)
    weighed = jax.jit(lambda arguments, particles: weights_of_masked(arguments, particles, key, *methods))
    x_0, x = jax.random.normal(key, (8, 2)), 0.3 * jnp.nan_to_num(y)[:, None] + jax.random.normal(key, (most, 8, 2))
    with jax.disable_jit(not compiled):
        panel = weighed(Arguments((y, present, seen)), Particles({"x_0": x_0}, {"x": x}))
        for n, length in enumerate(lengths):
            own = slice(n, n + 1)
            particles = Particles({"x_0": x_0[:, own]}, {"x": x[:length, :, own]})
            alone = weighed(Arguments(tuple(data[:length, own] for data in (y, present, seen))), particles)
            for together, apart in zip(panel, alone, strict=True):
                same(together.log_normalizer[n], apart.log_normalizer[0])
                same(together.log_weights[: length + 1, n], apart.log_weights[:, 0])


def test_what_is_in_the_padding_changes_no_bit(x64):
    lengths, y, present, seen = ragged(1, 12, least=7)
    (length,) = lengths
    pvmc = PVMC(masked, places, num_particles=8, particles="iid")
    flags = jnp.asarray(present), jnp.asarray(seen)
    first, second = (
        pvmc.posterior(jax.random.key(1), {"slope": SLOPE, "loc": 0.3}, jnp.asarray(data), *flags)
        for data in (y, np.where(present, y, 1e30))
    )
    assert_array_equal(first.log_normalizer, second.log_normalizer)
    assert_array_equal(first.log_weights["x"], second.log_weights["x"])
    held = first.log_weights["x"][length - 1]
    assert_array_equal(first.log_weights["x"][length:], jnp.broadcast_to(held, (12 - length, *held.shape)))


Y = np.random.default_rng(1).normal(size=6).cumsum()
SEEN = np.array([1, 1, 0, 1, 0, 1], bool)


def by_obs_mask(y, seen, after=False):
    def step(x_prev, now):
        x = numpyro.sample("x", dist.Normal(SLOPE * x_prev, NOISE))
        if not after:
            numpyro.sample("y", dist.Normal(x, SPREAD), obs=now[0], obs_mask=now[1])
        return x, x

    _, x = scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (y, seen))
    if after:
        numpyro.sample("y", dist.Normal(x, SPREAD), obs=y, obs_mask=seen)


def covariance_of(length, start=1.0):
    """Of x_1 to x_T, if x_0 has the variance `start`."""
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    moves, power = np.tril(SLOPE ** np.abs(lags)), SLOPE ** np.arange(1, length + 1)
    return NOISE**2 * moves @ moves.T + start * np.outer(power, power)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_obs_mask_is_a_mask_that_imputes(x64, after):
    arguments = jnp.asarray(np.where(SEEN, Y, np.nan)), jnp.asarray(SEEN), after
    pvmc = PVMC(by_obs_mask, num_particles=256)
    pvmc.init(jax.random.key(0), *arguments)
    posterior = pvmc.posterior(jax.random.key(1), {}, *arguments, refine=6)
    x = covariance_of(6)
    evidence = x[np.ix_(SEEN, SEEN)] + SPREAD**2 * np.eye(SEEN.sum())
    assert_allclose(posterior.log_normalizer, log_gaussian(Y[SEEN], np.zeros(SEEN.sum()), evidence), atol=2e-3)
    assert set(posterior.particles) == {"x", "x_0"}
    draws = posterior.sample(jax.random.key(2), (20_000,))
    gain = x[:, SEEN] @ np.linalg.inv(evidence)
    assert_array_equal(draws["y"][:, SEEN], np.broadcast_to(Y[SEEN], (20_000, SEEN.sum())))
    variance = np.diag(x - gain @ x[SEEN]) + SPREAD**2
    assert_allclose(draws["y"][:, ~SEEN].mean(0), (gain @ Y[SEEN])[~SEEN], atol=0.03)
    assert_allclose(draws["y"][:, ~SEEN].var(0), variance[~SEEN], rtol=0.05)


def known_at_times(y, x, known):
    def step(x_prev, now):
        y_t, x_t, known_t = now
        x = numpyro.sample("x", dist.Normal(SLOPE * x_prev, NOISE), obs=x_t, obs_mask=known_t)
        numpyro.sample("y", dist.Normal(x, SPREAD), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (y, x, known))


@pytest.mark.slow
def test_states_that_are_known_at_some_times(x64):
    """Each is one point of the potentials, however many particles it has."""
    states = Y + 0.2
    arguments = jnp.asarray(Y), jnp.asarray(np.where(SEEN, states, np.nan)), jnp.asarray(SEEN)
    pvmc = PVMC(known_at_times, num_particles=256)
    pvmc.init(jax.random.key(0), *arguments)
    posterior = pvmc.posterior(jax.random.key(1), {}, *arguments, refine=6)
    x = covariance_of(6)
    covariance = np.block([[x[np.ix_(SEEN, SEEN)], x[SEEN]], [x[:, SEEN], x + SPREAD**2 * np.eye(6)]])
    data = np.concatenate([states[SEEN], Y])
    assert_allclose(posterior.log_normalizer, log_gaussian(data, np.zeros(len(data)), covariance), atol=2e-3)
    mean = np.concatenate([x[SEEN], x]).T @ np.linalg.solve(covariance, data)
    assert_allclose(posterior.mean()["x_unobserved"][~SEEN], mean[~SEEN], atol=5e-3)
    draws = posterior.sample(jax.random.key(2), (5,))["x"]
    assert_array_equal(draws[:, SEEN], np.broadcast_to(states[SEEN], (5, SEEN.sum())))


def around(y, inside):
    def step(x_prev, y_t):
        with handlers.scale(scale=0.7 if inside else 1.0):
            x = numpyro.sample("x", dist.Normal(SLOPE * x_prev, NOISE))
            numpyro.sample("y", dist.Normal(x, SPREAD), obs=y_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    with handlers.scale(scale=1.0 if inside else 0.7):
        scan(step, x_0, y)


@pytest.mark.slow
def test_handlers_around_the_scan_act_on_its_sites(x64):
    values = [
        PVMC(around, num_particles=4).posterior(jax.random.key(0), {}, jnp.asarray(Y), inside).log_normalizer
        for inside in (False, True)
    ]
    assert_allclose(*values, rtol=1e-12)


def test_a_mask_around_the_scan_is_one_of_each_step(x64):
    present = jnp.arange(6) < 4

    def outside(y):
        with handlers.mask(mask=present[: len(y)]):
            scan(around_step, 0.0, y)

    def around_step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(SLOPE * x_prev, NOISE))
        numpyro.sample("y", dist.Normal(x, SPREAD), obs=y_t)
        return x, None

    y = jnp.asarray(Y)
    padded = PVMC(outside, num_particles=64).posterior(jax.random.key(0), {}, y, refine=5)
    x = covariance_of(4, start=0.0)
    assert_allclose(padded.log_normalizer, log_gaussian(Y[:4], np.zeros(4), x + SPREAD**2 * np.eye(4)), atol=0.02)
    assert_array_equal(np.isnan(padded.effective_sample_size()["x"]), ~np.asarray(present))
