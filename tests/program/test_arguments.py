"""What is refused among the arguments of a program, and in which words; what is static and stays allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.exact import exact_posterior

Y = np.sin(np.arange(4, dtype=np.float32))
MASKED = np.ma.masked_array(Y, mask=[False, True, False, False])


def model(y, sizes=(1, 2)):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, sum(sizes) / 3))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def guide(y, sizes=(1, 2)):
    numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 0.5))


@pytest.fixture(scope="module")
def warm():
    """An inference that has compiled for plain data of the shape, which would take the numbers and not the mask."""
    pvmc = PVMC(model, guide, num_particles=2)
    state = pvmc.init(jax.random.key(0), Y)
    pvmc.evaluate(state, Y)
    return pvmc, state, jax.random.key(0)


DOORS = {
    "init": lambda pvmc, state, key: pvmc.init(key, MASKED),
    "update": lambda pvmc, state, key: pvmc.update(state, MASKED),
    "evaluate": lambda pvmc, state, key: pvmc.evaluate(state, MASKED),
    "run": lambda pvmc, state, key: pvmc.run(key, 1, MASKED, progress_bar=False),
    "posterior": lambda pvmc, state, key: pvmc.posterior(key, {}, MASKED),
    "sample_posterior": lambda pvmc, state, key: pvmc.sample_posterior(key, {}, MASKED),
    "exact_posterior": lambda pvmc, state, key: exact_posterior(model, {}, MASKED),
    "keyword": lambda pvmc, state, key: pvmc.evaluate(state, y=MASKED),
    "in a tuple": lambda pvmc, state, key: pvmc.evaluate(state, (Y, MASKED)),
    "stock SVI": lambda pvmc, state, key: ImportanceSmoothedELBO(2).loss(key, {}, model, guide, MASKED),
}


@pytest.mark.parametrize("ask", DOORS.values(), ids=DOORS)
def test_a_masked_array_of_numpy_is_refused_at_every_door(warm, ask):
    with pytest.raises(TypeError, match=r"masked array of NumPy, of shape \(4,\).* `model\(y\.filled\("):
        ask(*warm)


REFUSED = {
    "list": (list(Y), "inputs of `scan` are 4 single numbers, as of a list, .* `jax.numpy.asarray\\(y\\)`"),
    "tuple of Python's": (tuple(Y.tolist()), "inputs of `scan` are 4 single numbers, as of a list"),
    "rows": (Y.reshape(2, 2).tolist(), "inputs of `scan` are 4 single numbers, as of a list"),
    "objects": (Y.astype(object), r"numpy.ndarray of type object.* `y.astype\(float\)`"),
    "words": (np.array(["a", "b"]), r"numpy.ndarray of type <U1\. .*categories as integers"),
    "dates": (np.arange(4).astype("datetime64[D]"), r"numpy.ndarray of type datetime64\[D\]\. Take times as numbers"),
    "records": (np.zeros(4, [("a", float)]), r"numpy.ndarray of type \[\('a', '<f8'\)\]"),
    "series": (pd.Series(Y), r"pandas.*Series of type float32.* `jax.numpy.asarray`"),
    "frame": (pd.DataFrame({"y": Y}), r"pandas.*DataFrame.* `jax.numpy.asarray`"),
}


@pytest.mark.parametrize(("y", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_array_of_numbers_is_named(y, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PVMC(model, guide, num_particles=2).init(jax.random.key(0), y)


def test_a_tuple_that_does_not_reach_the_scan_is_static(warm):
    pvmc, state, _ = warm
    assert pvmc.evaluate(state, Y, (1, 2)) == pvmc.evaluate(state, Y) != pvmc.evaluate(state, Y, sizes=(3, 3))
