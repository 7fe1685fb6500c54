"""Every program, guide and argument that cannot work says why, by name, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import LocScaleReparam

from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, markov

T = 4
Y = jnp.linspace(-1.0, 1.0, T)


def initialise(model, guide=None, *args, **kwargs):
    return PVMC(model, AutoNormal(model) if guide is None else guide).init(jax.random.key(0), *(args or (Y,)), **kwargs)


def walk(x_prev, y_t):
    x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
    return x, x


def random_walk(y):
    scan(walk, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def fitting_guide(y):
    numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(len(y)), 1.0))


# --- programs


def two_scans(y):
    def other(z_prev, _):
        z = numpyro.sample("z", dist.Normal(z_prev, 1.0))
        return z, z

    _, z = scan(other, 0.0, None, length=T)
    scan(walk, z[-1], y)


def no_scan(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def python_loop(y):
    x = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in markov(range(T)):
        x = numpyro.sample(f"x_{t + 1}", dist.Normal(x, 1.0))


def nested(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        scan(lambda c, _: (c, numpyro.sample("z", dist.Normal(c, 1.0), obs=y_t)), x, None, length=2)
        return x, x

    scan(step, 0.0, y)


def history_two(y):
    scan(walk, 0.0, y, history=2)


def reversed_time(y):
    scan(walk, 0.0, y, reverse=True)


def param_in_body(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, numpyro.param("sigma", 1.0)))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, x

    scan(step, 0.0, y)


def series_in_plate(transition_mean):
    def model(y):
        plate = numpyro.plate("series", 3)

        def step(x_prev, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(transition_mean(x_prev), 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, x

        with plate:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, y)

    return model


def emission_outside_plate(y):
    plate = numpyro.plate("series", 3)

    def step(x_prev, y_t):
        with plate:
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y_t)
        return x, x

    scan(step, jnp.zeros(3), y)


def subsampled_in_body(y):
    def step(x_prev, y_t):
        with numpyro.plate("series", 3, subsample_size=2):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        return x, x

    scan(step, jnp.zeros(2), y)


def accumulator(y):
    def step(carry, y_t):
        x_prev, total = carry
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        numpyro.sample("y", dist.Normal(total, 1.0), obs=y_t)
        return (x, total + x), x

    scan(step, (0.0, 0.0), y)


def second_lag(y):
    def step(carry, y_t):
        x_prev, x_before = carry
        x = numpyro.sample("x", dist.Normal(0.5 * x_prev + 0.2 * x_before, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return (x, x_prev), x

    scan(step, (0.0, 0.0), y)


def non_centred(y):
    def step(x_prev, y_t):
        x = 0.9 * x_prev + numpyro.sample("eps", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, x

    scan(step, 0.0, y)


def loc_scale_reparam(y):
    def step(x_prev, y_t):
        with numpyro.handlers.reparam(config={"x": LocScaleReparam(0.0)}):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, x

    scan(step, 0.0, y)


def delta_transition(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Delta(0.9 * x_prev))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, x

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def discrete(y):
    def step(z_prev, y_t):
        z = numpyro.sample("z", dist.Poisson(0.2 + 0.6 * z_prev))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
        return z, z

    scan(step, 0, y)


def mixing_times(y):
    _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, 0.0, None, length=T)
    numpyro.sample("y", dist.Normal(jnp.cumsum(xs), 1.0), obs=y)


def lagged_rows(y):
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, x_0, None, length=T)
    numpyro.sample("y", dist.Normal(jnp.concatenate([x_0[None], xs[:-1]]), 1.0), obs=y)


def no_time_axis(y):
    _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, 0.0, None, length=T)
    numpyro.sample("y", dist.Normal(xs.mean(), 1.0), obs=y[0])


def last_carry(y):
    last, _ = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, 0.0, None, length=T)
    numpyro.sample("y", dist.Normal(last, 1.0), obs=y[0])


def latent_after(y):
    _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, 0.0, None, length=T)
    numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(xs, 1.0)), 1.0), obs=y)


def scope_around(y):
    with numpyro.handlers.scope(prefix="weekly"):
        scan(walk, 0.0, y)


def changing_carry(y):
    def step(x_prev, y_t):
        with numpyro.plate("series", 3):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        return x, x

    scan(step, 0.0, y)


def lengths_differ(y):
    scan(walk, 0.0, y, length=T + 1)


def python_if(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
        return (x if x > 0 else x_prev), x

    scan(step, 0.0, y)


def without_output(y):
    scan(lambda x_prev, y_t: numpyro.sample("x", dist.Normal(x_prev, 1.0)), 0.0, y)


def improper(y):
    scan(lambda x_prev, y_t: (numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ())), y_t), 0.0, y)


def too_small_a_plate(y):
    with numpyro.plate("series", 2, subsample_size=5):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(walk, x_0, y)


def inputs_of_words(y):
    scan(walk, 0.0, (y, "weekly"))


def not_a_covariance(y):
    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(x_prev, jnp.zeros((2, 2)) * y_t))
        return x, x

    scan(step, jnp.zeros(2), y)


PROGRAMS = [
    (two_scans, r"2 scans with latent sites: \['z'\] and \['x'\].*markov"),
    (no_scan, "no `numpyro.contrib.control_flow.scan` with latent sites.*scan"),
    (nested, "another NumPyro `scan`.*nested"),
    (history_two, r"\['x'\] has `history=2`.*blocks"),
    (reversed_time, r"\['x'\] has `reverse=True`.*xs\[::-1\]"),
    (param_in_body, "declares the parameter 'sigma'.*before the scan"),
    (subsampled_in_body, "subsampled plate 'series'.*Build it once"),
    (accumulator, r"`carry\[1\]` after a step depends on `carry\[1\]`.*accumulates"),
    (second_lag, r"`carry\[1\]` after a step depends on `carry\[0\]`.*second lag.*blocks of L steps"),
    (non_centred, r"\['eps'\] do not read the carry.*non-centred"),
    (loc_scale_reparam, r"\['x_decentered'\] do not read the carry.*LocScaleReparam"),
    (delta_transition, "'x' of the scan has a `Delta` distribution.*noise"),
    (discrete, "'z' is discrete, and the guide does not sample it.*not finitely many.*Poisson"),
    (mixing_times, "'y' after the scan mixes times"),
    (lagged_rows, "'y' after the scan mixes times"),
    (no_time_axis, "'y' reads the outputs.*no leading axis of 4 or 5 times"),
    (last_carry, "'y' after the scan reads the last carry"),
    (latent_after, "Latent site 'z' after the scan"),
    (scope_around, "`scope` handler around.*'x' to 'weekly/x'.*whole model"),
    (changing_carry, r"starts with shapes \[\(\)\] and the step returns \[\(3,\)\]"),
    (lengths_differ, r"one leading time axis.*\[4, 5\]"),
    (python_if, "Python `if`.*Inside a step write `jnp.where`"),
    (improper, "'x' of the scan has an `ImproperUniform` distribution.*proper one"),
    (too_small_a_plate, "'series' has 2 elements, fewer than its `subsample_size=5`"),
    (inputs_of_words, "inputs of `scan` must be arrays of numbers, but among them is a str"),
    (not_a_covariance, "log density of site 'x' is not a number, first at time 0"),
]


@pytest.mark.parametrize(("model", "message"), PROGRAMS, ids=lambda value: getattr(value, "__name__", ""))
def test_programs(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        initialise(model)


def test_a_plate_is_too_small_on_an_accelerator_too(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # NumPyro draws a plate's indices by other means there
    with pytest.raises(ValueError, match="'series' has 2 elements, fewer than its `subsample_size=5`"):
        initialise(too_small_a_plate)


@pytest.mark.parametrize(("model", "message"), PROGRAMS[:1] + PROGRAMS[7:8] + PROGRAMS[13:14])
def test_programs_under_stock_svi(model, message):
    loss = ImportanceSmoothedELBO(4)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        jax.jit(lambda y: loss.loss(jax.random.key(0), {}, model, fitting_guide, y))(Y)


def test_step_without_an_output():
    with pytest.raises(TypeError, match=r"must return two things.*`return x, x`"):
        initialise(without_output)


def test_python_loop_over_markov():
    with pytest.raises(TypeError, match=r"(?s)got a range.*markov\(step, x_0, y, length=T\)"):
        initialise(python_loop)


def test_scan_under_an_open_plate():
    def model(y):
        with numpyro.plate("series", 3):
            scan(walk, jnp.zeros(3), y)

    with pytest.raises(NotImplementedError, match="move those `plate` statements into the control flow"):
        initialise(model, None, Y)


@pytest.mark.parametrize("mean", [lambda x: x.mean(-1), lambda x: x[::-1], jnp.cumsum], ids=["mean", "swap", "cumsum"])
def test_series_that_read_each_other(mean):
    with pytest.raises(ValueError, match=r"(?s)Site 'x' lets the elements of plate 'series' read each other.*\.to_event"):
        initialise(series_in_plate(mean), None, jnp.zeros((T, 3)))


@pytest.mark.slow
def test_series_that_do_not_read_each_other_pass():
    initialise(series_in_plate(lambda x: jnp.array([0.1, 0.5, 0.9]) * x), None, jnp.zeros((T, 3)))


def test_emission_outside_the_plate_of_the_chain():
    with pytest.raises(ValueError, match="'y' stands outside the plate 'series'"):
        initialise(emission_outside_plate)


# --- guides


def test_guide_without_the_chains_site():
    with pytest.raises(ValueError, match=r"does not sample \['x'\].*leading time axis of 4"):
        initialise(random_walk, lambda y: numpyro.sample("x_0", dist.Normal(0.0, 1.0)))


def test_guide_with_an_unknown_site():
    def guide(y):
        fitting_guide(y)
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"samples \['z'\], which the model does not have.*is_auxiliary"):
        initialise(random_walk, guide)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (dist.Normal(jnp.zeros(T + 1), 1.0), r"shape \(5,\).*leading time axis of 4"),
        (dist.Normal(jnp.zeros(T), 1.0).to_event(1), "joint distribution over time"),
        (dist.MultivariateNormal(jnp.zeros(T), jnp.eye(T)), "joint distribution over time"),
        (dist.Delta(jnp.zeros(T)), "`Delta` distribution"),
    ],
    ids=["wrong_length", "to_event_over_time", "multivariate", "delta"],
)
def test_guide_distributions(distribution, message):
    def guide(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", distribution)

    with pytest.raises(ValueError, match=f"(?s)'x'.*{message}"):
        initialise(random_walk, guide)


@pytest.mark.parametrize(
    ("of_model", "of_guide", "message"),
    [
        (dist.LogNormal(0.0, 1.0), dist.Normal(0.0, 1.0), "a Normal, has all real numbers.*`LogNormal`"),
        (dist.Uniform(0.0, 1.0), dist.StudentT(3.0), "a StudentT, has all real numbers"),
        (dist.Dirichlet(jnp.ones(2)), dist.Normal(0.0, jnp.ones(2)).to_event(1), "has all real numbers"),
        (dist.Poisson(1.0), dist.Normal(0.0, 1.0), "a Normal, is continuous, and the model's is discrete"),
        (dist.Normal(0.0, 1.0), dist.Poisson(1.0), "a Poisson, is discrete, and the model's is continuous"),
    ],
    ids=["positive", "interval", "simplex", "counts", "number"],
)
def test_guide_whose_distribution_has_other_values(of_model, of_guide, message):
    def model(y):
        scan(lambda _, y_t: (numpyro.sample("x", of_model), None), of_model.sample(jax.random.key(0)), y)

    def guide(y):
        numpyro.sample("x", of_guide.expand((T,)))

    with pytest.raises(ValueError, match=f"(?s)distribution of site 'x'.*{message}"):
        initialise(model, guide)


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_automatic_guide_for_missing_counts(after):
    def model(y, seen):
        def step(x_prev, now):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            if not after:
                numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=now[0], obs_mask=now[1])
            return x, x

        _, x = scan(step, 0.0, (y, seen))
        if after:
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y, obs_mask=seen)

    arguments = jnp.array([0, 1, 0, 2]), jnp.array([True, False, True, True])
    with pytest.raises(ValueError, match=r"(?s)\['y_unobserved'\] are discrete.*`AutoNormal`.*block\(model, hide=.*imputed"):
        initialise(model, None, *arguments)
    initialise(model, AutoNormal(numpyro.handlers.block(model, hide=["y_unobserved"])), *arguments)


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, pytest.param(AutoDelta, marks=pytest.mark.slow)])
def test_joint_autoguides(guide):
    with pytest.raises(ValueError, match=r"a `Delta` distribution.*independently at each time"):
        initialise(random_walk, guide(random_walk))


def test_guide_whose_globals_read_the_chain():
    def model(y):
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        random_walk(y)

    def guide(y):
        fitting_guide(y)
        numpyro.sample("mu", dist.Normal(numpyro.sample("x_1", dist.Normal(0.0, 1.0)), 1.0))

    def dependent(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", dist.Normal(jnp.zeros(len(y)), 1.0))
        numpyro.sample("mu", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match="global site, or mutable state, depends on the values of the chain's sites"):
        ImportanceSmoothedELBO(4).loss(jax.random.key(0), {}, model, dependent, Y)


def test_guide_without_an_axis_for_the_plate():
    def guide(y):
        numpyro.sample("x_0", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(jnp.zeros((T, 3)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'x_0' has shape .*without an axis for plate 'series'"):
        ImportanceSmoothedELBO(4).loss(jax.random.key(0), {}, series_in_plate(lambda x: x), guide, jnp.zeros((T, 3)))


# --- data


def test_nan_in_the_data():
    with pytest.raises(ValueError, match=r"site 'y' contain NaN, first at time 2 of the scan.*handlers.mask"):
        initialise(random_walk, None, Y.at[2].set(jnp.nan))


def test_nan_in_the_data_of_a_function_that_is_compiled():
    y = Y.at[2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"site 'y' contain NaN, first at time 2 of the scan"):
        jax.jit(lambda key: PVMC(random_walk, num_particles=2).init(key, y))(jax.random.key(0))


def test_nan_in_the_data_after_the_scan():
    def model(y):
        _, xs = scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)),) * 2, 0.0, None, length=T)
        numpyro.sample("y", dist.Normal(xs, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' contain NaN, first at index 3"):
        initialise(model, fitting_guide_without_start, Y.at[3].set(jnp.nan))


def fitting_guide_without_start(y):
    numpyro.sample("x", dist.Normal(jnp.zeros(len(y)), 1.0))


def masked_walk(hold, mask_emission=True):
    def model(y, mask):
        def step(x_prev, y_and_mask):
            y_t, mask_t = y_and_mask
            with numpyro.handlers.mask(mask=mask_t):
                x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            with numpyro.handlers.mask(mask=mask_t if mask_emission else True):
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return (jnp.where(mask_t, x, x_prev) if hold else x), x

        scan(step, 0.0, (y, mask))

    return model


def test_latent_masked_and_later_unmasked_without_a_hold():
    mask = jnp.array([True, False, True, True])
    with pytest.raises(ValueError, match=r"\['x'\] are masked at some steps and unmasked at a later one \(time 2"):
        initialise(masked_walk(False), lambda y, mask: fitting_guide_without_start(y), Y, mask)
    initialise(masked_walk(True), lambda y, mask: fitting_guide_without_start(y), Y, mask)


def test_observation_at_a_step_whose_state_is_masked():
    mask = jnp.array([True, True, True, False])
    with pytest.raises(ValueError, match=r"At time 3 of the scan the latent sites \['x'\] are masked"):
        initialise(masked_walk(False, mask_emission=False), lambda y, mask: fitting_guide_without_start(y), Y, mask)


@pytest.mark.parametrize("masked", [True, False])
def test_observation_after_the_scan_of_a_step_whose_state_is_masked(masked):
    mask = jnp.array([True, True, True, False])

    def model(y, mask):
        def step(x_prev, mask_t):
            with numpyro.handlers.mask(mask=mask_t):
                x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            return x, x

        _, xs = scan(step, 0.0, mask)
        with numpyro.handlers.mask(mask=mask if masked else jnp.ones(T, bool)):
            numpyro.sample("y", dist.Normal(xs, 1.0), obs=y)

    guide = lambda y, mask: fitting_guide_without_start(y)
    if masked:
        initialise(model, guide, Y, mask)
    else:
        with pytest.raises(ValueError, match=r"At time 3 of the scan the latent sites \['x'\] are masked"):
            initialise(model, guide, Y, mask)


def test_observation_of_the_wrong_shape():
    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, jnp.ones(2)).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y_t)
            return x, x

        scan(step, jnp.zeros(2), y)

    with pytest.raises(
        ValueError, match=r"'y' is observed with a value of shape \(3,\), but its distribution has shape \(2,\)"
    ):
        initialise(model, None, jnp.zeros((T, 3)))


def emitting(distribution):
    def model(y):
        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
            numpyro.sample("y", distribution(x), obs=y_t)
            return x, x

        scan(step, 0.0, y)

    return model


IMPOSSIBLE = {
    "infinite": (lambda x: dist.Normal(x, 1.0), jnp.inf),
    "counts": (lambda x: dist.Poisson(jnp.exp(x)), -1.0),
    "fractions": (lambda x: dist.Poisson(jnp.exp(x)), 1.5),
    "two_of_two": (lambda x: dist.Bernoulli(logits=x), 2.0),
    "too_many": (lambda x: dist.Binomial(3, logits=x), 5.0),
    "positive": (lambda x: dist.LogNormal(x, 1.0), 0.0),
    "interval": (lambda x: dist.Beta(jnp.exp(x), 2.0), 1.5),
    "vector": (lambda x: dist.Normal(x, jnp.ones(2)).to_event(1), -jnp.inf),
}


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        pytest.param(
            *one, id=name, marks=[pytest.mark.slow] * (name in ("fractions", "interval", "too_many", "two_of_two", "vector"))
        )
        for name, one in IMPOSSIBLE.items()
    ],
)
def test_data_that_their_distribution_cannot_have(distribution, value):
    y = jnp.full(
        (T, *distribution(0.0).event_shape), 0.5 if distribution(0.0).support is dist.constraints.unit_interval else 1.0
    )
    with pytest.raises(
        ValueError, match=f"(?s)'y' contain .*{value}.*, outside the support of its distribution, first at time 2 .*mask"
    ):
        initialise(emitting(distribution), None, y.at[2].set(value))
    initialise(emitting(distribution), None, y)


def test_data_outside_of_a_support_that_moves_are_not_refused():
    initialise(emitting(lambda x: dist.Uniform(x - 1.0, x + 1.0)), None, 30.0 + Y)


def test_inputs_that_are_nan():
    def model(y, z):
        def step(x_prev, now):
            x = numpyro.sample("x", dist.Normal(x_prev + now[1], 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=now[0])
            return x, x

        scan(step, 0.0, (y, z))

    with pytest.raises(ValueError, match=r"log density of site 'x' is not a number, first at time 3.*inputs of the scan"):
        initialise(model, None, Y, Y.at[3].set(jnp.nan))


def test_data_that_are_complex():
    with pytest.raises(ValueError, match="'y' is observed with complex numbers"):
        initialise(random_walk, None, Y + 1j)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (jnp.arange(3), r"plate 'series' have the shape \(3,\).*minibatch is of 2 series"),
        (jnp.array([0.0, 1.0]), "the type float32.*give as many integers"),
        (jnp.array([1, 5]), "must be from 0 to 4.*from 1 to 5"),
    ],
)
def test_indices_of_series(indices, message):
    def model(y):
        series = numpyro.plate("series", 5, subsample_size=2)
        with series as own:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(x_prev, y_t):
            with series:
                x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, x

        scan(step, x_0, y[:, own])

    pvmc = PVMC(model, num_particles=4)
    with pytest.raises(ValueError, match=message):
        pvmc.posterior(jax.random.key(0), {"series": indices}, jnp.zeros((T, 5)))


@pytest.mark.parametrize("words", ["daily", [1.0, None]])
def test_data_that_are_no_numbers(words):
    with pytest.raises((TypeError, ValueError), match="arrays of numbers"):
        initialise(random_walk, None, np.array(words, object))


def test_data_that_are_not_arrays():
    class Table:
        __array__ = None

    with pytest.raises(TypeError, match=r"jax.numpy.asarray"):
        initialise(random_walk, None, Table())


# --- choices


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ((None, fitting_guide), "`model` must be a NumPyro program, a function, but got a NoneType"),
        ((random_walk, "AutoNormal"), "`guide` must be a NumPyro program, a function, but got a str"),
        ((random_walk, AutoNormal), r"`guide` is the class `AutoNormal`. Make one: `AutoNormal\(model\)`"),
    ],
)
def test_programs_that_are_none(programs, message):
    with pytest.raises(TypeError, match=message):
        PVMC(*programs)


@pytest.mark.parametrize(
    ("arguments", "choices", "message"),
    [
        ((0, {}, Y), {}, "`rng_key` must be a random key.*got a int"),
        ((jax.random.key(0), None, Y), {}, "`params` must be a dictionary.*`result.params`.*got a NoneType"),
        ((jax.random.key(0), {}, Y), {"sample_shape": 5}, r"`sample_shape` must be a tuple of integers, such as `\(100,\)`"),
        ((jax.random.key(0), {}, Y), {"sample_shape": (2.5,)}, r"`sample_shape`.*but got \(2.5,\)"),
    ],
)
def test_what_is_asked_of_the_posterior(arguments, choices, message):
    with pytest.raises(TypeError, match=message):
        PVMC(random_walk, fitting_guide).sample_posterior(*arguments, **choices)


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_number_of_particles(number):
    with pytest.raises(ValueError, match="`num_particles` must be an integer of at least 1"):
        PVMC(random_walk, fitting_guide, num_particles=number)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"gradient": "score"}, "`gradient` must be one of"),
        ({"method": "parallel"}, "`method` must be one of"),
        ({"particles": "grid"}, "`particles` must be"),
    ],
    ids=str,
)
def test_unknown_choices(choice, message):
    with pytest.raises(ValueError, match=message):
        PVMC(random_walk, fitting_guide, **choice)


def test_choices_beside_an_explicit_loss():
    with pytest.raises(ValueError, match=r"\['num_particles'\] are choices of the default loss"):
        PVMC(random_walk, fitting_guide, loss=ImportanceSmoothedELBO(), num_particles=4)


def test_posterior_of_another_loss():
    pvmc = PVMC(random_walk, fitting_guide, loss=Trace_ELBO())
    with pytest.raises(TypeError, match=r"ImportanceSmoothedELBO.*Trace_ELBO"):
        pvmc.posterior(jax.random.key(0), {}, Y)


def test_forward_mode():
    pvmc = PVMC(random_walk, fitting_guide)
    with pytest.raises(ValueError, match="`forward_mode_differentiation=True` is not available"):
        pvmc.run(jax.random.key(0), 1, Y, forward_mode_differentiation=True)


@pytest.mark.parametrize("number", [0, 2.5, True])
def test_number_of_steps(number):
    with pytest.raises(ValueError, match="`num_steps` must be a positive integer"):
        PVMC(random_walk, fitting_guide).run(jax.random.key(0), number, Y)


def test_quantile_outside_the_unit_interval():
    posterior = PVMC(random_walk, fitting_guide, num_particles=2).posterior(jax.random.key(0), {}, Y)
    with pytest.raises(ValueError, match="`q` must be between 0 and 1"):
        posterior.quantile(1.5)


def test_time_coordinate_of_the_wrong_length():
    posterior = PVMC(random_walk, fitting_guide, num_particles=2).posterior(jax.random.key(0), {}, Y)
    with pytest.raises(ValueError, match=r"`time` must have shape \(4,\)"):
        posterior.to_arviz(time=jnp.arange(3))


def test_the_same_programs_run_where_nothing_is_wrong():
    initialise(random_walk)
    SVI(random_walk, AutoNormal(random_walk), numpyro.optim.Adam(0.1), Trace_ELBO()).init(jax.random.key(0), Y)
