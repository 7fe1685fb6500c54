"""Nonlinear dynamics and distributions."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoMultivariateNormal

from contract.entry import Entry, Wrong

positive = dist.constraints.positive


def runge_kutta(field, x, dt):
    k1 = field(x)
    k2 = field(x + dt / 2 * k1)
    k3 = field(x + dt / 2 * k2)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + dt * k3))


# --- returns whose falls raise the volatility of the day after


def volatility_with_leverage(y=None, T=None):
    mu = numpyro.param("mu", 0.0)
    phi = numpyro.param("phi", 0.9, constraint=dist.constraints.unit_interval)
    sigma = numpyro.param("sigma", 0.4, constraint=positive)
    rho = numpyro.param("rho", -0.1, constraint=dist.constraints.interval(-1.0, 1.0))

    def step(carry, y_t):
        h_prev, y_prev = carry
        shock = y_prev * jnp.exp(-h_prev / 2)
        mean = mu + phi * (h_prev - mu) + sigma * rho * shock
        h = numpyro.sample("h", dist.Normal(mean, sigma * jnp.sqrt(1.0 - rho**2)))
        y = numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y_t)
        return (h, y), h

    h_0 = numpyro.sample("h_0", dist.Normal(mu, sigma / jnp.sqrt(1.0 - phi**2)))
    scan(step, (h_0, 0.0), y, length=T)


def volatility_not_centred(y=None, T=None):
    def step(h_prev, y_t):
        shock = numpyro.sample("shock", dist.Normal(0.0, 1.0))
        h = 0.95 * h_prev + 0.3 * shock
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y_t)
        return h, h

    scan(step, 0.0, y, length=T)


# --- hares and lynxes, in logarithms


def lotka_volterra(y=None, T=None):
    rates = numpyro.param("rates", jnp.array([0.5, 0.5]), constraint=positive)
    noise = numpyro.param("noise", 0.2, constraint=positive)

    def field(x):
        prey, predators = jnp.exp(x)
        return jnp.stack([rates[0] - 0.5 * predators, 0.3 * prey - rates[1]])

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(runge_kutta(field, x_prev, 0.5), noise).to_event(1))
        numpyro.deterministic("populations", jnp.exp(x))
        numpyro.sample("y", dist.LogNormal(x, 0.25).to_event(1), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.5, 0.5).expand([2]).to_event(1))
    scan(step, x_0, y, length=T)


def populations_in_two_scans(y=None, T=None):
    def prey(x_prev, _):
        x = numpyro.sample("prey", dist.Normal(x_prev, 0.2))
        return x, x

    def predators(z_prev, inputs):
        x, y_t = inputs
        z = numpyro.sample("predators", dist.Normal(z_prev + 0.1 * jnp.exp(x), 0.2))
        numpyro.sample("y", dist.LogNormal(jnp.stack([x, z]), 0.25).to_event(1), obs=y_t)
        return z, z

    _, x = scan(prey, 0.5, None, length=len(y))
    scan(predators, 0.5, (x, y), length=T)


# --- the butterfly, of which two coordinates are seen


def lorenz(y=None, T=None):
    rho = numpyro.param("rho", 24.0, constraint=positive)
    noise = numpyro.param("noise", 1.0, constraint=positive)

    def field(x):
        a, b, c = x
        return jnp.stack([10.0 * (b - a), a * (rho - c) - b, a * b - 8.0 / 3.0 * c])

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(runge_kutta(field, x_prev, 0.05), noise).to_event(1))
        numpyro.sample("y", dist.Normal(x[..., :2], 1.0).to_event(1), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(jnp.array([1.0, 1.0, 20.0]), 2.0).to_event(1))
    scan(step, x_0, y, length=T)


# --- a ship, seen as bearings from two stations


def bearings(y=None, T=None):
    agility = numpyro.param("agility", 0.3, constraint=positive)
    concentration = numpyro.param("concentration", 30.0, constraint=positive)
    stations = jnp.array([[0.0, 0.0], [10.0, 0.0]])
    move = jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    # The distribution of position and velocity after a unit of time under white acceleration, and jitter of the position.
    spread = jnp.kron(jnp.array([[1 / 3, 1 / 2], [1 / 2, 1.0]]), jnp.eye(2))
    covariance = agility**2 * spread + 0.05**2 * jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(move @ x_prev, covariance))
        east, north = (x[:2] - stations).T
        numpyro.sample("y", dist.VonMises(jnp.arctan2(north, east), concentration).to_event(1), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(jnp.array([3.0, 8.0, 0.2, 0.0]), jnp.array([0.5, 0.5, 0.2, 0.2])).to_event(1))
    scan(step, x_0, y, length=T)


def bearings_without_noise_on_the_position(y=None, T=None):
    def step(carry, y_t):
        position, velocity = carry
        position = position + velocity
        velocity = numpyro.sample("velocity", dist.Normal(velocity, 0.3).to_event(1))
        east, north = (position - jnp.array([[0.0, 0.0], [10.0, 0.0]])).T
        numpyro.sample("y", dist.VonMises(jnp.arctan2(north, east), 30.0).to_event(1), obs=y_t)
        return (position, velocity), position

    scan(step, (jnp.array([3.0, 8.0]), jnp.zeros(2)), y, length=T)


ENTRIES = (
    Entry(
        name="volatility_with_leverage",
        about="stochastic volatility with leverage",
        model=volatility_with_leverage,
        truth={"mu": 0.5, "phi": 0.95, "rho": -0.7},
        length=40,
        wrong=Wrong(r"\['shock'\] do not read the carry.*non-centred", model=volatility_not_centred),
    ),
    Entry(
        name="lotka_volterra",
        about="Lotka-Volterra populations",
        model=lotka_volterra,
        truth={"rates": np.array([0.8, 0.6]), "noise": 0.1},
        num_particles=32,
        wrong=Wrong(r"2 scans with latent sites: \['prey'\] and \['predators'\]", model=populations_in_two_scans),
    ),
    Entry(
        name="lorenz",
        about="Lorenz-63, two of three coordinates seen",
        model=lorenz,
        truth={"rho": 28.0, "noise": 0.5},
        num_particles=32,
        wrong=Wrong("a `Delta` distribution.*independently at each time", guide=AutoMultivariateNormal),
    ),
    Entry(
        name="bearings",
        about="tracking by bearings from two stations",
        model=bearings,
        truth={"agility": 0.1, "concentration": 100.0},
        num_particles=32,
        wrong=Wrong(r"after a step depends on `carry\[0\]`.*noise of its own", model=bearings_without_noise_on_the_position),
    ),
)
