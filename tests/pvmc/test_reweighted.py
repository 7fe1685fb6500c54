"""Gradients that need no gradient of draws, guides over discrete sites, and gradients of terms under a schedule."""

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
from numpyro.infer import SVI

from conftest import few_particles
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, SupervisedELBO
from numpyro_pvmc.infer.schedule import growth
from oracles import LinearGaussian, forward_backward, rts_smoother

pytestmark = few_particles

Y = jnp.array([0.3, -0.5, 1.2, 0.4])
PARAMS = {"loc": jnp.array([0.1, 0.1, 0.3, 0.5]), "log_scale": jnp.full(4, -0.3), "a": jnp.array(0.8)}


def model(y, a=None):
    a = numpyro.param("a", 0.8) if a is None else a

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(a * x_prev, 0.7))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.5, y)


def guide(y):
    loc, scale = numpyro.param("loc", jnp.zeros(4)), jnp.exp(numpyro.param("log_scale", jnp.zeros(4)))
    numpyro.sample("x", dist.Normal(loc, scale))


def slope(loss, key=0, params=PARAMS):
    return jax.jit(jax.grad(lambda p: loss.loss(random.key(key), p, model, guide, Y)))(params)


def test_it_is_the_slope_of_log_q_over_the_smoothed_particles(x64):
    found = slope(ImportanceSmoothedELBO(16, gradient="reweighted"))
    posterior = PVMC(model, guide, num_particles=16).posterior(random.key(0), PARAMS, Y)
    x, weights = np.asarray(posterior.particles["x"]), np.exp(np.asarray(posterior.log_weights["x"]))
    loc, scale = np.asarray(PARAMS["loc"])[:, None], np.exp(np.asarray(PARAMS["log_scale"]))[:, None]
    assert_allclose(found["loc"], -(weights * (x - loc) / scale**2).sum(1), rtol=1e-6)
    assert_allclose(found["log_scale"], -(weights * ((x - loc) ** 2 / scale**2 - 1)).sum(1), rtol=1e-6)
    assert_allclose(found["a"], slope(ImportanceSmoothedELBO(16, gradient="reparam"))["a"], rtol=1e-6)


def test_the_default_growth_ends_at_the_exact_means():
    """With one particle every weight is 1, and a phase of noise would take the guide away from the data."""
    rng = np.random.default_rng(0)
    y = 4.0 + rng.normal(size=12).cumsum()
    one = np.eye(1)
    distribution = LinearGaussian(np.array([0.5]), 0.0 * one, 0.8 * one, np.zeros(1), 0.49 * one, one, one)
    exact = rts_smoother(distribution, np.concatenate([[np.nan], y])[:, None])

    def normals(y, a):
        loc, scale = numpyro.param("loc", jnp.zeros(12)), jnp.exp(numpyro.param("log_scale", jnp.zeros(12)))
        numpyro.sample("x", dist.Normal(loc, scale))

    pvmc = PVMC(model, normals, num_particles=16, gradient="reweighted", a=0.8)
    params = pvmc.run(random.key(0), 1000, jnp.asarray(y), progress_bar=False).params
    in_sd = (params["loc"] - exact.means[1:, 0]) / np.sqrt(exact.covariances[1:, 0, 0])
    assert abs(in_sd).max() < 0.1
    assert growth(1000, 16, reweighted=True) == [(4, 333), (16, 667)]


TRANSITION = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
MEANS, START, NOISE = np.array([-1.0, 0.0, 1.5]), np.array([0.5, 0.3, 0.2]), 0.8
SEEN = np.array([1.8, 1.1, -0.9, 0.1, -1.4, 0.7])


def hidden_markov(y):
    def step(s_prev, y_t):
        s = numpyro.sample("s", dist.Categorical(probs=jnp.asarray(TRANSITION)[s_prev]))
        numpyro.sample("y", dist.Normal(jnp.asarray(MEANS)[s], NOISE), obs=y_t)
        return s, None

    scan(step, numpyro.sample("s_0", dist.Categorical(probs=jnp.asarray(START))), y)


def state_guide(y):
    numpyro.sample("s_0", dist.Categorical(logits=numpyro.param("logits_0", jnp.zeros(3))))
    numpyro.sample("s", dist.Categorical(logits=numpyro.param("logits", jnp.zeros((6, 3)))))


def exact_states():
    log_emission = -0.5 * ((SEEN[:, None] - MEANS) / NOISE) ** 2 - np.log(NOISE * np.sqrt(2 * np.pi))
    return forward_backward(np.log(START), np.log(TRANSITION), np.concatenate([np.zeros((1, 3)), log_emission]))


@pytest.mark.parametrize("gradient", ["reweighted", pytest.param("doubly_reparam", marks=pytest.mark.slow)])
def test_a_guide_over_a_discrete_site_learns_the_exact_marginals(gradient):
    """Sites without a gradient of draws get the reweighted one, whatever is asked for."""
    exact, y = exact_states(), jnp.asarray(SEEN)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, 1500))
    pvmc = PVMC(hidden_markov, state_guide, optimiser, num_particles=32, gradient=gradient)
    params = pvmc.run(random.key(0), 1500, y, progress_bar=False, grow=False).params
    assert_allclose(jax.nn.softmax(params["logits"]), exact.weights[1:], atol=0.01)
    assert_allclose(jax.nn.softmax(params["logits_0"]), exact.weights[0], atol=0.01)
    many = PVMC(hidden_markov, state_guide, num_particles=1024).posterior(random.key(1), params, y)
    assert_allclose(many.log_normalizer, exact.log_normalizer, atol=0.01)
    assert_allclose(many.mean()["s"], exact.weights[1:] @ [0, 1, 2], atol=0.02)
    samples = many.sample(random.key(2), (4000,))["s"]
    assert samples.dtype == jnp.int32
    assert_allclose((samples == 2).mean(0), exact.weights[1:, 2], atol=0.03)


