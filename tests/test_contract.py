"""Everything that is promised of a program, asked of every program that people bring: a table of programs and questions.

`contract/` has the programs; a question is a function of one of them. What the questions of a program share is computed once.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIRunResult
from numpyro.infer.util import log_density

from brute_force import enumerate_posterior
from conftest import DOUBLE, SINGLE, few_particles, initial_params
from contract import ENTRIES, FIELDS
from contract.table import page
from numpyro_pvmc import PVMC

# NumPyro asks for the shape of every value in a trace, also of a module.
pytestmark = pytest.mark.filterwarnings("ignore:shape requires ndarray or scalar arguments:DeprecationWarning")

DRAWS, HORIZON = 5, 4


def pvmc_of(entry, num_particles, **choices):
    guide = None if entry.guide is None else entry.guide(entry.model)
    return PVMC(entry.model, guide, optax.adam(0.05), num_particles=num_particles, **choices)


class Fit(NamedTuple):
    pvmc: PVMC
    start: Any
    result: SVIRunResult


@functools.cache
def fit(name):
    """A program trained for a few updates."""
    entry = ENTRIES[name]
    pvmc = pvmc_of(entry, entry.num_particles)
    start = pvmc.init(jax.random.key(0), *entry.args())
    return Fit(pvmc, start, pvmc.run(jax.random.key(0), entry.num_steps, *entry.args(), progress_bar=False))


@functools.cache
def draws(name):
    """Trajectories of a trained program."""
    pvmc, _, result = fit(name)
    return pvmc.sample_posterior(jax.random.key(2), result.params, *ENTRIES[name].args(), sample_shape=(DRAWS,))


def model_parameters(entry, params):
    sites = trace(seed(substitute(entry.model, data=params), jax.random.key(0))).get_trace(*entry.args())
    return [name for name, site in sites.items() if site["type"] == "param"]


def hidden_values(model, args, params):
    """A draw of the latent and the deterministic sites, in the shapes that NumPyro gives them."""
    sites = trace(seed(substitute(model, data=params), jax.random.key(0))).get_trace(*args)
    is_hidden = lambda site: site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"])
    return {name: site["value"] for name, site in sites.items() if is_hidden(site)}


def starting_parameters(entry, pvmc, *args):
    # A refitted guide has none, and those of the model start as the program says.
    return {} if entry.guide is None else initial_params(pvmc, jax.random.key(0), *args)


# --- the questions


def trains(entry):
    """Losses are finite, every parameter of the model moves, and the bound rises: on common random numbers."""
    pvmc, start, result = fit(entry.name)
    assert result.losses.shape == (entry.num_steps,)
    assert np.isfinite(result.losses).all()
    before = pvmc.get_params(start)
    for name in model_parameters(entry, result.params):
        for old, new in zip(*map(jax.tree.leaves, (before[name], result.params[name])), strict=True):
            assert np.isfinite(new).all(), name
            assert (np.asarray(old) != np.asarray(new)).any(), f"'{name}' has not moved"

    def bound(state):
        losses = [pvmc.evaluate(state._replace(rng_key=jax.random.key(k)), *entry.args()) for k in range(8)]
        return -np.mean(losses)

    assert bound(result.state) > bound(start)


def posterior(entry):
    """Log evidence, weights and probabilities of states equal those of all trajectories as NumPyro scores them."""
    args, K = entry.args(3), 2 if entry.states else 3
    pvmc = pvmc_of(entry, K, particles="iid")
    params = starting_parameters(entry, pvmc, *args)
    ours = pvmc.posterior(jax.random.key(2), params, *args)
    assert ours.log_normalizer.dtype == np.float64
    assert ours.log_normalizer.shape == tuple(entry.plates.values())
    states = {name: np.arange(number) for name, number in entry.states.items()}
    exact = enumerate_posterior(
        ours,
        entry.model,
        pvmc.guide,
        args,
        {},
        ours.params,
        present=ours.present,
        states=states,
        ignore=ours.structure.free,
        scale=ours.structure.scale,
    )
    near = {"rtol": 1e-8, "atol": 1e-8}
    assert_allclose(ours.log_normalizer, exact.log_normalizer, **near)
    assert set(ours.log_weights) == set(exact.weights)
    for name, weights in exact.weights.items():
        here = slice(None)
        if ours.present is not None and name in ours.structure.step:
            here = np.broadcast_to(np.asarray(ours.present)[:, None], weights.shape)
        assert_allclose(np.exp(ours.log_weights[name])[here], weights[here], **near)
    for name, probabilities in exact.state_weights.items():
        assert_allclose(ours.state_probabilities[name], probabilities, **near)


def evidence(entry):
    """The log evidence of all data, 256 particles, from a start that has seen none, within its error of the exact one."""
    pvmc, repeats = pvmc_of(entry, 256, particles="rqmc"), 4
    params = starting_parameters(entry, pvmc, *entry.args())
    refine = 0 if entry.guide else 10
    keys = jax.random.split(jax.random.key(1), repeats)
    found = np.array([pvmc.posterior(key, params, *entry.args(), refine=refine).log_normalizer for key in keys])
    error = found.std(ddof=1) / np.sqrt(repeats)
    assert error < 0.03, f"too blunt to see anything: standard error {error:.2g}"
    expected = entry.exact(*entry.args())
    assert abs(found.mean() - expected) < 5 * error + 1e-6 * abs(expected), (found, expected)


def samples(entry):
    """Every latent and deterministic site in the shape that the model gives it, finite, within its support."""
    args, found = entry.args(), draws(entry.name)
    params = fit(entry.name).result.params
    prior = jax.eval_shape(lambda: hidden_values(entry.model, args, params))
    assert {name: x.shape for name, x in found.items()} == {name: (DRAWS, *x.shape) for name, x in prior.items()}
    for x in found.values():
        assert np.isfinite(x).all()

    def within_support(values):
        sites = trace(seed(substitute(entry.model, data={**params, **values}), jax.random.key(0))).get_trace(*args)
        latent = {n: site for n, site in sites.items() if site["type"] == "sample" and not site["is_observed"]}
        return {name: site["fn"].support(site["value"]) for name, site in latent.items()}

    supported = jax.jit(jax.vmap(within_support))(found)
    assert set(supported) <= set(found)
    for name, inside in supported.items():
        assert np.all(inside), name
        # A state may be all but certain.
        assert name in entry.states or len(np.unique(found[name])) > 1, f"all draws of '{name}' are the same"


def forecasts(entry):
    """Stock ``Predictive`` goes on where the trajectories end, each on a way of its own."""
    args, kwargs = entry.forecast(HORIZON)
    found = draws(entry.name)
    params = fit(entry.name).result.params
    known = {name: x for name, x in found.items() if name != entry.observed}  # not what was imputed
    predict = Predictive(entry.model, known, params=params, return_sites=[*known, entry.observed])
    ahead = predict(jax.random.key(4), *args, **kwargs)
    assert ahead[entry.observed].shape[1] == entry.length + entry.rows + HORIZON
    for name, x in ahead.items():
        assert np.isfinite(x).all(), name
    for name, past in known.items():
        if name.endswith("_unobserved"):
            continue  # part of the past only
        x = np.asarray(ahead[name])
        is_step = x.shape != past.shape
        assert_allclose(x[:, : entry.length] if is_step else x, past, rtol=1e-5, atol=1e-6, err_msg=name)
        assert not is_step or x.shape[1] == entry.length + HORIZON, name
    to_come = np.asarray(ahead[entry.observed], float)[:, -HORIZON:]  # a single count may be zero in all
    assert len(np.unique(to_come, axis=0)) > 1


def to_arviz(entry):
    """Groups and dimensions of ArviZ data; time has dates."""
    pvmc, _, result = fit(entry.name)
    found = pvmc.posterior(jax.random.key(2), result.params, *entry.args())
    dates = np.datetime64("2020-01-01") + np.arange(entry.length).astype("timedelta64[D]")
    dates = dates.astype("datetime64[ns]")
    data = found.to_arviz(jax.random.key(3), num_samples=DRAWS, time=dates)
    plates = tuple(entry.plates)
    for name in (*found.particles, *getattr(found, "state_probabilities", {})):
        time = ("time",) if name in found.structure.step else ()
        assert data["posterior"][name].dims[: 2 + len(time + plates)] == ("chain", "draw", *time, *plates)
    assert data["posterior"].sizes["draw"] == DRAWS
    in_front = () if entry.rows else ("time",)
    observed, y = data["observed_data"][entry.data_site], entry.args()[0]
    y = np.nan_to_num(y) if entry.imputed else y
    for name in found.structure.subsampled:
        y = y[:, found.params[name]]
    assert observed.dims[: len(in_front + plates)] == in_front + plates
    assert_array_equal(observed, np.asarray(y, np.float32))
    smoothing = data["smoothing"]
    assert smoothing["log_normalizer"].dims == plates
    for name, mean in found.mean().items():
        assert_array_equal(smoothing[f"{name}_mean"], mean)
    assert_array_equal(data["posterior"]["time"], dates)
    for name, size in entry.plates.items():
        assert_array_equal(data["posterior"][name], range(size))
    assert int(arviz.__version__.split(".")[0]) >= 1 or isinstance(data, arviz.InferenceData)


def precision(entry):
    """In float32 and float64 the same seed, parameters and global sites give the same log evidence."""

    def smoothed(double, values=None):
        with jax.enable_x64(double):
            # The points of quasi-random particles are made of the same bits in both; independent draws are not.
            pvmc = pvmc_of(entry, 32, particles="rqmc")
            values = pvmc.get_params(pvmc.init(jax.random.key(0), *entry.args())) if values is None else values
            return values, pvmc.posterior(jax.random.key(1), values, *entry.args())

    # Where a guide starts is drawn too, so the values of one precision are those of the other.
    _, single = smoothed(False)
    is_float = lambda x: np.issubdtype(x.dtype, np.floating)
    wide = lambda x: np.asarray(x, np.float64) if is_float(x) else x
    _, double = smoothed(True, jax.tree.map(wide, single.params | single.globals))
    assert (single.log_normalizer.dtype, double.log_normalizer.dtype) == (np.float32, np.float64)
    assert_allclose(single.log_normalizer, double.log_normalizer, rtol=1e-3)


def vanilla(entry):
    """The same program has a density under NumPyro itself, and its ``SVI`` with ``Trace_ELBO`` takes two steps."""
    args = entry.args()
    model = seed(entry.model, jax.random.key(0))  # for parameters that start at a draw
    log_joint = jax.jit(lambda: log_density(model, args, {}, hidden_values(entry.model, args, {}))[0])()
    assert np.isfinite(log_joint)
    if entry.states:  # no draws with a gradient
        return
    guide = AutoNormal(entry.model) if entry.guide is None else entry.guide(entry.model)
    svi = SVI(entry.model, guide, optax.adam(0.05), Trace_ELBO())
    start = svi.init(jax.random.key(0), *args)
    update, state = jax.jit(lambda state: svi.update(state, *args)), start
    for _ in range(2):  # behind an output layer that starts at zero nothing moves in the first
        state, loss = update(state)
        assert np.isfinite(loss)
    before, after = (svi.get_params(s) for s in (start, state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert all(moved), sorted(before)


def errors(entry):
    """A wrong use that suggests itself is refused by name."""
    wrong = entry.wrong
    model = wrong.model or entry.model
    guide = wrong.guide or (None if wrong.model else entry.guide)
    args = wrong.args(*entry.args()) if wrong.args else entry.args()
    with pytest.raises((ValueError, TypeError), match=f"(?s){wrong.message}"):
        PVMC(model, guide and guide(model), num_particles=4).init(jax.random.key(0), *args)


_FUNCTIONS = (trains, posterior, evidence, samples, forecasts, to_arviz, precision, vanilla, errors)
QUESTIONS = {question.__name__.removeprefix("to_"): question for question in _FUNCTIONS}


# What the default run leaves out costs more than 60 s; `-m slow` runs that.
QUICK = {
    "errors": set(list(ENTRIES)[::8]),
    "posterior": {"missing_by_obs_mask", "volatility_with_leverage", "two_regimes"},
    "trains": {"known_start"},
}


def asked(entry):
    """The questions that make sense for a program."""
    return [question for question in QUESTIONS if question != "evidence" or entry.exact is not None]


def answered(entry):
    return [question for question in asked(entry) if question not in entry.defects]


def cell(entry, question):
    tolerance = DOUBLE if question in ("posterior", "evidence") else SINGLE
    marks = [] if entry.name in QUICK.get(question, ()) else [pytest.mark.slow]
    if question != "evidence":  # the others are of a few updates, or three particles
        marks.append(few_particles)
    if question in entry.defects:
        marks.append(pytest.mark.xfail(strict=True, reason=entry.defects[question]))
    return pytest.param(entry, question, tolerance, id=f"{entry.name}-{question}", marks=marks)


CELLS = [cell(entry, question) for entry in ENTRIES.values() for question in asked(entry)]


@pytest.mark.parametrize(("entry", "question", "tolerance"), CELLS, indirect=["tolerance"])
def test_contract(entry, question, tolerance):
    QUESTIONS[question](entry)


def test_the_page_of_the_documentation_is_this_table():
    assert (Path(__file__).parents[1] / "docs/contract.rst").read_text() == page(FIELDS, QUESTIONS, answered)


if __name__ == "__main__":
    print(page(FIELDS, QUESTIONS, answered), end="")
