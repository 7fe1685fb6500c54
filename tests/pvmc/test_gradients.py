"""The guide's gradients: the same mean, other noise; and the model's gradient against finite differences.

A Gaussian chain of 4 steps, whose guide is a little off.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import ImportanceSmoothedELBO

Y = jnp.array([0.3, -0.5, 1.2, 0.4])
PARAMS = {"loc": jnp.array([0.1, 0.1, 0.3, 0.5, 0.3]), "log_scale": jnp.full(5, -0.3), "a": jnp.array(0.8)}


def model(y):
    a = numpyro.param("a", 0.8)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(a * x_prev, 0.7))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def guide(y):
    loc, scale = numpyro.param("loc", jnp.zeros(5)), jnp.exp(numpyro.param("log_scale", jnp.zeros(5)))
    numpyro.sample("x_0", dist.Normal(loc[0], scale[0]))
    numpyro.sample("x", dist.Normal(loc[1:], scale[1:]))


@functools.cache
def gradients(gradient, num_particles, number):
    """Draws of the bound's gradient, (number, 11): by loc, log scale and the model's coefficient."""
    loss = ImportanceSmoothedELBO(num_particles, gradient=gradient, particles="iid")

    def one(key):
        slope = jax.grad(lambda params: -loss.loss(key, params, model, guide, Y))(PARAMS)
        return jnp.concatenate([slope["loc"], slope["log_scale"], slope["a"][None]])

    keys = jax.random.split(jax.random.key(num_particles), number)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(keys), np.float64)


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / np.sqrt(len(draws))


@pytest.mark.parametrize("num_particles", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 64)), 16])
def test_doubly_reparameterised_gradient_has_the_mean_of_the_plain_one(num_particles):
    number = 40_000 if num_particles == 1 else 20_000
    plain, plain_error = mean_and_error(gradients("reparam", num_particles, number))
    doubly, doubly_error = mean_and_error(gradients("doubly_reparam", num_particles, number))
    assert (plain_error < 0.02).all(), f"too blunt to see anything: {plain_error}"
    assert (abs(plain - doubly) < 4.5 * np.hypot(plain_error, doubly_error)).all()


@pytest.mark.slow
def test_signal_to_noise_at_64_particles():
    def signal_to_noise(draws):
        mean = gradients("doubly_reparam", 64, 20_000).mean(0)[:10]  # the better estimate of what both are of
        return np.linalg.norm(mean) / np.sqrt(draws[:, :10].var(0).sum())

    plain = signal_to_noise(gradients("reparam", 64, 20_000))
    doubly = signal_to_noise(gradients("doubly_reparam", 64, 20_000))
    assert doubly > 50 * plain


@pytest.mark.slow
def test_sticking_the_landing_is_biased_for_more_than_one_particle():
    plain, plain_error = mean_and_error(gradients("reparam", 4, 20_000))
    sticking, sticking_error = mean_and_error(gradients("sticking", 4, 20_000))
    off = abs(plain - sticking) / np.hypot(plain_error, sticking_error)
    assert off[:10].max() > 20
    assert off[10] < 4.5  # the model's gradient is the same


def test_sticking_the_landing_is_the_doubly_reparameterised_gradient_of_one_particle():
    assert_allclose(gradients("sticking", 1, 1000), gradients("doubly_reparam", 1, 1000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["sequential", pytest.param("associative", marks=pytest.mark.slow)])
def test_plain_gradient_against_finite_differences(x64, method):
    loss = ImportanceSmoothedELBO(8, gradient="reparam", method=method)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
    value = jax.jit(lambda params: loss.loss(jax.random.key(0), params, model, guide, jnp.asarray(Y, jnp.float64)))
    check_grads(value, (params,), order=2 if method == "sequential" else 1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradient", ["doubly_reparam", pytest.param("sticking", marks=pytest.mark.slow)])
def test_gradient_of_the_model_against_finite_differences(x64, gradient):
    loss = ImportanceSmoothedELBO(8, gradient=gradient)
    value = jax.jit(lambda a: loss.loss(jax.random.key(0), PARAMS | {"a": a}, model, guide, Y))
    check_grads(value, (jnp.array(0.8, jnp.float64),), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "gradient", ["doubly_reparam", *(pytest.param(g, marks=pytest.mark.slow) for g in ("reparam", "sticking"))]
)
def test_padding_gets_no_gradient_and_spoils_none(gradient):
    """Two series, the second one padded with nan: its guide's parameters there stay as they are."""
    y = jnp.stack([Y, Y.at[2:].set(jnp.nan)], 1)
    present = ~jnp.isnan(y)

    def padded(y, present):
        plate = numpyro.plate("series", 2)

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with plate, numpyro.handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.7))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, present))

    def wide_guide(y, present):
        numpyro.sample("x_0", dist.Normal(numpyro.param("loc_0", jnp.zeros(2)), 1.0))
        numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros((4, 2))), 1.0))

    params = {"loc_0": jnp.zeros(2), "loc": jnp.zeros((4, 2))}
    loss = ImportanceSmoothedELBO(4, gradient=gradient)
    slope = jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(0), p, padded, wide_guide, y, present)))(params)
    assert np.isfinite(slope["loc"]).all()
    assert (slope["loc"][2:, 1] == 0).all()
    assert (slope["loc"][:2, 1] != 0).all()
