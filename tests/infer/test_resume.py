"""Going on from a state: in another object, after pickling, inside of a compiled function; states that do not fit."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC
from numpyro_pvmc.infer import pickling

pytestmark = few_particles

Y = jnp.sin(jnp.arange(6.0))


def model(y, name="scale"):
    scale = numpyro.param(name, 0.5, constraint=dist.constraints.positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def with_auto_normal(**static):
    return PVMC(model, AutoNormal(model), optax.adam(0.01), num_particles=4, **static)


def refitted():
    return PVMC(model, optim=optax.adam(0.01), num_particles=4)


def through_numpy(state):
    return jax.tree.map(np.asarray, pickle.loads(pickle.dumps(state)))


@pytest.fixture(scope="module", params=[with_auto_normal, refitted], ids=["AutoNormal", "refitted"])
def begun(request):
    """How to make an inference, its state after a few steps, and where it went from there."""
    pvmc = request.param()
    state = pvmc.run(random.PRNGKey(0), 5, Y, progress_bar=False, grow=False).state
    return request.param, through_numpy(state), pvmc.run(random.key(9), 3, Y, progress_bar=False, init_state=state)


def test_a_new_object_goes_on_where_another_stopped(begun):
    make, state, expected = begun
    result = make().run(random.key(1), 3, Y, progress_bar=False, init_state=state)
    assert_allclose(result.losses, expected.losses, rtol=1e-6)
    jax.tree.map(lambda one, other: assert_allclose(one, other, rtol=1e-5), result.params, expected.params)


def test_a_new_object_evaluates_a_state(begun):
    make, state, expected = begun
    new = make()
    with pytest.raises(ValueError, match=r"constraints of the parameters are not known before the model has met data"):
        new.get_params(state)
    assert_allclose(new.evaluate(state, Y), expected.losses[0], rtol=1e-6)
    assert new.get_params(state)["scale"] > 0


@pytest.mark.slow
def test_a_new_object_updates_a_state_and_smooths(begun):
    make, state, expected = begun
    assert_allclose(make().update(state, Y)[1], expected.losses[0], rtol=1e-6)
    assert np.isfinite(make().posterior(random.key(0), expected.params, Y).log_normalizer)


@pytest.mark.slow
def test_it_goes_on_inside_of_a_compiled_function(begun):
    make, state, expected = begun
    pvmc = make()
    pvmc.init(random.key(0), Y)  # an automatic guide of NumPyro sets itself up by numbers
    losses = jax.jit(lambda state, y: pvmc.run(random.key(1), 3, y, progress_bar=False, init_state=state).losses)(state, Y)
    assert_allclose(losses, expected.losses, rtol=1e-5)


def test_a_random_key_of_the_new_kind_is_pickled():
    state = refitted().init(random.key(3), Y)
    again = pickle.loads(pickle.dumps(state))
    assert_array_equal(random.key_data(again.rng_key), random.key_data(state.rng_key))


OTHERS = {
    "names": (lambda: with_auto_normal(name="s"), Y, r"its parameter has the names \['scale', .* and here they are \['s', "),
    "length": (with_auto_normal, Y[:4], r"parameter 'x_auto_loc' has the shape \(6,\) in the state, and \(4,\) for this"),
    "guide": pytest.param(refitted, Y, r"of another model or guide: its parameter .* 'x_0_auto_loc'", marks=pytest.mark.slow),
    "optimiser": (lambda: PVMC(model, AutoNormal(model), numpyro.optim.Adam(0.01)), Y, r"one of another optimiser"),
    "other sgd": (lambda: PVMC(model, AutoNormal(model), optax.sgd(0.01)), Y, r"optimiser that it was made with, or start"),
}


@pytest.fixture(scope="module")
def state():
    return with_auto_normal().init(random.key(0), Y)


@pytest.mark.parametrize(("make", "y", "message"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_something_else_is_refused(make, y, message, state):
    with pytest.raises(ValueError, match=message):
        make().run(random.key(0), 3, y, progress_bar=False, init_state=state)


def test_what_is_no_state_is_refused(state):
    with pytest.raises(TypeError, match=r"must be an `SVIState`, such as `result.state` of `run`.* but got a tuple"):
        with_auto_normal().run(random.key(0), 3, Y, progress_bar=False, init_state=tuple(state))


@pytest.mark.parametrize("enabled", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["on", "off"])
def test_precision_that_is_switched_between(enabled):
    """In the object that knows the old precision, and in one that only sees the state."""
    y = np.asarray(Y, np.float32)
    with jax.enable_x64(not enabled):
        pvmc = refitted()
        state = pvmc.init(random.key(0), y)
    with jax.enable_x64(enabled):
        with pytest.raises(ValueError, match=r"met its data when floats were float\d\d, and now they are float\d\d. Set"):
            pvmc.run(random.key(0), 3, y, progress_bar=False, init_state=state)
        with pytest.raises(
            ValueError, match=r"parameter 'scale' is float\d\d in the state, and float\d\d here.*jax_enable_x64"
        ):
            refitted().run(random.key(0), 3, y, progress_bar=False, init_state=state)


def test_constraints_that_read_the_data_are_those_of_the_data_in_compiled_functions():
    def bounded(y):
        level = numpyro.param("level", y.max() / 2, constraint=dist.constraints.interval(0.0, y.max()))
        scan(lambda x, y_t: (numpyro.sample("x", dist.Normal(x, 1.0)), None), level, y)

    guide = lambda y: numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0))
    pvmc, small, large = PVMC(bounded, guide, num_particles=2), jnp.ones(3), 8.0 * jnp.ones(3)
    pvmc.evaluate(pvmc.init(random.key(0), small), small)
    state = pvmc.init(random.key(0), large)
    key = random.split(state.rng_key)[1]
    loss = jax.jit(lambda y: pvmc.loss.loss(key, {"level": jnp.array(4.0)}, bounded, guide, y))(large)
    assert_allclose(pvmc.evaluate(state, large), loss, rtol=1e-6)


@pytest.mark.slow
def test_an_inference_is_copied_and_pickled():
    pytest.importorskip("cloudpickle")
    pvmc = refitted()
    loss = pvmc.evaluate(pvmc.init(random.key(0), Y), Y)
    for again in (pickle.loads(pickle.dumps(pvmc)), copy.deepcopy(pvmc), copy.copy(pvmc)):
        assert_allclose(again.evaluate(again.init(random.key(0), Y), Y), loss, rtol=1e-6)


def test_an_inference_that_cannot_be_pickled_says_what_to_pickle(monkeypatch):
    monkeypatch.setattr(pickling, "cloudpickle", None)
    with pytest.raises(TypeError, match=r"`PVMC` is not pickled.* Pickle `result.state`.* go on with `run\(\.\.\., init_state"):
        pickle.dumps(refitted())
