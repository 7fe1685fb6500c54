"""Series spread over devices: the numbers of one device, and between devices only what all series share."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import few_particles
from linear_gaussian import distribution, guide, model, on_two_devices, simulate
from numpyro_pvmc import PVMC, AutoSmoothedNormal, ImportanceSmoothedELBO
from numpyro_pvmc.ops.smoothing import log_normalizer, marginals

pytestmark = few_particles

STEPS, SERIES, PARTICLES = 40, 4, 16


@pytest.fixture
def data():
    return jnp.asarray(simulate(distribution(), STEPS, SERIES)[1], jnp.float32)


def between_devices(function, *args):
    """What goes from one device to the others: in which way, and how many numbers."""
    program = jax.jit(function).lower(*args).compile().as_text()
    ways = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.+?) ({ways})(?:-start)?\(", program)
    sizes = lambda shapes: [
        math.prod(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\[([\d,]*)\]", shapes)
    ]
    return [(way, size) for shapes, way in found for size in sizes(shapes)]


@pytest.mark.parametrize(
    "method", ["sequential", *(pytest.param(method, marks=pytest.mark.slow) for method in ("blocked", "associative"))]
)
def test_sums_over_trajectories(method):
    """One pass forwards and one backwards keep series apart; products of matrices are put together as the caches want them."""
    keys = jax.random.split(jax.random.key(0))
    node = jax.random.normal(keys[0], (STEPS + 1, SERIES, PARTICLES))
    edge = jax.random.normal(keys[1], (STEPS, SERIES, PARTICLES, PARTICLES))

    def work(node, edge):
        gradient = jax.grad(lambda *potentials: log_normalizer(*potentials, method=method).sum(), (0, 1))(node, edge)
        return marginals(node, edge, method=method), gradient

    expected, actual = jax.jit(work)(node, edge), jax.jit(work)(on_two_devices(node), on_two_devices(edge))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), expected, actual)
    assert len(actual[0].log_normalizer.sharding.device_set) == 2
    if method == "sequential":
        assert not between_devices(work, on_two_devices(node), on_two_devices(edge))


def test_value_and_gradient(data):
    """The gradient of what all series share is added up over devices, and nothing else."""
    params = {"decay": jnp.float32(0.38), "loc": data / 2, "log_scale": jnp.full(data.shape, -0.3)}
    loss = ImportanceSmoothedELBO(PARTICLES, method="sequential")
    work = jax.value_and_grad(lambda params, data: loss.loss(jax.random.key(0), params, model, guide, data))
    of_series = params | {name: on_two_devices(params[name]) for name in ("loc", "log_scale")}
    expected, actual = jax.jit(work)(params, data), jax.jit(work)(of_series, on_two_devices(data))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), expected, actual)
    assert len(actual[1]["loc"].sharding.device_set) == 2
    shared = [("all-reduce", 1), ("all-reduce", 25)]  # the loss, and the gradient of the matrix
    assert sorted(between_devices(work, of_series, on_two_devices(data))) == shared


@pytest.mark.parametrize(
    "smoothed",
    [pytest.param(False, marks=pytest.mark.slow, id="guide with parameters"), pytest.param(True, id="refitted guide")],
)
def test_run_and_posterior(data, smoothed):
    pvmc = PVMC(model, AutoSmoothedNormal(model) if smoothed else guide, optax.adam(1e-2), num_particles=PARTICLES)

    def work(data):
        result = pvmc.run(jax.random.key(0), 5, data, progress_bar=False)
        posterior = pvmc.posterior(jax.random.key(1), result.params, data)
        return result.losses, result.params, posterior.mean()

    expected, actual = work(data), work(on_two_devices(data))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), expected, actual)
    assert len(actual[-1]["x"].sharding.device_set) == 2
