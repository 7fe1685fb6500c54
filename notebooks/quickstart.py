# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Quickstart: ten years of stock market volatility
#
# How volatile was the market on a given day? The size of one return says little about it; the days around it say more.
# *Stochastic volatility* makes the logarithm of the variance a hidden process that wanders from day to day. Here it is
# written as a plain NumPyro program, fitted to ten years of the S&P 500, checked against a particle filter, and used to
# look back (smoothing) and ahead (forecasting). That takes about two minutes on two CPU cores.
#
# You need `pip install "numpyro_pvmc[demo]"`. `SCALE=smoke` in the environment runs the same code small, and
# `OUTPUT=folder` says where the figure and the posterior go.

# %%
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from cuthbert import filter as run_filter
from cuthbert.smc import particle_filter
from cuthbertlib.resampling import adaptive, systematic
from jax import random
from matplotlib.ticker import NullLocator
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal

from numpyro_pvmc import PVMC, AutoSmoothedNormal
from numpyro_pvmc.datasets import load_sp500_returns

SMOKE = os.environ.get("SCALE") == "smoke"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUTPUT = Path(os.environ.get("OUTPUT", HERE / "output"))
OUTPUT.mkdir(parents=True, exist_ok=True)

num_days, num_steps, num_filter_particles, num_repeats = (250, 40, 500, 4) if SMOKE else (2516, 150, 10_000, 6)
plain_steps = 320 if SMOKE else 4_800
num_particles, horizon = 64, 30
more_particles = 128 if SMOKE else 256

# %% [markdown]
# ## Data
#
# Daily log returns in percent, centred. They ship with the package `arch`, so nothing is downloaded.

# %%
returns, dates = load_sp500_returns(num_days)
y = jnp.asarray(returns)
print(f"{len(y)} returns, {dates[0]} to {dates[-1]}, standard deviation {returns.std():.2f}% a day")

# %% [markdown]
# ## Model and guide
#
# The log variance $x_t$ returns to its mean $\mu$ at a rate set by $\phi$, and is pushed about by noise of scale $s$:
#
# $$x_0 \sim \mathrm{N}\Bigl(\mu, \tfrac{s^2}{1 - \phi^2}\Bigr), \qquad x_t = \mu + \phi\,(x_{t-1} - \mu) + s\,\varepsilon_t, \qquad y_t \sim \mathrm{N}(0, e^{x_t}),$$
#
# The model is a plain NumPyro program with NumPyro's own `scan`, and its parameters start far from where they will end. The
# guide proposes from one Normal for each day. It has no parameters: every evaluation weighs its particles, and the
# Normals move to the mean and spread of the weighted particles.


# %%
def model(y=None, T=None):
    mu = numpyro.param("mu", 1.0)
    phi = numpyro.param("phi", 0.5, constraint=dist.constraints.unit_interval)
    s = numpyro.param("s", 0.8, constraint=dist.constraints.positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(mu + phi * (x_prev - mu), s))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(mu, s / jnp.sqrt(1 - phi**2)))
    scan(step, x_0, y, length=T)


guide = AutoSmoothedNormal(model)

# %% [markdown]
# ## Learn
#
# `PVMC` is NumPyro's `SVI` with another objective. Each day has 64 particles drawn from the guide, and all $64^{2517}$
# trajectories through them (the start counts too) are weighed at once.
#
# The optimiser has three numbers to find. For the first few steps they rest, while the guide finds the data.

# %%
started = time.perf_counter()
pvmc = PVMC(model, guide, optax.adam(0.1), num_particles=num_particles)
result = pvmc.run(random.key(0), num_steps, y)
jax.block_until_ready(result)
print(f"PVMC: {num_steps} steps in {time.perf_counter() - started:.0f} s")

# %% [markdown]
# For contrast, the textbook way: the same model under the plain evidence lower bound (ELBO), in stock NumPyro, with its
# `AutoNormal`, independent Normals too. Independent Normals cannot follow a strongly autocorrelated posterior, so this bound is
# loose; worse, it is tightest where the model has *no* autocorrelation, and that is where it drags $\phi$.

# %%
started = time.perf_counter()
plain_guide = AutoNormal(model, init_loc_fn=init_to_median, init_scale=1.5)
plain_optimizer = optax.adam(optax.cosine_decay_schedule(0.1, plain_steps, alpha=0.03))
plain = SVI(model, plain_guide, plain_optimizer, Trace_ELBO())
plain_result = plain.run(random.key(0), plain_steps, y, progress_bar=False)
jax.block_until_ready(plain_result)
print(f"ELBO: {plain_steps} steps in {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Is the bound tight?
#
# Both objectives bound the log evidence $\log p(y)$ from below. How far below, a particle filter tells that knows nothing
# of the guide: `cuthbert`'s bootstrap filter, run at the parameters that each of them has learned. The last row is the
# same guide with more particles, which costs no more training.

# %%
smoother = PVMC(model, guide, num_particles=more_particles)


def bounds(svi, params, keys):
    """The objective at fresh draws of the guide, one for each key."""
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: -svi.loss.loss(key, params, model, svi.guide, y), keys))
    return np.asarray(draw(keys))


