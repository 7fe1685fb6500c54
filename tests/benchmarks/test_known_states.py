"""A training step of the paper's prey-predator experiment: 256 steps, 16 series, 32 particles, float32.

Drift and spread are two networks of 5 x 32, the guide a network of convolutions; the loss is the squared error of the smoothed
state less the bound (Brady, Nüsken & Li, ICML 2026).
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module

from numpyro_pvmc import PVMC, AutoAmortisedNormal, SupervisedELBO
from numpyro_pvmc.networks import Convolutions
from prey_predator import DT, START, STEPS, simulate

LONG_RUNS = True
K, SERIES, WIDTH = 32, 16, 32
OTHERS = "15 s: the authors' PyTorch code; 0.52 s: the fastest filter of pydpf; medians on two CPU cores of another machine"


class Network(nnx.Module):
    def __init__(self, rngs):
        sizes = [2, *[WIDTH] * 5, 2]
        self.layers = nnx.List(nnx.Linear(*size, rngs=rngs) for size in pairwise(sizes))

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.swish(layer(x))
        return self.layers[-1](x)


def model(y, states=None):
    drift = nnx_module("drift", Network(nnx.Rngs(0)))
    spread = nnx_module("spread", Network(nnx.Rngs(1)))
    series = numpyro.plate("series", y.shape[1])

    def step(x, y_t):
        with series:
            scale = jnp.exp(jnp.tanh(spread(x))) * np.sqrt(DT)
            x = numpyro.sample("x", dist.Normal(x + drift(x) * DT, scale).to_event(1))
            f = jnp.stack([5 * x[..., 0], x[..., 0] * x[..., 1]], -1)
            numpyro.sample("y", dist.Poisson(5 * nnx.sigmoid(f - 4)).to_event(1), obs=y_t)
        return x, None

    scan(step, jnp.broadcast_to(jnp.array(START), (y.shape[1], 2)), y)


def test_update(measure):
    states, y = (jnp.asarray(x, jnp.float32) for x in simulate(SERIES))
    guide = AutoAmortisedNormal(model, Convolutions(channels=(16, 32, 32, 32), width=7))
    loss = SupervisedELBO(lambda y, states: {"x": states}, K)
    pvmc = PVMC(model, guide, optax.chain(optax.clip(1.0), optax.adam(1e-3)), loss=loss)
    measure(pvmc.update, pvmc.init(jax.random.key(0), y, states), y, states, others=OTHERS)


def test_networks_alone(measure):
    """Value and gradient of both networks, once a particle."""
    graph, weights = nnx.split([Network(nnx.Rngs(n)) for n in range(2)])
    x = jax.random.normal(jax.random.key(0), (STEPS, SERIES, K, 2))

    def total(weights, x):
        return sum(network(x).sum() for network in nnx.merge(graph, weights))

    measure(jax.jit(jax.value_and_grad(total, (0, 1))), weights, x)
