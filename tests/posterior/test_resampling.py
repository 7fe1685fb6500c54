"""Global sites drawn from their posterior, whatever their guide: against sums over a grid in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from numpyro_pvmc import PVMC, AutoStateSpace
from numpyro_pvmc.posterior.resampling import ROUNDS, Guide, resample_globals
from numpyro_pvmc.program.arguments import Arguments

NUMBER = 1000


def gamma_target(z):
    """Unnormalised, of the logarithm of a Gamma(1/2, 1): its left tail is exponential, and its integral the root of pi."""
    return 0.5 * z - jnp.exp(z)


def narrow():
    """Too narrow, and off to the right."""
    numpyro.sample("scale", dist.LogNormal(0.3, 0.4))


def weigh(rng_key, other_key, values):
    """The weight under `narrow`, in coordinates, which are the logarithm."""
    z = jnp.log(values["scale"])
    return z, gamma_target(z) - dist.Normal(0.3, 0.4).log_prob(z)


NARROW = Guide(narrow, Arguments((), {}), {}, ())


def test_a_tail_that_the_guide_lacks_is_reached():
    z, keys, values, log_weights = jax.jit(lambda key: resample_globals(key, NARROW, weigh, NUMBER))(jax.random.key(0))
    grid = np.linspace(-40, 5, 200_001)
    density = np.exp(0.5 * grid - np.exp(grid))
    density /= density.sum()
    mean = density @ grid
    deviation = np.sqrt(density @ (grid - mean) ** 2)
    assert z.shape == keys.shape == values["scale"].shape == (NUMBER,)
    assert log_weights.shape == (NUMBER * (ROUNDS + 1),)
    assert abs(z.mean() - mean) < 0.15 * deviation
    assert abs(z.std() / deviation - 1) < 0.15
    assert abs(np.quantile(z, 0.1) - grid[np.searchsorted(density.cumsum(), 0.1)]) < 0.3 * deviation
    weights = np.asarray(jax.nn.softmax(log_weights))
    assert 1 / (weights**2).sum() > NUMBER / 2
    own = 0.3 + 0.4 * np.random.default_rng(0).normal(size=NUMBER)  # what the guide alone has to choose from
    weights = np.exp(0.5 * own - np.exp(own) + 0.5 * ((own - 0.3) / 0.4) ** 2)
    assert abs(weights @ own / weights.sum() - mean) > 0.3 * deviation


def test_the_mean_weight_is_the_integral():
    """Each round is drawn from what it is said to be drawn from; that distributions are fitted to draws before them costs
    little.
    """
    one = lambda key: resample_globals(key, NARROW, weigh, 400).log_weights
    log_weights = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 200))
    estimates = np.exp(np.asarray(log_weights)).mean(1)
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() / np.sqrt(np.pi) - 1) < 0.02
    assert error < 0.01


def test_the_chosen_are_made_again_with_their_own_keys():
    """What their weight was estimated with must be what they have."""

    def noisy(rng_key, other_key, values):
        noise = jax.random.normal(rng_key)
        return (noise, jax.random.normal(other_key)), weigh(rng_key, other_key, values)[1] + 3 * noise

    (noise, other), keys, *_ = resample_globals(jax.random.key(0), NARROW, noisy, NUMBER)
    np.testing.assert_allclose(noise, jax.vmap(jax.random.normal)(keys), rtol=1e-5)
    assert noise.mean() > 1.5  # heavy weights are those of much noise: they would not be if it were drawn again
    assert len(np.unique(noise)) < 0.7 * NUMBER
    assert len(np.unique(other)) > 0.99 * NUMBER


def test_a_few_draws_have_keys_of_their_own_too():
    """Too few for a fit: what is weighed and what is not must still not be drawn with one key."""

    def noisy(rng_key, other_key, values):
        return (jax.random.normal(rng_key), jax.random.normal(other_key)), jnp.zeros(())

    (noise, other), keys, *_ = resample_globals(jax.random.key(0), NARROW, noisy, 3)
    np.testing.assert_allclose(noise, jax.vmap(jax.random.normal)(keys), rtol=1e-5)
    assert np.abs(noise - other).min() > 1e-3


def dependent():
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    numpyro.sample("high", dist.TruncatedNormal(low, 1.0, low=low))
    numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("twice", 2 * low)
    numpyro.sample("fixed", dist.Delta(low + 1.0))


def test_origins_of_a_guide_by_hand():
    """Supports that depend on sites before them, and vectors with fewer coordinates than numbers."""
    guide = Guide(dependent, Arguments((), {}), {}, ())
    drawn = guide.origins(jax.random.key(0))
    assert set(drawn.values) == {"low", "high", "share"}
    assert drawn.coordinates.shape == (4,)
    again = guide.origins(jax.random.key(1), drawn.coordinates)
    for name, value in drawn.values.items():
        np.testing.assert_allclose(again.values[name], value, rtol=2e-5)
    np.testing.assert_allclose(again.log_density, drawn.log_density, rtol=1e-5)
    moved = guide.origins(jax.random.key(1), drawn.coordinates + 0.3)
    assert moved.values["high"] > moved.values["low"]
    assert abs(moved.values["share"].sum() - 1) < 1e-6


def test_a_density_in_coordinates_integrates_to_one():
    def guide():
        numpyro.sample("a", dist.Gamma(2.0, 3.0))

    grid = jnp.linspace(-12.0, 4.0, 4001)
    of_grid = jax.vmap(lambda z: Guide(guide, Arguments((), {}), {}, ()).origins(jax.random.key(0), z[None]).log_density)(grid)
    assert abs(jnp.exp(of_grid).sum() * (grid[1] - grid[0]) - 1) < 1e-3


def level(y):
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


Y = jnp.asarray(np.random.default_rng(3).normal(size=12), jnp.float32)


def distribution_of_log_scale(y):
    """Mean and standard deviation, by a Kalman filter on a grid."""
    grid = np.linspace(-12.0, 3.0, 3001)
    mean, variance, logs = np.zeros(len(grid)), np.ones(len(grid)), grid - np.log1p(np.exp(2 * grid))
    for y_t in y:
        mean, variance = 0.9 * mean, 0.81 * variance + np.exp(2 * grid)
        total = variance + 0.25
        logs = logs - 0.5 * np.log(total) - 0.5 * (y_t - mean) ** 2 / total
        mean, variance = mean + variance / total * (y_t - mean), variance * 0.25 / total
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    return weights @ grid, np.sqrt(weights @ (grid - weights @ grid) ** 2)


def by_hand(y):
    numpyro.sample("scale", dist.LogNormal(-0.7, 0.3))
    numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(0.6 * y, 0.5))


def test_a_scale_that_may_be_zero():
    pvmc = PVMC(level, by_hand, num_particles=32)
    draws = pvmc.sample_posterior(jax.random.key(0), {}, Y, sample_shape=(600,), refine=3, resample=True)
    mean, deviation = distribution_of_log_scale(np.asarray(Y))
    log_scale = np.log(draws["scale"])
    assert abs(log_scale.mean() - mean) < 0.2 * deviation
    assert abs(log_scale.std() / deviation - 1) < 0.2
    assert draws["x"].shape == (600, 12)


@pytest.mark.parametrize("number", [(2, 3), pytest.param((), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Of .* draws of the global sites:UserWarning")
def test_a_few_draws_are_those_of_the_guide(number):
    draws = PVMC(level, by_hand, num_particles=32).sample_posterior(
        jax.random.key(0), {}, Y, sample_shape=number, refine=3, resample=True
    )
    assert draws["scale"].shape == number
    assert draws["x"].shape == (*number, 12)
    assert jnp.isfinite(draws["scale"]).all()


def test_a_guide_without_draws_of_global_sites():
    pvmc = PVMC(level, AutoStateSpace(level, AutoDelta), num_particles=32)
    params = pvmc.get_params(pvmc.init(jax.random.key(0), Y))
    draws = pvmc.sample_posterior(jax.random.key(1), params, Y, sample_shape=(20,), refine=3, resample=True)
    assert len(jnp.unique(draws["scale"])) == 1


@pytest.mark.slow
def test_one_distribution_for_all_of_numpyros_guides():
    pvmc = PVMC(level, AutoStateSpace(level, AutoNormal), num_particles=32)
    params = pvmc.get_params(pvmc.init(jax.random.key(0), Y))  # untrained
    draws = pvmc.sample_posterior(jax.random.key(1), params, Y, sample_shape=(600,), refine=3, resample=True)
    mean, deviation = distribution_of_log_scale(np.asarray(Y))
    assert abs(np.log(draws["scale"]).mean() - mean) < 0.2 * deviation


@pytest.mark.slow
def test_inside_of_a_compiled_function():
    pvmc = PVMC(level, by_hand, num_particles=16)
    sample = lambda key, y: pvmc.sample_posterior(key, {}, y, sample_shape=(50,), refine=2, resample=True)["scale"]
    np.testing.assert_allclose(jax.jit(sample)(jax.random.key(0), Y), sample(jax.random.key(0), Y), rtol=1e-3)


def explosive(y):
    """Without a density where `power` is above 0.5."""
    power = numpyro.sample("power", dist.Normal(0.0, 30.0))
    numpyro.factor("nowhere", jnp.where(power > 0.5, jnp.nan, 0.0))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def fit_of_power(distribution):
    def guide(y):
        numpyro.sample("power", distribution)
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(0.6 * y, 0.5))

    return PVMC(explosive, guide, num_particles=16)


@pytest.mark.slow
def test_coordinates_of_a_bounded_site_stay_within_its_bounds():
    pvmc = fit_of_power(dist.Uniform(-1.0, 0.5))
    draws = pvmc.sample_posterior(jax.random.key(0), {}, Y, sample_shape=(50,), refine=2, resample=True)
    assert draws["power"].max() <= 0.5


def test_draws_without_a_weight_are_counted():
    pvmc = fit_of_power(dist.TruncatedNormal(-1.0, 0.3, high=0.9))
    with pytest.warns(UserWarning, match=r"\d+ of 250 draws of the global sites, from their guide and around, have no weight"):
        draws = pvmc.sample_posterior(jax.random.key(0), {}, Y, sample_shape=(50,), refine=2, resample=True)
    assert draws["power"].max() <= 0.5


def test_a_guide_that_draws_what_has_no_density_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        fit_of_power(dist.Normal(0.3, 0.3)).sample_posterior(
            jax.random.key(0), {}, Y, sample_shape=(50,), refine=2, resample=True
        )
