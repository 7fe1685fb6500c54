"""Several series in a plate."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoNormal

from contract.entry import Entry, Wrong

positive, unit_interval = dist.constraints.positive, dist.constraints.unit_interval

# --- series that end at different times and have holes


def ragged_panel(y=None, present=None, T=None):
    level_noise = numpyro.param("level_noise", 0.8, constraint=positive)
    noise = numpyro.param("noise", 0.8, constraint=positive)
    series = numpyro.plate("series", 4)

    def step(level_prev, inputs):
        y_t, present_t = inputs
        seen = True if y_t is None else ~jnp.isnan(y_t)
        with series, numpyro.handlers.mask(mask=present_t):
            level = numpyro.sample("level", dist.Normal(level_prev, level_noise))
            with numpyro.handlers.mask(mask=seen):
                numpyro.sample("y", dist.Normal(level, noise), obs=y_t)
        level = jnp.where(present_t, level, level_prev)
        return level, level

    with series:
        level_0 = numpyro.sample("level_0", dist.Normal(0.0, 2.0))
    scan(step, level_0, (y, present), length=T)


LENGTHS = np.array([24, 2, 20, 24])


def presence(T):
    """Each series up to its end, and again once it is forecast."""
    t = np.arange(T)[:, None]
    return ((t < LENGTHS) | (t >= 24),)


def ragged(y):
    y = np.where(presence(len(y))[0], y, np.nan)
    y[4:6, 0] = y[1, 2] = np.nan
    return y


def ragged_panel_without_a_hold(y=None, present=None, T=None):
    series = numpyro.plate("series", 4)

    def step(level_prev, inputs):
        y_t, present_t = inputs
        with series, numpyro.handlers.mask(mask=present_t):
            level = numpyro.sample("level", dist.Normal(level_prev, 0.8))
            numpyro.sample("y", dist.Normal(level, 0.8), obs=y_t)
        return level, level

    with series:
        level_0 = numpyro.sample("level_0", dist.Normal(0.0, 2.0))
    scan(step, level_0, (y, present), length=T)


def with_a_gap(y, present):
    present = present.copy()
    present[3:6] = False
    return np.nan_to_num(y), present


# --- series that are alike: each has a slope of its own, drawn from a distribution of all of them


def hierarchical_panel(y=None, T=None):
    centre = numpyro.param("centre", 0.0)
    width = numpyro.param("width", 1.0, constraint=positive)
    series = numpyro.plate("series", 5)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(jnp.tanh(slope) * x_prev, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    with series:
        slope = numpyro.sample("slope", dist.Normal(centre, width))
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


def panel_that_shares_its_mean(y=None, T=None):
    series = numpyro.plate("series", 5)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.5 * x_prev + 0.5 * x_prev.mean(), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


# --- more series than one step of training reads


SERIES, BATCH = 12, 4


def subsampled_panel(y=None, T=None, batch=BATCH):
    slope = numpyro.param("slope", 0.4, constraint=unit_interval)
    series = numpyro.plate("series", SERIES, subsample_size=batch)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(slope * x_prev, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    with series:
        y = None if y is None else numpyro.subsample(y, event_dim=0)
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y, length=T)


def guide_of_all_series(y=None, T=None, batch=BATCH):
    """Locations and scales for all series; those of the batch are read."""
    first, spread = (numpyro.param(f"{name}_0", jnp.full(SERIES, value)) for name, value in (("loc", 0.0), ("log_scale", 0.0)))
    mean, scale = (
        numpyro.param(name, jnp.full((len(y), SERIES), value)) for name, value in (("loc", 0.0), ("log_scale", -0.5))
    )
    with numpyro.plate("series", SERIES, subsample_size=batch) as n:
        numpyro.sample("x_0", dist.Normal(first[n], jnp.exp(spread[n])))
        numpyro.sample("x", dist.Normal(mean[:, n], jnp.exp(scale[:, n])))


def subsampled_in_the_body(y=None, T=None):
    def step(x_prev, y_t):
        with numpyro.plate("series", SERIES, subsample_size=BATCH):
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
        return x, x

    scan(step, jnp.zeros(BATCH), y, length=T)


def all_series():
    predict = Predictive(subsampled_panel, num_samples=1, params={"slope": 0.9})
    return predict(jax.random.key(0), T=24, batch=SERIES)["y"][0]


ENTRIES = (
    Entry(
        name="ragged_panel",
        about="local levels, ragged ends and holes",
        model=ragged_panel,
        inputs=presence,
        spoil=ragged,
        truth={"level_noise": 0.3, "noise": 0.5},
        plates={"series": 4},
        wrong=Wrong(r"\['level'\] are masked at some steps", model=ragged_panel_without_a_hold, args=with_a_gap),
    ),
    Entry(
        name="hierarchical_panel",
        about="a parameter for each series, with a distribution over series",
        model=hierarchical_panel,
        guide=AutoNormal,
        num_steps=100,
        truth={"centre": 1.0, "width": 0.3},
        plates={"series": 5},
        wrong=Wrong("'x' lets the elements of plate 'series' read each other", model=panel_that_shares_its_mean),
    ),
    Entry(
        name="subsampled_panel",
        about="a minibatch of the series in each update",
        model=subsampled_panel,
        guide=lambda model: guide_of_all_series,
        num_steps=100,
        data=all_series,
        plates={"series": BATCH},
        wrong=Wrong("subsampled plate 'series'.*Build it once", model=subsampled_in_the_body),
    ),
)
