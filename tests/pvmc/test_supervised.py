"""Losses on known states: their value, their gradient, and what must not enter them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from conftest import few_particles, in_both_precisions, initial_params
from models import BY_NAME
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, SupervisedELBO
from numpyro_pvmc.infer.objective import TrainingStep
from numpyro_pvmc.pvmc.supervised import kernel_log_density, squared_error
from test_against_enumeration import enumerate_program, presence

pytestmark = few_particles

NAN = np.nan


def distance(weights, particles, truth):
    """A user's error, with a slope at zero that is nan, and which does not know of NaN."""
    return jnp.sqrt(jnp.sum((jnp.tensordot(weights, particles, 1) - truth) ** 2))


def exact_squared_error(weights, particles, truth):
    return np.nansum((np.tensordot(weights, particles, 1) - truth) ** 2)


def exact_kernel_log_density(weights, particles, truth):
    known = ~np.isnan(truth)
    kernel = stats.norm.pdf(particles[:, known], truth[known], 0.6)
    return -np.log(weights @ kernel.reshape(len(weights), -1).prod(-1))


def exact_distance(weights, particles, truth):
    return np.linalg.norm(np.ravel(np.tensordot(weights, particles, 1) - truth))


ERRORS = {
    "squared": (squared_error, exact_squared_error),
    "kernel": (kernel_log_density(0.6), exact_kernel_log_density),
    "users": (distance, exact_distance),
}


def some_states(program, seed=0):
    """States of all sites of a program, some elements, steps, and where there are several series one of those, unknown."""
    rng = np.random.default_rng(seed)
    states = {name: rng.normal(size=(*program.plates, *program.event)) for name in program.initial_sites}
    for name in program.sites:
        states[name] = rng.normal(size=(program.length, *program.plates, *program.event))
        states[name][1] = NAN
        states[name].reshape(-1)[0] = NAN
        if program.plates:
            states[name][:, 1] = NAN
    if program.plates:
        for name in program.initial_sites:
            states[name][1] = NAN
    return states


def exact_loss(program, posterior, states, error, skips_nan, bound, filtering):
    total = 0.0
    for n in np.ndindex(*program.plates):
        chain = enumerate_program(program, posterior, n)
        weights = chain.filtering_weights if filtering else chain.weights
        present = presence(program, n)
        by_time = {}
        for name, of_site in states.items():
            if name in program.initial_sites:
                asked = [(-1, 0, posterior.particles[name][:, *n], of_site[n])]
            else:
                rows = np.cumsum(present) - 1 + bool(program.start)
                asked = [
                    (t, rows[t], posterior.particles[name][t][:, *n], of_site[t][n])
                    for t in range(program.length)
                    if present[t]
                ]
            for t, row, particles, truth in asked:
                known = ~np.isnan(truth)
                if known.any() if skips_nan else known.all():
                    by_time.setdefault(t, []).append(error(weights[row], np.asarray(particles), np.asarray(truth)))
        total += np.mean([sum(errors) for errors in by_time.values()]) if by_time else 0.0
        total -= bound * chain.log_normalizer / (program.length + bool(program.start))
    return total


SLOW = pytest.mark.slow
VALUES = [  # program, error, bound, filtering
    pytest.param("vector", "squared", 1.0, False, marks=SLOW),
    pytest.param("vector", "kernel", 0.3, False, marks=SLOW),
    pytest.param("vector", "users", 0.3, True, marks=SLOW),
    pytest.param("two_coupled_sites", "kernel", 1.0, False, marks=SLOW),
    pytest.param("padded", "squared", 1.0, True, marks=SLOW),
    ("padded", "users", 1.0, False),
    pytest.param("held", "squared", 0.0, False, marks=SLOW),
    pytest.param("late_start", "kernel", 2.0, False, marks=SLOW),
    ("deterministic_start", "squared", 1.0, True),
]


@pytest.mark.parametrize(("name", "error", "bound", "filtering"), VALUES)
def test_value_against_numpy(x64, name, error, bound, filtering):
    program = BY_NAME[name]
    ours, exact = ERRORS[error]
    states = some_states(program)
    loss = SupervisedELBO(lambda *args: states, 4, error=ours, bound=bound, filtering=filtering)
    pvmc = PVMC(program.model, program.guide, loss=loss)
    params = initial_params(pvmc, jax.random.key(1), *program.args)
    posterior = pvmc.posterior(jax.random.key(2), params, *program.args)
    value = jax.jit(lambda params: loss.loss(jax.random.key(2), params, program.model, program.guide, *program.args))(params)
    expected = exact_loss(program, posterior, states, exact, error != "users", bound, filtering)
    assert_allclose(value, expected, rtol=1e-9)


