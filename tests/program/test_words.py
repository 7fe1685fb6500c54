"""What is refused is refused in a person's words, and the error shows that person's lines."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC

Y = jnp.linspace(-1.0, 1.0, 4)


def emit(x, y_t):
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)


def chain(init, new_carry):
    def model(y):
        def step(carry, y_t):
            x = numpyro.sample("x", dist.Normal(0.5 * jnp.asarray(jax.tree.leaves(carry)[0], float), 1.0))
            emit(x, y_t)
            return new_carry(carry, x), None

        scan(step, init, y)

    return model


CARRIES = {
    "a truth value that counts": (lambda: (0.0, False), lambda c, x: (x, c[1] + 1)),
    "an integer array that becomes real": (lambda: (0.0, jnp.zeros((), int)), lambda c, x: (x, c[1] + 0.5)),
    "a number that becomes a vector": (lambda: (0.0, 0.0), lambda c, x: (x, jnp.zeros(2))),
    "a list that becomes a tuple": (lambda: [0.0, 0.0], lambda c, x: (x, x)),
    "a state of integers": (lambda: np.int32(0), lambda c, x: x),
}


@pytest.mark.parametrize("name", CARRIES)
def test_a_carry_that_numpyro_refuses(name):
    init, new = CARRIES[name]
    with pytest.raises(TypeError, match="carry"):  # NumPyro's own, of `jax.lax.scan`
        lax.scan(lambda c, _: (new(c, jnp.zeros(())), None), init(), None, length=2)
    with pytest.raises((TypeError, ValueError), match=r"The carry of `scan` must keep its (types|structure|shapes)"):
        PVMC(chain(init(), new)).init(random.key(0), Y)


@pytest.mark.parametrize("init", [0, 0.0, np.float32(0.0)], ids=["int", "float", "float32"])
def test_a_carry_that_numpyro_promotes(init):
    """A clock that starts at a Python number: compared with the same carry written as an array."""
    count = lambda c, x: (x, c[1] + 0.4)
    found = [PVMC(chain((0.0, one), count)).posterior(random.key(0), {}, Y) for one in (init, jnp.zeros(()))]
    assert found[0].log_normalizer == found[1].log_normalizer


def test_improper_start():
    def model(y):
        start = numpyro.sample("x_0", dist.ImproperUniform(dist.constraints.real, (), ()))
        scan(lambda x, y_t: (numpyro.sample("x", dist.Normal(x, 1.0)), None), start, y)

    with pytest.raises(ValueError, match=r"'x_0' outside the scan has an `ImproperUniform`.*wide Normal"):
        PVMC(model).init(random.key(0), Y)


def test_noise_of_a_key():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            emit(x + random.normal(numpyro.prng_key()), y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"`numpyro\.prng_key\(\)`.*`numpyro\.sample`"):
        PVMC(model).init(random.key(0), Y)


def test_forgotten_data():
    def model(y=None):
        scan(lambda x, y_t: (numpyro.sample("x", dist.Normal(x, 1.0)), None), 0.0, y)

    with pytest.raises(ValueError, match=r"called without its data.*`run\(rng_key, num_steps, y\)`"):
        PVMC(model).run(random.key(0), 10)


def files_of(error):
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def with_bug(y):
    scan(lambda x, y_t: (numpyro.sample("x", dist.Normal(x, jnp.ones(2) @ jnp.ones(3))), None), 0.0, y)


def accumulating(y):
    scan(lambda x, y_t: (x + numpyro.sample("x", dist.Normal(x, 1.0)), None), 0.0, y)


@pytest.mark.parametrize("model", [with_bug, accumulating])
@pytest.mark.parametrize("call", ["init", "run", "posterior"])
def test_tracebacks_are_short(model, call):
    """Between the call and the line at fault one frame of this library is left."""
    pvmc, arguments = PVMC(model), {"init": (Y,), "run": (2, Y), "posterior": ({}, Y)}[call]
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(pvmc, call)(random.key(0), *arguments)
    files = files_of(caught.value)
    others = [file for file in files if file != __file__]
    assert len(others) <= 2, files
    assert (files[-1] == __file__) == (model is with_bug)


@pytest.fixture
def unfiltered():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def test_tracebacks_are_whole_if_asked_for(unfiltered):
    with pytest.raises(ValueError, match="accumulates") as caught:
        PVMC(accumulating).init(random.key(0), Y)
    assert any(file.endswith("analysis.py") for file in files_of(caught.value))
