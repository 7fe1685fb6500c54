"""Refitted proposals: from a blind start to the smoothing marginals, without gradients and without bias."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from jax import random
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import autoregressions
from conftest import initial_params
from models_blind import BLIND, T, key_of
from numpyro_pvmc import PVMC, AutoSmoothedNormal, ImportanceSmoothedELBO, SupervisedELBO
from numpyro_pvmc.ops.gaussian import Moments, dense, diagonal, refit, spread, widening
from oracles import LinearGaussian, kalman_filter, rts_smoother


def draws_and_weights(seed, number=5000, dimensions=2):
    rng = np.random.default_rng(seed)
    log_weights = rng.normal(size=(3, number))
    log_weights -= np.logaddexp.reduce(log_weights, -1, keepdims=True)
    return rng.normal(size=(3, number, dimensions)) @ [[1.0, 0.3], [0.0, 0.5]] + [1.0, -2.0], log_weights


@pytest.mark.parametrize("kind", [dense, diagonal])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("wider", [1.0, 1.5])
def test_moments_of_the_mixture(x64, kind, rate, wider):
    """With enough particles: the mean and covariance of `1 - rate` of the old distribution and `rate` of the particles,
    `wider`.
    """
    draws, log_weights = draws_and_weights(0)
    old = kind(Moments(jnp.full((3, 2), 0.5), jnp.array([[1.0, 2.0]] * 3)))
    new = refit(old, jnp.asarray(draws), jnp.asarray(log_weights), rate, wider=wider)
    weights = np.exp(log_weights)
    for n in range(3):
        mean = weights[n] @ draws[n]
        mixed = (1 - rate) * 0.5 + rate * mean
        of_particles = wider * np.cov(draws[n].T, aweights=weights[n], ddof=0) + np.outer(mean, mean)
        second = (1 - rate) * (np.diag([1.0, 4.0]) + 0.25) + rate * of_particles
        covariance = second - np.outer(mixed, mixed)
        assert_allclose(new.mean[n], mixed, rtol=1e-10)
        if new.is_full:
            assert_allclose(new.factor[n] @ new.factor[n].T, covariance, rtol=1e-4)
        else:
            assert_allclose(new.factor[n] ** 2, np.diag(covariance), rtol=1e-10)


@pytest.mark.parametrize(("num_particles", "left"), [(16, 13), (64, 61), (1024, 1021), (4, 3.2), (1, 1)])
@pytest.mark.parametrize(("particles", "dimensions"), [("iid", 1), ("rqmc", 1), ("iid", 4), ("rqmc", 4)])
def test_a_wider_proposal_costs_three_particles_or_a_fifth(num_particles, left, particles, dimensions):
    """If the distribution is a Gaussian: by quadrature, dimension by dimension. Quasi-random draws on a line pay a tenth."""
    if particles == "rqmc" and dimensions == 1 and num_particles > 1:
        left = min(left, 0.9 * num_particles)
    scale = np.sqrt(widening(num_particles, dimensions, particles))
    x = np.linspace(-12, 12, 10_001)
    target, proposal = scipy.stats.norm.pdf(x), scipy.stats.norm.pdf(x, scale=scale)
    share = 1 / np.trapezoid(target**2 / proposal, x)
    assert scale >= 1
    assert_allclose(num_particles * share**dimensions, left, rtol=1e-6)


def variances_of_proposal(way, particles):
    """After some rounds, for 12 steps of an autoregression."""
    y, model = jnp.asarray(autoregressions.simulate(0, 12, 1)), autoregressions.model
    if way == "refine":
        pvmc = PVMC(model, num_particles=1024, particles=particles)
        return np.var(pvmc.posterior(random.key(0), {}, y, refine=6).particles["x"][..., 0], 1)
    loss = ImportanceSmoothedELBO(1024, particles=particles)
    if way == "supervised":
        loss = SupervisedELBO(lambda y: {"x": y}, 1024, particles=particles)
    svi = SVI(model, AutoSmoothedNormal(model), optax.sgd(0.0), loss)
    return svi.run(random.key(0), 12, y, progress_bar=False).state.mutable_state["auto_steps_factor"][:, 0, 0] ** 2


@pytest.mark.parametrize(
    ("way", "particles"),
    [
        ("refine", "rqmc"),
        *(pytest.param(way, "rqmc", marks=pytest.mark.slow) for way in ("objective", "supervised")),
        *(pytest.param(way, "iid", marks=pytest.mark.slow) for way in ("refine", "objective", "supervised")),
    ],
)
def test_quasi_random_draws_on_a_line_come_from_wider_proposals(way, particles):
    left = {"rqmc": 0.9, "iid": 1 - 3 / 1024}[particles]
    y = autoregressions.simulate(0, 12, 1)
    exact = rts_smoother(autoregressions.LAW, autoregressions.with_the_start(y)).covariances[1:, 0, 0]
    wider = np.roots([left**2, -2, 1]).max()  # sqrt(2 v - 1) / v of the particles are left
    assert_allclose(variances_of_proposal(way, particles).mean(), wider * exact.mean(), rtol=0.05)


@pytest.mark.parametrize(("particles", "at_most"), [("rqmc", 0.5), pytest.param("iid", 50.0, marks=pytest.mark.slow)])
def test_eight_particles_a_step_from_a_blind_start(particles, at_most):
    """Proposals with just the moments of their particles are 2 nats low, and 240 with independent draws."""
    y = autoregressions.simulate(0, 400, 1)
    exact = kalman_filter(autoregressions.LAW, autoregressions.with_the_start(y)).log_evidence
    pvmc = PVMC(autoregressions.model, num_particles=8, particles=particles)
    smooth = jax.jit(lambda key: pvmc.posterior(key, {}, jnp.asarray(y), refine=10))
    found = np.mean([smooth(key).log_normalizer for key in random.split(random.key(0), 4)])
    assert abs(found - exact) < at_most


def test_weights_on_one_particle_move_without_collapse():
    """The best of the particles is where to go, but one particle has no covariance."""
    draws, _ = draws_and_weights(0, 64)
    log_weights = jnp.asarray(-1e4 * np.abs(draws[..., 0] - draws[:, 5:6, 0]), jnp.float32)
    log_weights = log_weights - jax.scipy.special.logsumexp(log_weights, -1, keepdims=True)
    old = dense(Moments(jnp.zeros((3, 2)), jnp.ones((3, 2))))
    new = refit(old, jnp.asarray(draws, jnp.float32), log_weights)
    assert (np.linalg.norm(new.mean - draws[:, 5], axis=-1) < np.linalg.norm(draws[:, 5], axis=-1)).all()
    assert (np.linalg.eigvalsh(new.factor @ new.factor.swapaxes(-1, -2)) > 1e-3).all()


def test_dead_weights_and_padding_change_nothing():
    draws, log_weights = draws_and_weights(0, 64)
    log_weights[1] = -np.inf
    old = dense(Moments(jnp.full((3, 2), 0.5), jnp.ones((3, 2))))
    new = refit(old, jnp.asarray(draws), jnp.asarray(log_weights), present=jnp.array([True, True, False]))
    for n, same in enumerate([False, True, True]):
        assert (new.mean[n] == old.mean[n]).all() == same
        assert (new.factor[n] == old.factor[n]).all() == same
    assert np.isfinite(new.factor).all()


def test_spread_of_draws_that_are_not_all_finite():
    draws = np.random.default_rng(0).normal(size=(4000, 1, 2)) * [1.0, 30.0] + [0.0, 1000.0]
    draws[::10, 0, 0] = np.inf
    draws[::7, 0, 1] = np.nan
    found = spread(jnp.asarray(draws, jnp.float32))
    assert_allclose(found.mean[0], [0.13, 1000.0], atol=2.0)
    assert_allclose(found.factor[0, 1], 30.0, rtol=0.1)


A, Q, R = np.array([[0.8, 0.3], [-0.2, 0.7]]), 0.5, 0.7
EXACT = LinearGaussian(np.zeros(2), np.eye(2), A, np.zeros(2), Q**2 * np.eye(2), np.ones((1, 2)), R**2 * np.eye(1))
Y = np.array([0.4, -0.2, 2.9, 1.3, 0.2, -0.6])


def linear_gaussian(y, series=2):
    plate = numpyro.plate("series", series)

    def step(x_prev, y_t):
        with plate:
            x = numpyro.sample("x", dist.Normal(x_prev @ jnp.asarray(A).T, Q).to_event(1))
            numpyro.sample("y", dist.Normal(x.sum(-1), R), obs=y_t)
        return x, None

    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scan(step, x_0, y)


SERIES = jnp.asarray(np.stack([Y, -0.5 * Y], 1))


def exact_moments():
    found = [rts_smoother(EXACT, np.concatenate([[[np.nan]], y[:, None]])) for y in np.asarray(SERIES, float).T]
    return np.stack([one.means for one in found], 1), np.stack([one.covariances for one in found], 1), found


def test_a_refitted_proposal_is_a_smoothing_marginal_made_wider():
    """Known parameters, no guide, no training: means, covariances and evidence of the Kalman smoother."""
    means, covariances, found = exact_moments()
    posterior = PVMC(linear_gaussian, num_particles=1024).posterior(random.key(0), {}, SERIES, refine=6)
    assert_allclose(posterior.mean()["x"], means[1:], atol=0.01)
    assert_allclose(posterior.variance()["x"], np.diagonal(covariances[1:], 0, -2, -1), rtol=0.03)
    assert_allclose(posterior.log_normalizer, [one.log_evidence for one in found], atol=0.01)
    draws = np.asarray(posterior.particles["x"], float)
    spread_of = np.einsum("tkni,tknj->tnij", *[draws - draws.mean(1, keepdims=True)] * 2) / 1024
    wider = np.roots([1 - 3 / 1024, -2, 1]).max()  # what is left of the particles is (2 v - 1) / v^2 of them, in two dimensions
    assert_allclose(spread_of, wider * covariances[1:], atol=0.02)
    assert posterior.effective_sample_size()["x"].min() > 1000


@pytest.mark.parametrize("num_particles", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_refined_posteriors_are_unbiased(num_particles):
    """The particles are drawn after the last round, whatever the rounds have made of the proposal."""
    pvmc = PVMC(linear_gaussian, num_particles=num_particles)
    one = lambda key: pvmc.posterior(key, {}, SERIES[:, :1], 1, refine=2).log_normalizer[0]
    log_z = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(random.split(random.key(1), 6000))
    exact = kalman_filter(EXACT, np.concatenate([[np.nan], Y])[:, None]).log_evidence
    ratio = np.exp(np.asarray(log_z, np.float64) - exact)
    standard_error = ratio.std() / np.sqrt(len(ratio))
    assert standard_error < 0.02, f"too blunt to see anything: {standard_error}"
    assert abs(ratio.mean() - 1) < 4 * standard_error


def dense_guide(y, series=2):
    covariance = jnp.array([[4.0, 1.0], [1.0, 3.0]])
    numpyro.sample("x_0", dist.MultivariateNormal(jnp.zeros((2, 2)), covariance))
    numpyro.sample("x", dist.MultivariateNormal(jnp.zeros((6, 2, 2)), covariance))


def expanded_guide(y, series=2):
    """Distributions that get their axes, time among them, from outside; and whole numbers for parameters."""
    numpyro.sample("x_0", dist.Normal(0, 2).expand([2, 2]).to_event(1))
    with numpyro.plate("time", 6, dim=-2):
        numpyro.sample("x", dist.Normal(jnp.zeros((2, 2)), 2).to_event(1))


def transformed_guide(y, series=2):
    numpyro.sample("x_0", dist.Normal(jnp.zeros((2, 2)), 2.0).to_event(1))
    moved = [dist.transforms.AffineTransform(1.0, 3.0)]
    numpyro.sample("x", dist.TransformedDistribution(dist.Normal(jnp.zeros((6, 2, 2)), 1.0).to_event(1), moved))


@pytest.mark.parametrize(
    "guide",
    [
        pytest.param(dense_guide, marks=pytest.mark.slow),
        expanded_guide,
        pytest.param(transformed_guide, marks=pytest.mark.slow),
        pytest.param(AutoNormal(linear_gaussian, init_scale=1.0), marks=pytest.mark.slow),
    ],
)
def test_any_gaussian_guide_can_be_refined(guide):
    pvmc = PVMC(linear_gaussian, guide, num_particles=64)
    params = initial_params(pvmc, random.key(0), SERIES)
    before = pvmc.posterior(random.key(1), params, SERIES)
    after = pvmc.posterior(random.key(1), params, SERIES, refine=5)
    assert before.effective_sample_size()["x"].min() < 30
    assert after.effective_sample_size()["x"].min() > 58
    assert_allclose(after.mean()["x"], exact_moments()[0][1:], atol=0.05)


@pytest.mark.slow
def test_sites_that_read_each_other_in_the_guide():
    """Two sites a step, the second given the first: read at the first's median, then refitted with their correlation."""

    def model(y):
        def step(state, y_t):
            a, b = state
            a = numpyro.sample("a", dist.Normal(0.8 * a, 0.5))
            b = numpyro.sample("b", dist.LogNormal(0.5 * jnp.log(b), 0.5))
            numpyro.sample("y", dist.Normal(a + jnp.log(b), 0.2), obs=y_t)
            return (a, b), None

        scan(step, (0.0, 1.0), y)

    def guide(y):
        a = numpyro.sample("a", dist.Normal(y, 1.0))
        numpyro.sample("b", dist.LogNormal(y - a, 1.0))

    pvmc = PVMC(model, guide, num_particles=128)
    posterior = pvmc.posterior(random.key(0), {}, jnp.asarray(Y), refine=5)
    assert posterior.effective_sample_size()["a"].min() > 120
    state = np.stack([posterior.particles["a"], np.log(posterior.particles["b"])], -1)
    assert all(np.corrcoef(step.T)[0, 1] < -0.6 for step in state)


