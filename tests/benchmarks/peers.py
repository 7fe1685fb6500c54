"""What else a user might run on the linear-Gaussian experiment; series by series, over data of shape (T + 1, series, D)."""

import functools

import cuthbert
import jax
import jax.numpy as jnp
import numpy as np
from cuthbert.smc import backward_sampler, particle_filter
from cuthbertlib.resampling import systematic
from cuthbertlib.resampling.autodiff import stop_gradient_decorator
from cuthbertlib.smc.smoothing import exact_sampling, mcmc
from jax import random
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

from linear_gaussian import DECAY, DIMENSION


@functools.partial(jax.jit, static_argnames="n")
def systematic_in_xla(key, logits, positions, n):
    """Cuthbert's own systematic resampling leaves XLA for a callback on a CPU, which is slower for few particles."""
    cumulative = jnp.cumsum(jax.nn.softmax(jax.lax.stop_gradient(logits)))
    chosen = jnp.searchsorted(cumulative, (random.uniform(key) + jnp.arange(n)) / n)
    chosen = jnp.minimum(chosen, len(logits) - 1)
    return chosen, jnp.zeros(n, logits.dtype), jax.tree.map(lambda x: x[chosen], positions)


RESAMPLING = {"callback": systematic.resampling, "xla": systematic_in_xla}
BACKWARD = {"exact": exact_sampling.simulate, "mcmc": functools.partial(mcmc.simulate, n_steps=10)}


def transition(decay):
    axis = jnp.arange(DIMENSION)
    return decay ** (jnp.abs(axis[:, None] - axis) + 1.0)


def bootstrap_filter(num_particles, resampling, decay=DECAY):
    """Cuthbert's filter of one series. Its first step starts from nothing: x_0 is observed too."""
    A = transition(decay)
    mean = lambda x, inputs: jnp.where(inputs["is_first"], 0.0, A @ x)
    return particle_filter.build_filter(
        lambda key: jnp.zeros(DIMENSION),
        lambda key, x, inputs: mean(x, inputs) + random.normal(key, (DIMENSION,)),
        lambda x_prev, x, inputs: norm.logpdf(inputs["y"], x).sum(),
        num_particles,
        resampling,
    )


def _inputs(y):
    return {"y": y, "is_first": jnp.arange(len(y)) == 0}


def _filtered(key, y, *args):
    filter_object = bootstrap_filter(*args)
    return cuthbert.filter(filter_object, _inputs(y), filter_object.init_prepare(key=key), key=key)


def filtered(key, y, num_particles, resampling):
    """Log evidence and filtered means."""

    def one(key, y):
        states = _filtered(key, y, num_particles, resampling)
        weights = jax.nn.softmax(states.log_weights, -1)[..., None]
        return states.log_normalizing_constant[-1], (weights * states.particles).sum(-2)[1:]

    return jax.vmap(one, (0, 1), (0, 1))(random.split(key, y.shape[1]), y)


def training_step(key, y, decay, num_particles, resampling):
    """Value and gradient of minus the log evidence, by the filter whose resampling has the gradient of its weights."""

    def loss(decay):
        keys = random.split(key, y.shape[1])
        one = lambda key, y: _filtered(key, y, num_particles, stop_gradient_decorator(resampling), decay)
        return -jax.vmap(one, (0, 1))(keys, y).log_normalizing_constant[:, -1].sum()

    return jax.value_and_grad(loss)(decay)


def backward_sampled(key, y, num_particles, resampling, backward):
    """Log evidence and smoothed means, by as many backward draws as there are particles."""
    A = transition(DECAY)

    def one(key, y):
        key_filter, key_smoother = random.split(key)
        states = _filtered(key_filter, y, num_particles, resampling)
        smoother = backward_sampler.build_smoother(
            lambda x_prev, x, inputs: norm.logpdf(x, A @ x_prev).sum(), backward, resampling, num_particles
        )
        smoothed = cuthbert.smoother(smoother, states, key=key_smoother)
        return states.log_normalizing_constant[-1], smoothed.particles[1:].mean(-2)

    return jax.vmap(one, (0, 1), (0, 1))(random.split(key, y.shape[1]), y)


def de_sequentialized(key, node, edge, x):
    """De-Sequentialized Monte Carlo of one series: neighbouring blocks are joined, and N of N^2 pairs drawn, in a tree.

    `node` (T, K), `edge` (T - 1, K, K) and `x` (T, K, D) are a chain's potentials and particles. Log evidence and smoothed
    means. *De-Sequentialized Monte Carlo: a parallel-in-time particle smoother*, Corenflos, Chopin & Särkkä (2022), by
    systematic draws.
    """
    T, K = node.shape
    depth = int(np.ceil(np.log2(T)))
    # A point by itself has the distribution of its proposal; observation and density enter where it is joined to the point
    # before. Points that fill up the tree weigh the same whatever the others are.
    edge = edge + node[1:, None, :] + jnp.log(K)
    edge = jnp.concatenate([edge, jnp.zeros((2**depth - T, K, K))])
    node = jnp.full((2**depth, K), -jnp.log(K)).at[0].set(node[0])
    log_z = logsumexp(node, -1)
    log_weights, paths = node - log_z[:, None], jnp.broadcast_to(jnp.arange(K), (2**depth, 1, K))

    def join(key, edge, left, right, log_weights_left, log_weights_right):
        joint = log_weights_left[:, None] + log_weights_right + edge[left[-1][:, None], right[0]]
        total = logsumexp(joint)
        cumulative = jnp.cumsum(jnp.exp(joint - total).ravel())
        drawn = jnp.searchsorted(cumulative, (random.uniform(key) + jnp.arange(K)) / K * cumulative[-1])
        drawn = jnp.minimum(drawn, K * K - 1)
        return total, jnp.concatenate([left[:, drawn // K], right[:, drawn % K]])

    for level in range(depth):
        ends = edge[2**level - 1 :: 2 ** (level + 1)]
        keys = random.split(random.fold_in(key, level), len(ends))
        pairs = paths[::2], paths[1::2], log_weights[::2], log_weights[1::2]
        gain, paths = jax.vmap(join)(keys, ends, *pairs)
        log_z, log_weights = log_z[::2] + log_z[1::2] + gain, jnp.full((len(ends), K), -jnp.log(K))
    return log_z[0], jnp.take_along_axis(x, paths[0, :T, :, None], 1).mean(1)
