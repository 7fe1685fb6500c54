"""With one particle the bound is the plain ELBO on the same draws: NumPyro itself is the oracle, program by program."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from conftest import initial_params
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, markov

T = 5


def walk(x_prev, y_t):
    x = numpyro.sample("x", dist.Normal(0.5 * x_prev, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
    return x, x


def two_plates(y):
    a, b = numpyro.plate("a", 2, dim=-1), numpyro.plate("b", 3, dim=-2)
    with a, b:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x_prev, y_t):
        with a, b:
            return walk(x_prev, y_t)

    scan(step, x_0, y)


def plate_on_the_left(y):
    series = numpyro.plate("series", 3, dim=-2)

    def step(x_prev, y_t):
        with series:
            return walk(x_prev, y_t[:, None])

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


def another_scan(y):
    def drift(z_prev, _):
        z = numpyro.sample("z", dist.Normal(z_prev, 0.1))
        return z, z

    _, zs = scan(drift, 0.0, None, length=T)

    def step(x_prev, inputs):
        y_t, z_t = inputs
        return walk(x_prev + z_t, y_t)

    markov(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), (y, zs))


def hierarchy(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    series = numpyro.plate("series", 3)
    with series:
        a = numpyro.sample("a", dist.Beta(2.0, 2.0))
        x_0 = numpyro.sample("x_0", dist.Normal(mu, 1.0))

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(a * x_prev, 1.0))
            numpyro.sample("y", dist.StudentT(5.0, x, 1.0), obs=y_t)
        return x, None

    scan(step, x_0, y)


def carry_of_many_leaves(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(jnp.tanh(carry["x"]) + 0.1 * carry["t"], jnp.eye(2)))
        scale = numpyro.sample("scale", dist.LogNormal(0.1 * carry["x"].sum() + 0.5 * jnp.log(carry["scale"]), 1.0))
        numpyro.sample("y", dist.Normal(x.sum(), scale), obs=y_t)
        return {"x": x, "t": carry["t"] + 1, "scale": scale}, None

    x_0 = numpyro.sample("x_0", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    scan(step, {"x": x_0, "t": 0, "scale": jnp.ones(())}, y)


def factors(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        numpyro.factor("near", -0.5 * (x - y_t) ** 2)
        return x, None

    scan(step, 0.0, y)
    numpyro.factor("constant", -1.3)


def scaled_emission(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        with numpyro.handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    with numpyro.handlers.scale(scale=0.7):
        scan(step, 0.0, y)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(two_plates, (3, 2), marks=pytest.mark.slow),
        (plate_on_the_left, (3,)),
        pytest.param(another_scan, (), marks=pytest.mark.slow),
        (hierarchy, (3,)),
        pytest.param(carry_of_many_leaves, (), marks=pytest.mark.slow),
        (factors, ()),
        (scaled_emission, ()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_particle_is_trace_elbo(x64, model, shape):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(T, *shape)))
    guide = AutoNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    params = initial_params(svi, jax.random.key(0), y)
    plain, smoothed = (
        jax.jit(lambda params, loss=loss: loss.loss(jax.random.key(1), params, model, guide, y))(params)
        for loss in (Trace_ELBO(), ImportanceSmoothedELBO(1))
    )
    assert_allclose(smoothed, plain, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "plates"), [(two_plates, (3, 2)), (plate_on_the_left, (3,)), (another_scan, ())])
def test_shapes_are_tidy_in_the_posterior_and_the_models_own_in_samples(model, plates):
    y = jnp.zeros((T, *plates))
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    params = initial_params(pvmc, jax.random.key(0), y)
    posterior = pvmc.posterior(jax.random.key(2), params, y)
    assert posterior.log_normalizer.shape == plates
    assert posterior.particles["x"].shape[: 2 + len(plates)] == (T, 4, *plates)
    samples = pvmc.sample_posterior(jax.random.key(3), params, y, sample_shape=(2,))
    traced = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(y)
    assert all(value.shape == (2, *np.shape(traced[name]["value"])) for name, value in samples.items())