LONGER = ("constrained", "epidemic", "local_level", "panel", "tracking", "two_sites")


@pytest.mark.parametrize(
    "program", [pytest.param(one, marks=[pytest.mark.slow] * (one.name in LONGER)) for one in BLIND], ids=repr
)
def test_from_a_blind_start(program):
    """The proposal starts as the prior, and the data are far more informative than that."""
    arguments = program.data(key_of(program))
    pvmc = PVMC(program.model, num_particles=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # before it is refitted, few particles count
        blind = pvmc.posterior(random.key(1), {}, *arguments)
    is_hard = program.name == "tracking"  # four dimensions, and steps much smaller than the prior is wide
    says = pytest.warns(UserWarning, match="site 'state' is below 6.4 of 128") if is_hard else contextlib.nullcontext()
    with says:
        posterior = pvmc.posterior(random.key(1), {}, *arguments, refine=15, temper=0.1 if is_hard else 1.0)
    sizes = [np.concatenate([np.ravel(x) for x in one.effective_sample_size().values()]) for one in (blind, posterior)]
    assert np.median(sizes[1]) > 2.5 * np.median(sizes[0])
    assert np.median(sizes[1]) > 90
    assert sizes[1].min() > (1 if is_hard else 10)
    assert not is_hard or posterior.log_normalizer > blind.log_normalizer + 6000
    assert posterior.log_normalizer.sum() > blind.log_normalizer.sum() - 0.5


@pytest.mark.slow
def test_collapse_is_said_aloud():
    program = next(one for one in BLIND if one.name == "tracking")
    pvmc = PVMC(program.model, num_particles=8)
    with pytest.warns(UserWarning, match=r"(?s)site 'state' is below.*more rounds, tempered.*more particles.*mode"):
        pvmc.posterior(random.key(0), {}, *program.data(key_of(program)), refine=1)


@pytest.mark.slow
def test_samples_are_those_of_the_refined_posterior():
    pvmc = PVMC(linear_gaussian, num_particles=512)
    samples = pvmc.sample_posterior(random.key(0), {}, SERIES, sample_shape=(20_000,), refine=5)
    means, covariances, _ = exact_moments()
    assert_allclose(samples["x"].mean(0), means[1:], atol=0.06)
    assert_allclose(samples["x"].var(0), np.diagonal(covariances[1:], 0, -2, -1), rtol=0.15)


@pytest.mark.slow
def test_padding_is_left_alone():
    present = jnp.arange(6)[:, None] < jnp.array([6, 3])

    def padded(y, present):
        plate = numpyro.plate("series", 2)

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with plate, numpyro.handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.7))
                numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, present))

    y = jnp.where(present, SERIES, jnp.nan)
    pvmc = PVMC(padded, num_particles=64)
    posterior = pvmc.posterior(random.key(0), {}, y, present, refine=5)
    assert np.nanmin(posterior.effective_sample_size()["x"]) > 55
    assert np.isfinite(posterior.particles["x"]).all()
    short = pvmc.posterior(random.key(0), {}, jnp.stack([y[:3, 1]] * 2, 1), present[:3] | True, refine=5)
    assert_allclose(posterior.log_normalizer[1], short.log_normalizer[1], atol=0.03)


