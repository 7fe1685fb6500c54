"""Discrete sites that the guide leaves out: exact where there is nothing else, summed around the particles where there is."""

import itertools

import hmmlearn.hmm
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as log_density_enumerated
from numpyro.infer.autoguide import AutoNormal
from numpyro.ops.indexing import Vindex
from scipy import stats

from conftest import few_particles, in_both_precisions, initial_params
from numpyro_pvmc import PVMC, AutoSmoothedNormal, ImportanceSmoothedELBO
from oracles import forward_backward, log_gaussian

pytestmark = few_particles

INITIAL, MOVES = np.array([0.5, 0.3, 0.2]), np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])
LEVELS = np.array([-1.0, 0.0, 2.0])
Y = np.random.default_rng(0).normal(size=(9, 2)) + LEVELS[np.random.default_rng(1).integers(0, 3, (9, 2))]


def log_of(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def panel(y, present, seen):
    """Hidden Markov models of two series: states before the data, ends that are padded, observations that are missing."""
    series = numpyro.plate("series", 2)
    moves, levels = jnp.asarray(MOVES, float), jnp.asarray(LEVELS, float)

    def step(s_prev, now):
        y_t, present_t, seen_t = now
        with series, handlers.mask(mask=present_t):
            s = numpyro.sample("s", dist.Categorical(moves[s_prev]))
            with handlers.mask(mask=seen_t):
                numpyro.sample("y", dist.Normal(levels[s], 0.7), obs=y_t)
        return s, s

    with series:
        s_0 = numpyro.sample("s_0", dist.Categorical(jnp.asarray(INITIAL, float)))
    scan(step, s_0, (y, present, seen))


@in_both_precisions
def test_a_hidden_markov_model_is_exact(tolerance):
    present = np.arange(9)[:, None] < np.array([9, 6])
    seen = present & (np.arange(9)[:, None] % 4 != 2)
    y = jnp.asarray(np.where(seen, Y, np.nan))
    pvmc = PVMC(panel)
    params = initial_params(pvmc, jax.random.key(0), y, jnp.asarray(present), jnp.asarray(seen))
    posterior = pvmc.posterior(jax.random.key(0), params, y, jnp.asarray(present), jnp.asarray(seen))
    for n, length in enumerate((9, 6)):
        emission = stats.norm.logpdf(Y[:length, n, None], LEVELS, 0.7) * seen[:length, n, None]
        emission = np.concatenate([np.zeros((1, 3)), emission])
        exact = forward_backward(log_of(INITIAL), log_of(MOVES), emission)
        near = {"rtol": tolerance, "atol": tolerance}
        assert_allclose(posterior.log_normalizer[n], exact.log_normalizer, **near)
        assert_allclose(posterior.state_probabilities["s"][:length, n], exact.weights[1:], **near)
        assert_allclose(posterior.state_probabilities["s_0"][n], exact.weights[0], **near)
        assert_allclose(posterior.filtering_state_probabilities["s"][:length, n], exact.filtering_weights[1:], **near)
    assert posterior.particles == posterior.effective_sample_size() == {}
    assert posterior.to_arviz(num_samples=3).smoothing["s_probability"].dims[:2] == ("time", "series")


def enumerable(y):
    """A program that NumPyro's enumerated `scan` reads too."""
    moves = numpyro.param("moves", jnp.asarray(MOVES[:2, :2] / MOVES[:2, :2].sum(1, keepdims=True), float))

    def step(s_prev, y_t):
        s = numpyro.sample("s", dist.Categorical(Vindex(moves)[s_prev, :]))
        numpyro.sample("y", dist.Normal(1.5 * s, 0.7), obs=y_t)
        return s, None

    scan(step, 0, y)


@pytest.mark.slow
def test_equals_the_enumerated_scan_of_numpyro(x64):
    y, moves = jnp.asarray(Y[:, 0]), jnp.asarray([[0.8, 0.2], [0.4, 0.6]])

    def ours(moves):
        return -ImportanceSmoothedELBO(8).loss(jax.random.key(0), {"moves": moves}, enumerable, lambda y: None, y)

    def theirs(moves):
        return log_density_enumerated(enum(config_enumerate(enumerable), -1), (y,), {}, {"moves": moves})[0]

    for value, expected in zip(jax.value_and_grad(ours)(moves), jax.value_and_grad(theirs)(moves), strict=True):
        assert_allclose(value, expected, rtol=1e-5)


def started(y):
    moves, levels = jnp.asarray(MOVES, float), jnp.asarray(LEVELS, float)

    def emit(name, s, y):
        numpyro.sample(name, dist.Normal(levels[s], 0.7), obs=y)

    def step(s_prev, y_t):
        s = numpyro.sample("s", dist.Categorical(moves[s_prev]))
        emit("y", s, y_t)
        return s, None

    s_0 = numpyro.sample("s_0", dist.Categorical(jnp.asarray(INITIAL, float)))
    emit("y_0", s_0, y[0])
    scan(step, s_0, y[1:])


def test_equals_hmmlearn(x64):
    reference = hmmlearn.hmm.GaussianHMM(3)
    reference.startprob_, reference.transmat_, reference.means_ = INITIAL, MOVES, LEVELS[:, None]
    reference.covars_ = np.full((3, 1), 0.49)
    y = Y[:, :1]
    posterior = PVMC(started).posterior(jax.random.key(0), {}, jnp.asarray(y[:, 0]))
    states = np.concatenate([posterior.state_probabilities["s_0"][None], posterior.state_probabilities["s"]])
    assert_allclose(posterior.log_normalizer, reference.score(y), rtol=1e-8)
    assert_allclose(states, reference.predict_proba(y), atol=1e-8)


def several(y):
    """Three sites of different numbers of values, one of two elements; a beginning with fewer of them."""

    def step(carry, y_t):
        a_prev, _ = carry
        a = numpyro.sample("a", dist.Categorical(logits=jnp.array([0.1, -0.4, 0.3]) * (1 + a_prev)))
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.3, 0.6]) + 0.1 * a).to_event(1))
        c = numpyro.sample("c", dist.Binomial(2, 0.3))
        numpyro.sample("y", dist.Normal(a - b[0] + 0.5 * b[1] * c, 0.8), obs=y_t)
        return (a, b), None

    a_0 = numpyro.sample("a_0", dist.Bernoulli(0.4))
    scan(step, (a_0, jnp.zeros(2, int)), y)