@pytest.mark.slow
def test_global_sites_enter_the_bound(x64):
    """Without error and times the number of points it is the bound of every other objective."""
    program = BY_NAME["global_sites"]
    unknown = {"x": np.full(program.length, NAN)}
    supervised = SupervisedELBO(lambda *args: unknown, 4)
    plain = ImportanceSmoothedELBO(4, gradient="reparam")
    pvmc = PVMC(program.model, program.guide, loss=plain)
    params = initial_params(pvmc, jax.random.key(1), *program.args)
    value = lambda loss: loss.loss(jax.random.key(2), params, program.model, program.guide, *program.args)
    points = program.length + bool(program.start)
    assert_allclose(value(supervised) * points, value(plain), rtol=1e-12)


# Two series of five steps and three; the second step of the first is not observed.
PRESENT = np.arange(5)[:, None] < np.array([5, 3])
SEEN = PRESENT & ~((np.arange(5)[:, None] == 1) & (np.arange(2) == 0))
Y = np.where(SEEN[..., None], np.random.default_rng(0).normal(size=(5, 2, 2)), NAN)
STATES = np.where(PRESENT[..., None], np.random.default_rng(1).normal(size=(5, 2, 2)), NAN)
STATES[2, 0] = STATES[3, 0, 1] = NAN
STARTS = np.random.default_rng(2).normal(size=(2, 2))


def ragged(y, present, seen, states, starts):
    slope = numpyro.param("slope", 0.8)
    noise = numpyro.param("noise", 0.7)
    plate = numpyro.plate("series", y.shape[1])

    def step(x_prev, inputs):
        y_t, present_t, seen_t = inputs
        with plate, handlers.mask(mask=present_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev + 0.1 * x_prev[..., ::-1], 0.6).to_event(1))
            with handlers.mask(mask=seen_t):
                numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y_t)
        return x, None

    with plate:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scan(step, x_0, (y, present, seen))


def ragged_guide(y, *args):
    length, series, _ = y.shape
    loc = numpyro.param("loc", lambda key: 0.3 * jax.random.normal(key, (length + 1, series, 2)))
    scale = jnp.exp(numpyro.param("log_scale", jnp.full((length + 1, 1, 2), -0.2)))
    with numpyro.plate("series", series):
        numpyro.sample("x_0", dist.Normal(loc[0], scale[0]).to_event(1))
        numpyro.sample("x", dist.Normal(loc[1:], scale[1:]).to_event(1))


def ragged_truth(y, present, seen, states, starts):
    return {"x": states, "x_0": starts}


def ragged_arguments(states=STATES, starts=STARTS, length=5):
    return tuple(jnp.asarray(x) for x in (Y[:length], PRESENT[:length], SEEN[:length], states[:length], starts))


def ragged_params(length=5):
    rng = np.random.default_rng(3)
    loc = 0.4 * rng.normal(size=(length + 1, 2, 2))
    shaped = {"slope": 0.8, "noise": 0.7, "loc": loc, "log_scale": np.full((length + 1, 1, 2), -0.2)}
    return jax.tree.map(lambda x: jnp.asarray(x, float), shaped)


def value_of(loss):
    """The loss as a compiled function of parameters and arguments."""
    return jax.jit(lambda params, arguments: loss.loss(jax.random.key(0), params, ragged, ragged_guide, *arguments))


def value_and_slope(loss):
    return jax.jit(jax.value_and_grad(value_of(loss)))


@pytest.mark.parametrize(
    ("error", "choices"),
    [
        ("squared", {}),
        pytest.param("squared", {"filtering": True, "bound": 0.0}, marks=SLOW),
        pytest.param("squared", {"method": "associative", "bound": 0.0}, marks=SLOW),
        pytest.param("kernel", {"bound": 0.2}, marks=SLOW),
        pytest.param("users", {"bound": 0.0}, marks=SLOW),
    ],
)
def test_gradient_against_finite_differences(x64, error, choices):
    value = value_of(SupervisedELBO(ragged_truth, 4, error=ERRORS[error][0], **choices))
    of_params = lambda params: value(params, ragged_arguments())
    check_grads(of_params, (ragged_params(),), order=1, modes=["rev"], atol=1e-6, rtol=1e-5, eps=1e-5)


FINITE = [  # error, number of particles, steps, filtering
    pytest.param("squared", 4, 5, False, marks=SLOW),
    pytest.param("squared", 1, 5, False, marks=SLOW),
    ("kernel", 4, 5, True),
    pytest.param("kernel", 2, 1, False, marks=SLOW),
    pytest.param("users", 4, 5, False, marks=SLOW),
]


