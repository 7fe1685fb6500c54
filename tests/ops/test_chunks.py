"""A function of every step, a few steps at a time: the same as all at once, in less memory."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro.infer.autoguide import AutoNormal

from conftest import initial_params
from models import BY_NAME
from numpyro_pvmc import PVMC
from numpyro_pvmc.ops import chunks
from numpyro_pvmc.ops.chunks import at_all_steps

WIDTH = 50
WEIGHTS = random.normal(random.key(0), (4, WIDTH, WIDTH)) / math.sqrt(WIDTH)


def network(weights, x):
    """From D numbers to one and a sum, on the way `WIDTH` in each of the layers."""
    hidden = jnp.repeat(x, WIDTH // x.shape[-1], -1)
    for layer in weights:
        hidden = jax.nn.silu(hidden @ layer)
    return {"first": hidden[..., 0], "total": hidden.sum(-1)}


def at_most(monkeypatch, number):
    monkeypatch.setattr(chunks, "_BYTES_AT_ONCE", number)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        *((1, 1), (7, 3), (12, 3), (12, 100)),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((2, 1), (7, 1), (12, 1), (1, 3), (2, 3), (1, 100), (2, 100), (7, 100))
        ),
    ],
)
def test_parts_are_the_whole(monkeypatch, x64, length, steps):
    x = random.normal(random.key(1), (length, 5))
    evaluate = lambda weights, x: at_all_steps(lambda one: network(weights, one["x"]), {"x": x})
    loss = lambda weights, x: sum((value**2).sum() for value in evaluate(weights, x).values())
    weights = WEIGHTS.astype(float)
    expected = jax.jit(network)(weights, x)
    gradient = jax.jit(jax.grad(lambda *args: sum((value**2).sum() for value in network(*args).values()), (0, 1)))(weights, x)
    push = lambda function: jax.jit(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1])(x)
    slope = push(lambda x: network(weights, x)["total"])
    bytes_of_step = chunks._bytes_on_the_way(jax.make_jaxpr(lambda one: network(weights, one))(x[0]))
    at_most(monkeypatch, steps * bytes_of_step)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, jax.eval_shape(evaluate, weights, x), expected))
    for found, known in zip(jax.tree.leaves(jax.jit(evaluate)(weights, x)), jax.tree.leaves(expected), strict=True):
        assert_allclose(found, known, rtol=1e-12)
    for found, known in zip(jax.jit(jax.grad(loss, (0, 1)))(weights, x), gradient, strict=True):
        assert_allclose(found, known, rtol=1e-10, atol=1e-12)
    assert_allclose(push(lambda x: evaluate(weights, x)["total"]), slope, rtol=1e-10)


def kept(function, x):
    """Bytes that the backward pass reads."""
    pull = jax.eval_shape(lambda x: jax.vjp(function, x)[1], x)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def test_what_is_computed_on_the_way_is_not_kept(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("on an accelerator all steps are taken at once")
    x = jnp.ones((1000, 5))
    evaluate = lambda x: at_all_steps(lambda one: network(WEIGHTS, one), x)
    layers = x.shape[0] * WIDTH * len(WEIGHTS) * 4
    at_most(monkeypatch, 2**60)
    assert kept(evaluate, x) > layers
    at_most(monkeypatch, 10_000)
    assert kept(evaluate, x) < 0.1 * layers


@pytest.mark.parametrize(
    "name", ["autoregression_4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("padded", "two_coupled_sites"))]
)
def test_a_bound_and_its_gradient_step_by_step(monkeypatch, x64, name):
    program = BY_NAME[name]
    pvmc = PVMC(program.model, AutoNormal(program.model), num_particles=4)
    params = initial_params(pvmc, random.key(0), *program.args, **program.kwargs)

    def bound(params):
        return pvmc.loss.loss(random.key(1), params, program.model, pvmc.guide, *program.args, **program.kwargs)

    at_most(monkeypatch, 2**60)
    whole, gradient = jax.jit(jax.value_and_grad(bound))(params)
    at_most(monkeypatch, 1)
    # Another function: what is compiled for one is kept.
    by_step, of_steps = jax.jit(jax.value_and_grad(lambda params: bound(params)))(params)
    assert_allclose(by_step, whole, rtol=1e-12)
    assert jax.tree.leaves(gradient)
    for found, known in zip(jax.tree.leaves(of_steps), jax.tree.leaves(gradient), strict=True):
        assert_allclose(found, known, rtol=1e-9, atol=1e-11)