def test_several_sites_of_one_step(x64):
    y = Y[:2, 0]
    posterior = PVMC(several).posterior(jax.random.key(0), {}, jnp.asarray(y))
    values = [(a, *b, c) for a in range(3) for b in itertools.product(range(2), repeat=2) for c in range(3)]
    total, of_b = 0.0, np.zeros((2, 2, 2))
    for a_0, first, second in itertools.product(range(2), values, values):
        mass = (0.6, 0.4)[a_0]
        for y_t, a_prev, (a, b_0, b_1, c) in zip(y, (a_0, first[0]), (first, second), strict=True):
            odds = np.exp(np.array([0.1, -0.4, 0.3]) * (1 + a_prev))
            mass *= odds[a] / odds.sum() * stats.bernoulli.pmf([b_0, b_1], [0.3 + 0.1 * a, 0.6 + 0.1 * a]).prod()
            mass *= stats.binom.pmf(c, 2, 0.3) * stats.norm.pdf(y_t, a - b_0 + 0.5 * b_1 * c, 0.8)
        total += mass
        for t, (_, b_0, b_1, _) in enumerate((first, second)):
            of_b[t, 0, b_0] += mass
            of_b[t, 1, b_1] += mass
    assert_allclose(posterior.log_normalizer, np.log(total), rtol=1e-10)
    assert_allclose(posterior.state_probabilities["b"], of_b / total, rtol=1e-10)
    assert {name: x.shape for name, x in posterior.state_probabilities.items()} == {
        "a_0": (2,), "a": (2, 3), "b": (2, 2, 2), "c": (2, 3)
    }  # fmt: skip
    draws = posterior.sample(jax.random.key(1), (20_000,))
    assert {name: x.shape[1:] for name, x in draws.items()} == {"a_0": (), "a": (2,), "b": (2, 2), "c": (2,)}
    assert_allclose(draws["b"].mean(0), of_b[..., 1] / total, atol=0.015)  # four standard errors


SLOPES, NOISES = np.array([0.95, 0.3]), np.array([0.2, 0.8])


def switching(y, recurrent=False):
    slopes, noises = jnp.asarray(SLOPES), jnp.asarray(NOISES)

    def step(carry, y_t):
        s_prev, x_prev = carry
        stay = jax.nn.sigmoid(1.0 + x_prev) if recurrent else 0.9
        s = numpyro.sample("s", dist.Bernoulli(jnp.where(s_prev == 1, stay, 1 - stay)))
        x = numpyro.sample("x", dist.Normal(slopes[s] * x_prev, noises[s]))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return (s, x), None

    scan(step, (0, numpyro.sample("x_0", dist.Normal(0.0, 1.0))), y)


def exact_switching(y):
    """A Kalman filter for each of all 2^T sequences of switches."""
    logs = []
    for switches in itertools.product(range(2), repeat=len(y)):
        mean, variance, log_mass, before = 0.0, 1.0, 0.0, 0
        for y_t, s in zip(y, switches, strict=True):
            log_mass += np.log(0.9 if s == before else 0.1)
            mean, variance, before = SLOPES[s] * mean, SLOPES[s] ** 2 * variance + NOISES[s] ** 2, s
            total = variance + 0.25
            log_mass += log_gaussian(np.array([y_t]), np.array([mean]), np.array([[total]]))
            mean, variance = mean + variance / total * (y_t - mean), variance * 0.25 / total
        logs.append(log_mass)
    logs = np.array(logs)
    log_z = np.logaddexp.reduce(logs)
    states = np.array(list(itertools.product(range(2), repeat=len(y))))
    return log_z, np.exp(logs - log_z) @ states