@in_both_precisions
@pytest.mark.parametrize(("error", "num_particles", "length", "filtering"), FINITE)
def test_finite_with_padding_missing_data_and_unknown_states(tolerance, error, num_particles, length, filtering):
    both = value_and_slope(SupervisedELBO(ragged_truth, num_particles, error=ERRORS[error][0], filtering=filtering))
    far = (STATES + 1e4, STARTS - 1e4)  # from all particles: no kernel reaches them
    for states, starts in ((STATES, STARTS), (STATES, NAN * STARTS), (NAN * STATES, NAN * STARTS), far):
        value, slope = both(ragged_params(length), ragged_arguments(states, starts, length))
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
        assert (np.asarray(slope["loc"])[4:, 1] == 0).all()


@pytest.mark.parametrize("error", [name if name == "kernel" else pytest.param(name, marks=SLOW) for name in ERRORS])
def test_what_stands_in_padding_does_not_enter(x64, error):
    both = value_and_slope(SupervisedELBO(ragged_truth, 4, error=ERRORS[error][0]))
    fillings = [np.where(PRESENT[..., None], STATES, filling) for filling in (NAN, np.inf, 1e30, 0.0)]
    first, *rest = [both(ragged_params(), ragged_arguments(states)) for states in fillings]
    for other in rest:
        jax.tree.map(assert_array_equal, first, other)


@pytest.mark.parametrize("error", [name if name == "kernel" else pytest.param(name, marks=SLOW) for name in ERRORS])
def test_series_and_sites_without_labels_have_no_error(x64, error):
    """Known is the first series after its start: the loss is that of its error, and a site that is left out is unknown."""
    unknown = np.where(np.arange(2)[:, None] == 0, STATES, NAN)
    chosen = {"error": ERRORS[error][0], "bound": 0.0}
    given = value_and_slope(SupervisedELBO(ragged_truth, 4, **chosen))(ragged_params(), ragged_arguments(unknown, NAN * STARTS))
    left_out = value_and_slope(SupervisedELBO(lambda *args: {"x": args[3]}, 4, **chosen))(
        ragged_params(), ragged_arguments(unknown)
    )
    jax.tree.map(assert_allclose, given, left_out)
    _, slope = given
    assert (np.asarray(slope["loc"])[:, 1] == 0).all()
    assert (np.asarray(slope["loc"])[:, 0] != 0).all()  # unknown steps too: their neighbours read them


def test_unknown_elements_are_left_out_of_the_shipped_errors():
    weights, particles = jnp.array([0.2, 0.8]), jnp.array([[1.0, 2.0], [0.0, 3.0]])
    assert_allclose(squared_error(weights, particles, jnp.array([NAN, 1.0])), squared_error(weights, particles[:, 1], 1.0))
    one, both = kernel_log_density(2.0), kernel_log_density(jnp.array([0.5, 2.0]))
    assert_allclose(both(weights, particles, jnp.array([NAN, 1.0])), one(weights, particles[:, 1], jnp.array(1.0)), rtol=1e-6)


def test_a_particle_without_weight_has_a_finite_slope():
    slope = jax.grad(kernel_log_density(0.5))(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]), jnp.array(0.5))
    assert np.isfinite(slope).all()