def test_what_cannot_be_refined():
    def guide(y, series=2):
        numpyro.sample("x_0", dist.Laplace(jnp.zeros((2, 2)), 2.0).to_event(1))
        numpyro.sample("x", dist.Laplace(jnp.zeros((6, 2, 2)), 2.0).to_event(1))

    pvmc = PVMC(linear_gaussian, guide, num_particles=16)
    with pytest.raises(ValueError, match=r"distribution for site 'x_0', Independent, is not Gaussian.*AutoSmoothedNormal"):
        pvmc.posterior(random.key(0), {}, SERIES, refine=2)
    for refine in (-1, 1.5, True):
        with pytest.raises(ValueError, match="`refine` must be a number of rounds"):
            pvmc.posterior(random.key(0), {}, SERIES, refine=refine)
    with pytest.raises(ValueError, match="`temper` must be above 0 and at most 1"):
        pvmc.posterior(random.key(0), {}, SERIES, refine=1, temper=2.0)
    with pytest.raises(ValueError, match="Give `refine=` too"):
        pvmc.posterior(random.key(0), {}, SERIES, temper=0.5)


@pytest.mark.parametrize(
    ("series", "num_particles"), [(1, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, 1), (1, 8)))]
)
def test_one_step_one_particle_one_series(series, num_particles):
    pvmc = PVMC(linear_gaussian, num_particles=num_particles)
    posterior = pvmc.posterior(random.key(0), {}, SERIES[:1, :series], series, refine=2)
    assert np.isfinite(posterior.log_normalizer).all()
    assert posterior.particles["x"].shape == (1, num_particles, series, 2)


