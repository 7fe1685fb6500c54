"""What is said of posteriors that are no numbers, of impossible data, or rest on few particles; and by whom nothing is said."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC, AutoSmoothedNormal
from numpyro_pvmc.exact import exact_posterior

T, SERIES = 3, 2
KEY = random.key(0)


def panel(y, x_scale, y_scale, x_0_scale):
    """Two series whose scales are inputs."""
    series, slope = numpyro.plate("series", SERIES), numpyro.param("slope", 0.5)
    level = numpyro.sample("level", dist.Normal(0.0, 0.1))

    def step(x, inputs):
        y_t, x_scale_t, y_scale_t = inputs
        with series:
            x = numpyro.sample("x", dist.Normal(slope * x, x_scale_t))
            numpyro.sample("y", dist.Normal(x + level, y_scale_t), obs=y_t)
        return x, x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, x_0_scale))
    scan(step, x_0, (y, x_scale, y_scale))


def guide(*arguments):
    width = numpyro.param("width", jnp.ones((T, SERIES)))
    numpyro.sample("level", dist.Normal(0.0, 0.1))
    with numpyro.plate("series", SERIES):
        numpyro.sample("x_0", dist.Normal(jnp.zeros(SERIES), 1.0))
        numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros((T, SERIES))), width))


PANEL = PVMC(panel, guide, num_particles=2, particles="iid")
SOUND = {
    "y": jnp.ones((T, SERIES)),
    "x_scale": jnp.ones((T, SERIES)),
    "y_scale": jnp.ones((T, SERIES)),
    "x_0_scale": jnp.ones(SERIES),
}
PARAMS = {"slope": 0.5, "width": jnp.ones((T, SERIES)), "loc": jnp.zeros((T, SERIES))}


@pytest.mark.parametrize(
    ("arguments", "params", "says"),
    [
        (
            {"x_scale": SOUND["x_scale"].at[1, 1].set(-1.0)},
            {},
            "site 'x', a transition.*at time 1 .*series 1 of plate.*`scale` is not",
        ),
        (
            {"y_scale": SOUND["y_scale"].at[2, 0].set(-1.0)},
            {},
            "'y', an emission.*at time 2 .*series 0 .*`scale` is not positive",
        ),
        ({"x_0_scale": jnp.array([1.0, -1.0])}, {}, "'x_0', an initial distribution.*first at the initial step in series 1"),
        ({}, {"slope": jnp.nan}, r"^Parameters \['slope'\] are not finite"),
        ({}, {"width": PARAMS["width"].at[1, 0].set(-1.0)}, r"guide's log density of \['x', 'x_0'\].*at time 1 .*in series 0"),
        (
            {},
            {"loc": PARAMS["loc"].at[2, 1].set(jnp.inf), "width": PARAMS["width"].at[2, 1].set(jnp.inf)},
            r"^Parameters \['width', 'loc'\] are not finite",
        ),
    ],
    ids=["transition", "emission", "initial", "parameter", "guide's scale", "guide's parameters"],
)
def test_nan_is_named(arguments, params, says):
    """Site, role, time and series; all of these are one compiled program."""
    arguments, params = SOUND | arguments, PARAMS | params
    says = says if says.startswith("^") else f"(?s)^The posterior is not a number, because .*{says}"
    with pytest.raises(ValueError, match=says):
        PANEL.posterior(KEY, params, *arguments.values())
    with pytest.raises(ValueError, match=says):
        PANEL.sample_posterior(KEY, params, *arguments.values(), sample_shape=(2,))


def integrated(y, dt, b=0.6):
    """An integrated Ornstein-Uhlenbeck process: for a short step its covariance is a difference of nearly equal numbers."""

    def step(state, inputs):
        y_t, d = inputs
        e = jnp.exp(-b * d)
        q11 = (d - 2 / b * (1 - e) + (1 - e**2) / (2 * b)) / b**2
        q12, q22 = (1 - e) ** 2 / (2 * b**2), (1 - e**2) / (2 * b)
        mean = jnp.array([[1.0, (1 - e) / b], [0.0, e]]) @ state
        x = numpyro.sample("x", dist.MultivariateNormal(mean, covariance_matrix=jnp.array([[q11, q12], [q12, q22]])))
        numpyro.sample("y", dist.Normal(x[0], 0.5), obs=y_t)
        return x, x

    scan(step, numpyro.sample("x_0", dist.Normal(jnp.zeros(2), 1.0).to_event(1)), (y, dt))


def short_step():
    return jnp.sin(jnp.arange(12.0)), jnp.ones(12).at[5].set(0.002)


def test_a_covariance_that_single_precision_makes_indefinite():
    says = (
        "(?s)'x'.* at time 5 .*covariance matrix is not positive definite in float32, with eigenvalues from -.*expm1.*float64"
    )
    with pytest.raises(ValueError, match=says):
        exact_posterior(integrated, {}, *short_step())
    with pytest.raises(ValueError, match=says):
        PVMC(integrated, num_particles=4).posterior(KEY, {}, *short_step())


@pytest.mark.slow
def test_the_same_covariance_in_double_precision(x64):
    assert_allclose(exact_posterior(integrated, {}, *short_step()).log_normalizer, -14.50878, atol=1e-5)


def test_no_number_of_a_kalman_filter():
    def model(y, scale):
        def step(x, inputs):
            y_t, scale_t = inputs
            x = numpyro.sample("x", dist.Normal(x, scale_t))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, (y, scale))

    with pytest.raises(ValueError, match=r"log evidence is -inf: the Kalman filter meets a number that float32"):
        exact_posterior(model, {}, jnp.full(3, 1e30), jnp.ones(3))
    # A covariance does not see the sign of a scale.
    with pytest.raises(ValueError, match=r"'x' is not a number, first at time 1.*`scale` is not positive"):
        exact_posterior(model, {}, jnp.ones(3), jnp.array([1.0, -1.0, 1.0]))


def cases(y, before):
    """Counts that are impossible after a zero."""

    def step(growth, inputs):
        y_t, before_t = inputs
        with numpyro.plate("places", 2):
            growth = numpyro.sample("growth", dist.Normal(growth, 0.3))
            numpyro.sample("y", dist.Poisson(before_t * jnp.exp(growth)), obs=y_t)
        return growth, growth

    scan(step, jnp.zeros(2), (y, before))


COUNTS = jnp.array([[5.0, 5.0], [8.0, 8.0], [6.0, 0.0], [7.0, 4.0], [5.0, 9.0]])


def test_an_impossible_series_is_said_aloud_and_spoils_no_other():
    pvmc, data = PVMC(cases, num_particles=32), (COUNTS[1:], COUNTS[:-1])
    fine = pvmc.posterior(KEY, {}, COUNTS[1:].at[2, 1].set(0.0), COUNTS[:-1])
    says = r"^The evidence is 0 in series 1 of plate 'places': none of the 32 particles is possible at time 2 of the scan"
    with pytest.warns(UserWarning, match=says) as all_said:
        posterior = pvmc.posterior(KEY, {}, *data)
    assert len(all_said) == 1
    assert_array_equal(np.isneginf(posterior.log_normalizer), [False, True])
    assert_allclose(posterior.log_normalizer[0], fine.log_normalizer[0], rtol=1e-6)
    assert (posterior.effective_sample_size()["growth"][:, 1] == 0).all()
    asked = [posterior.mean(), posterior.variance(), posterior.quantile(0.3), posterior.sample(KEY)]
    expected = [fine.mean(), fine.variance(), fine.quantile(0.3)]
    for ours, others in zip(asked, [*expected, None], strict=True):
        assert np.isnan(ours["growth"][:, 1]).all()
        assert np.isfinite(ours["growth"][:, 0]).all()
        assert others is None or np.allclose(ours["growth"][:, 0], others["growth"][:, 0], rtol=1e-5)


def hidden_states(y):
    """A state that stays, and is seen without error."""

    def step(s, y_t):
        with numpyro.plate("series", 2):
            s = numpyro.sample("s", dist.Categorical(jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[s]))
            numpyro.sample("y", dist.Categorical(jnp.array([[1.0, 0.0], [0.4, 0.6], [1.0, 0.0]])[s]), obs=y_t)
        return s, s

    scan(step, jnp.array([0, 2]), y)


def test_states_of_an_impossible_series_are_not_drawn():
    with pytest.warns(UserWarning, match="no state is possible at time 1 of the scan") as all_said:
        posterior = exact_posterior(hidden_states, {}, jnp.array([[0, 0], [1, 1], [0, 0]]))
    assert len(all_said) == 1
    assert_allclose(posterior.log_normalizer, [np.log(0.5 * 0.5 * 0.6 * 0.4 + 0.5 * 0.4 * 0.6 * 0.4), -np.inf], rtol=1e-6)
    probabilities, filtering = posterior.state_probabilities["s"], posterior.filtering_state_probabilities["s"]
    assert np.isnan(probabilities[:, 1]).all()
    assert_allclose(probabilities[0, 0], [5 / 9, 4 / 9, 0.0], rtol=1e-5)
    assert_allclose(filtering[0], [[5 / 7, 2 / 7, 0.0], [0.0, 0.0, 1.0]], rtol=1e-5)
    assert np.isnan(filtering[1:, 1]).all()
    # Compiled, values come back, and nothing is said.
    again = jax.jit(lambda y: exact_posterior(hidden_states, {}, y).log_normalizer)(jnp.array([[0, 0], [1, 1], [0, 0]]))
    assert_allclose(again, posterior.log_normalizer, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^The sites \['s'\] cannot be drawn in series 1 of plate 'series'.*at time 1"):
        posterior.sample(KEY)


def walk(y):
    level = numpyro.sample("level", dist.Normal(0.0, 0.1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.3))
        numpyro.sample("y", dist.Normal(x + level, 0.1), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def wide(y):
    """Far too wide from time 2 on."""
    numpyro.sample("level", dist.Normal(0.0, 0.1))
    numpyro.sample("x", dist.Normal(0.0, jnp.where(jnp.arange(len(y)) < 2, 0.3, 1e3)))


Y = jnp.array([0.1, 0.2, 0.3, 0.2])


def test_few_particles_are_said_aloud_once():
    pvmc = PVMC(walk, wide, num_particles=64)
    with pytest.warns(UserWarning, match=r"^The effective sample size of site 'x' .*refine=15") as all_said:
        posterior = pvmc.posterior(KEY, {}, Y)
    sizes = np.asarray(posterior.effective_sample_size()["x"])
    low = sizes < 3.2
    assert low.any()
    assert not low.all()
    (said,) = all_said
    assert f"is below 3.2 of 64 in {100 * low.mean():.0f}% of its steps and series, first at time {low.argmax()} " in str(
        said.message
    )
    assert f"(least {sizes.min():.1f})" in str(said.message)
    assert said.filename == __file__
    with pytest.warns(UserWarning, match="in the worst of 7 draws of the global sites") as all_said:
        pvmc.sample_posterior(KEY, {}, Y, sample_shape=(7,))
    assert len(all_said) == 1
    assert all_said[0].filename == __file__


@pytest.mark.slow
def test_of_two_particles_nothing_is_said():
    assert (PANEL.posterior(KEY, PARAMS, *SOUND.values()).effective_sample_size()["x"] < 1.5).any()


@pytest.mark.slow
def test_a_bad_start_at_the_mode_is_left_for_the_prior():
    """The first series has a narrow mode of little mass, at which the search starts; the second is Gaussian."""

    def model(y):
        weights = jnp.array([[0.02, 0.98], [1e-12, 1.0]])

        def step(x, y_t):
            with numpyro.plate("series", 2):
                x = numpyro.sample("x", dist.Normal(0.5 * x, 1.0))
                near = dist.Normal(x[:, None] + jnp.array([0.0, 2.0]), jnp.array([0.1, 0.5]))
                numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), near), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    y = jnp.zeros((4, 2))

    pvmc = PVMC(model, AutoSmoothedNormal(model, init="laplace"), num_particles=128)
    params = pvmc.get_params(pvmc.init(KEY, y))
    mean, factor = (params[f"auto_steps_{of}"][..., 0] for of in ("mean", "factor"))
    # The narrow mode has a standard deviation of about 0.1, the prior one of 1 and more.
    assert (factor[:, 0] > 0.8).all()
    # Of a Gaussian chain the mode is the smoothed mean.
    precision = np.diag(np.full(4, 1 + 4 + 0.25)) - 0.5 * (np.eye(4, k=1) + np.eye(4, k=-1))
    precision[-1, -1] -= 0.25
    assert_allclose(mean[:, 1], np.linalg.solve(precision, np.full(4, -8.0)), atol=1e-3)
    assert_allclose(factor[:, 1] ** 2, np.diag(np.linalg.inv(precision)), rtol=1e-3)
