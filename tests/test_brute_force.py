"""The enumeration of trajectories, against chains whose sums are written by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.handlers import mask
from scipy import stats

from brute_force import enumerate_posterior
from models import BY_NAME
from oracles import enumerate_chain
from test_against_enumeration import enumerate_program, smooth

START, MOVE = np.array([0.5, 0.2, 0.3]), np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])


def no_guide(*args):
    pass


@pytest.mark.parametrize("name", [pytest.param("two_coupled_sites", marks=pytest.mark.slow), "padded"])
def test_particles(x64, name):
    program = BY_NAME[name]
    posterior, _ = smooth(program, 2)
    found = enumerate_posterior(posterior, program.model, program.guide, program.args, present=program.present)
    for n in np.ndindex(*program.plates):
        expected = enumerate_program(program, posterior, n)
        assert_allclose(found.log_normalizer[n], expected.log_normalizer, rtol=1e-12)
        times = np.arange(program.length) if program.present is None else np.flatnonzero(program.present[:, *n])
        assert_allclose(found.weights["x_0"][:, *n], expected.weights[0], rtol=1e-10)
        assert_allclose(found.weights["x"][times][:, :, *n], expected.weights[1:], rtol=1e-10)


def test_states_alone(x64):
    """A hidden Markov model of two series, of which the second is a step shorter: no particles, no guide."""
    y, present = np.random.default_rng(0).normal(size=(3, 2)), np.array([[1, 1], [1, 1], [1, 0]], bool)

    def model(y, present):
        plate = numpyro.plate("series", 2)

        def step(z, inputs):
            y_t, present_t = inputs
            with plate, mask(mask=present_t):
                z = numpyro.sample("z", dist.Categorical(jnp.asarray(MOVE)[z]))
                numpyro.sample("y", dist.Normal(1.0 * z, 0.7), obs=y_t)
            return z, None

        with plate:
            z_0 = numpyro.sample("z_0", dist.Categorical(jnp.asarray(START)))
        scan(step, z_0, (y, present))

    posterior = SimpleNamespace(particles={}, globals={}, log_normalizer=np.zeros(2))
    states = {"z_0": np.arange(3), "z": np.arange(3)}
    found = enumerate_posterior(posterior, model, no_guide, (y, present), present=present, states=states)
    for n, length in enumerate([3, 2]):
        log_y = stats.norm.logpdf(y[:length, n, None], np.arange(3), 0.7)
        node = np.concatenate([np.log(START)[None], log_y])
        expected = enumerate_chain(node, np.log([MOVE] * length))
        assert_allclose(found.log_normalizer[n], expected.log_normalizer, rtol=1e-12)
        assert_allclose(found.state_weights["z_0"][n], expected.weights[0], rtol=1e-10)
        assert_allclose(found.state_weights["z"][:length, n], expected.weights[1:], rtol=1e-10)


def test_particles_and_states(x64):
    """A level that a switch moves up or down: the guide proposes the level only."""
    y, x = np.random.default_rng(1).normal(size=2), np.random.default_rng(2).normal(size=(2, 3))

    def model(y):
        def step(carry, y_t):
            s, x = carry
            s = numpyro.sample("s", dist.Categorical(jnp.asarray(MOVE)[s]))
            x = numpyro.sample("x", dist.Normal(x + s - 1.0, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return (s, x), None

        scan(step, (0, 0.0), y)

    def guide(y):
        numpyro.sample("x", dist.Normal(jnp.array([0.1, -0.2]), 1.2))

    posterior = SimpleNamespace(particles={"x": x}, globals={}, log_normalizer=np.zeros(()))
    found = enumerate_posterior(posterior, model, guide, (y,), states={"s": np.arange(3)})
    states, rows = np.tile(np.arange(3), 3), np.repeat(np.arange(3), 3)  # nine points: a particle and a state
    level = x[:, rows]
    proposed = stats.norm.logpdf(level, np.array([[0.1], [-0.2]]), 1.2)
    node = stats.norm.logpdf(y[:, None], level, 0.7) - proposed - np.log(3)
    node[0] += np.log(MOVE[0][states]) + stats.norm.logpdf(level[0], states - 1.0, 0.5)
    edge = np.log(MOVE[states[:, None], states]) + stats.norm.logpdf(level[1], level[0][:, None] + states - 1.0, 0.5)
    expected = enumerate_chain(node, edge[None])
    assert_allclose(found.log_normalizer, expected.log_normalizer, rtol=1e-12)
    assert_allclose(found.weights["x"], expected.weights.reshape(2, 3, 3).sum(2), rtol=1e-10)
    assert_allclose(found.state_weights["s"], expected.weights.reshape(2, 3, 3).sum(1), rtol=1e-10)


def test_too_many(x64):
    posterior = SimpleNamespace(particles={"x": jnp.zeros((2, 100))}, globals={}, log_normalizer=np.zeros(()))
    program = BY_NAME["deterministic_start"]
    with pytest.raises(AssertionError, match="10000 trajectories are too many"):
        enumerate_posterior(posterior, program.model, program.guide, (jnp.ones(2), 0.5))