@jax.jit
def filter_evidence(key, mu, phi, s):
    """The log evidence as one run of a bootstrap particle filter estimates it."""
    filter_ = particle_filter.build_filter(
        init_sample=lambda key: mu + s / jnp.sqrt(1 - phi**2) * random.normal(key),
        propagate_sample=lambda key, x, y: mu + phi * (x - mu) + s * random.normal(key),
        log_potential=lambda x_prev, x, y: dist.Normal(0.0, jnp.exp(x / 2)).log_prob(y),
        n_filter_particles=num_filter_particles,
        resampling_fn=adaptive.ess_decorator(systematic.resampling, 0.5),
    )
    key_init, key_filter = random.split(key)
    states = run_filter(filter_, y, filter_.init_prepare(key=key_init), key=key_filter)
    return states.log_normalizing_constant[-1]


def evidences(params):
    """Runs of the filter at given parameters."""
    keys = random.split(random.key(1), num_repeats)
    return np.array([filter_evidence(key, params["mu"], params["phi"], params["s"]) for key in keys])


started = time.perf_counter()
evidence_at = {"PVMC": evidences(result.params), "ELBO": evidences(plain_result.params)}
print(f"Particle filter: 2 x {num_repeats} runs in {time.perf_counter() - started:.0f} s\n")

started = time.perf_counter()
print("objective      mu     phi      s        bound          log evidence     gap")
for name, particles, svi, params, num_draws in [
    ("ELBO", 1, plain, plain_result.params, 1_000),
    ("PVMC", num_particles, pvmc, result.params, 100),
    ("PVMC", more_particles, smoother, result.params, 20),
]:
    bound, evidence = bounds(svi, params, random.split(random.key(2), num_draws)), evidence_at[name]
    print(
        f"{name}, K = {particles:<3} {params['mu']:6.2f} {params['phi']:6.3f} {params['s']:6.3f}"
        f"   {bound.mean():7.1f} ± {bound.std(ddof=1) / np.sqrt(num_draws):.1f}"
        f"   {evidence.mean():7.1f} ± {evidence.std(ddof=1) / np.sqrt(num_repeats):.1f}"
        f"   {evidence.mean() - bound.mean():5.1f}"
    )
