"""Discrete states, which the guide leaves out: the library sums over them exactly."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy import stats

from contract.entry import Entry, Wrong
from oracles import forward_backward

positive, simplex = dist.constraints.positive, dist.constraints.simplex


def guide_of_nothing(model):
    """All latent sites are discrete."""
    return lambda *args, **kwargs: None


def evidence(initial, transition, mean, scale):
    """Of a hidden Markov model whose first state has no observation. `mean` and `scale` of what is observed: (T, S)."""

    def of(y):
        log_emission = stats.norm.logpdf(y[:, None], mean(y) if callable(mean) else mean, scale)
        log_emission = np.concatenate([np.zeros((1, len(initial))), log_emission])
        return forward_backward(np.log(initial), np.log(transition), log_emission).log_normalizer

    return of


# --- hidden Markov models


def two_regimes(y=None, T=None):
    stay = numpyro.param("stay", jnp.array([0.7, 0.7]), constraint=dist.constraints.unit_interval)
    scale = numpyro.param("scale", jnp.array([0.6, 1.5]), constraint=positive)

    def step(z_prev, y_t):
        z = numpyro.sample("z", dist.Bernoulli(jnp.where(z_prev == 1, stay[1], 1.0 - stay[0])))
        numpyro.sample("y", dist.Normal(0.0, scale[z]), obs=y_t)
        return z, z

    z_0 = numpyro.sample("z_0", dist.Bernoulli(0.5))
    scan(step, z_0, y, length=T)


def three_states(y=None, T=None):
    transition = numpyro.param("transition", jnp.full((3, 3), 0.2) + 0.4 * jnp.eye(3), constraint=simplex)
    mean = numpyro.param("mean", jnp.array([-1.0, 0.0, 1.0]))

    def step(z_prev, y_t):
        z = numpyro.sample("z", dist.Categorical(transition[z_prev]))
        numpyro.sample("y", dist.Normal(mean[z], 0.6), obs=y_t)
        return z, z

    z_0 = numpyro.sample("z_0", dist.Categorical(jnp.ones(3) / 3.0))
    scan(step, z_0, y, length=T)


def hidden_counts(y=None, T=None):
    """States without an end cannot be summed one by one."""

    def step(n_prev, y_t):
        n = numpyro.sample("n", dist.Poisson(1.0 + 0.8 * n_prev))
        numpyro.sample("y", dist.Normal(n, 0.6), obs=y_t)
        return n, n

    n_0 = numpyro.sample("n_0", dist.Poisson(3.0))
    scan(step, n_0, y, length=T)


# --- an autoregression of the observations, whose coefficients switch


def switching_autoregression(y=None, T=None):
    intercept = numpyro.param("intercept", jnp.array([-0.3, 0.3]))
    slope = numpyro.param("slope", jnp.array([0.2, 0.6]))
    scale = numpyro.param("scale", jnp.array([0.5, 0.5]), constraint=positive)
    transition = jnp.array([[0.9, 0.1], [0.2, 0.8]])

    def step(carry, y_t):
        z_prev, y_prev = carry
        z = numpyro.sample("z", dist.Categorical(transition[z_prev]))
        y = numpyro.sample("y", dist.Normal(intercept[z] + slope[z] * y_prev, scale[z]), obs=y_t)
        return (z, y), z

    z_0 = numpyro.sample("z_0", dist.Categorical(jnp.array([0.5, 0.5])))
    scan(step, (z_0, 0.0), y, length=T)


def mean_of_autoregression(y):
    before = np.concatenate([[0.0], y[:-1]])
    return np.array([-0.3, 0.3]) + np.outer(before, [0.2, 0.6])


# --- linear dynamics that switch


def switching_linear(y=None, T=None):
    slope = numpyro.param("slope", jnp.array([0.9, 0.3]))
    push = numpyro.param("push", jnp.array([0.0, 1.0]))
    transition = jnp.array([[0.9, 0.1], [0.2, 0.8]])

    def step(carry, y_t):
        z_prev, x_prev = carry
        z = numpyro.sample("z", dist.Categorical(transition[z_prev]))
        x = numpyro.sample("x", dist.Normal(slope[z] * x_prev + push[z], 0.3))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return (z, x), (z, x)

    z_0 = numpyro.sample("z_0", dist.Categorical(jnp.array([0.5, 0.5])))
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, (z_0, x_0), y, length=T)


# --- ovals: where the state is decides which dynamics come next (Linderman et al., AISTATS 2017)


def ovals():
    """Two turns about (-2, 0) and (2, 0), and two straights between them, each with the place where it is chosen."""

    def turn(angle, centre):
        rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        return rotation, centre - rotation @ centre

    angle = jnp.pi / 12
    A, b = zip(
        turn(angle, jnp.array([-2.0, 0.0])),
        turn(angle, jnp.array([2.0, 0.0])),
        (jnp.eye(2), jnp.array([-0.3, 0.0])),
        (jnp.eye(2), jnp.array([0.3, 0.0])),
        strict=True,
    )
    R = 5.0 * jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    r = jnp.array([-8.0, -8.0, 0.0, 0.0])
    return jnp.stack(A), jnp.stack(b), R, r


def recurrent_switching(y=None, T=None):
    A, b, R, r = ovals()
    C = numpyro.param("C", jnp.eye(10, 2))

    def step(x_prev, y_t):
        z = numpyro.sample("z", dist.Categorical(logits=R @ x_prev + r))
        x = numpyro.sample("x", dist.Normal(A[z] @ x_prev + b[z], 0.1).to_event(1))
        numpyro.sample("y", dist.Normal(C @ x, 0.3).to_event(1), obs=y_t)
        return x, (z, x)

    x_0 = numpyro.sample("x_0", dist.Normal(jnp.array([0.0, -1.5]), 0.3).to_event(1))
    scan(step, x_0, y, length=T)


def guide_of_one_state(y):
    numpyro.sample("z", dist.Categorical(jnp.ones(3) / 3.0))


def with_nan(y):
    y = y.copy()
    y[2] = np.nan
    return y


ENTRIES = (
    Entry(
        name="two_regimes",
        about="hidden Markov model, 2 states",
        model=two_regimes,
        guide=guide_of_nothing,
        states={"z_0": 2, "z": 2},
        exact=evidence([0.5, 0.5], [[0.7, 0.3], [0.3, 0.7]], 0.0, [0.6, 1.5]),
        truth={"stay": np.array([0.95, 0.9]), "scale": np.array([0.3, 2.0])},
        wrong=Wrong("'n_0' is discrete.*not finitely many", model=hidden_counts),
    ),
    Entry(
        name="three_states",
        about="hidden Markov model, 3 states",
        model=three_states,
        guide=guide_of_nothing,
        states={"z_0": 3, "z": 3},
        exact=evidence(np.ones(3) / 3.0, 0.2 + 0.4 * np.eye(3), [-1.0, 0.0, 1.0], 0.6),
        truth={"mean": np.array([-2.0, 0.0, 3.0])},
        wrong=Wrong("'z'.*leading time axis of 24", guide=lambda model: guide_of_one_state),
    ),
    Entry(
        name="switching_autoregression",
        about="Markov-switching autoregression",
        model=switching_autoregression,
        guide=guide_of_nothing,
        states={"z_0": 2, "z": 2},
        exact=evidence([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], mean_of_autoregression, 0.5),
        truth={"intercept": np.array([-1.0, 1.0]), "slope": np.array([-0.2, 0.7])},
        wrong=Wrong("'y' contain NaN, first at time 2", args=lambda y: (with_nan(y),)),
    ),
    Entry(
        name="switching_linear",
        about="switching linear system",
        model=switching_linear,
        states={"z_0": 2, "z": 2},
        truth={"slope": np.array([0.95, 0.0]), "push": np.array([0.0, 2.0])},
        wrong=Wrong("'y' contain NaN, first at time 2", args=lambda y: (with_nan(y),)),
    ),
    Entry(
        name="recurrent_switching",
        about="recurrent switching system: ovals, 4 states, 10 sensors",
        model=recurrent_switching,
        states={"z": 4},
        truth={"C": np.random.default_rng(5).normal(size=(10, 2))},
        num_particles=32,
        wrong=Wrong("'y'.*shape", args=lambda y: (y[:, :9],)),
    ),
)
