"""How cost grows with the number of steps, of particles and of series: one of the three moves, the others stay.

All sizes of a curve are timed in each round, so that they see the same machine. JAX takes its processor for one device, and of
few series one core has most of the work; with the processor as two devices and half of the series on each, both have.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from floor import exponentials, pairs, seconds

from linear_gaussian import distribution, guide, model, on_two_devices, simulate
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.ops.smoothing import Edges, log_normalizer, marginals
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.pvmc.propose import propose

LONG_RUNS = True
SIZES = {"T": (50, 200, 1_000, 3_000, 10_000), "K": (8, 32, 128, 256, 512), "B": (1, 4, 16, 64, 256)}
OTHERS = {"T": 500, "K": 64, "B": 4}
ROUNDS = 9


def of_given_particles(compute, place=lambda x: x):
    """Sums over trajectories alone: their draws, and distributions of single particles, are given."""

    def work(y, params, K):
        arguments = Arguments((y,), {})
        structure = read_structure(model, arguments, params)
        potentials = propose(jax.random.key(0), structure, model, guide, arguments, params, K, particles="iid").potentials
        function, inputs = potentials.edges
        given = place((potentials.node, inputs))
        compiled = jax.jit(lambda node, inputs: compute(node, Edges(function, inputs)))
        return lambda: compiled(*given)

    return work


def of_posterior(y, params, K):
    pvmc = PVMC(model, guide, num_particles=K, particles="iid")
    weights = jax.jit(lambda params, key: pvmc.posterior(key, params, y).log_weights)
    return lambda: weights(params, jax.random.key(0))


def of_training(y, params, K):
    loss = ImportanceSmoothedELBO(K, particles="iid")
    step = jax.jit(jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide, y)))
    return lambda: step(params, jax.random.key(0))


WORK = {
    "log normalizer": of_given_particles(log_normalizer),
    "weights": of_given_particles(lambda node, edges: marginals(node, edges).log_weights),
    "posterior": of_posterior,
    "bound and gradient": of_training,
}
SPREAD = {"log normalizer, two devices": of_given_particles(log_normalizer, on_two_devices)}


@pytest.mark.parametrize(("work", "axis"), [*itertools.product(WORK, SIZES), *itertools.product(SPREAD, "B")])
def test_curve(benchmark, work, axis):
    sizes = SIZES[axis][1:] if work in SPREAD else SIZES[axis]  # one series is on one device
    calls, times = [], []
    for size in sizes:
        T, K, B = (OTHERS | {axis: size}).values()
        y = jnp.asarray(simulate(distribution(), T, B)[1], jnp.float32)
        params = {"decay": jnp.float32(0.38), "loc": y / 2, "log_scale": jnp.full(y.shape, -0.3)}
        calls.append((WORK | SPREAD)[work](y, params, K))

    def one_round():
        times.append([seconds(exponentials, pairs()), *(seconds(call) for call in calls)])

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    floor, *medians = np.median(times[1:], 0)
    slope = np.polyfit(np.log(sizes[-3:]), np.log(medians[-3:]), 1)[0]
    benchmark.extra_info |= {"work": work, "axis": axis, "sizes": sizes, "E": floor, "seconds": medians, "slope": slope}
    print(f"\n{work}, {axis}: slope at the end {slope:.2f}, E {floor:.4f} s,", np.round(medians, 4))
