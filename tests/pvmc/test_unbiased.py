"""exp(log Z) is unbiased, and the bound rises to the evidence: against the Kalman filter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import ImportanceSmoothedELBO
from oracles import kalman_filter

LONG_RUNS = True

A, Q, R = 0.8, 0.5, 0.8
Y = np.array([0.4, -0.2, 0.9, 1.3, 0.2, -0.6])


def model(y, series=2):
    """Two equal series: each has an evidence of its own."""
    plate = numpyro.plate("series", series)

    def step(x_prev, y_t):
        with plate:
            x = numpyro.sample("x", dist.Normal(A * x_prev, Q))
            numpyro.sample("y", dist.Normal(x, R), obs=y_t)
        return x, None

    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


def guide(y, series=2):
    numpyro.sample("x_0", dist.Normal(jnp.zeros(series), 1.0))
    numpyro.sample("x", dist.Normal(0.5 * y, 0.9))


def exact():
    one = np.eye(1)
    distribution = (np.zeros(1), one, A * one, np.zeros(1), Q**2 * one, one, R**2 * one)
    return kalman_filter(distribution, np.concatenate([[np.nan], Y])[:, None]).log_evidence


@functools.cache
def log_evidence(num_particles, method="auto", number=4000, particles="iid"):
    """Estimates for one series, (number,)."""
    loss = ImportanceSmoothedELBO(num_particles, method=method, particles=particles)
    estimate = jax.jit(jax.vmap(lambda key: -loss.loss(key, {}, model, guide, jnp.asarray(Y)[:, None], 1)))
    return np.asarray(estimate(jax.random.split(jax.random.key(num_particles), number)), np.float64)


def assert_mean(samples, expected, *, at_most_standard_error):
    standard_error = samples.std() / np.sqrt(len(samples))
    assert standard_error < at_most_standard_error, f"too blunt to see anything: standard error {standard_error:.2g}"
    assert abs(samples.mean() - expected) < 4 * standard_error


@pytest.mark.parametrize(
    ("num_particles", "method"),
    [
        (2, "auto"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((8, "sequential"), (8, "associative"), (32, "auto"))),
    ],
)
def test_evidence_is_unbiased(num_particles, method):
    number = 16_000 if num_particles == 2 else 4000
    ratio = np.exp(log_evidence(num_particles, method, number) - exact())
    assert_mean(ratio, 1.0, at_most_standard_error=0.02)


@pytest.mark.parametrize("num_particles", [8, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 32))])
def test_evidence_is_unbiased_with_quasi_random_particles(num_particles):
    number = 16_000 if num_particles == 2 else 4000
    ratio = np.exp(log_evidence(num_particles, number=number, particles="rqmc") - exact())
    assert_mean(ratio, 1.0, at_most_standard_error=0.02)


@pytest.mark.slow
def test_quasi_random_particles_are_better_ones():
    independent, even = (log_evidence(32, particles=particles) for particles in ("iid", "rqmc"))
    assert even.std() < 0.6 * independent.std()
    assert even.mean() > independent.mean()


@pytest.mark.slow
def test_bound_rises_to_the_evidence_from_below():
    bounds = [log_evidence(k).mean() for k in (1, 8, 32)]
    error = log_evidence(32).std() / np.sqrt(4000)
    assert bounds[0] < bounds[1] < bounds[2] < exact() + 4 * error
    assert exact() - bounds[2] < 0.1


def test_series_are_averaged_over_particles_one_by_one():
    """The bound of two series is the sum of two bounds, not one bound of their joint trajectories."""
    loss = ImportanceSmoothedELBO(4)
    two = jnp.stack([Y, Y + 1.0], 1)
    both = jax.jit(jax.vmap(lambda key: -loss.loss(key, {}, model, guide, two)))
    alone = jax.jit(jax.vmap(lambda key, y: -loss.loss(key, {}, model, guide, y, 1), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 6000)
    together = np.asarray(both(keys))
    apart = sum(np.asarray(alone(keys, two[:, i : i + 1])) for i in range(2))
    error = np.hypot(together.std(), apart.std()) / np.sqrt(6000)
    assert error < 0.05
    assert abs(together.mean() - apart.mean()) < 4 * error


def test_a_masked_site_has_no_density_in_the_guide_either():
    """Of two latent sites of a step one is masked: how the guide proposes it there does not matter."""

    def model(y, present):
        def step(x_prev, inputs):
            y_t, present_t = inputs
            x = numpyro.sample("x", dist.Normal(A * x_prev, Q))
            with numpyro.handlers.mask(mask=present_t):
                z = numpyro.sample("z", dist.Normal(x, 1.0))
                numpyro.sample("w", dist.Normal(z, 1.0), obs=0.3)
            numpyro.sample("y", dist.Normal(x, R), obs=y_t)
            return x, None

        scan(step, 0.0, (y, present))

    def guide(y, present):
        numpyro.sample("x", dist.Normal(0.5 * y, 0.9))
        numpyro.sample("z", dist.Normal(jnp.zeros(len(y)), numpyro.param("scale", jnp.ones(len(y)))))

    present = jnp.array([True, True, False, True, True, True])
    loss = ImportanceSmoothedELBO(4)
    value = jax.jit(lambda scale: loss.loss(jax.random.key(0), {"scale": scale}, model, guide, jnp.asarray(Y), present))
    scale = jnp.ones(len(Y))
    as_it_is, masked, unmasked = (float(value(s)) for s in (scale, scale.at[2].set(3.0), scale.at[3].set(3.0)))
    assert masked == pytest.approx(as_it_is, rel=1e-6)
    assert unmasked != pytest.approx(as_it_is, rel=1e-3)