def test_one_particle_teaches_a_guide_without_gradients_of_draws_nothing():
    with pytest.raises(ValueError, match=r"`gradient='reweighted'` needs at least `num_particles=2`: .* every weight is 1"):
        ImportanceSmoothedELBO(1, gradient="reweighted")
    pvmc = PVMC(hidden_markov, state_guide, num_particles=1)
    state = pvmc.init(random.key(0), jnp.asarray(SEEN))
    assert np.isfinite(pvmc.evaluate(state, jnp.asarray(SEEN)))
    with pytest.raises(ValueError, match=r"Sites \['s_0', 's'\] have no gradient of their draws.* Train with `num_particles`"):
        pvmc.update(state, jnp.asarray(SEEN))


def test_a_discrete_and_a_continuous_site_in_one_step():
    """A switch and a level: the plain bound of both, by two kinds of gradient, goes up."""

    def switching(y):
        def step(state, y_t):
            s, x = state
            s = numpyro.sample("s", dist.Bernoulli(0.1 + 0.8 * s))
            x = numpyro.sample("x", dist.Normal(jnp.where(s, 0.95, 0.2) * x, jnp.where(s, 0.1, 1.0)))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return (s, x), None

        scan(step, (0, 0.0), y)

    def both(y):
        numpyro.sample("s", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(4))))
        numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 0.4))

    pvmc = PVMC(switching, both, optax.adam(0.03), num_particles=4)  # the growth has no phase with fewer
    result = pvmc.run(random.key(0), 400, Y, progress_bar=False)
    assert result.losses[-50:].mean() < result.losses[:5].mean() - 0.3
    assert_allclose(result.params["loc"], Y, atol=0.4)
    assert (abs(result.params["logits"]) > 0.05).all()


@pytest.mark.slow
def test_gradient_of_a_term_is_scaled_and_its_value_is_not(x64):
    plain = ImportanceSmoothedELBO(8, gradient="reparam")
    of = lambda **scales: ImportanceSmoothedELBO(8, gradient="reparam", gradient_scale=scales)
    value = lambda loss: loss.loss(random.key(0), PARAMS, model, guide, Y)
    assert_allclose(value(of(x=0.3)), value(plain), rtol=1e-14)
    whole, scaled, neither, emission = slope(plain), slope(of(x=0.3)), slope(of(x=0.0, y=0.0)), slope(of(x=0.0))
    assert_allclose(scaled["a"], 0.3 * whole["a"], rtol=1e-6)  # in the distribution of x alone
    assert emission["a"] == 0
    transition = slope(of(y=0.0))["loc"] - neither["loc"]
    assert_allclose(scaled["loc"], emission["loc"] + 0.3 * transition, rtol=1e-6)


def test_a_schedule_counts_updates():
    """The model's coefficient gets no gradient before the fifth update, neither in `run` nor in `update`."""
    after_five = lambda step: jnp.where(step < 5, 0.0, 1.0)
    loss = ImportanceSmoothedELBO(8, gradient_scale={"x": after_five})
    pvmc = PVMC(model, guide, optax.sgd(0.01), loss)
    state, values = pvmc.init(random.key(0), Y), []
    for _ in range(8):
        state, _ = pvmc.update(state, Y)
        values.append(float(pvmc.get_params(state)["a"]))
    assert (np.diff([PARAMS["a"], *values]) == 0).tolist() == [True] * 5 + [False] * 3
    result = pvmc.run(random.key(0), 8, Y, progress_bar=False, grow=False)
    assert_allclose(result.params["a"], values[-1], rtol=1e-6)


@pytest.mark.slow
def test_a_schedule_may_be_one_of_optax():
    linear = ImportanceSmoothedELBO(8, gradient_scale={"x": optax.linear_schedule(0.05, 1.0, 95)})
    assert np.isfinite(PVMC(model, guide, loss=linear).run(random.key(0), 5, Y, progress_bar=False).losses).all()


def test_scales_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"names \['z'\], which are no sites of the model: it has \['x', 'y'\]"):
        slope(ImportanceSmoothedELBO(8, gradient_scale={"z": 0.5}))
    loss = ImportanceSmoothedELBO(8, gradient_scale={"x": optax.linear_schedule(0.05, 1.0, 95)})
    svi = SVI(model, guide, optax.sgd(0.01), loss)
    with pytest.raises(ValueError, match=r"needs the number of the update.*`PVMC` tells the loss"):
        svi.update(svi.init(random.key(0), Y), Y)


def test_a_supervised_loss_wants_gradients_of_draws():
    pvmc = PVMC(hidden_markov, state_guide, loss=SupervisedELBO(lambda y: {"s": jnp.zeros(6)}, 8))
    state = pvmc.init(random.key(0), jnp.asarray(SEEN))
    with pytest.raises(ValueError, match=r"'s(_0)?' is discrete: the guide learns it by the reweighted gradient"):
        pvmc.update(state, jnp.asarray(SEEN))
