"""Sums over all trajectories, against visiting every one of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from conftest import in_both_precisions
from numpyro_pvmc.ops import smoothing
from oracles import enumerate_chain, forward_backward, paths_and_logs

INF = np.inf
LATTICES = [  # T, batch, K, masked
    (4, (), 3, False),
    (4, (2,), 2, True),
    pytest.param(3, (2, 3), 2, False, marks=pytest.mark.slow),
    pytest.param(3, (2, 3), 2, True, marks=pytest.mark.slow),
    (1, (2,), 3, True),
    pytest.param(4, (), 1, False, marks=pytest.mark.slow),
    (1, (), 1, False),
]
every_method = pytest.mark.parametrize("method", ["sequential", "blocked", "associative"])
sequential_by_default = pytest.mark.parametrize(
    "method", ["sequential", *(pytest.param(method, marks=pytest.mark.slow) for method in ("blocked", "associative"))]
)


def random_chain(T, batch, K, masked=False, seed=0):
    """Random potentials, one in five of them -inf, with or without a mask; the first step is present."""
    rng = np.random.default_rng(seed)
    node, edge = rng.normal(size=(T, *batch, K)), rng.normal(size=(max(T - 1, 0), *batch, K, K))
    node[rng.random(node.shape) < 0.2] = edge[rng.random(edge.shape) < 0.2] = -INF
    mask = rng.random((T, *batch)) < 0.6
    mask[0] = True
    return jnp.asarray(node), jnp.asarray(edge), jnp.asarray(mask) if masked else None


def finite_chain(T=4, K=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(T, K))), jnp.asarray(rng.normal(size=(T - 1, K, K)))


def enumerate_batch(node, edge, mask, batch):
    """One enumerated chain for each place in the batch."""
    for n in np.ndindex(*batch):
        here = (slice(None), *n)
        yield here, enumerate_chain(*(None if x is None else np.asarray(x)[here] for x in (node, edge, mask)))


@jax.jit(static_argnames="method")
def everything(node, edge, mask, method):
    chain = (node, edge, mask, method)
    return smoothing.log_normalizer(*chain), smoothing.marginals(*chain), smoothing.pairwise_marginals(*chain)


@every_method
@in_both_precisions
@pytest.mark.parametrize(("T", "batch", "K", "masked"), LATTICES)
def test_enumeration(T, batch, K, masked, method, tolerance):
    node, edge, mask = random_chain(T, batch, K, masked, seed=K)
    log_z, marginals, pairs = everything(node, edge, mask, method)
    assert log_z.shape == marginals.log_normalizer.shape == batch
    assert marginals.log_weights.shape == marginals.log_filtering_weights.shape == (T, *batch, K)
    assert pairs.shape == (T - 1, *batch, K, K)
    for here, exact in enumerate_batch(node, edge, mask, batch):
        near = {"rtol": tolerance, "atol": tolerance}
        assert_allclose(log_z[here[1:]], exact.log_normalizer, **near)
        assert_allclose(marginals.log_normalizer[here[1:]], exact.log_normalizer, **near)
        assert_allclose(np.exp(marginals.log_weights[here]), exact.weights, **near)
        assert_allclose(np.exp(marginals.log_filtering_weights[here]), exact.filtering_weights, **near)
        assert_allclose(pairs[here], exact.pair_weights, **near)


@pytest.mark.parametrize("T", [pytest.param(5, marks=pytest.mark.slow), 8])
def test_all_speeds_are_one_number(x64, T):
    node, edge, mask = random_chain(T, (2,), 3, masked=True, seed=T)
    sequential, *others = (everything(node, edge, mask, method) for method in ("sequential", "blocked", "associative"))
    for other in others:
        jax.tree.map(partial(assert_allclose, rtol=1e-12, atol=1e-14), sequential, other)


@every_method
def test_weights_that_no_number_can_hold(method, tolerance):
    """Logarithms of them are as right as those of any other: a proposal is refitted to particles that weigh next to nothing."""
    rng = np.random.default_rng(1)
    node, edge = 3e3 * rng.normal(size=(6, 3)), 3e3 * rng.normal(size=(5, 3, 3))
    paths, logs = paths_and_logs(node, edge)
    ways = np.array([[np.logaddexp.reduce(logs[paths[:, t] == k]) for k in range(3)] for t in range(6)])
    expected = ways - np.logaddexp.reduce(ways, -1)[:, None]
    assert expected.min() < -1000

    alone = jax.jit(lambda node, edge: smoothing.marginals(node, edge, method=method).log_weights)
    with_value = jax.jit(lambda node, edge: smoothing.log_normalizer_and_weights(node, edge, method=method)[1])
    for found in (one(jnp.asarray(node), jnp.asarray(edge)) for one in (alone, with_value)):
        assert_allclose(found, expected, rtol=tolerance, atol=100 * tolerance)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of .* got 'fast'"):
        smoothing.log_normalizer(*finite_chain(), method="fast")


@pytest.mark.parametrize(
    ("T", "batch", "K", "method"),
    [
        (500, (), 4, "blocked"),
        (500, (2,), 4, "blocked"),
        (500, (3,), 4, "sequential"),
        (500, (), 5, "sequential"),
        (499, (), 4, "sequential"),
        (100, (), 16, "sequential"),
    ],
)
def test_auto_is_what_is_fastest(pytestconfig, T, batch, K, method):
    if pytestconfig.getoption("method") or jax.default_backend() != "cpu":
        pytest.skip("`auto` chooses by other measurements here, or is another method")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, *batch, K), (T - 1, *batch, K, K))]
    auto, named = (str(jax.make_jaxpr(partial(smoothing.marginals, method=m))(*shapes)) for m in ("auto", method))
    assert re.sub("0x[0-9a-f]+", "", auto) == re.sub("0x[0-9a-f]+", "", named)


def test_one_particle_adds_up_the_potentials(x64):
    node, edge = finite_chain(K=1)
    assert_allclose(smoothing.log_normalizer(node, edge), node.sum() + edge.sum(), rtol=1e-14)


@every_method
def test_gradients_of_the_log_normalizer_are_the_marginals(x64, method):
    node, edge = finite_chain()
    slopes = jax.jit(jax.grad(partial(smoothing.log_normalizer, method=method), (0, 1)))
    by_node, by_edge = slopes(node, edge)
    exact = enumerate_chain(node, edge)
    assert_allclose(by_node, exact.weights, rtol=1e-12)
    assert_allclose(by_edge, exact.pair_weights, rtol=1e-12)
    assert_allclose(by_edge.sum(-1), by_node[:-1], rtol=1e-12)
    assert_allclose(by_edge.sum(-2), by_node[1:], rtol=1e-12)


@every_method
def test_gradients_by_finite_differences(x64, method):
    def log_normalizer(node, edge):
        return smoothing.log_normalizer(jnp.asarray(node), jnp.asarray(edge), method=method)

    check_grads(jax.jit(log_normalizer), finite_chain(), order=2, modes=["rev"])


@every_method
def test_gradients_of_a_smoothed_state_by_finite_differences(x64, method):
    """A loss on the smoothed state is a second derivative of the log normalizer."""

    def smoothed(node, edge):
        weights = jnp.exp(smoothing.marginals(jnp.asarray(node), jnp.asarray(edge), method=method).log_weights)
        return weights @ jnp.arange(3.0)

    check_grads(jax.jit(smoothed), finite_chain(), order=1, modes=["rev"])


def test_a_constant_goes_through(x64):
    """Added to the potentials of any one step it adds to the log normalizer and changes no weight."""
    node, edge = finite_chain()
    marginals = jax.jit(smoothing.marginals)
    before = marginals(node, edge)
    for t in range(3):
        after = marginals(node.at[t].add(5.0), edge.at[t].add(-1.5))
        assert_allclose(after.log_normalizer, before.log_normalizer + 3.5, rtol=1e-12)
        assert_allclose(after.log_weights, before.log_weights, rtol=1e-12)


def test_particles_have_no_order(x64):
    node, edge = finite_chain()
    order = np.array([np.random.default_rng(t).permutation(3) for t in range(4)])
    t = np.arange(4)[:, None]
    permuted = edge[t[:-1, None], order[:-1, :, None], order[1:, None, :]]
    marginals = jax.jit(smoothing.marginals)
    before, after = marginals(node, edge), marginals(node[t, order], permuted)
    assert_allclose(after.log_normalizer, before.log_normalizer, rtol=1e-12)
    assert_allclose(after.log_weights, before.log_weights[t, order], rtol=1e-12)


@every_method
@pytest.mark.parametrize("step", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_impossible_chain(step, method):
    """No trajectory through one step: -inf, no weights, no gradients; the chain beside it in the batch is untouched."""
    node, edge = (jnp.stack([x, x], 1) for x in finite_chain())
    node = node.at[step, 0].set(-INF)
    log_z, marginals, pairs = everything(node, edge, None, method)
    exact = enumerate_chain(node[:, 1], edge[:, 1])
    assert_allclose(log_z, [-INF, exact.log_normalizer], rtol=1e-4)
    assert (marginals.log_weights[:, 0] == -INF).all()
    assert_allclose(np.exp(marginals.log_weights[:, 1]), exact.weights, atol=1e-4)
    assert_allclose(pairs[:, 0], 0.0)
    assert_allclose(pairs[:, 1], exact.pair_weights, atol=1e-4)
    filtering = enumerate_chain(node[:, 0], edge[:, 0]).filtering_weights
    assert_allclose(np.exp(marginals.log_filtering_weights[:, 0]), filtering, atol=1e-4)


@every_method
@pytest.mark.parametrize("gap", [INF, pytest.param(300.0, marks=pytest.mark.slow)], ids=["impossible", "underflow"])
def test_a_loss_on_the_weights_has_finite_gradients_beside_particles_without_weight(gap, method):
    """Also when the weight only underflows, as exp(-300) does in float32."""
    node, edge = finite_chain()
    node = node.at[1, 2].set(-gap)

    @jax.jit
    @jax.grad
    def slope(node):
        return (jnp.exp(smoothing.marginals(node, edge, method=method).log_weights) @ jnp.arange(3.0)).sum()

    assert slope(node)[1, 2] == 0.0
    assert_allclose(slope(node), slope(node.at[1, 2].set(-60.0)), atol=1e-5)


@in_both_precisions
def test_padding_changes_no_bit(tolerance):
    """Two series of one panel, each against itself without its padding; trees and blocks of another length round anew."""
    node, edge, _ = random_chain(13, (2,), 8)
    lengths = 7, 10
    mask = np.arange(13)[:, None] < np.array(lengths)
    panel = everything(node, edge, mask, "sequential")[1]
    for n, length in enumerate(lengths):
        own = slice(n, n + 1)
        alone = everything(node[:length, own], edge[: length - 1, own], mask[:length, own], "sequential")[1]
        assert_array_equal(panel.log_normalizer[own], alone.log_normalizer)
        assert_array_equal(panel.log_weights[:length, own], alone.log_weights)
        assert_array_equal(panel.log_filtering_weights[:length, own], alone.log_filtering_weights)


@every_method
def test_what_stands_in_absent_steps_does_not_matter(x64, method):
    """NaN included, for the value and for the gradients."""
    node, edge = finite_chain(T=5)
    mask = jnp.array([True, False, True, True, False])
    exact = enumerate_chain(node, edge, mask)
    filled = node.at[~mask].set(jnp.nan), edge.at[~mask[1:]].set(jnp.nan)
    value_and_slope = jax.jit(jax.value_and_grad(smoothing.log_normalizer, (0, 1)), static_argnums=3)
    value, (by_node, by_edge) = value_and_slope(*filled, mask, method)
    assert_allclose(value, exact.log_normalizer, rtol=1e-12)
    assert_allclose(by_node, exact.weights * mask[:, None], rtol=1e-12)
    assert_allclose(by_edge, exact.pair_weights, rtol=1e-12, atol=1e-15)


@every_method
def test_what_stands_in_absent_steps_does_not_matter_for_a_loss_on_the_weights(x64, method):
    node, edge = finite_chain(T=5)
    mask = jnp.array([True, False, True, True, False])

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def slopes(node, edge):
        log_weights = smoothing.marginals(node, edge, mask, method).log_weights
        return (jnp.exp(log_weights) @ jnp.arange(3.0)).sum()

    filled = slopes(node.at[~mask].set(jnp.nan), edge.at[~mask[1:]].set(jnp.nan))
    jax.tree.map(partial(assert_allclose, rtol=1e-12), filled, slopes(node, edge))
    assert all((slope != 0).any() for slope in filled)


@every_method
def test_all_states_as_particles_is_the_hidden_markov_model(x64, method):
    rng = np.random.default_rng(3)
    log_initial, log_transition = np.log(rng.dirichlet(np.ones(4))), np.log(rng.dirichlet(np.ones(4), size=4))
    log_emission = rng.normal(size=(30, 4))
    exact = forward_backward(log_initial, log_transition, log_emission)
    node, edge = log_emission + np.eye(30, 1) * log_initial, np.repeat(log_transition[None], 29, 0)
    log_z, marginals, pairs = everything(jnp.asarray(node), jnp.asarray(edge), None, method)
    assert_allclose(log_z, exact.log_normalizer, rtol=1e-12)
    assert_allclose(np.exp(marginals.log_weights), exact.weights, rtol=1e-10)
    assert_allclose(np.exp(marginals.log_filtering_weights), exact.filtering_weights, rtol=1e-10)
    assert_allclose(pairs, exact.pair_weights, rtol=1e-10)


@every_method
@pytest.mark.parametrize("spread", ["one constant", "far apart"])
def test_float32_with_large_potentials(spread, method):
    """Potentials near 1e4; what may be lost is the rounding of the log normalizer itself, 4e4 * 2^-24 = 0.002."""
    node, edge = finite_chain()
    node = node - 1e4 if spread == "one constant" else node * 1e4
    exact = enumerate_chain(node, edge)
    log_z, marginals, pairs = everything(node, edge, None, method)
    assert log_z.dtype == jnp.float32
    assert_allclose(log_z, exact.log_normalizer, rtol=1e-6)
    assert_allclose(np.exp(marginals.log_weights), exact.weights, atol=0.01)
    assert_allclose(pairs, exact.pair_weights, atol=0.01)


def test_float32_stays_float32(x64):
    """Also in a process that allows float64: what comes out, and every exponential on the way."""
    node, edge = (x.astype(jnp.float32) for x in finite_chain())
    for method in ("sequential", "blocked", "associative"):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(everything(node, edge, None, method)))
        program = str(everything.trace(node, edge, None, method).jaxpr)
        assert re.search(r"f32\[[\d,]+\] = exp", program)
        assert not re.search(r"f64\[[\d,]+\] = (exp|log)", program)


def gaussian_edges(batch):
    """Transitions between particle positions, as a function and as an array."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, *batch, 3)))

    def edge(positions):
        x_prev, x = positions
        return -0.5 * (x[..., None, :] - jnp.sin(x_prev[..., :, None])) ** 2

    return edge, (x[:-1], x[1:])


