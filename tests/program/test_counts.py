"""Counts whose supports read the state, inputs, or have no end: summed up to a bound that is proved or declared.

The oracle multiplies matrices of scipy's probabilities over more counts than the library's tables have.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats
from scipy.special import expit

from conftest import in_both_precisions
from numpyro_pvmc import PVMC
from numpyro_pvmc.exact import exact_posterior
from oracles import sum_counts

N = np.arange(61)
OLD, NEW = N[:, None], N[None]


def slope(function, at, step=1e-5):
    return (function(at + step) - function(at - step)) / (2 * step)


def recruits(y):
    p, q = numpyro.param("p", 0.9), numpyro.param("q", 0.5)

    def step(previous, y_t):
        n = numpyro.sample("n", dist.Binomial(previous + 3, p))
        numpyro.sample("y", dist.Binomial(n, q), obs=y_t)
        return n, n

    scan(step, 5, y)


def sum_recruits(y, p, q):
    moves = stats.binom.pmf(NEW, OLD + 3, p)
    return sum_counts(N == 5, [moves] * len(y), stats.binom.pmf(np.array(y)[:, None], N, q))


@in_both_precisions
def test_recruits(tolerance):
    """The support of the first step for all was a wrong number: -17.565."""
    y = jnp.array([3, 4, 5, 4, 5, 3])
    log_z, weights = sum_recruits(y, 0.9, 0.5)
    assert_allclose(log_z, -11.742, atol=5e-4)
    posterior = exact_posterior(recruits, {}, y)
    assert_allclose(posterior.log_normalizer, log_z, rtol=10 * tolerance)
    assert_allclose(posterior.state_probabilities["n"], weights[:, : 5 + 3 * 6 + 1], atol=10 * tolerance)
    gradient = jax.grad(lambda params: exact_posterior(recruits, params, y).log_normalizer)({"p": 0.9, "q": 0.5})
    assert_allclose(gradient["p"], slope(lambda p: sum_recruits(y, p, 0.5)[0], 0.9), rtol=max(1e-6, 10 * tolerance))
    assert_allclose(gradient["q"], slope(lambda q: sum_recruits(y, 0.9, q)[0], 0.5), rtol=max(1e-6, 10 * tolerance))


def survivors(y):
    def step(previous, y_t):
        n = numpyro.sample("n", dist.Binomial(previous, 0.9))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=y_t)
        return n, n

    scan(step, numpyro.sample("n_0", dist.Binomial(50, 0.8)), y)


def test_survivors(x64):
    y = jnp.array([20, 17, 15, 14, 13, 10, 11, 8])
    moves, emissions = stats.binom.pmf(NEW, OLD, 0.9), stats.binom.pmf(np.array(y)[:, None], N, 0.5)
    log_z, weights = sum_counts(stats.binom.pmf(N, 50, 0.8), [moves] * 8, emissions)
    assert_allclose(log_z, -16.433, atol=5e-4)
    posterior = PVMC(survivors).posterior(jax.random.key(0), {}, y)
    assert_allclose(posterior.log_normalizer, log_z, rtol=1e-10)
    assert_allclose(posterior.state_probabilities["n"], weights[:, :51], atol=1e-10)
    draws = posterior.sample(jax.random.key(1), (20_000,))
    falls = np.diff(np.concatenate([draws["n_0"][:, None], draws["n"]], 1), axis=1)
    assert (falls <= 0).all()
    assert_allclose(draws["n"].mean(0), weights @ N, atol=0.1)  # four standard errors


def totals(y, total):
    p = numpyro.param("p", 0.9)

    def step(previous, now):
        y_t, total_t = now
        n = numpyro.sample("n", dist.Binomial(total_t, jax.nn.sigmoid(0.1 * previous - p)))
        numpyro.sample("y", dist.Poisson(0.8 * n), obs=y_t)
        return n, n

    scan(step, 2, (y, total))


def sum_totals(y, total, p):
    moves = [stats.binom.pmf(NEW, t, expit(0.1 * OLD - p)) for t in np.array(total)]
    return sum_counts(N == 2, moves, stats.poisson.pmf(np.array(y)[:, None], 0.8 * N))


def test_totals_among_the_data(x64):
    """Numbers of arguments bound the count: larger ones make another table, everywhere that something is kept by shapes."""
    y, pvmc = jnp.array([2, 3, 1, 5]), PVMC(totals)
    few, many = jnp.array([4, 9, 2, 7]), jnp.array([4, 9, 20, 7])
    expected = [sum_totals(y, total, 0.9)[0] for total in (few, many)]
    state = pvmc.init(jax.random.key(0), y, few)
    for total, log_z in zip((few, many, few), (*expected, expected[0]), strict=True):
        assert_allclose(pvmc.evaluate(state, y, total), -log_z, rtol=1e-10)
    posterior = jax.vmap(lambda y: pvmc.posterior(jax.random.key(0), {"p": 0.9}, y, many))(y[None])  # others may be traced
    assert_allclose(posterior.log_normalizer[0], expected[1], rtol=1e-10)
    with pytest.raises(
        ValueError, match=r"'n' is discrete.*reads the inputs of the scan, of which no bound is known.*max_count"
    ):
        jax.jit(lambda total: exact_posterior(totals, {}, y, total).log_normalizer)(few)


def test_counts_that_the_guide_samples_are_not_bound_by_numbers(x64):
    """So nothing is compiled anew for others."""
    y, met = jnp.array([2, 3, 1, 5]), []

    def guide(y, total):
        met.append(total)
        numpyro.sample("n", dist.Binomial(jnp.broadcast_to(total, (4,)), 0.5))

    pvmc = PVMC(totals, guide, num_particles=2, particles="iid")
    for total in (4, 9):
        pvmc.posterior(jax.random.key(0), {"p": 0.9}, y, jnp.full(4, total))
        number = len(met)
    pvmc.posterior(jax.random.key(0), {"p": 0.9}, y, jnp.full(4, 7))
    assert len(met) == number


def undetected(y):
    """The rate of what is not seen is negative for counts that no step can reach, and zero for the largest."""
    q = numpyro.param("q", 0.5)

    def step(carry, y_t):
        previous, t = carry
        n = numpyro.sample("n", dist.Binomial(previous + 2, 0.6))
        numpyro.sample("y", dist.Poisson(q * (7 + 2 * t - n)), obs=y_t)
        numpyro.sample("lost", dist.Binomial(previous + 2 - n, q), obs=jnp.array(1))
        return (n, t + 1), n

    scan(step, (5, 0), y)


def sum_undetected(y, q):
    moves = stats.binom.pmf(NEW, OLD + 2, 0.6) * stats.binom.pmf(1, np.maximum(OLD + 2 - NEW, 0), q)
    unseen = np.maximum(7 + 2 * np.arange(len(y))[:, None] - N, 0)
    return sum_counts(N == 5, [moves] * len(y), stats.poisson.pmf(np.array(y)[:, None], q * unseen))[0]


def test_gradients_are_finite_where_there_is_no_mass(x64):
    y = jnp.array([2, 3, 1])
    value, gradient = jax.value_and_grad(lambda q: exact_posterior(undetected, {"q": q}, y).log_normalizer)(0.5)
    assert_allclose(value, sum_undetected(y, 0.5), rtol=1e-10)
    assert_allclose(gradient, slope(lambda q: sum_undetected(y, q), 0.5), rtol=1e-6)


def births(y, max_count=40):
    def step(previous, y_t):
        n = numpyro.sample("n", dist.Poisson(0.6 * previous + 1), infer={"max_count": max_count})
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=y_t)
        return n, n

    scan(step, 5, y)


def test_counts_without_end_are_summed_up_to_the_declared_largest(x64):
    y = jnp.array([2, 3, 1, 5])
    for most, is_enough in ((40, True), (9, False)):
        moves = stats.poisson.pmf(NEW, 0.6 * OLD + 1) * (most >= NEW)
        log_z, weights = sum_counts(N == 5, [moves] * 4, stats.binom.pmf(np.array(y)[:, None], N, 0.5))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            posterior = exact_posterior(births, {}, y, max_count=most)
            if not is_enough:
                PVMC(births).posterior(jax.random.key(0), {}, y, max_count=most)
        assert_allclose(posterior.log_normalizer, log_z, rtol=1e-10)
        assert_allclose(posterior.state_probabilities["n"], weights[:, : most + 1], atol=1e-10)
        expected = (
            []
            if is_enough
            else 2 * [f"The count 'n' is its `max_count` with the smoothed probability {weights[:, 9].max():.2g}"]
        )
        assert [str(warning.message).split(", so")[0] for warning in said] == expected
        assert all(warning.filename == __file__ for warning in said)


def open_mixture(y):
    """Survivors and recruits, of whom only the sum is seen and goes on."""
    q = numpyro.param("q", 0.5)
    series = numpyro.plate("series", 2)

    def step(previous, y_t):
        with series:
            s = numpyro.sample("s", dist.Binomial(previous, 0.8), infer={"max_count": 10})
            g = numpyro.sample("g", dist.Poisson(1.5), infer={"max_count": 6})
            numpyro.sample("y", dist.Binomial(s + g, q), obs=y_t)
        return s + g, (s, g)

    with series:
        n_0 = numpyro.sample("n_0", dist.Poisson(4.0), infer={"max_count": 12})
    scan(step, n_0, y)


def all_paths(y, q):
    """Masses of all ``[n_0, s, g, s, g]`` of two steps."""
    n_0, s, g, s_2, g_2 = np.ogrid[:13, :11, :7, :11, :7]
    first = (
        stats.poisson.pmf(n_0, 4.0) * stats.binom.pmf(s, n_0, 0.8) * stats.poisson.pmf(g, 1.5) * stats.binom.pmf(y[0], s + g, q)
    )
    second = stats.binom.pmf(s_2, s + g, 0.8) * stats.poisson.pmf(g_2, 1.5) * stats.binom.pmf(y[1], s_2 + g_2, q)
    return first, first * second


@pytest.mark.filterwarnings("ignore:The count")
def test_an_open_mixture(x64):
    y = jnp.array([[2, 6], [3, 4]])
    posterior = exact_posterior(open_mixture, {"q": 0.5}, y)
    draws = posterior.sample(jax.random.key(0), (20_000,))
    assert posterior.log_filtering.shape[-1] == 17  # totals, and not pairs
    for k in range(2):
        first, paths = all_paths(np.array(y)[:, k], 0.5)
        assert_allclose(posterior.log_normalizer[k], np.log(paths.sum()), rtol=1e-10)
        smoothed, filtered, joint = paths / paths.sum(), first / first.sum(), paths.sum((0, 1, 2)) / paths.sum()
        for name, axes in (("s", (1, 3)), ("g", (2, 4))):
            of_site = [smoothed.sum(tuple({0, 1, 2, 3, 4} - {axis})) for axis in axes]
            assert_allclose(posterior.state_probabilities[name][:, k], of_site, atol=1e-10)
            early = filtered.sum(tuple({0, 1, 2, 3, 4} - {axes[0]}))
            assert_allclose(posterior.filtering_state_probabilities[name][0, k], early, atol=1e-10)
        product = np.asarray(draws["s"] * draws["g"])[:, 1, k]
        expected = (joint * np.outer(np.arange(11), np.arange(7))).sum()
        assert abs(product.mean() - expected) < 4 * product.std() / np.sqrt(len(product))


@pytest.mark.slow
def test_the_gradient_of_an_open_mixture(x64):
    y = jnp.array([[2, 6], [3, 4]])
    gradient = jax.grad(lambda q: exact_posterior(open_mixture, {"q": q}, y).log_normalizer.sum())(0.5)
    evidence = lambda q: sum(np.log(all_paths(np.array(y)[:, k], q)[1].sum()) for k in range(2))
    assert_allclose(gradient, slope(evidence, 0.5), rtol=1e-6)


def chain_binomial(y):
    """Two counts of a step, of which one is out of the other."""

    def step(previous, y_t):
        a = numpyro.sample("a", dist.Binomial(previous, 0.8))
        b = numpyro.sample("b", dist.BetaBinomial(2.0, 1.5, a))
        numpyro.sample("y", dist.Poisson(0.2 + a - b), obs=y_t)
        return b, b

    scan(step, 9, y)


def test_a_count_out_of_another_of_its_step(x64):
    y = jnp.array([2, 3, 1])
    moves = []
    for y_t in np.array(y):
        of_a = stats.betabinom.pmf(NEW, OLD, 2.0, 1.5) * stats.poisson.pmf(y_t, 0.2 + np.maximum(OLD - NEW, 0))
        moves.append(stats.binom.pmf(NEW, OLD, 0.8) @ of_a)
    log_z, weights = sum_counts(N == 9, moves, np.ones((3, 61)))
    posterior = exact_posterior(chain_binomial, {}, y)
    # NumPyro's density of it has seven digits.
    assert_allclose(posterior.log_normalizer, log_z, rtol=1e-6)
    assert_allclose(posterior.state_probabilities["b"], weights[:, :10], atol=1e-6)


def walk(y):
    """Both ends of the support move; its density says nothing of them."""

    def step(previous, y_t):
        n = numpyro.sample("n", dist.DiscreteUniform(previous - 1, previous + 2))
        numpyro.sample("y", dist.Normal(n, 1.0), obs=y_t)
        return n, n

    scan(step, 3, y)


def test_a_density_that_is_positive_outside_of_its_support(x64):
    y = jnp.array([2.0, 3.5, 1.2])
    with numpyro.validation_enabled(False):
        posterior = exact_posterior(walk, {}, y)
    moves = stats.randint.pmf(NEW, OLD - 1, OLD + 3)
    log_z, weights = sum_counts(N == 3, [moves] * 3, stats.norm.pdf(np.array(y)[:, None], N, 1.0))
    assert_allclose(posterior.log_normalizer, log_z, rtol=1e-10)
    assert_allclose(posterior.state_probabilities["n"], weights[:, :10], atol=1e-10)


def panel(y, present, seen, most=(7, 12)):
    """Two populations of different sizes, of which one ends early, with recruits up to another largest number in each."""
    series = numpyro.plate("series", 2)

    def step(previous, now):
        y_t, present_t, seen_t = now
        with series, handlers.mask(mask=present_t):
            n = numpyro.sample("n", dist.Poisson(0.7 * previous + 1), infer={"max_count": np.array(most)})
            with handlers.mask(mask=seen_t):
                numpyro.sample("y", dist.Binomial(n, 0.6), obs=y_t)
        n = jnp.where(present_t, n, previous)
        return n, n

    with series:
        n_0 = numpyro.sample("n_0", dist.Binomial(jnp.array([4, 9]), 0.8))
    scan(step, n_0, (y, present, seen))


@in_both_precisions
def test_series_with_bounds_of_their_own_that_end_and_miss_data(tolerance):
    y = np.array([[2, 3], [1, 4], [3, 6], [0, 5]])
    present = np.arange(4)[:, None] < np.array([3, 4])
    seen = present & (np.arange(4)[:, None] != 1)
    arguments = jnp.asarray(y), jnp.asarray(present), jnp.asarray(seen)
    with pytest.warns(UserWarning, match="The count 'n' is its `max_count`"):
        posterior = exact_posterior(panel, {}, *arguments)
    for k, (start, most, length) in enumerate(((4, 7, 3), (9, 12, 4))):
        moves = stats.poisson.pmf(NEW, 0.7 * OLD + 1) * (most >= NEW)
        emissions = np.where(seen[:length, k, None], stats.binom.pmf(y[:length, k, None], N, 0.6), 1.0)
        log_z, weights = sum_counts(stats.binom.pmf(N, start, 0.8), [moves] * length, emissions)
        assert_allclose(posterior.log_normalizer[k], log_z, rtol=10 * tolerance)
        assert_allclose(posterior.state_probabilities["n"][:length, k], weights[:, :13], atol=10 * tolerance)


def visits(y, total, open_):
    """A count that some steps do not have, beside a state that all have."""

    def step(previous, now):
        y_t, total_t, open_t = now
        b = numpyro.sample("b", dist.Bernoulli(0.3 + 0.4 * previous))
        with handlers.mask(mask=open_t):
            a = numpyro.sample("a", dist.Binomial(total_t, 0.5))
        numpyro.sample("y", dist.Normal(jnp.where(open_t, a, 0) + b, 1.0), obs=y_t)
        return b, None

    scan(step, 0, (y, total, open_))


def test_a_count_that_a_step_lacks_is_one_value(x64):
    y, total, open_ = np.array([1.2, 0.4, 2.1]), np.array([4, 2, 3]), np.array([True, False, True])
    posterior = exact_posterior(visits, {}, jnp.asarray(y), jnp.asarray(total), jnp.asarray(open_))
    b, a = np.arange(2), np.arange(5)[:, None]
    seen = [(stats.binom.pmf(a, n, 0.5) * stats.norm.pdf(y_t, a + b, 1.0)).sum(0) for y_t, n in zip(y, total, strict=True)]
    emissions = np.where(open_[:, None], seen, stats.norm.pdf(y[:, None], b, 1.0))
    log_z, weights = sum_counts([1.0, 0.0], [[[0.7, 0.3], [0.3, 0.7]]] * 3, emissions)
    assert_allclose(posterior.log_normalizer, log_z, rtol=1e-10)
    assert_allclose(posterior.state_probabilities["b"], weights, atol=1e-10)


def mixed(y):
    """Survivors whose chance is a state with particles."""

    def step(carry, y_t):
        x_prev, previous = carry
        x = numpyro.sample("x", dist.Normal(0.8 * x_prev, 0.5))
        n = numpyro.sample("n", dist.Binomial(previous, jax.nn.sigmoid(1 + x)))
        numpyro.sample("y", dist.Poisson(0.5 * n), obs=y_t)
        return (x, n), None

    scan(step, (0.0, 9), y)


def test_particles_and_counts(x64):
    y = jnp.array([3, 2, 2])
    pvmc = PVMC(mixed, lambda y: numpyro.sample("x", dist.Normal(jnp.zeros(3), 0.7).mask(True)), num_particles=4)
    posterior = pvmc.posterior(jax.random.key(0), {}, y)
    x = np.concatenate([np.zeros((1, 4)), posterior.particles["x"]])
    # Of a particle and a count together: 4 * 10 of them.
    alpha = np.where(np.arange(10) == 9, 0.25, 0.0) * np.ones((4, 1))
    for t in range(1, 4):
        of_x = stats.norm.pdf(x[t], 0.8 * x[t - 1][:, None], 0.5) / (4 * stats.norm.pdf(x[t], 0.0, 0.7))
        of_n = stats.binom.pmf(np.arange(10), np.arange(10)[:, None, None], expit(1 + x[t])[:, None])  # before, particle, now
        alpha = np.einsum("jm,jk,mkn->kn", alpha, of_x, of_n) * stats.poisson.pmf(int(y[t - 1]), 0.5 * np.arange(10))
    assert_allclose(posterior.log_normalizer, np.log(alpha.sum()), rtol=1e-10)
    assert_allclose(posterior.state_probabilities["n"][-1], alpha.sum(0) / alpha.sum(), atol=1e-10)


def test_what_is_refused():
    y = jnp.ones(3)
    with pytest.raises(ValueError, match="`max_count` of site 'n' is traced"):
        exact_posterior(births, {}, y, max_count=jnp.array(3))
    with pytest.raises(ValueError, match=r"the pairs of a step would take 1\.7 GB, for 20480 points a step and 1 series"):
        PVMC(mixed, lambda y: numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0)), num_particles=2048).posterior(
            jax.random.key(0), {}, y
        )