class Counted:
    """The states, and how often they were asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, y, states=None):
        self.calls += 1
        return {"x": states}


def autoregression(y, states=None):
    slope = numpyro.param("slope", 0.5)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(slope * x_prev, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def data(seed):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=6)).astype(np.float32)
    return x + 0.5 * rng.normal(size=6).astype(np.float32), x


@pytest.mark.slow
def test_stock_svi_and_pvmc_are_one():
    loss = SupervisedELBO(Counted(), 8)
    stock = SVI(autoregression, AutoNormal(autoregression), optax.adam(0.02), loss=loss)
    ours = PVMC(autoregression, AutoNormal(autoregression), optax.adam(0.02), loss=loss)
    results = [
        stock.run(jax.random.key(0), 20, *data(0), progress_bar=False),
        ours.run(jax.random.key(0), 20, *data(0), progress_bar=False, grow=False),
    ]
    assert_allclose(results[0].losses, results[1].losses, rtol=1e-5)
    assert results[1].losses[-1] < results[1].losses[0]


@SLOW
def test_second_run_on_other_states_compiles_nothing(caplog):
    truth = Counted()
    pvmc = PVMC(autoregression, AutoNormal(autoregression), loss=SupervisedELBO(truth, 4))

    def compilations(seed):
        caplog.clear()
        with jax.log_compiles(True):
            jax.block_until_ready(pvmc.run(jax.random.key(seed), 120, *data(seed), progress_bar=False))
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    assert compilations(0) > 5
    calls = truth.calls
    assert compilations(1) == 0
    assert truth.calls == calls


@SLOW
def test_a_growing_run_stays_supervised(capsys):
    loss = SupervisedELBO(Counted(), 4, bound=0.5, filtering=True, gradient="sticking")
    few = loss.at(TrainingStep(num_particles=2, frozen=("slope",)))
    assert (few.num_particles, few.bound, few.filtering, few.gradient) == (2, 0.5, True, "sticking")
    assert (few.truth, few.error, few.step.frozen) == (loss.truth, loss.error, ("slope",))
    assert (loss.num_particles, loss.step.frozen) == (4, ())
    pvmc = PVMC(autoregression, AutoNormal(autoregression), loss=loss)
    result = pvmc.run(jax.random.key(0), 60, *data(0))
    assert "loss: " in capsys.readouterr().err
    assert np.isfinite(result.losses).all()
    y, _ = data(0)
    assert pvmc.posterior(jax.random.key(1), result.params, y).mean()["x"].shape == (6,)
    assert pvmc.sample_posterior(jax.random.key(1), result.params, y, sample_shape=(3,))["x"].shape == (3, 6)


def test_frozen_parameters_get_no_gradient():
    loss = SupervisedELBO(ragged_truth, 4).at(TrainingStep(frozen=("slope",)))
    _, slope = value_and_slope(loss)(ragged_params(), ragged_arguments())
    assert slope["slope"] == 0
    assert slope["noise"] != 0


@pytest.mark.slow
def test_mutable_state_comes_back():
    def guide(y, states):
        count = numpyro.primitives.mutable("count", {"n": jnp.array(0.0)})
        count["n"] = count["n"] + 1
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(y, 1.0))

    y, x = data(0)
    params = {"slope": 0.5, "count": {"n": jnp.array(2.0)}}
    found = SupervisedELBO(Counted(), 2).loss_with_mutable_state(jax.random.key(0), params, autoregression, guide, y, x)
    assert found["mutable_state"]["count"]["n"] == 3


@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"truth": np.ones(6)}, TypeError, r"`truth` must be a function .* got ndarray. Give the states as an argument"),
        ({"error": "squared"}, TypeError, r"`error` must be a function .* got 'squared'. Take `squared_error` or"),
        ({"bound": -1.0}, ValueError, r"`bound`, .* must be a finite number of at least 0, but got -1.0"),
        ({"bound": NAN}, ValueError, r"`bound`, .* but got nan"),
        ({"bound": True}, ValueError, r"`bound`, .* but got True"),
        ({"gradient": "doubly_reparam"}, ValueError, r"got 'doubly_reparam'.* supervised terms use 'reparam'"),
        ({"num_particles": 0}, ValueError, r"`num_particles` must be an integer of at least 1"),
    ],
)
def test_choices_that_do_not_exist_are_refused(choices, kind, message):
    with pytest.raises(kind, match=message):
        SupervisedELBO(**{"truth": Counted(), **choices})


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, np.array([1.0, 0.0])])
def test_a_bandwidth_that_is_not_positive_is_refused(bandwidth):
    with pytest.raises(ValueError, match=r"`bandwidth` must be positive, but got .* It has the unit of the states"):
        kernel_log_density(bandwidth)


@pytest.mark.parametrize(
    ("truth", "error", "kind", "message"),
    [
        (
            lambda y, x: x,
            squared_error,
            TypeError,
            r"`truth` must return {site: array}, but it returned an array. Name",
        ),
        (lambda y, x: {}, squared_error, ValueError, r"`truth` returned no site, .* which are \['x', 'x_0'\]"),
        (lambda y, x: {"z": x}, squared_error, ValueError, r"returned \['z'\], .* which are \['x', 'x_0'\]. A site of which"),
        (lambda y, x: {"x": x[1:]}, squared_error, ValueError, r"'x' the shape \(5,\), .* gives it \(6,\): 6 steps .* NaN"),
        (lambda y, x: {"x_0": x}, squared_error, ValueError, r"'x_0' the shape \(6,\), .* gives it \(\): no time axis"),
        (lambda y, x: {"x": x}, lambda w, x, z: w * x, ValueError, r"`error` must return one number .* 'x' .* shape \(2,\)"),
    ],
)
def test_truths_and_errors_that_do_not_fit_are_refused(truth, error, kind, message):
    pvmc = PVMC(autoregression, AutoNormal(autoregression), loss=SupervisedELBO(truth, 2, error=error))
    y, x = (jnp.asarray(part) for part in data(0))
    with pytest.raises(kind, match=message):
        pvmc.evaluate(pvmc.init(jax.random.key(0), y, x), y, x)