@every_method
@pytest.mark.parametrize("batch", [pytest.param((), marks=pytest.mark.slow), (2,)])
def test_edges_computed_when_needed_are_the_array_of_them(x64, batch, method):
    node, _, mask = random_chain(4, batch, 3, masked=True)
    function, inputs = gaussian_edges(batch)

    @partial(jax.jit, static_argnums=0)
    def marginals_and_slope(edge, inputs):
        log_normalizer = lambda inputs: smoothing.log_normalizer(node, edge(inputs), mask, method).sum()
        return smoothing.marginals(node, edge(inputs), mask, method), jax.grad(log_normalizer)(inputs)

    lazy = marginals_and_slope(lambda inputs: smoothing.Edges(function, inputs), inputs)
    dense = marginals_and_slope(function, inputs)
    jax.tree.map(partial(assert_allclose, rtol=1e-12, atol=1e-15), lazy, dense)


@sequential_by_default
def test_edges_may_close_over_anything(x64, method):
    """A parameter, and what has no derivative: also where the compiled value is differentiated from outside, and twice."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))

    @jax.jit
    def log_normalizer(slope, x):
        key, shift = jax.random.key(0), jnp.arange(3)
        edge = lambda ends: -0.5 * (ends[1] - slope * ends[0][:, None] - 0.1 * jax.random.normal(key, (3,)) - shift) ** 2
        return smoothing.log_normalizer(-0.5 * x**2, smoothing.Edges(edge, (x[:-1], x[1:])), method=method)

    check_grads(log_normalizer, (jnp.asarray(0.7), x), order=2, modes=["rev"])


@pytest.mark.parametrize("method", [pytest.param("blocked", marks=pytest.mark.slow), "associative"])
@pytest.mark.parametrize("far", [1.0, pytest.param(1e3, marks=pytest.mark.slow)])
def test_with_particles_enough_for_products_of_matrices(method, far, x64):
    """Up to eight, terms are added up one by one; `far` apart, most exponentials of twelve underflow. Batched, and mapped."""
    node, edge, mask = random_chain(6, (2,), 12, masked=True)
    coefficients = np.random.default_rng(1).normal(size=node.shape)

    def loss(node, edge, mask, coefficients, method):
        found = smoothing.marginals(far * node, far * edge, mask, method)
        return jnp.sum(found.log_normalizer) + jnp.sum(coefficients * jnp.exp(found.log_weights))

    def mapped(*chains_and_method):
        *chains, method = chains_and_method
        return jax.vmap(lambda *chain: loss(*chain, method), in_axes=1)(*chains).sum()

    slope = lambda loss, method: jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=4)(
        node, edge, mask, coefficients, method
    )
    expected = slope(loss, "sequential")
    for found in (slope(loss, method), slope(mapped, method)):
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-9, atol=1e-9), found, expected)


def test_vmap_is_a_batch(x64):
    node, edge, mask = random_chain(3, (2,), 3, masked=True)
    batched = everything(node, edge, mask, "sequential")
    over_series = (0, smoothing.Marginals(0, 1, 1), 1)
    mapped = jax.vmap(lambda *c: everything(*c, "sequential"), 1, over_series)(node, edge, mask)
    jax.tree.map(partial(assert_allclose, rtol=1e-12), batched, mapped)


@pytest.mark.parametrize("masked", [False, True], ids=["present", "masked"])
def test_trajectories_have_the_joint_frequencies(masked):
    """Every one of the 27 paths as often as its mass says, in each chain of a batch, within 4.5 standard errors."""
    node, edge, mask = random_chain(3, (2,), 3, seed=1)
    if masked:
        mask = jnp.array([[True, True], [False, True], [True, False]])
    draws, key = 40_000, jax.random.key(0)
    trajectories = smoothing.sample_trajectories(key, node, edge, mask, sample_shape=(draws // 100, 100))
    assert trajectories.shape == (draws // 100, 100, 3, 2)
    assert jnp.issubdtype(trajectories.dtype, jnp.integer)
    for n in range(2):
        present = np.ones(3, bool) if mask is None else np.asarray(mask[:, n])
        steps = np.flatnonzero(present)
        paths, logs = paths_and_logs(np.asarray(node)[steps, n], np.asarray(edge)[steps[1:] - 1, n])
        expected = np.exp(logs - np.logaddexp.reduce(logs))
        drawn = np.asarray(trajectories[..., n]).reshape(draws, 3)
        assert_array_equal(drawn, drawn[:, steps][:, np.cumsum(present) - 1])  # absent steps stay on the particle
        counted = np.array([(drawn[:, steps] == path).all(-1).mean() for path in paths])
        standard_error = np.sqrt(expected * (1 - expected) / draws)
        assert standard_error.max() < 0.003, "too blunt to see anything"
        assert (np.abs(counted - expected) <= 4.5 * standard_error).all()


def test_trajectories_depend_on_the_key_alone():
    node, edge = finite_chain()
    draw = jax.jit(lambda key: smoothing.sample_trajectories(key, node, edge, sample_shape=(50,)))
    one, same, other = (draw(jax.random.key(k)) for k in (0, 0, 1))
    assert_array_equal(one, same)
    assert (one != other).any()


@every_method
def test_long_chains_keep_their_weights_in_float32(method):
    """However far the log normalizer has gone."""
    rng = np.random.default_rng(0)
    node = jnp.asarray(rng.normal(size=(2000, 8)) * 2.0 - 20.0, jnp.float32)
    edge = jnp.asarray(rng.normal(size=(1999, 8, 8)), jnp.float32)
    value_and_weights = jax.jit(jax.value_and_grad(partial(smoothing.log_normalizer, method=method)))
    value, weights = value_and_weights(node, edge)
    with jax.enable_x64(True):
        exact_value, exact_weights = value_and_weights(jnp.asarray(node, float), jnp.asarray(edge, float))
    assert_allclose(weights, exact_weights, atol=1e-5)
    assert_allclose(value, exact_value, rtol=1e-6)


@sequential_by_default
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_value_weights_and_gradient_in_one_pass(x64, masked, method):
    node, edge, mask = random_chain(4, (2,), 3, masked)
    scale = jnp.asarray(1.3)

    def edges(scale):
        return smoothing.Edges(lambda inputs: scale * inputs[0], (edge, jnp.arange(3)))

    @jax.jit
    def both(node, scale):
        value, log_weights = smoothing.log_normalizer_and_weights(node, edges(scale), mask, method)
        return value + jnp.where(jnp.isfinite(log_weights), log_weights, 0.0).sum(), log_weights  # the weights are constants

    plain = lambda node, scale: smoothing.log_normalizer(node, edges(scale), mask, method).sum()
    found, log_weights = both(node, scale)
    exact = smoothing.marginals(node, edges(scale), mask, method).log_weights
    assert_allclose(np.exp(log_weights), np.exp(exact), atol=1e-12)
    finite = np.where(np.isfinite(log_weights), log_weights, 0.0).sum()
    assert_allclose(found - finite, plain(node, scale), rtol=1e-12)
    # Two times, for the cotangent is not always one.
    ours = jax.grad(lambda *at: 2.0 * both(*at)[0], (0, 1))(node, scale)
    assert_allclose(ours[0], 2 * jax.grad(plain)(node, scale), atol=1e-12)
    assert_allclose(ours[1], 2 * jax.grad(plain, 1)(node, scale), rtol=1e-10)


@sequential_by_default
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_is_summed_in_single(method, dtype):
    """2000 steps: in half precision alpha would lose whole units, or overflow."""
    rng = np.random.default_rng(0)
    length = 2000 if method == "sequential" else 40
    node = jnp.asarray(10 + rng.normal(size=(length, 4)), dtype)
    edge = jnp.asarray(rng.normal(size=(length - 1, 4, 4)), dtype)
    found = smoothing.marginals(node, edge, method=method)
    single = smoothing.marginals(node.astype(jnp.float32), edge.astype(jnp.float32), method=method)
    assert found.log_normalizer.dtype == jnp.float32
    assert_allclose(found.log_normalizer, single.log_normalizer, rtol=1e-6)
    assert_allclose(np.exp(found.log_weights), np.exp(single.log_weights), atol=1e-4)
