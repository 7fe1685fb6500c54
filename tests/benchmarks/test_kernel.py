"""Medians of finished work at the size of the paper's linear-Gaussian experiment, and their ratios to the floor E.

500 transitions, 16 series, 64 particles in 5 dimensions, float32. E is measured before each round, in the same run. Run by
`pytest tests/benchmarks`; the ratios are in the file that `--benchmark-json` writes, and printed with `-s`.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from linear_gaussian import SERIES, TRANSITIONS, distribution, guide, model, on_two_devices, simulate
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.draws import draw, sites_to_draw
from numpyro_pvmc.ops.smoothing import Edges, log_normalizer, marginals
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.pvmc.propose import propose

LONG_RUNS = True  # else XLA would leave out the optimisations that are measured here
K = 64
AUTHORS = (
    "6.4 s for one training step of the guide, 12.6 s of guide and model, 5.4 s for the smoothing weights: the PyTorch code of "
    "Brady, Nüsken & Li (ICML 2026) at this size, float32, medians on two CPU cores of another machine"
)


@pytest.fixture(scope="module")
def y():
    return jnp.asarray(simulate(distribution(), TRANSITIONS, SERIES)[1], jnp.float32)


@pytest.fixture(scope="module")
def params(y):
    return {"decay": jnp.float32(0.38), "loc": y / 2, "log_scale": jnp.full(y.shape, -0.3)}


@pytest.fixture(scope="module")
def potentials(y, params):
    arguments = Arguments((y,), {})
    structure = read_structure(model, arguments, params)
    return propose(jax.random.key(0), structure, model, guide, arguments, params, K).potentials


def test_draws(measure, y, params):
    """Particles alone: in `test_value_and_gradient` and `test_update`, not in the others."""
    arguments = Arguments((y,), {})
    drawn = sites_to_draw(read_structure(model, arguments, params))
    measure(jax.jit(lambda params, key: draw(guide, arguments, params, key, drawn, K)[0]), params, jax.random.key(0))


@pytest.mark.parametrize("weigh", [log_normalizer, marginals], ids=["log_normalizer", "marginals"])
def test_lattice(measure, potentials, weigh):
    function, inputs = potentials.edges
    measure(jax.jit(lambda node, inputs: weigh(node, Edges(function, inputs))), potentials.node, inputs)


def value_and_gradient():
    loss = ImportanceSmoothedELBO(K)
    return jax.jit(jax.value_and_grad(lambda params, key, y: loss.loss(key, params, model, guide, y)))


def test_value_and_gradient(measure, y, params):
    measure(value_and_gradient(), params, jax.random.key(0), y)


def test_value_and_gradient_on_two_devices(measure, y, params):
    """The processor's cores as devices, half of the series on each."""
    y, loc, log_scale = on_two_devices((y, params["loc"], params["log_scale"]))
    measure(value_and_gradient(), params | {"loc": loc, "log_scale": log_scale}, jax.random.key(0), y)


def test_update(measure, y):
    pvmc = PVMC(model, guide, optax.adam(1e-3), num_particles=K)
    measure(pvmc.update, pvmc.init(jax.random.key(0), y), y, authors=AUTHORS)


def test_compile_value_and_gradient(benchmark, y, params):
    benchmark.pedantic(
        lambda: value_and_gradient().lower(params, jax.random.key(0), y).compile(), setup=jax.clear_caches, rounds=3
    )
