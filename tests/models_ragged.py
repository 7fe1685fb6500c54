"""Programs of series that differ in length, or that have gaps."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from programs import SERIES, Program, normal, normal_guide, observations, series_plate


def padded():
    """Series of 4, 2 and 3 steps: the latents and what is observed are masked where a series has ended."""
    present = np.arange(4)[:, None] < np.array([4, 2, 3])
    y = np.where(present, observations(4, SERIES), np.nan)

    def model(y, present):
        plate = series_plate()

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with plate, handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, present))

    return Program(
        name="padded",
        model=model,
        args=(y, present),
        present=present,
        start=lambda n, first: normal(first["x"], 0.0, 1.0),
        step=lambda t, n, prev, now: normal(now["x"], 0.9 * prev["x"], 0.5) + normal(y[t][n], now["x"], 0.7),
        **normal_guide(4, (SERIES,)),
    )


def held():
    """The state is held over absent steps: early in the first series, inside the second, at the end of the third."""
    present = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]], bool)
    y = np.where(present, observations(4, SERIES), np.nan)

    def model(y, present):
        plate = series_plate()

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with plate, handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            x = jnp.where(present_t, x, x_prev)
            return x, x

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, present))

    return padded()._replace(
        name="held",
        model=model,
        args=(y, present),
        present=present,
        step=lambda t, n, prev, now: normal(now["x"], 0.9 * prev["x"], 0.5) + normal(y[t][n], now["x"], 0.7),
    )


def late_start():
    """Like `held`, from a constant start: the first series begins a step late."""
    program = held()

    def model(y, present):
        plate = series_plate()

        def step(x_prev, inputs):
            y_t, present_t = inputs
            with plate, handlers.mask(mask=present_t):
                x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            x = jnp.where(present_t, x, x_prev)
            return x, x

        scan(step, jnp.full(SERIES, 0.5), (y, present))

    return program._replace(
        name="late_start",
        start=None,
        model=model,
        step=lambda t, n, prev, now: program.step(t, n, prev or {"x": 0.5}, now),
        **normal_guide(4, (SERIES,), start=False),
    )


PROGRAMS = (
    padded(),
    held(),
    late_start(),
)
