"""Transitions and emissions that are networks, of Flax."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module

from contract.entry import Entry, Wrong
from numpyro_pvmc import AutoAmortisedNormal
from numpyro_pvmc.networks import Convolutions

positive = dist.constraints.positive


class MLP(nnx.Module):
    def __init__(self, inputs, outputs, width=8, *, rngs):
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.output = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        return self.output(jnp.tanh(self.hidden(x)))


# --- a drift that is learned


def deep_transition(y=None, T=None):
    drift = nnx_module("drift", MLP(2, 2, rngs=nnx.Rngs(0)))
    noise = numpyro.param("noise", 0.5, constraint=positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev + drift(x_prev), noise).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.4).to_event(1), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scan(step, x_0, y, length=T)


def rotation(T=24):
    """A noisy spiral: no distribution of the program's."""
    t = jnp.arange(T)
    clean = 2.0 * jnp.stack([jnp.cos(t / 2.0), jnp.sin(t / 2.0)], -1)
    return clean + 0.3 * jax.random.normal(jax.random.key(1), clean.shape)


def deep_transition_declared_in_the_body(y=None, T=None):
    def step(x_prev, y_t):
        drift = nnx_module("drift", MLP(2, 2, rngs=nnx.Rngs(0)))
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev + drift(x_prev), 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.4).to_event(1), obs=y_t)
        return x, x

    scan(step, jnp.zeros(2), y, length=T)


# --- many sensors of a small state, read by a network; another network is the guide


def deep_emission(y=None, T=None):
    decode = nnx_module("decode", MLP(2, 6, rngs=nnx.Rngs(1)))
    noise = numpyro.param("noise", 0.5, constraint=positive)
    series = numpyro.plate("series", 3)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.4).to_event(1))
            numpyro.sample("y", dist.Normal(decode(x), noise).to_event(1), obs=y_t)
        return x, x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scan(step, x_0, y, length=T)


ENTRIES = (
    Entry(
        name="deep_transition",
        about="transition by a network",
        model=deep_transition,
        data=rotation,
        wrong=Wrong("'drift.*before the scan", model=deep_transition_declared_in_the_body),
    ),
    Entry(
        name="deep_emission",
        about="emission by a network; amortised guide",
        model=deep_emission,
        guide=lambda model: AutoAmortisedNormal(model, Convolutions(channels=(8,), width=3)),
        truth={"noise": 0.2},
        plates={"series": 3},
        num_steps=60,
        wrong=Wrong(
            r"'y' is observed with a value of shape \(3, 5\), but its distribution has shape \(3, 6\)",
            args=lambda y: (y[..., :5],),
        ),
    ),
)