@pytest.mark.slow
def test_a_switching_system_is_exact_as_particles_grow(x64):
    y = Y[:6, 0]
    log_z, probability = exact_switching(y)
    errors = []
    for number in (4, 16, 64, 256):
        pvmc = PVMC(switching, num_particles=number)
        posteriors = jax.vmap(lambda key, pvmc=pvmc: pvmc.posterior(key, {}, jnp.asarray(y), refine=4))(
            jax.random.split(jax.random.key(0), 20)
        )
        of_states = posteriors.state_probabilities["s"][..., 1] - probability
        errors.append([np.abs(posteriors.log_normalizer - log_z).mean(), np.abs(of_states).mean()])
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) < 0).all()
    assert (errors[-1] < [0.01, 0.002]).all()


def blind(y, *args):
    numpyro.sample("x_0", dist.Normal(0.2, 1.2))
    numpyro.sample("x", dist.Normal(numpyro.param("gain", jnp.asarray(0.5)) * y, 0.9))


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_mixed_chain_is_unbiased(x64, number):
    y = Y[:4, 0]
    log_z, _ = exact_switching(y)
    pvmc = PVMC(switching, blind, num_particles=number)
    keys = jax.random.split(jax.random.key(number), 20_000)
    ratios = jax.jit(jax.vmap(lambda key: jnp.exp(pvmc.posterior(key, {}, jnp.asarray(y)).log_normalizer - log_z)))(keys)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(len(keys))
    assert ratios.std() / np.sqrt(len(keys)) < 0.01


@pytest.mark.slow
def test_gradients_of_a_mixed_chain_have_one_mean(x64):
    y, keys = jnp.asarray(Y[:4, 0]), jax.random.split(jax.random.key(3), 20_000)
    means, errors = [], []
    for gradient in ("reparam", "doubly_reparam"):
        loss = ImportanceSmoothedELBO(4, gradient=gradient, particles="iid")
        slope = jax.grad(lambda gain, key, loss=loss: loss.loss(key, {"gain": gain}, switching, blind, y, True))
        slopes = jax.jit(jax.vmap(slope, (None, 0)))(0.5, keys)
        means.append(slopes.mean())
        errors.append(slopes.std() / np.sqrt(len(keys)))
    assert abs(means[0] - means[1]) < 4 * np.hypot(*errors)
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["default", "AutoNormal"])
def test_a_recurrent_switching_system_trains(guide):
    guide = None if guide == "default" else AutoNormal(handlers.block(switching, hide=["s"]))
    pvmc = PVMC(switching, guide, num_particles=8)
    result = pvmc.run(jax.random.key(0), 60, jnp.asarray(Y[:, 0]), True, progress_bar=False, grow=False)
    assert result.losses[-10:].mean() < result.losses[:10].mean()
    posterior = pvmc.posterior(jax.random.key(1), result.params, jnp.asarray(Y[:, 0]), True)
    assert posterior.log_weights["x"].shape == (9, 8)
    assert_allclose(jnp.exp(posterior.log_weights["x"]).sum(1), 1.0, rtol=1e-5)
    assert_allclose(posterior.state_probabilities["s"].sum(-1), 1.0, rtol=1e-5)
    assert posterior.mean().keys() == {"x_0", "x"}


def many(y):
    def step(s_prev, y_t):
        s = numpyro.sample("s", dist.Bernoulli(0.3 + 0.4 * s_prev).to_event(1))
        numpyro.sample("y", dist.Normal(s.sum(), 1.0), obs=y_t)
        return s, None

    scan(step, jnp.zeros(13, int), y)


def test_what_cannot_be_summed_says_so():
    y = jnp.asarray(Y[:, 0])
    with pytest.raises(ValueError, match=r"\['s'\] of one step have 8192 joint values.*plate"):
        PVMC(many).init(jax.random.key(0), y)
    with pytest.raises(
        ValueError, match=r"\['s'\] are discrete, and `AutoNormal` cannot sample them.*block\(model, hide=\['s'\]\)"
    ):
        PVMC(switching, AutoNormal(switching)).init(jax.random.key(0), y)
    with pytest.raises(ValueError, match=r"`init='laplace'` needs states with a smooth density, and \['s'\] are discrete"):
        PVMC(switching, AutoSmoothedNormal(switching, init="laplace")).init(jax.random.key(0), y)
