"""Programs that differ in what is observed of one scalar autoregression, x_t ~ N(0.9 x_{t-1}, 0.5), and where."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from programs import SERIES, Program, normal, normal_guide, observations, series_plate


def first_state():
    return numpyro.sample("x_0", dist.Normal(0.0, 1.0))


def next_state(x_prev):
    return numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))


def program(name, model, args, log_emission, plates=(), log_first_emission=None, length=4):
    """`log_emission(t, n, x_prev, x)` and `log_first_emission(n, x_0)` are what differs by hand too."""

    def start(n, first):
        log_first = log_first_emission(n, first["x"]) if log_first_emission else 0.0
        return normal(first["x"], 0.0, 1.0) + log_first

    def step(t, n, prev, now):
        return normal(now["x"], 0.9 * prev["x"], 0.5) + log_emission(t, n, prev["x"], now["x"])

    return Program(name=name, model=model, args=args, start=start, step=step, **normal_guide(length, plates))


def missing():
    """Some observations are missing: the emission alone is masked, and the data hold NaN there."""
    seen = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]], bool)
    y = np.where(seen, observations(4, SERIES), np.nan)

    def model(y):
        plate = series_plate()

        def step(x_prev, y_t):
            with plate:
                x = next_state(x_prev)
                with handlers.mask(mask=~jnp.isnan(y_t)):
                    numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        with plate:
            x_0 = first_state()
        scan(step, x_0, y)

    emission = lambda t, n, x_prev, x: normal(y[t][n], x, 0.7) if seen[t][n] else 0.0
    return program("missing", model, (y,), emission, plates=(SERIES,))


def pair_emission():
    """What is observed reads the state before as well."""
    y = observations(4)

    def model(y):
        def step(x_prev, y_t):
            x = next_state(x_prev)
            numpyro.sample("y", dist.Normal(x - 0.5 * x_prev, 0.7), obs=y_t)
            return x, x

        scan(step, first_state(), y)

    return program("pair_emission", model, (y,), lambda t, n, x_prev, x: normal(y[t], x - 0.5 * x_prev, 0.7))


def sensors():
    """Two sensors read each series: a plate that does not enclose the latents."""
    y, gains = observations(4, 2, SERIES), np.array([[1.0], [-0.5]])

    def model(y):
        plate, sensor_plate = series_plate(), numpyro.plate("sensors", 2, dim=-2)

        def step(x_prev, y_t):
            with plate:
                x = next_state(x_prev)
                with sensor_plate:
                    numpyro.sample("y", dist.Normal(jnp.asarray(gains) * x, 0.7), obs=y_t)
            return x, x

        with plate:
            x_0 = first_state()
        scan(step, x_0, y)

    emission = lambda t, n, x_prev, x: normal(y[t][:, *n], gains[:, 0] * x, 0.7)
    return program("sensors", model, (y,), emission, plates=(SERIES,))


def first_observed():
    """y_0 is observed outside the scan."""
    y = observations(5)

    def model(y):
        def step(x_prev, y_t):
            x = next_state(x_prev)
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, x

        x_0 = first_state()
        numpyro.sample("y_0", dist.Normal(x_0, 0.6), obs=y[0])
        scan(step, x_0, y[1:])

    return program(
        "first_observed",
        model,
        (y,),
        lambda t, n, x_prev, x: normal(y[t + 1], x, 0.7),
        log_first_emission=lambda n, x: normal(y[0], x, 0.6),
    )


def after_the_scan():
    """One observed site after the scan reads the stacked states."""
    y = observations(4)

    def model(y):
        def step(x_prev, _):
            x = next_state(x_prev)
            return x, x

        _, x = scan(step, first_state(), None, length=4)
        numpyro.sample("y", dist.Normal(x**2, 0.7), obs=y)

    return program("after_the_scan", model, (y,), lambda t, n, x_prev, x: normal(y[t], x**2, 0.7))


def after_the_scan_as_event():
    """The same, with time inside the event."""
    y = observations(4)

    def model(y):
        def step(x_prev, _):
            x = next_state(x_prev)
            return x, x

        _, x = scan(step, first_state(), None, length=4)
        numpyro.sample("y", dist.Normal(x**2, 0.7).to_event(1), obs=y)

    return program("after_the_scan_as_event", model, (y,), lambda t, n, x_prev, x: normal(y[t], x**2, 0.7))


def after_the_scan_with_first():
    """The same with x_0 put in front: one row more than steps."""
    y = observations(5)

    def model(y):
        def step(x_prev, _):
            x = next_state(x_prev)
            return x, x

        x_0 = first_state()
        _, x = scan(step, x_0, None, length=4)
        numpyro.sample("y", dist.Normal(jnp.concatenate([x_0[None], x]), 0.7), obs=y)

    return program(
        "after_the_scan_with_first",
        model,
        (y,),
        lambda t, n, x_prev, x: normal(y[t + 1], x, 0.7),
        log_first_emission=lambda n, x: normal(y[0], x, 0.7),
    )


def after_the_scan_in_plates():
    """The same under a plate for time and a plate for series, with one reading missing."""
    y = observations(5, SERIES)
    y[2, 1] = np.nan

    def model(y):
        plate = series_plate()

        def step(x_prev, _):
            with plate:
                x = next_state(x_prev)
            return x, x

        with plate:
            x_0 = first_state()
        _, x = scan(step, x_0, None, length=4)
        with plate, numpyro.plate("time", 5, dim=-2), handlers.mask(mask=~jnp.isnan(y)):
            numpyro.sample("y", dist.Normal(jnp.concatenate([x_0[None], x]), 0.7), obs=y)

    return program(
        "after_the_scan_in_plates",
        model,
        (y,),
        lambda t, n, x_prev, x: 0.0 if np.isnan(y[t + 1][n]) else normal(y[t + 1][n], x, 0.7),
        plates=(SERIES,),
        log_first_emission=lambda n, x: normal(y[0][n], x, 0.7),
    )


def conditioned():
    """The data come by `handlers.condition`, the arguments hold none."""
    y = observations(4)

    def unconditioned(length):
        def step(x_prev, _):
            x = next_state(x_prev)
            numpyro.sample("y", dist.Normal(x, 0.7))
            return x, x

        scan(step, first_state(), None, length=length)

    def model(length):
        handlers.condition(unconditioned, {"y": jnp.asarray(y)})(length)

    return program("conditioned", model, (4,), lambda t, n, x_prev, x: normal(y[t], x, 0.7))


def no_inputs():
    """`xs` is None: the step looks its data up by a counter in the carry."""
    y = observations(4)

    def model(y, length):
        def step(carry, _):
            t, x_prev = carry
            x = next_state(x_prev)
            numpyro.sample("y", dist.Normal(x, 0.7), obs=jnp.asarray(y)[t])
            return (t + 1, x), x

        scan(step, (0, first_state()), None, length=length)

    no_length = program("no_inputs", model, (y,), lambda t, n, x_prev, x: normal(y[t], x, 0.7))
    return no_length._replace(kwargs={"length": 4})


def factor():
    """A factor that is no distribution, reading both states of a step."""

    def model(length):
        def step(x_prev, _):
            x = next_state(x_prev)
            numpyro.factor("smoothness", -0.5 * jnp.abs(x - x_prev))
            return x, x

        scan(step, first_state(), None, length=length)

    return program("factor", model, (4,), lambda t, n, x_prev, x: -0.5 * np.abs(x - x_prev))


PROGRAMS = (
    missing(),
    pair_emission(),
    sensors(),
    first_observed(),
    after_the_scan(),
    after_the_scan_as_event(),
    after_the_scan_with_first(),
    after_the_scan_in_plates(),
    conditioned(),
    no_inputs(),
    factor(),
)