print(f"\nBounds: {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Look back
#
# The guide's particles, weighted by all that came before and after. At the learned parameters three more rounds refit the
# guide to them before the final particles are drawn. The effective sample size says on how many
# of the particles a day's estimate really rests; days on which it is small are days to distrust.

# %%
started = time.perf_counter()
posterior = smoother.posterior(random.key(3), result.params, y, refine=3)
ess = np.asarray(posterior.effective_sample_size()["x"])
print(f"Effective sample size: median {np.median(ess):.0f} of {more_particles}, least {ess.min():.0f}")


def annualised(x):
    """Volatility in percent a year, from the log variance of a daily return in percent."""
    return np.sqrt(252) * np.exp(np.asarray(x) / 2)


levels = np.array([0.05, 0.5, 0.95])
low, middle, high = annualised(posterior.quantile(levels)["x"])
for day in (middle.argmax(), middle.argmin()):
    print(f"{dates[day]}: volatility {middle[day]:.0f}% a year, 90% between {low[day]:.0f}% and {high[day]:.0f}%")
print(f"Smoothing: {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Look ahead
#
# Joint trajectories of the posterior go straight into NumPyro's own `Predictive`. It runs the same program for longer:
# the past is the trajectory's, the future is the model's.

# %%
started = time.perf_counter()
samples = posterior.sample(random.key(4), (500,))
predictive = Predictive(model, samples, params=result.params, return_sites=["x", "y"], parallel=True)
forecast = predictive(random.key(5), T=len(y) + horizon)

future_dates = np.busday_offset(dates[-1], np.arange(horizon + 1))  # from the last day on; holidays are not left out
ahead_low, ahead_middle, ahead_high = annualised(np.quantile(forecast["x"], levels, axis=0)[:, len(y) - 1 :])
moves = np.pad(np.cumsum(np.asarray(forecast["y"])[:, len(y) :], axis=1), ((0, 0), (1, 0)))
print(f"In {horizon} trading days, with 90% probability:")
print(f"- the volatility is between {ahead_low[-1]:.0f}% and {ahead_high[-1]:.0f}% a year")
least, most = np.quantile(moves[:, -1], [0.05, 0.95])
print(f"- the index has moved by between {least:+.0f}% and {most:+.0f}%, less the drift")
print(f"Forecast: {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## See
#
# Volatility is in percent a year: the daily standard deviation times $\sqrt{252}$, the unit in which options are quoted.

# %%
episodes = {
    "2009-03-09": "Trough of the\ncrisis of 2008",
    "2010-05-20": "Flash crash,\nGreece",
    "2011-08-08": "US loses AAA,\neuro crisis",
    "2015-08-24": "China\ndevalues",
    "2016-06-24": "Brexit\nvote",
    "2018-02-05": "Volatility\nfunds fail",
    "2018-12-24": "December\nsell-off",
}
blue, orange, grey, ink = "#1f5a94", "#c4582a", "#8a9199", "#20262c"
style = {
    "font.size": 10,
    "text.color": ink,
    "axes.edgecolor": grey,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": "#e6e8ea",
    "xtick.color": grey,
    "xtick.labelcolor": ink,
    "ytick.labelcolor": ink,
    "ytick.left": False,
    "ytick.minor.left": False,
}
band = {"alpha": 0.28, "lw": 0}
recent = slice(-120, None)

with plt.rc_context(style):
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    figure.suptitle("The volatility of the S&P 500, day by day", x=0.021, ha="left", fontsize=17, fontweight="bold")
    axes = figure.subplot_mosaic(
        [["volatility", "ahead"], ["returns", "move"], ["ess", "move"]],
        height_ratios=[3.4, 2.1, 1],
        width_ratios=[3.1, 1],
    )

    axis = axes["volatility"]
    axis.set_title("Volatility, % a year (log scale): median and 90% band, given all the returns")
    axis.fill_between(dates, low, high, color=blue, **band)
    axis.plot(dates, middle, color=blue, lw=1.1)
    for day, text in episodes.items():
        if dates[0] <= np.datetime64(day) <= dates[-1]:
            near = np.abs(dates - np.datetime64(day)) <= np.timedelta64(10, "D")
            at = dates[near][high[near].argmax()], high[near].max()
            inwards = np.interp((at[0] - dates[0]) / (dates[-1] - dates[0]), [0, 0.03, 0.97, 1], [30, 0, 0, -8])
            axis.annotate(text, at, (inwards, 5), textcoords="offset points", ha="center", fontsize=9)

    axis = axes["returns"]
    axis.set_title("Daily returns, %, and the range that holds 90% of them at the median volatility")
    daily = 1.645 * middle / np.sqrt(252)
    axis.fill_between(dates, -daily, daily, color=blue, **band)
    axis.vlines(dates, 0, returns, color=ink, lw=0.5)

    axis = axes["ess"]
    axis.set_title(f"Effective sample size, of {more_particles} particles")
    axis.fill_between(dates, 0, ess, color=grey, step="mid", alpha=0.45, lw=0)
    axis.set_ylim(0, more_particles)
    axis.set_yticks([0, more_particles // 2, more_particles])

    axis = axes["ahead"]
    axis.set_title(f"The next {horizon} trading days")
    axis.fill_between(dates[recent], low[recent], high[recent], color=blue, **band)
    axis.plot(dates[recent], middle[recent], color=blue, lw=1.4)
    axis.fill_between(future_dates, ahead_low, ahead_high, color=orange, **band)
    axis.plot(future_dates, ahead_middle, color=orange, lw=1.4)
    axis.sharey(axes["volatility"])

    axis = axes["move"]
    axis.set_title("Cumulative return, %, less the drift")
    past = np.cumsum(returns[recent])
    axis.plot(dates[recent], past - past[-1], color=ink, lw=1.2)
    fan = np.quantile(moves, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    axis.fill_between(future_dates, fan[0], fan[4], color=orange, **band)
    axis.fill_between(future_dates, fan[1], fan[3], color=orange, **band)
    axis.plot(future_dates, fan[2], color=orange, lw=1.4)

    axes["volatility"].set_yscale("log")
    axes["volatility"].set_ylim(low.min() / 1.1, 1.7 * high.max())
    axes["volatility"].set_yticks([5, 10, 20, 40, 80], labels=["5", "10", "20", "40", "80"])
    axes["volatility"].yaxis.set_minor_locator(NullLocator())
    for name, axis in axes.items():
        axis.margins(x=0.01)
        axis.tick_params(length=0, axis="y")
        if name in ("ahead", "move"):
            axis.xaxis.set_major_locator(mdates.MonthLocator(interval=2))
            axis.xaxis.set_major_formatter(mdates.DateFormatter("%b"))
    figure.savefig(OUTPUT / "quickstart.png", dpi=160)
figure

# %% [markdown]
# ## Keep
#
# As ArviZ data, in a netCDF file, for whatever comes next.

# %%
posterior.to_arviz(time=dates, num_samples=500).to_netcdf(OUTPUT / "quickstart.nc")
print(f"Wrote {OUTPUT / 'quickstart.png'} and {OUTPUT / 'quickstart.nc'}")
