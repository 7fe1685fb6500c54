"""Observations that are counts or categories."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from contract.entry import Entry, Wrong

positive, unit_interval = dist.constraints.positive, dist.constraints.unit_interval

# --- counts of a walking intensity


def poisson(y=None, T=None):
    walk = numpyro.param("walk", 0.5, constraint=positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, walk))
        numpyro.deterministic("intensity", jnp.exp(x))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(2.0, 0.5))
    scan(step, x_0, y, length=T)


def guide_of_the_start_alone(y):
    numpyro.sample("x_0", dist.Normal(2.0, 0.5))


# --- counts with more zeros than a Poisson distribution has


def zero_inflated(y=None, T=None):
    gate = numpyro.param("gate", 0.5, constraint=unit_interval)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(1.5 + 0.8 * (x_prev - 1.5), 0.4))
        numpyro.sample("y", dist.ZeroInflatedPoisson(gate, rate=jnp.exp(x)), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(1.5, 0.7))
    scan(step, x_0, y, length=T)


def guide_with_a_gate(y):
    """The model sums out whether a zero is structural; there is no such site."""
    numpyro.sample("x_0", dist.Normal(1.5, 1.0))
    numpyro.sample("x", dist.Normal(jnp.full(len(y), 1.5), 1.0))
    numpyro.sample("is_structural", dist.Normal(jnp.zeros(len(y)), 1.0))


# --- ordered categories, such as answers to a survey


def ordinal(y=None, T=None):
    first = numpyro.param("first_cut", -1.0)
    gaps = numpyro.param("gaps", jnp.ones(3), constraint=positive)
    cuts = first + jnp.concatenate([jnp.zeros(1), jnp.cumsum(gaps)])

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.6))
        numpyro.sample("y", dist.OrderedLogistic(2.0 * x, cuts), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


# --- an epidemic with a season: a part of the people, and a part of their contacts, in logarithms


def seasonal_epidemic(cases=None, T=None):
    transmission = numpyro.param("transmission", 1.2, constraint=positive)
    season = numpyro.param("season", 0.1, constraint=unit_interval)
    reported = 0.3

    def step(carry, cases_t):
        (s_prev, i_prev), week = carry
        contact = transmission * (1.0 + season * jnp.cos(2.0 * jnp.pi * week / 12.0))
        force = contact * jnp.exp(i_prev)
        # Those who recover become susceptible again, so that neither part dies out.
        s = numpyro.sample("s", dist.Normal(s_prev - force + 0.05 * jnp.exp(-s_prev), 0.1))
        i = numpyro.sample("i", dist.Normal(i_prev + contact * jnp.exp(s_prev) - 0.6, 0.2))
        numpyro.deterministic("susceptible", jnp.exp(s))
        numpyro.sample("cases", dist.NegativeBinomial2(1_000.0 * reported * jnp.exp(i), 20.0), obs=cases_t)
        return ((s, i), week + 1), (s, i)

    s_0 = numpyro.sample("s_0", dist.Normal(-0.5, 0.2))
    i_0 = numpyro.sample("i_0", dist.Normal(-3.0, 0.5))
    scan(step, ((s_0, i_0), 0), cases, length=T)


def epidemic_with_a_parameter_in_the_body(cases=None, T=None):
    def step(i_prev, cases_t):
        growth = numpyro.param("growth", 0.1)
        i = numpyro.sample("i", dist.Normal(i_prev + growth, 0.2))
        numpyro.sample("cases", dist.Poisson(jnp.exp(i)), obs=cases_t)
        return i, i

    scan(step, 2.0, cases, length=T)


# --- an epidemic seen through tests: susceptible, infected, removed, as a composition


def sir(positives=None, tests=None, T=None):
    beta = numpyro.param("beta", 0.5, constraint=positive)
    gamma = numpyro.param("gamma", 0.3, constraint=positive)

    def step(x_prev, inputs):
        positives_t, tests_t = inputs
        s, i, r = jax.nn.softmax(jnp.append(x_prev, 0.0))
        infected, removed = s * (1.0 - jnp.exp(-beta * i)), i * (1.0 - jnp.exp(-gamma))
        s, i, r = s - infected, i + infected - removed, r + removed
        # Noise on the log ratios to the removed, so that the parts stay positive and sum to one.
        x = numpyro.sample("x", dist.Normal(jnp.log(jnp.stack([s, i]) / r), 0.1).to_event(1))
        prevalence = numpyro.deterministic("prevalence", jax.nn.softmax(jnp.append(x, 0.0))[1])
        numpyro.sample("positives", dist.Binomial(tests_t, prevalence), obs=positives_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(jnp.array([3.0, 0.0]), 0.3).to_event(1))
    scan(step, x_0, (positives, tests), length=T)


def sir_that_adds_up_cases(positives=None, tests=None, T=None):
    def step(carry, inputs):
        i_prev, total = carry
        positives_t, tests_t = inputs
        i = numpyro.sample("i", dist.Normal(i_prev - 0.1 * total, 0.1))
        numpyro.sample("positives", dist.Binomial(tests_t, logits=i), obs=positives_t)
        return (i, total + jax.nn.sigmoid(i)), i

    scan(step, (-2.0, 0.0), (positives, tests), length=T)


def number_of_tests(T):
    return (200 + 50 * (np.arange(T) % 3),)


ENTRIES = (
    Entry(
        name="poisson",
        about="Poisson counts",
        model=poisson,
        guide=AutoNormal,
        num_steps=100,
        truth={"walk": 0.2},
        wrong=Wrong(r"does not sample \['x'\].*leading time axis of 24", guide=lambda model: guide_of_the_start_alone),
    ),
    Entry(
        name="zero_inflated",
        about="zero-inflated counts",
        model=zero_inflated,
        truth={"gate": 0.2},
        wrong=Wrong(r"samples \['is_structural'\], which the model does not have", guide=lambda model: guide_with_a_gate),
    ),
    Entry(
        name="ordinal",
        about="ordered categories",
        model=ordinal,
        truth={"first_cut": -2.0, "gaps": np.array([0.7, 1.5, 2.0])},
        wrong=Wrong("'y' is observed with a value of shape", args=lambda y: (np.stack([y, y], -1),)),
    ),
    Entry(
        name="seasonal_epidemic",
        about="epidemic with a season, a clock in the carry",
        model=seasonal_epidemic,
        observed="cases",
        truth={"transmission": 1.0, "season": 0.4},
        num_particles=32,
        wrong=Wrong("declares the parameter 'growth'.*before the scan", model=epidemic_with_a_parameter_in_the_body),
    ),
    Entry(
        name="sir",
        about="SIR epidemic, binomial tests",
        model=sir,
        observed="positives",
        inputs=number_of_tests,
        truth={"beta": 0.9, "gamma": 0.2},
        num_particles=32,
        wrong=Wrong(r"`carry\[1\]` after a step depends on `carry\[1\]`.*accumulates", model=sir_that_adds_up_cases),
    ),
)
