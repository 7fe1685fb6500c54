"""Evenly spread draws: of the right distribution, one in each cell of a grid, new ones for each step and series."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan

from conftest import few_particles
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO
from numpyro_pvmc.guides.quasirandom import from_uniform, noise_shape, uniform_points

pytestmark = few_particles

NORMAL = dist.Normal(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.3, 2.0]))
WITH_CDF = [
    NORMAL,
    dist.Normal(0.3, 2.0).expand([3]),
    NORMAL.mask(jnp.array([True, False, True])),
    dist.LogNormal(0.1, jnp.array([0.5, 1.0, 0.2])),
    dist.TransformedDistribution(NORMAL, [dist.transforms.AffineTransform(1.0, 3.0), dist.transforms.SigmoidTransform()]),
    dist.TruncatedNormal(jnp.zeros(3), 1.0, low=-0.5, high=2.0),
    dist.Laplace(0.0, jnp.array([0.5, 1.0, 0.2])),
    dist.Gumbel(0.0, jnp.array([0.5, 1.0, 0.2])),
    dist.Uniform(-1.0, jnp.array([0.5, 1.0, 0.2])),
    dist.HalfNormal(jnp.array([0.5, 1.0, 0.2])),
]


@pytest.mark.parametrize("distribution", WITH_CDF, ids=lambda distribution: type(distribution).__name__)
def test_a_draw_has_the_probability_that_it_was_made_of(x64, distribution):
    uniform = jnp.linspace(0.01, 0.99, 15).reshape(5, 3)
    assert noise_shape(distribution) == (3,)
    values = from_uniform(distribution, uniform)
    bare = (
        distribution.base_dist
        if isinstance(distribution, dist.MaskedDistribution | dist.ExpandedDistribution)
        else distribution
    )
    assert_allclose(bare.cdf(values), uniform, rtol=1e-6)


@pytest.mark.parametrize(
    "distribution",
    [
        dist.MultivariateNormal(jnp.array([1.0, -1.0]), jnp.array([[2.0, 0.6], [0.6, 1.0]])),
        dist.MultivariateNormal(jnp.array([1.0, -1.0]), precision_matrix=jnp.array([[2.0, 0.6], [0.6, 1.0]])),
        dist.LowRankMultivariateNormal(jnp.array([1.0, -1.0]), jnp.array([[1.0], [0.3]]), jnp.array([0.4, 0.7])),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_multivariate_normals_have_their_moments(distribution):
    points = jax.vmap(lambda k: uniform_points(random.key(0), (2,), (), k, 4096, 0))(jnp.arange(4096))
    draws = np.asarray(from_uniform(distribution, points), np.float64)
    assert_allclose(draws.mean(0), distribution.mean, atol=0.005)
    assert_allclose(np.cov(draws.T), distribution.covariance_matrix, atol=0.02)


def test_discrete_distributions():
    probabilities = jnp.array([0.2, 0.5, 0.3])
    uniform = jnp.array([0.1, 0.3, 0.69, 0.71, 0.99])
    assert from_uniform(dist.Categorical(probabilities), uniform).tolist() == [0, 1, 1, 2, 2]
    assert from_uniform(dist.Bernoulli(0.4), uniform).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("distribution", [dist.Gamma(2.0), dist.StudentT(4.0), dist.Dirichlet(jnp.ones(3)), dist.Poisson(2.0)])
def test_distributions_without_a_quantile_function(distribution):
    assert noise_shape(distribution) is None
    assert noise_shape(distribution.expand([4])) is None


def points_of_all(key, shape, shared_axes, number, first=0):
    one = lambda k: uniform_points(key, shape, shared_axes, k, number, first)
    return np.asarray(jax.vmap(one)(jnp.arange(number)))


def test_each_cell_of_a_grid_has_one_point():
    points = points_of_all(random.key(1), (6, 4, 2), (0, 1), 64)
    for one in points.reshape(64, 24, 2).swapaxes(0, 1):
        for columns, rows in [(64, 1), (1, 64), (8, 8), (16, 4)]:
            cells = np.floor(one * [columns, rows]) @ [rows, 1]
            assert sorted(cells) == list(range(64))


def test_steps_and_series_have_points_of_their_own():
    points = points_of_all(random.key(1), (6, 4, 2), (0, 1), 64).reshape(64, 24, 2)
    assert len({tuple(column) for column in points[:, :, 0].T}) == 24
    lowest = points[0, :, 0]
    assert 0.1 < np.std(lowest) < 0.5  # the first particle is not the first point of the set everywhere


def test_points_are_uniform():
    keys = random.split(random.key(2), 4000)
    draws = np.asarray(jax.vmap(lambda key: uniform_points(key, (3,), (), jnp.asarray(5), 8, 0))(keys))
    standard_error = 1 / np.sqrt(12 * 4000)
    assert (abs(draws.mean(0) - 0.5) < 4 * standard_error).all()
    assert_allclose(draws.var(0), 1 / 12, rtol=0.1)


def test_no_point_is_zero_or_one():
    points = points_of_all(random.key(0), (2**15,), (0,), 64)
    assert points.dtype == np.float32
    assert points.min() > 0
    assert points.max() < 1


def test_single_and_double_precision_agree():
    single = points_of_all(random.key(0), (5, 2), (0,), 16)
    with jax.enable_x64(True):
        double = points_of_all(random.key(0), (5, 2), (0,), 16)
    assert_allclose(single, double, atol=2**-22)


def model(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.5))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + z, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def guide(y, distribution=dist.Normal):
    numpyro.sample("x_0", distribution(0.0, 1.0))
    numpyro.sample("x", distribution(jnp.zeros(len(y)), 1.0))
    numpyro.sample("z", distribution(jnp.zeros(len(y)), 1.0))


Y = jnp.array([0.3, -0.5, 1.2, 0.4])


def test_sites_of_a_step_share_one_point_set():
    particles = PVMC(model, guide, num_particles=64).posterior(random.key(0), {}, Y).particles
    for t in range(4):
        cells = [np.floor(8 * np.asarray(dist.Normal(0.0, 1.0).cdf(particles[name][t]))) for name in ("x", "z")]
        assert sorted(8 * cells[0] + cells[1]) == list(range(64))


def test_one_particle_is_the_same_either_way():
    one = [PVMC(model, guide, num_particles=1, particles=p).posterior(random.key(0), {}, Y) for p in ("iid", "rqmc")]
    assert_allclose(one[0].log_normalizer, one[1].log_normalizer, rtol=1e-6)


def test_without_a_quantile_function_draws_are_independent_and_that_is_said():
    student = lambda loc, scale: dist.StudentT(5.0, loc, scale)
    own = lambda y: guide(y, student)
    with pytest.warns(UserWarning, match=r"\['x', 'x_0', 'z'\] are independent draws.*StudentT"):
        even = PVMC(model, own, num_particles=4).posterior(random.key(0), {}, Y)
    independent = PVMC(model, own, num_particles=4, particles="iid").posterior(random.key(0), {}, Y)
    assert_allclose(even.particles["x"], independent.particles["x"])


def test_numbers_that_are_no_power_of_two():
    with pytest.warns(UserWarning, match="`num_particles` is 50.*take 32 or 64"):
        ImportanceSmoothedELBO(50)
    ImportanceSmoothedELBO(50, particles="iid")


def test_an_unknown_way_to_draw():
    with pytest.raises(ValueError, match="`particles` must be one of"):
        ImportanceSmoothedELBO(particles="sobol")
