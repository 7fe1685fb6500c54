"""Log densities of pairs that are put together from distributions and values, against those of every pair by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.chain import densities
from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.densities import Particles, target
from numpyro_pvmc.chain.pairwise import pair_form, univariate
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments

K, N = 4, 3
TRIL = np.array([[0.7, 0.0, 0.0], [0.2, 0.5, 0.0], [-0.1, 0.3, 0.9]])
positive = lambda x: jax.nn.softplus(x) + 0.1

# Distributions of the state after, given the state before and a parameter; and whether they are put together.
LAWS = {
    "normal": (lambda x, a: dist.Normal(a * x, 0.3).to_event(1), True),
    "normal_whose_scale_moves": (lambda x, a: dist.Normal(a * x, positive(a * x)).to_event(1), True),
    "scale_that_moves": (lambda x, a: dist.Normal(a, positive(x)).to_event(1), True),
    "normal_expanded": (lambda x, a: dist.Normal(a * x.sum(), 0.3).expand((N,)).to_event(1), True),
    "multivariate": (lambda x, a: dist.MultivariateNormal(a * x, scale_tril=TRIL), True),
    "multivariate_by_covariance": (lambda x, a: dist.MultivariateNormal(a * x, TRIL @ TRIL.T + a**2 * jnp.eye(N)), True),
    "multivariate_by_precision": (lambda x, a: dist.MultivariateNormal(a * x, precision_matrix=TRIL @ TRIL.T), True),
    "multivariate_whose_scale_moves": (lambda x, a: dist.MultivariateNormal(a * x, scale_tril=positive(x[0]) * TRIL), True),
    "low_rank": (lambda x, a: dist.LowRankMultivariateNormal(a * x, TRIL[:, :1], jnp.full(N, 0.4)), True),
    "student": (lambda x, a: dist.StudentT(4.0, a * x, 0.4).to_event(1), True),
    "laplace": (lambda x, a: dist.Laplace(a * x, 0.4).to_event(1), True),
    "log_normal": (lambda x, a: dist.LogNormal(a * jnp.log(positive(x)), 0.4).to_event(1), True),
    "uniform_that_moves": (lambda x, a: dist.Uniform(a * x - 0.5, a * x + 0.5).to_event(1), True),
    "gamma": (lambda x, a: dist.Gamma(2.0, positive(a * x)).to_event(1), True),
    "transformed": (
        lambda x, a: dist.TransformedDistribution(
            dist.Normal(a * x, 0.4), [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.SigmoidTransform()]
        ).to_event(1),
        True,
    ),
    "transform_that_moves": (
        lambda x, a: dist.TransformedDistribution(
            dist.Normal(jnp.zeros(N), 1.0), dist.transforms.AffineTransform(a * x, 0.4)
        ).to_event(1),
        False,
    ),
    "masked": (lambda x, a: dist.Normal(a * x, 0.3).mask(jnp.array([True, False, True])).to_event(1), False),
    "mixture": (lambda x, a: mixture(a * x), False),
    "many_components": (lambda x, a: dist.Normal(a * jnp.tile(x, 7)[:20], 0.3).to_event(1), True),
}

LONGER = ("many_components", "mixture", "multivariate_by_covariance", "multivariate_whose_scale_moves", "scale_that_moves")


def mixture(loc):
    return dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(loc[:, None], jnp.array([0.3, 1.0]))).to_event(
        1
    )


def chain_of(distribution, mask=None):
    def model(a, seen=None):
        def step(x_prev, now):
            with handlers.mask(mask=True if seen is None else now):
                x = numpyro.sample("x", distribution(x_prev[..., :N], a))
            return x, None

        size = distribution(jnp.ones(N), 0.5).event_shape[0]
        scan(step, jnp.full(size, 0.4), seen, length=2)

    arguments = Arguments((jnp.asarray(0.6), mask))
    structure = read_structure(model, arguments, {})

    def blocks(a, x):
        chain = read_chain(structure, model, Arguments((a, mask)), {})
        _, edges = target(chain, Particles({}, {"x": x}))
        return jax.vmap(edges.function)(edges.inputs)

    return blocks


def values(distribution):
    size = distribution(jnp.ones(N), 0.5).event_shape
    draws = jax.vmap(jax.vmap(lambda key: distribution(jnp.full(N, 0.4), 0.6).sample(key)))(
        jax.random.split(jax.random.key(0), (2, K))
    )
    assert draws.shape == (2, K, *size)
    return draws


def both(monkeypatch, blocks, a, x):
    """Values, and the gradient of a random sum, put together and pair by pair."""
    signs = jax.random.normal(jax.random.key(1), (2, K, K))
    found = []
    for generic in (False, True):
        if generic:
            monkeypatch.setattr(densities, "read_pair", lambda *site: None)
        value, pull = jax.vjp(jax.jit(lambda a, x: blocks(a, x)), a, x)
        found.append((value, pull(signs.astype(value.dtype))))
    return found


@pytest.fixture(autouse=True)
def closed_form(pytestconfig):
    if pytestconfig.getoption("pair_by_pair"):
        pytest.skip("of densities that this run does without")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONGER)) for name in LAWS])
def test_equal_those_of_every_pair(x64, monkeypatch, name):
    distribution, is_apart = LAWS[name]
    seen = []
    read = densities.read_pair
    monkeypatch.setattr(densities, "read_pair", lambda *site: seen.append(read(*site)) or seen[-1])
    ours, generic = both(monkeypatch, chain_of(distribution), jnp.asarray(0.6), values(distribution))
    assert ours[0].shape == (2, K, K)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, generic)
    # The first look is abstract; what is put together is read again, for distributions and for values.
    assert (len(seen) > 4) == is_apart


@pytest.mark.parametrize("name", ["normal", "multivariate", "student", "log_normal"])
def test_masked_steps(x64, monkeypatch, name):
    distribution, _ = LAWS[name]
    mask = jnp.array([True, False])
    ours, generic = both(monkeypatch, chain_of(distribution, mask), jnp.asarray(0.6), values(distribution))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, generic)
    assert (ours[0][1] == 0).all()


@pytest.mark.parametrize("name", ["normal", "normal_whose_scale_moves", "multivariate"])
def test_far_apart_in_single_precision(name):
    """Particles ten thousand noise scales apart: log densities keep their digits, and so does the gradient of near pairs."""
    distribution, _ = LAWS[name]
    centres = 3e3 * jnp.arange(K)[None, :, None] / 0.6
    x = values(distribution) + centres
    found = {}
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            a, own = jnp.asarray(0.6, dtype), jnp.asarray(np.asarray(x), dtype)
            block, pull = jax.vjp(jax.jit(chain_of(distribution)), a, own)
            # Trajectories go on near where they are: pairs far apart have no weight.
            near = jnp.broadcast_to(jnp.eye(K, dtype=block.dtype) * (1 if name == "normal" else 0), block.shape)
            found[dtype] = [np.asarray(part, np.float64) for part in (block, *pull(near))]
    # Whitened points lose as many digits as the mean of all particles is far.
    assert_allclose(found[jnp.float32][0], found[jnp.float64][0], rtol=2e-5, atol=3e-3 if name == "multivariate" else 0)
    for ours, exact in zip(found[jnp.float32][1:], found[jnp.float64][1:], strict=True):
        assert_allclose(ours, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max() + 1e-12)


def test_gradient_far_from_zero_in_single_precision():
    """Particles near each other, and a million noise scales from the origin of the coordinates."""
    distribution = lambda x, a: dist.Normal(x + a, 0.3).to_event(1)
    x = np.asarray(values(distribution) + 3e5, np.float32)
    found = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            block, pull = jax.vjp(jax.jit(chain_of(distribution)), jnp.asarray(0.25, dtype), jnp.asarray(x, dtype))
            found.append(np.asarray(pull(jnp.exp(block - block.max()))[1], float))
    assert_allclose(found[0], found[1], atol=2e-3 * np.abs(found[1]).max())


def test_what_reads_one_particle_is_evaluated_once_for_each():
    """No array of K x K x components of the transition's mean, nor anything of a network's width for pairs."""
    weights = jnp.ones((N, 17)), jnp.ones((17, N))
    distribution = lambda x, a: dist.Normal(a * jnp.tanh(x @ weights[0]) @ weights[1], 0.3).to_event(1)
    jaxpr = str(jax.make_jaxpr(chain_of(distribution))(jnp.asarray(0.6), values(distribution)))
    assert "17]" in jaxpr
    assert f"{K},{K},17]" not in jaxpr
    assert f"{K},{K},{N}]" not in jaxpr


def test_a_distribution_of_the_users_own():
    class Cauchy(dist.Cauchy):
        pass

    distribution = lambda x, a: Cauchy(a * x, 0.4).to_event(1)
    plain = chain_of(distribution)(jnp.asarray(0.6), values(distribution))
    calls = []

    def log_density(value, loc, scale):
        calls.append(value.shape)
        return dist.Cauchy(loc, scale).log_prob(value)

    pair_form.register(Cauchy, lambda distribution: univariate(distribution, log_density))
    assert_allclose(chain_of(distribution)(jnp.asarray(0.6), values(distribution)), plain, rtol=1e-5)
    assert calls
