"""A model that is deleted is freed, with all that it closes over, whatever was done with it."""

import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC, AutoSmoothedNormal, AutoStateSpace, ImportanceSmoothedELBO
from numpyro_pvmc.exact import exact_posterior

pytestmark = few_particles

T = 4
Y = jnp.linspace(-1.0, 1.0, T)
KEY = jax.random.key(0)


class Covariates:
    def __init__(self):
        self.values = jnp.ones((T, 2))

    def model(self, y):
        slope = numpyro.param("slope", jnp.zeros(2))

        def step(x_prev, inputs):
            drive, y_t = inputs
            x = numpyro.sample("x", dist.Normal(x_prev + drive, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, (self.values @ slope, y))

    def regimes(self, y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))

        def step(z_prev, y_t):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.7, 0.3], [0.2, 0.8]])[z_prev]))
            numpyro.sample("y", dist.Normal(level + z * self.values[0, 0], 1.0), obs=y_t)
            return z, None

        scan(step, 0, y)


def train(make_guide, model):
    pvmc = PVMC(model, make_guide(model), optax.adam(0.01), num_particles=4)
    state = pvmc.init(KEY, Y)
    pvmc.evaluate(pvmc.update(state, Y)[0], Y)
    pvmc.run(KEY, 2, Y, progress_bar=False)


def smooth(model):
    pvmc = PVMC(model, num_particles=4)
    params = pvmc.get_params(pvmc.init(KEY, Y))
    posterior = pvmc.posterior(KEY, params, Y)
    posterior.sample(KEY, (2,))
    posterior.to_arviz(num_samples=2)
    pvmc.sample_posterior(KEY, params, Y, sample_shape=(2,))


def refuse(model):
    with pytest.raises(ValueError, match="contain NaN"):
        PVMC(model, AutoNormal(model), num_particles=4).init(KEY, Y.at[1].set(jnp.nan))


def stock(model):
    loss = ImportanceSmoothedELBO(num_particles=4)
    SVI(model, AutoNormal(model), optax.adam(0.01), loss).run(KEY, 2, Y, progress_bar=False)


def exact(params, model):
    exact_posterior(model, params, Y).sample(KEY, (2,))


USES = {
    "AutoNormal": (partial(train, AutoNormal), "model"),
    "AutoSmoothedNormal": (partial(train, AutoSmoothedNormal), "model"),
    "smooth": (smooth, "model"),
    "refuse": (refuse, "model"),
    "stock": (stock, "model"),
    "exact": (partial(exact, {"slope": jnp.zeros(2)}), "model"),
    "finite": (partial(exact, {"level": 0.3}), "regimes"),
    "AutoStateSpace": (partial(train, AutoStateSpace), "model"),
}
IN_SECONDS = ("AutoNormal", "smooth", "exact")


@pytest.mark.parametrize("use", [pytest.param(name, marks=() if name in IN_SECONDS else pytest.mark.slow) for name in USES])
def test_a_deleted_model_is_freed(use):
    """A function, and what it closes over; an array of 30 MB would be freed alike."""
    function, name = USES[use]
    covariates = Covariates()
    program = getattr(covariates, name)

    def model(y):
        return program(y)

    there = [weakref.ref(x) for x in (model, covariates, covariates.values)]
    function(model)
    del covariates, model, program
    gc.collect()
    assert [reference() for reference in there] == [None] * 3


def test_a_method_is_compiled_once_and_freed_with_its_object(caplog):
    """`covariates.model` is a new object whenever it is written."""
    covariates = Covariates()
    there = weakref.ref(covariates)
    params = {"slope": jnp.zeros(2)}

    def posterior_and_compilations():
        caplog.clear()
        with jax.log_compiles(True):
            posterior = exact_posterior(covariates.model, params, Y)
        return posterior, sum("XLA compilation of jit(of_rest)" in record.getMessage() for record in caplog.records)

    first, second = posterior_and_compilations(), posterior_and_compilations()
    assert first[1] > 0
    assert second[1] == 0
    assert first[0].log_normalizer == second[0].log_normalizer
    del covariates, first, second
    gc.collect()
    assert there() is None


class Slotted:
    """A model without a hash and without weak references."""

    __slots__ = ("covariates",)
    __hash__ = None

    def __init__(self):
        self.covariates = Covariates()

    def __call__(self, y):
        return self.covariates.model(y)


def test_a_model_without_a_hash_or_weak_references():
    params = {"slope": jnp.zeros(2)}
    one, other = exact_posterior(Slotted(), params, Y), exact_posterior(Covariates().model, params, Y)
    np.testing.assert_allclose(one.mean()["x"], other.mean()["x"])


@pytest.mark.slow
def test_smoothing_a_model_without_a_hash_or_weak_references():
    model, params = Slotted(), {"slope": jnp.zeros(2)}
    assert PVMC(model, num_particles=4).posterior(KEY, params, Y, refine=1).sample(KEY, (2,))["x"].shape == (2, T)