@pytest.mark.slow
def test_full_covariances_need_plates_on_the_left():
    def model(y):
        def step(x, y_t):
            with numpyro.plate("series", 3, dim=-1):
                x = numpyro.sample("x", dist.Normal(0.8 * x, jnp.ones((2, 1))))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, jnp.zeros((2, 3)), y)

    y = jnp.zeros((T, 2, 3))
    with pytest.raises(ValueError, match=r"Site 'x' has batch axes \(2, 3\).*covariance='diagonal'"):
        PVMC(model, num_particles=8).posterior(random.key(0), {}, y, refine=1)
    guide = AutoSmoothedNormal(model)
    posterior = PVMC(model, guide, num_particles=32).posterior(random.key(0), {}, y, refine=3)
    assert posterior.effective_sample_size()["x"].min() > 25


@pytest.mark.slow
def test_joint_guides_are_refused_as_ever():
    pvmc = PVMC(linear_gaussian, AutoMultivariateNormal(linear_gaussian), num_particles=8)
    with pytest.raises(ValueError, match="gives site 'x_0' a `Delta` distribution"):
        pvmc.init(random.key(0), SERIES)


def support_by_input(y, lowest):
    def step(x, inputs):
        y_t, low = inputs
        x = numpyro.sample("x", dist.TruncatedNormal(0.5 * x, 1.0, low=low))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (y, lowest))


