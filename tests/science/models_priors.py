"""Ten ordinary models with weakly informative priors on their parameters, and data drawn from them by plain NumPy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan


class Problem(NamedTuple):
    """A program and its data; `parameters` are the global sites whose posterior is looked at.

    `oracle` is a program with the same posterior of the parameters, in which NUTS moves more easily: states summed out.
    """

    model: Callable
    data: np.ndarray
    parameters: tuple[str, ...]
    oracle: Callable


class Linear(NamedTuple):
    """x_0 ~ N(mean, diag(start)), x_t ~ N(move x_{t-1} + shift, diag(noise)), y_t ~ N(read x_t, sigma^2); all variances."""

    mean: jax.Array
    start: jax.Array
    move: jax.Array
    noise: jax.Array
    read: jax.Array
    sigma: jax.Array
    shift: jax.Array | float = 0.0


def log_evidence(system, y):
    """By the Kalman filter."""

    def step(carry, y_t):
        mean, cov = carry
        mean = system.move @ mean + system.shift
        cov = system.move @ cov @ system.move.T + jnp.diag(system.noise)
        log_p = 0.0
        for read, value in zip(system.read, y_t, strict=True):  # one number at a time: their noise is independent
            along = cov @ read
            variance, miss = read @ along + system.sigma**2, value - read @ mean
            mean, cov = mean + along * miss / variance, cov - jnp.outer(along, along) / variance
            log_p += -0.5 * (miss**2 / variance + jnp.log(2 * jnp.pi * variance))
        return (mean, cov), log_p

    return jax.lax.scan(step, (jnp.asarray(system.mean, float), jnp.diag(system.start)), y)[1].sum()


def _summed(draw, linear):
    """The program in which the Kalman filter has summed the states out."""

    def oracle(y):
        numpyro.factor("y", log_evidence(linear(draw()), y.reshape(len(y), -1)))

    return oracle


def autoregression():
    rng, x, y = np.random.default_rng(0), 0.0, []
    for _ in range(80):
        x = 0.8 * x + 0.4 * rng.normal()
        y.append(x + 0.5 * rng.normal())

    def draw():
        beta = numpyro.sample("beta", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
        return beta, tau, numpyro.sample("sigma", dist.HalfCauchy(1.0))

    def model(y):
        beta, tau, sigma = draw()

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(beta * x, tau))
            numpyro.sample("y", dist.Normal(x, sigma), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0, 1)), y)

    def linear(p):
        beta, tau, sigma = p
        return Linear(jnp.zeros(1), jnp.ones(1), beta * jnp.eye(1), tau**2 * jnp.ones(1), jnp.eye(1), sigma)

    return Problem(model, np.array(y), ("beta", "tau", "sigma"), _summed(draw, linear))


def second_order():
    """AR(2): two points of it are one step of the chain."""
    rng, x, y = np.random.default_rng(1), [0.0, 0.0], []
    for _ in range(80):
        x = [x[1], 1.3 * x[1] - 0.6 * x[0] + 0.5 * rng.normal()]
        y.append(x[1] + 0.4 * rng.normal())

    def draw():
        a, b = (numpyro.sample(name, dist.Normal(0, 1)) for name in ("a", "b"))
        return a, b, numpyro.sample("tau", dist.HalfNormal(1.0)), numpyro.sample("sigma", dist.HalfNormal(1.0))

    def model(y):
        a, b, tau, sigma = draw()

        def step(carry, y_t):
            before, last = carry
            odd = numpyro.sample("odd", dist.Normal(a * last + b * before, tau))
            even = numpyro.sample("even", dist.Normal(a * odd + b * last, tau))
            numpyro.sample("y", dist.Normal(jnp.stack([odd, even]), sigma).to_event(1), obs=y_t)
            return (odd, even), None

        start = [numpyro.sample(name, dist.Normal(0, 1)) for name in ("odd_0", "even_0")]
        scan(step, tuple(start), y)

    def linear(p):
        a, b, tau, sigma = p
        move = jnp.stack([jnp.stack([a, b]), jnp.array([1.0, 0.0])])
        return Linear(jnp.zeros(2), jnp.ones(2), move, tau**2 * jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0]]), sigma)

    one_by_one = _summed(draw, linear)
    return Problem(model, np.array(y).reshape(-1, 2), ("a", "b", "tau", "sigma"), lambda y: one_by_one(y.reshape(-1)))


def trend():
    rng, level, slope, y = np.random.default_rng(2), 0.0, 0.3, []
    for _ in range(60):
        level += slope + 0.4 * rng.normal()
        slope += 0.2 * rng.normal()
        y.append(level + 0.5 * rng.normal())

    def draw():
        return [numpyro.sample(name, dist.HalfNormal(1.0)) for name in ("s_level", "s_slope", "sigma")]

    def model(y):
        s_level, s_slope, sigma = draw()

        def step(carry, y_t):
            level, slope = carry
            level = numpyro.sample("level", dist.Normal(level + slope, s_level))
            slope = numpyro.sample("slope", dist.Normal(slope, s_slope))
            numpyro.sample("y", dist.Normal(level, sigma), obs=y_t)
            return (level, slope), None

        scan(step, (numpyro.sample("level_0", dist.Normal(0, 2)), numpyro.sample("slope_0", dist.Normal(0, 1))), y)

    def linear(p):
        s_level, s_slope, sigma = p
        move, noise = jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.stack([s_level, s_slope]) ** 2
        return Linear(jnp.zeros(2), jnp.array([4.0, 1.0]), move, noise, jnp.array([[1.0, 0.0]]), sigma)

    return Problem(model, np.array(y), ("s_level", "s_slope", "sigma"), _summed(draw, linear))


def seasonal():
    """Monthly: a level, and one harmonic of the year that changes."""
    rng, level, wave, y = np.random.default_rng(3), 10.0, np.array([2.0, 0.0]), []
    turn = np.array([[np.cos(np.pi / 6), np.sin(np.pi / 6)], [-np.sin(np.pi / 6), np.cos(np.pi / 6)]])
    for _ in range(72):
        level += 0.3 * rng.normal()
        wave = turn @ wave + 0.2 * rng.normal(size=2)
        y.append(level + wave[0] + 0.4 * rng.normal())

    def draw():
        widths = {"s_level": 1.0, "s_wave": 0.5, "sigma": 1.0}
        return [numpyro.sample(name, dist.HalfNormal(width)) for name, width in widths.items()]

    def model(y):
        s_level, s_wave, sigma = draw()

        def step(carry, y_t):
            level, wave = carry
            level = numpyro.sample("level", dist.Normal(level, s_level))
            wave = numpyro.sample("wave", dist.Normal(turn @ wave, s_wave).to_event(1))
            numpyro.sample("y", dist.Normal(level + wave[0], sigma), obs=y_t)
            return (level, wave), None

        level = numpyro.sample("level_0", dist.Normal(10, 5))
        scan(step, (level, numpyro.sample("wave_0", dist.Normal(0, 3).expand([2]).to_event(1))), y)

    def linear(p):
        s_level, s_wave, sigma = p
        move = jax.scipy.linalg.block_diag(jnp.eye(1), turn)
        noise = jnp.stack([s_level, s_wave, s_wave]) ** 2
        return Linear(jnp.array([10.0, 0, 0]), jnp.array([25.0, 9, 9]), move, noise, jnp.array([[1.0, 1, 0]]), sigma)

    return Problem(model, np.array(y), ("s_level", "s_wave", "sigma"), _summed(draw, linear))


def volatility():
    rng, h, y = np.random.default_rng(4), -1.0, []
    for _ in range(80):
        h = -1.0 + 0.95 * (h + 1.0) + 0.3 * rng.normal()
        y.append(np.exp(h / 2) * rng.normal())

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 2))
        phi = numpyro.sample("phi", dist.Beta(10, 1.5))
        tau = numpyro.sample("tau", dist.HalfNormal(0.5))

        def step(h, y_t):
            h = numpyro.sample("h", dist.Normal(mu + phi * (h - mu), tau))
            numpyro.sample("y", dist.Normal(0, jnp.exp(h / 2)), obs=y_t)
            return h, None

        scan(step, numpyro.sample("h_0", dist.Normal(mu, 1)), y)

    return Problem(model, np.array(y), ("mu", "phi", "tau"), model)


def counts():
    rng, x, y = np.random.default_rng(5), 1.0, []
    z = rng.normal(size=70)
    for z_t in z:
        x += 0.2 * rng.normal()
        y.append(rng.poisson(np.exp(x + 0.5 * z_t)))

    def model(y):
        tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
        effect = numpyro.sample("effect", dist.Normal(0, 1))

        def step(x, row):
            count, z_t = row
            x = numpyro.sample("x", dist.Normal(x, tau))
            numpyro.sample("y", dist.Poisson(jnp.exp(x + effect * z_t)), obs=count)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0, 2)), (y, jnp.asarray(z)))

    return Problem(model, np.array(y), ("tau", "effect"), model)


def panel():
    """Five series around levels of their own."""
    rng = np.random.default_rng(6)
    level = 1.0 + 0.8 * rng.normal(size=5)
    x, y = level, []
    for _ in range(30):
        x = level + 0.7 * (x - level) + 0.4 * rng.normal(size=5)
        y.append(x + 0.3 * rng.normal(size=5))

    def draw():
        mu, phi = numpyro.sample("mu", dist.Normal(0, 2)), numpyro.sample("phi", dist.Normal(0, 1))
        omega, tau, sigma = (numpyro.sample(name, dist.HalfNormal(1.0)) for name in ("omega", "tau", "sigma"))
        with numpyro.plate("series", 5):
            level = numpyro.sample("level", dist.Normal(mu, omega))
        return level, phi, tau, sigma

    def model(y):
        level, phi, tau, sigma = draw()
        with numpyro.plate("series", 5):
            x = numpyro.sample("x_0", dist.Normal(level, 1))

        def step(x, y_t):
            with numpyro.plate("series", 5):
                x = numpyro.sample("x", dist.Normal(level + phi * (x - level), tau))
                numpyro.sample("y", dist.Normal(x, sigma), obs=y_t)
            return x, None

        scan(step, x, y)

    def linear(p):
        level, phi, tau, sigma = p
        return Linear(level, jnp.ones(5), phi * jnp.eye(5), tau**2 * jnp.ones(5), jnp.eye(5), sigma, (1 - phi) * level)

    return Problem(model, np.array(y), ("mu", "omega", "phi", "tau", "sigma"), _summed(draw, linear))


def regimes():
    """A level that moves little in one regime and much in the other."""
    rng, x, calm, y = np.random.default_rng(7), 0.0, True, []
    for _ in range(80):
        calm = calm if rng.uniform() < 0.92 else not calm
        x += (0.1 if calm else 1.2) * rng.normal()
        y.append(x + 0.2 * rng.normal())

    def draw():
        stay = numpyro.sample("stay", dist.Beta(8, 2).expand([2]).to_event(1))
        widths = {"tau": 0.5, "more": 1.0, "sigma": 0.5}
        return stay, *(numpyro.sample(name, dist.HalfNormal(width)) for name, width in widths.items())

    def model(y):
        stay, tau, more, sigma = draw()

        def step(carry, y_t):
            z, x = carry
            second = jnp.where(z == 0, 1 - stay[0], stay[1])
            z = numpyro.sample("z", dist.Bernoulli(second))
            x = numpyro.sample("x", dist.Normal(x, jnp.where(z == 0, tau, tau + more)))
            numpyro.sample("y", dist.Normal(x, sigma), obs=y_t)
            return (z, x), None

        z = numpyro.sample("z_0", dist.Bernoulli(0.5))
        scan(step, (z, numpyro.sample("x_0", dist.Normal(0, 1))), y)

    def oracle(y):
        """States are sampled as they stand, regimes summed by the forward pass."""
        stay, tau, more, sigma = draw()
        x = numpyro.sample("x", dist.Normal(0, 10).expand([len(y) + 1]).to_event(1).mask(False))
        numpyro.factor("start", dist.Normal(0, 1).log_prob(x[0]))
        move = jnp.log(jnp.stack([jnp.stack([stay[0], 1 - stay[0]]), jnp.stack([1 - stay[1], stay[1]])]))
        at_steps = dist.Normal(x[:-1, None], jnp.stack([tau, tau + more])).log_prob(x[1:, None])

        def forward(log_alpha, log_p):
            return jax.nn.logsumexp(log_alpha[:, None] + move, 0) + log_p, None

        last, _ = jax.lax.scan(forward, jnp.log(jnp.array([0.5, 0.5])), at_steps)
        numpyro.factor("moves", jax.nn.logsumexp(last))
        numpyro.sample("y", dist.Normal(x[1:], sigma).to_event(1), obs=y)

    return Problem(model, np.array(y), ("stay", "tau", "more", "sigma"), oracle)


def epidemic():
    """SIR in logs of the shares of a town, with noise in both compartments; daily counts of the infected."""
    rng, s, i, y = np.random.default_rng(8), np.log(0.99), np.log(0.01), []
    for _ in range(60):
        s, i = (
            s - 0.4 * np.exp(i) + 0.03 * rng.normal(),
            i + 0.4 * np.exp(s) - 0.15 + 0.1 * rng.normal(),
        )
        y.append(rng.poisson(1000 * np.exp(i)))

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(-1.0, 0.5))
        recovery = numpyro.sample("recovery", dist.LogNormal(-2.0, 0.5))
        tau_s = numpyro.sample("tau_s", dist.HalfNormal(0.1))
        tau_i = numpyro.sample("tau_i", dist.HalfNormal(0.3))

        def step(carry, y_t):
            s, i = carry
            new_s = numpyro.sample("s", dist.Normal(s - rate * jnp.exp(i), tau_s))
            new_i = numpyro.sample("i", dist.Normal(i + rate * jnp.exp(s) - recovery, tau_i))
            numpyro.sample("y", dist.Poisson(1000 * jnp.exp(new_i)), obs=y_t)
            return (new_s, new_i), None

        start = numpyro.sample("s_0", dist.Normal(0.0, 0.05)), numpyro.sample("i_0", dist.Normal(-4.5, 0.5))
        scan(step, start, y)

    return Problem(model, np.array(y), ("rate", "recovery", "tau_s", "tau_i"), model)


def tracking():
    """Position and velocity in the plane."""
    rng, position, velocity, y = np.random.default_rng(9), np.zeros(2), np.array([1.0, 0.5]), []
    for _ in range(50):
        position = position + velocity + 0.3 * rng.normal(size=2)
        velocity = velocity + 0.3 * rng.normal(size=2)
        y.append(position + 0.7 * rng.normal(size=2))

    def draw():
        widths = {"s_position": 1.0, "s_velocity": 1.0, "sigma": 2.0}
        return [numpyro.sample(name, dist.HalfNormal(width)) for name, width in widths.items()]

    def model(y):
        s_position, s_velocity, sigma = draw()

        def step(carry, y_t):
            position, velocity = carry
            position = numpyro.sample("position", dist.Normal(position + velocity, s_position).to_event(1))
            velocity = numpyro.sample("velocity", dist.Normal(velocity, s_velocity).to_event(1))
            numpyro.sample("y", dist.Normal(position, sigma).to_event(1), obs=y_t)
            return (position, velocity), None

        position = numpyro.sample("position_0", dist.Normal(0, 2).expand([2]).to_event(1))
        scan(step, (position, numpyro.sample("velocity_0", dist.Normal(0, 2).expand([2]).to_event(1))), y)

    def linear(p):
        s_position, s_velocity, sigma = p
        two = jnp.eye(2)
        noise = jnp.repeat(jnp.stack([s_position, s_velocity]) ** 2, 2)
        move = jnp.kron(jnp.array([[1.0, 1.0], [0.0, 1.0]]), two)
        return Linear(jnp.zeros(4), jnp.full(4, 4.0), move, noise, jnp.kron(jnp.array([[1.0, 0.0]]), two), sigma)

    return Problem(model, np.array(y), ("s_position", "s_velocity", "sigma"), _summed(draw, linear))


PROBLEMS = (autoregression, second_order, trend, seasonal, volatility, counts, panel, regimes, epidemic, tracking)
