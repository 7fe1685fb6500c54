"""The Gaussian at the mode: exact for a linear-Gaussian chain, a mode for others, and a good proposal."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy.optimize import minimize

from linear_gaussian import distribution, simulate
from linear_gaussian import model as linear_gaussian
from models import BY_NAME
from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.chain.unconstrained import coordinates_of_model
from numpyro_pvmc.guides.gaussian import Proposal
from numpyro_pvmc.guides.laplace import _log_joint, _points, laplace
from numpyro_pvmc.guides.refitting import propose_gaussian
from numpyro_pvmc.ops.gaussian import Moments
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.program.arguments import Arguments
from oracles import LinearGaussian, rts_smoother

pytestmark = pytest.mark.usefixtures("x64")


def read(program, *args):
    structure = read_structure(program, Arguments(args), {})
    chain = read_chain(structure, program, Arguments(args), {})
    return chain, coordinates_of_model(chain)


def wide(chain, coordinates, place=0.0):
    plates = [plate.size for plate in chain.structure.plates]
    sizes = [sum(block.size for block in blocks) for blocks in coordinates]
    of = lambda length, size: Moments(jnp.full((length, *plates, size), place), jnp.ones((length, *plates, size)))
    return Proposal(of(1, sizes[0]) if sizes[0] else None, of(chain.structure.length, sizes[1]))


def at_mode(program, *args, place=0.0, **choices):
    chain, coordinates = read(program, *args)
    found = jax.jit(lambda: laplace(chain, coordinates, wide(chain, coordinates, place), **choices))()
    return chain, coordinates, found


def covariance(moments):
    return moments.factor @ jnp.swapaxes(moments.factor, -1, -2)


def slope(chain, coordinates, found):
    points = _points(chain, coordinates, found)
    gradient = jax.jit(jax.grad(lambda z: _log_joint(chain, coordinates, z, points.order).sum()))(points.mean)
    return jnp.abs(jnp.where(points.present, gradient, 0.0)).max()


def effective_share(chain, coordinates, found, num_particles=64):
    potentials = propose_gaussian(random.key(0), chain, coordinates, found, num_particles)
    log_weights = marginals(potentials.node, potentials.edges, potentials.mask).log_weights
    return 1 / jnp.exp(2 * log_weights).sum(-1) / num_particles


def test_one_step_smooths_a_linear_gaussian_chain():
    _, y = simulate(distribution(), 30, 3)
    exact = [rts_smoother(distribution(), y[:, n]) for n in range(3)]
    _, _, found = at_mode(linear_gaussian, jnp.asarray(y), iterations=1, place=3.0)
    means = jnp.concatenate([found.initial.mean, found.steps.mean])
    covariances = jnp.concatenate([covariance(found.initial), covariance(found.steps)])
    for n in range(3):
        assert_allclose(means[:, n], exact[n].means, atol=1e-8)
        assert_allclose(covariances[:, n], exact[n].covariances, atol=1e-8)


@pytest.mark.parametrize(
    ("length", "has_start"), [(1, True), *(pytest.param(one, False, marks=pytest.mark.slow) for one in (1, 6))]
)
def test_short_chains_and_constant_starts(length, has_start):
    """Two sites of a step, which read each other, of a series without a plate."""
    y = np.random.default_rng(0).normal(size=(length, 2))

    def program(y):
        def step(prev, y_t):
            a = numpyro.sample("a", dist.Normal(0.8 * prev[0] + 0.3 * prev[1], 1.0))
            b = numpyro.sample("b", dist.Normal(0.5 * prev[1] - 0.2 * a, 0.7))
            numpyro.sample("y", dist.Normal(jnp.stack([a, a + b]), 0.6).to_event(1), obs=y_t)
            return (a, b), None

        start = jnp.array([0.4, -1.0])
        if has_start:
            start = numpyro.sample("x_0", dist.Normal(start, 1.0).to_event(1))
        scan(step, (start[0], start[1]), y)

    # b = 0.5 b' - 0.2 a + 0.7 e and a = 0.8 a' + 0.3 b' + e': written as one vector with correlated noise.
    mix = np.array([[1.0, 0.0], [-0.2, 1.0]])
    A = mix @ np.array([[0.8, 0.3], [0.0, 0.5]])
    Q = mix @ np.diag([1.0, 0.49]) @ mix.T
    C = np.array([[1.0, 0.0], [1.0, 1.0]])
    start = np.array([0.4, -1.0])
    P = np.eye(2) if has_start else 1e-14 * np.eye(2)
    exact = rts_smoother(LinearGaussian(start, P, A, np.zeros(2), Q, C, 0.36 * np.eye(2)), np.r_[[[np.nan] * 2], y])
    _, _, found = at_mode(program, jnp.asarray(y), iterations=1)
    assert_allclose(found.steps.mean, exact.means[1:], atol=1e-8)
    assert_allclose(covariance(found.steps), exact.covariances[1:], atol=1e-8)
    assert (found.initial is not None) == has_start


@pytest.mark.slow
def test_gaps_and_padding():
    """A held state: the present steps are neighbours. Series a: steps 0, 3, 4; series b: the first two."""
    present = np.array([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]], bool).T
    y = np.random.default_rng(1).normal(size=(5, 2))

    def program(y, present):
        series = numpyro.plate("series", 2)

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with series, handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return jnp.where(present_t, x, x_prev), None

        with series:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, present))

    one = np.eye(1)
    model = LinearGaussian(np.zeros(1), one, 0.9 * one, np.zeros(1), 0.25 * one, one, 0.49 * one)
    _, _, found = at_mode(program, jnp.asarray(y), jnp.asarray(present), iterations=1, place=0.3)
    for n in range(2):
        exact = rts_smoother(model, np.r_[[[np.nan]], y[present[:, n], n][:, None]])
        assert_allclose(found.steps.mean[present[:, n], n], exact.means[1:], atol=1e-8)
        assert_allclose(covariance(found.steps)[present[:, n], n], exact.covariances[1:], atol=1e-8)
    assert_allclose(found.steps.mean[~present], 0.3)
    assert_allclose(covariance(found.steps)[~present], 1.0)


@pytest.mark.slow
def test_observed_after_the_scan():
    y = np.random.default_rng(2).normal(size=6)

    def program(y):
        _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(0.9 * x, 0.5)),) * 2, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Normal(xs, 0.7).to_event(1), obs=y)

    one = np.eye(1)
    exact = LinearGaussian(np.zeros(1), 1e-14 * one, 0.9 * one, np.zeros(1), 0.25 * one, one, 0.49 * one)
    exact = rts_smoother(exact, np.r_[[[np.nan]], y[:, None]])
    _, _, found = at_mode(program, jnp.asarray(y), iterations=1)
    assert_allclose(found.steps.mean, exact.means[1:], atol=1e-8)


def counts(y, rate):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.95 * x_prev, 0.4))
        numpyro.sample("y", dist.Poisson(rate * jnp.exp(x)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def volatility(y, scale):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.95 * x_prev, 0.3))
        numpyro.sample("y", dist.Normal(0.0, scale * jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def levels(y, scale):
    """A positive state."""

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.LogNormal(0.9 * jnp.log(x_prev), scale))
        numpyro.sample("y", dist.Gamma(5.0, 5.0 / x), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.LogNormal(0.0, 1.0)), y)


@pytest.mark.parametrize(
    ("program", "place"),
    [pytest.param(*one, marks=pytest.mark.slow) for one in ((counts, 0.0), (volatility, 4.0), (levels, -2.0))],
)
def test_finds_the_mode(program, place):
    rng = np.random.default_rng(3)
    x = np.sin(np.arange(40) / 4)
    y = {
        counts: rng.poisson(3.0 * np.exp(x)).astype(float),
        volatility: np.exp(x / 2) * rng.normal(size=40),
        levels: np.exp(x) * rng.gamma(5.0, 0.2, size=40),
    }[program]
    chain, coordinates, found = at_mode(program, jnp.asarray(y), 3.0 if program is counts else 0.7, place=place)
    assert slope(chain, coordinates, found) < 1e-6
    share = effective_share(chain, coordinates, found)
    assert share.mean() > 0.85
    # A plain optimiser finds no higher point.
    points = _points(chain, coordinates, found)
    negative = jax.jit(jax.value_and_grad(lambda z: -_log_joint(chain, coordinates, z.reshape(-1, 1, 1), points.order).sum()))
    best = minimize(lambda z: jax.tree.map(np.asarray, negative(z)), np.zeros(41), jac=True, method="L-BFGS-B")
    assert negative(points.mean.ravel())[0] <= best.fun + 1e-4


@pytest.mark.slow
def test_steps_that_overshoot_are_damped():
    """Far from a sharp observation of logistic tails the density is all slope, and a Newton step lands as far beyond it."""

    def program(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 1.0))
            numpyro.sample("y", dist.Logistic(x, 0.05), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    chain, coordinates, found = at_mode(program, jnp.sin(jnp.arange(10.0)), place=4.0)
    assert slope(chain, coordinates, found) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "two_coupled_sites",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("matrix", "after_the_scan_in_plates", "late_start")),
    ],
)
def test_programs(name):
    """The covariances are those of the inverse of the whole matrix of second derivatives."""
    program = BY_NAME[name]
    chain, coordinates, found = at_mode(program.model, *program.args, iterations=12)
    assert slope(chain, coordinates, found) < 1e-6
    points = _points(chain, coordinates, found)
    shape, there = points.mean.shape, points.present.ravel()
    flat = lambda z: _log_joint(chain, coordinates, z.reshape(shape), points.order).sum()
    whole = jax.jit(jax.hessian(flat))(points.mean.ravel())[there][:, there]
    whole = np.linalg.inv(-whole)
    for p, n in np.ndindex(*shape[:2]):
        here = np.zeros(shape, bool)
        here[p, n] = True
        here = here.ravel()[there]
        size = here.sum()
        block = (points.factor[p, n] @ points.factor[p, n].T)[:size, :size]
        assert_allclose(block, whole[here][:, here], atol=1e-8)


def test_two_modes_and_no_curvature():
    """Where the density is not concave the start's covariance stays, and of each series by itself."""

    def program(y):
        series = numpyro.plate("series", 2)

        def step(x_prev, y_t):
            with series:
                x = numpyro.sample("x", dist.Laplace(0.5 * x_prev, 1.0))
                numpyro.sample("y", dist.Normal(x, 0.5).mask(jnp.array([True, False])), obs=y_t)
            return x, None

        with series:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    _, _, found = at_mode(program, jnp.ones((4, 2)), place=0.1)
    assert np.isfinite(found.steps.mean).all()
    assert_allclose(covariance(found.steps)[:, 1], 1.0)
    assert (covariance(found.steps)[:, 0] < 0.9).all()


def test_errors_name_the_cause():
    def program(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            root = jax.lax.while_loop(lambda a: a > 1.0, lambda a: a / 2, x)
            numpyro.sample("y", dist.Normal(root, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"states \['x'\] cannot be differentiated twice"):
        at_mode(program, jnp.ones(3))
    with pytest.raises(ValueError, match="positive integer, but got 0"):
        at_mode(counts, jnp.ones(3), 1.0, iterations=0)

    def switching(y):
        def step(s_prev, y_t):
            s = numpyro.sample("s", dist.Bernoulli(0.3 + 0.5 * s_prev))
            numpyro.sample("y", dist.Normal(s, 1.0), obs=y_t)
            return s, None

        scan(step, jnp.array(0), y)

    with pytest.raises(ValueError, match="'s' is discrete"):
        at_mode(switching, jnp.ones(3))