def support_by_state(y, lowest):
    def step(x, y_t):
        x = numpyro.sample("x", dist.TruncatedNormal(x + 0.5, 1.0, low=x))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def support_by_parameter(y, lowest):
    top = numpyro.param("top", 2.0)

    def step(x, y_t):
        x = numpyro.sample("x", dist.TruncatedNormal(0.5 * x, 1.0, low=-1.0, high=top))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


@pytest.mark.parametrize(
    ("model", "what"),
    [(support_by_input, "inputs of the scan"), (support_by_state, "state before"), (support_by_parameter, "parameters")],
)
def test_a_support_that_moves_has_no_coordinates(model, what):
    """A start at time 0, or at the first parameters, would leave out what they do not allow, and say nothing."""
    with pytest.raises(ValueError, match=f"support of site 'x' reads .*{what}.*unconstrained site"):
        PVMC(model, num_particles=4).posterior(random.key(0), {}, jnp.zeros(3), jnp.array([0.5, -1.0, -2.0]))


def test_a_support_given_as_data_is_like_any_other():
    def model(y, low):
        def step(x, y_t):
            x = numpyro.sample("x", dist.TruncatedNormal(0.5 * x, 1.0, low=low))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    posterior = PVMC(model, num_particles=16).posterior(random.key(0), {}, jnp.zeros(3), jnp.asarray(-0.2), refine=1)
    assert posterior.particles["x"].min() > -0.2


def test_transforms_that_differ_between_times_are_not_refitted():
    def guide(y, series=2):
        numpyro.sample("x_0", dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(1))
        moved = dist.transforms.AffineTransform(jnp.arange(6.0)[:, None, None], 1.0)
        numpyro.sample("x", dist.TransformedDistribution(dist.Normal(jnp.zeros((6, 2, 2)), 1.0), [moved]).to_event(1))

    with pytest.raises(ValueError, match="site 'x' has a transform that differs between times"):
        PVMC(linear_gaussian, guide, num_particles=4).posterior(random.key(0), {}, SERIES, refine=1)


def test_a_chain_without_a_possible_trajectory():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.factor("wall", jnp.where(y_t > 0, -jnp.inf, 0.0))
            return x, None

        scan(step, 0.0, y)

    with pytest.warns(UserWarning, match=r"evidence is 0: none of the 8 particles is possible at time 1"):
        posterior = PVMC(model, num_particles=8).posterior(random.key(0), {}, jnp.array([0.0, 1.0, 0.0]), refine=1)
    assert posterior.log_normalizer == -jnp.inf
    assert (posterior.effective_sample_size()["x"] == 0).all()
