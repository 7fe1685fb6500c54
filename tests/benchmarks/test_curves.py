"""How cost grows with the number of steps, of particles and of series: one of the three moves, the others stay."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

from linear_gaussian import law, model, simulate
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.chain import read_structure
from numpyro_pvmc.potentials import propose
from numpyro_pvmc.program import Arguments
from numpyro_pvmc.smoothing import Edges, log_normalizer

LONG_RUNS = True
SIZES = (
    [("T", T, 64, 4) for T in (50, 200, 1_000, 3_000, 10_000)]
    + [("K", 500, K, 4) for K in (8, 32, 128, 256, 512)]
    + [("B", 500, 64, B) for B in (1, 4, 16, 32, 64)]
)
every_size = pytest.mark.parametrize(("axis", "T", "K", "B"), SIZES)


def guide(y):
    loc, log_scale = numpyro.param("loc", y / 2), numpyro.param("log_scale", jnp.full(y.shape, -0.3))
    with numpyro.plate("series", y.shape[1]):
        numpyro.sample("x_0", dist.Normal(loc[0], jnp.exp(log_scale[0])).to_event(1))
        numpyro.sample("x", dist.Normal(loc[1:], jnp.exp(log_scale[1:])).to_event(1))


@pytest.fixture
def problem(T, B):
    y = jnp.asarray(simulate(law(), T, B)[1], jnp.float32)
    return y, {"decay": jnp.float32(0.38), "loc": y / 2, "log_scale": jnp.full(y.shape, -0.3)}


@every_size
def test_log_normalizer(measure, problem, axis, T, K, B):
    """Of particles that are given."""
    y, params = problem
    arguments = Arguments((y,), {})
    structure = read_structure(model, arguments, params)
    lattice = propose(jax.random.key(0), structure, model, guide, arguments, params, K, particles="iid")
    function, inputs = lattice.edges
    weigh = jax.jit(lambda node, inputs: log_normalizer(node, Edges(function, inputs)))
    measure(weigh, lattice.node, inputs, rounds=9, axis=axis, T=T, K=K, B=B)


@every_size
def test_value_and_gradient(measure, problem, axis, T, K, B):
    y, params = problem
    loss = ImportanceSmoothedELBO(K, particles="iid")
    step = jax.jit(jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide, y)))
    measure(step, params, jax.random.key(0), rounds=9, axis=axis, T=T, K=K, B=B)


@every_size
def test_posterior(measure, problem, axis, T, K, B):
    y, params = problem
    pvmc = PVMC(model, guide, num_particles=K, particles="iid")
    weights = jax.jit(lambda params, key: pvmc.posterior(key, params, y).log_weights)
    measure(weights, params, jax.random.key(0), rounds=9, axis=axis, T=T, K=K, B=B)
