"""Programs that differ in which latents there are and how they move."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy import stats

from programs import Program, guide_means, normal, normal_guide, observations


def autoregression(length):
    y = observations(length)

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    return Program(
        name=f"autoregression_{length}",
        model=model,
        args=(y,),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: normal(now["x"], 0.9 * prev["x"], 0.5) + normal(y[t], now["x"], 0.7),
        **normal_guide(length),
    )


def deterministic_start():
    y = observations(4)

    def model(y, x_0):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(jnp.tanh(x_prev), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, x_0, y)

    return Program(
        name="deterministic_start",
        model=model,
        args=(y, 0.5),
        step=lambda t, n, prev, now: normal(now["x"], np.tanh(prev["x"] if t else 0.5), 0.5) + normal(y[t], now["x"], 0.7),
        **normal_guide(4, start=False),
    )


def clock():
    """The carry holds a step counter and a filtered control beside the state."""
    y, u = observations(4), observations(4, seed=1)
    control = [1.0]
    for u_t in u:
        control.append(0.8 * control[-1] + u_t)

    def model(y, u):
        def step(carry, inputs):
            x_prev, control, t = carry
            y_t, u_t = inputs
            control = 0.8 * control + u_t
            x = numpyro.sample("x", dist.Normal(0.7 * x_prev + control, 0.4 + 0.1 * t))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return (x, control, t + 1), x

        scan(step, (numpyro.sample("x_0", dist.Normal(0.0, 1.0)), jnp.array(1.0), 0), (y, u))

    return Program(
        name="clock",
        model=model,
        args=(y, u),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: (
            normal(now["x"], 0.7 * prev["x"] + control[t + 1], 0.4 + 0.1 * t) + normal(y[t], now["x"], 0.7)
        ),
        **normal_guide(4),
    )


def two_sites():
    """Two latents a step, of which only the first is carried; the guide draws the second given the first."""
    y, means = observations(4), guide_means(4)

    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.5))
            z = numpyro.sample("z", dist.Normal(jnp.sin(x), 0.4))
            numpyro.sample("y", dist.Normal(x + z, 0.7), obs=y_t)
            return x, (x, z)

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    def guide(y):
        numpyro.sample("x_0", dist.Normal(0.2, 1.1))
        x = numpyro.sample("x", dist.Normal(jnp.asarray(means), 0.8))
        numpyro.sample("z", dist.Normal(0.3 * x + jnp.asarray(means), 0.6))

    return Program(
        name="two_sites",
        model=model,
        guide=guide,
        args=(y,),
        length=4,
        sites=("x", "z"),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: (
            normal(now["x"], 0.8 * prev["x"], 0.5)
            + normal(now["z"], np.sin(now["x"]), 0.4)
            + normal(y[t], now["x"] + now["z"], 0.7)
        ),
        propose_start=lambda n, first: normal(first["x"], 0.2, 1.1),
        propose=lambda t, n, now: normal(now["x"], means[t], 0.8) + normal(now["z"], 0.3 * now["x"] + means[t], 0.6),
    )


def two_coupled_sites():
    """Two latents a step, both carried, the second reading the first of its own step and itself of the step before."""
    y, means = observations(4), guide_means(4)

    def model(y):
        def step(prev, y_t):
            x = numpyro.sample("x", dist.Normal(0.5 * prev["x"] + 0.2 * prev["z"], 0.5))
            z = numpyro.sample("z", dist.Normal(0.6 * prev["z"] + x, 0.4))
            numpyro.sample("y", dist.Normal(z, 0.7), obs=y_t)
            return {"x": x, "z": z}, None

        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, {"x": x_0, "z": numpyro.sample("z_0", dist.Normal(x_0, 0.9))}, y)

    def guide(y):
        numpyro.sample("z", dist.Normal(jnp.asarray(means) + 0.1, 0.6))
        numpyro.sample("x", dist.Normal(jnp.asarray(means), 0.8))
        x_0 = numpyro.sample("x_0", dist.Normal(0.2, 1.1))
        numpyro.sample("z_0", dist.Normal(0.5 * x_0, 1.2))

    return Program(
        name="two_coupled_sites",
        model=model,
        guide=guide,
        args=(y,),
        length=4,
        sites=("x", "z"),
        initial_sites=("x_0", "z_0"),
        start=lambda n, first: normal(first["x"], 0.0, 1.0) + normal(first["z"], first["x"], 0.9),
        step=lambda t, n, prev, now: (
            normal(now["x"], 0.5 * prev["x"] + 0.2 * prev["z"], 0.5)
            + normal(now["z"], 0.6 * prev["z"] + now["x"], 0.4)
            + normal(y[t], now["z"], 0.7)
        ),
        propose_start=lambda n, first: normal(first["x"], 0.2, 1.1) + normal(first["z"], 0.5 * first["x"], 1.2),
        propose=lambda t, n, now: normal(now["x"], means[t], 0.8) + normal(now["z"], means[t] + 0.1, 0.6),
    )


def global_sites():
    """A slope and a noise scale drawn once; the bound is that of the chain given the draw."""
    y = observations(4)
    chain = normal_guide(4)

    def model(y):
        slope = numpyro.sample("slope", dist.Normal(0.5, 0.3))
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.2))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev, scale))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, scale)), y)

    def guide(y):
        numpyro.sample("slope", dist.Normal(0.6, 0.1))
        numpyro.sample("scale", dist.LogNormal(-0.4, 0.1))
        chain["guide"](y)

    log_normal = lambda x, mean, scale: stats.lognorm.logpdf(x, scale, scale=np.exp(mean))
    return Program(
        name="global_sites",
        model=model,
        args=(y,),
        start=lambda n, first: normal(first["x"], 0.0, first["scale"]),
        step=lambda t, n, prev, now: normal(now["x"], now["slope"] * prev["x"], now["scale"]) + normal(y[t], now["x"], 0.7),
        log_prior=lambda g: normal(g["slope"], 0.5, 0.3) + log_normal(g["scale"], -0.5, 0.2),
        propose_globals=lambda g: normal(g["slope"], 0.6, 0.1) + log_normal(g["scale"], -0.4, 0.1),
        **{**chain, "guide": guide},
    )


def parameters():
    """Parameters of the model and of the guide, outside the scan and constrained."""
    y, means = observations(4), guide_means(4)
    positive = dist.constraints.positive

    def model(y):
        slope = numpyro.param("slope", 0.7)
        scale = numpyro.param("scale", 0.4, constraint=positive)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev, scale))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    def guide(y):
        numpyro.sample("x_0", dist.Normal(numpyro.param("guide_mean_0", 0.2), 1.1))
        mean = numpyro.param("guide_mean", jnp.asarray(means))
        numpyro.sample("x", dist.Normal(mean, numpyro.param("guide_scale", jnp.full(4, 0.8), constraint=positive)))

    return Program(
        name="parameters",
        model=model,
        args=(y,),
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: normal(now["x"], 0.7 * prev["x"], 0.4) + normal(y[t], now["x"], 0.7),
        **{**normal_guide(4), "guide": guide},
    )


PROGRAMS = (
    autoregression(4),
    autoregression(1),
    deterministic_start(),
    clock(),
    two_sites(),
    two_coupled_sites(),
    global_sites(),
    parameters(),
)
