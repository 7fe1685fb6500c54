"""Draw global sites from their posterior by adaptive importance sampling, starting from their guide.

A guide trained by its bound is narrower than the posterior, and the logarithm of a scale that may be near zero has a tail that
no Gaussian has: weights cannot make up for what is never drawn. So a multivariate Student's t is fitted to the weighted draws,
more are drawn from it, and again, R times. Each draw counts as one of the equal mixture of all that were drawn from, the guide
included,

    weight = p(globals) Z / ((q + t_1 + ... + t_R) / (R + 1)),

which is at most R + 1 times its weight under the guide.

Sources: *Adaptive multiple importance sampling*, Cornuet, Marin, Mira & Robert (Scandinavian Journal of Statistics, 2012); for
the mixture, *Safe and effective importance sampling*, Owen & Zhou (JASA, 2000).
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute, trace

from numpyro_pvmc.ops.gaussian import Moments, refit
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.handlers import is_latent

ROUNDS = 4  # of draws from a fitted distribution
_FREEDOM = 5.0  # degrees of freedom of the t, whose tails are heavier than those of exponential families
_PER_COORDINATE = 4  # draws for each coordinate, at least, for there to be a fit


class Origins(NamedTuple):
    """What a guide draws its global sites from: unconstrained `coordinates`, their values by site, and their density.

    `log_density` is that of the guide, in these coordinates.
    """

    coordinates: jax.Array
    values: dict[str, jax.Array]
    log_density: jax.Array


class Guide(NamedTuple):
    """A guide, and all that it needs to be run; `elsewhere` are names of sites that are not global."""

    guide: Callable
    arguments: Arguments
    params: dict[str, Any]
    elsewhere: Collection[str]

    def origins(self, rng_key: jax.Array, coordinates: jax.Array | None = None) -> Origins | None:
        """Draw them, or put them at coordinates.

        :param coordinates: where to put them.
        :return: ``None`` if there are none, or one of them is discrete or has no unconstrained coordinates.
        """
        sites = self._run(rng_key)
        try:
            moves = {name: biject_to(site["fn"].support) for name, site in sites.items()}
        except NotImplementedError:
            return None
        if not sites or any(site["fn"].support.is_discrete for site in sites.values()):
            return None
        free = {name: move.inv(sites[name]["value"]) for name, move in moves.items()}
        if coordinates is not None:
            _, put = ravel_pytree(free)
            free = put(coordinates)
            sites = self._run(rng_key, functools.partial(_placed, free))
        log_density = jnp.zeros(())
        for name, site in sites.items():
            move = biject_to(site["fn"].support)  # which may depend on sites before it
            log_density += site["fn"].log_prob(site["value"]).sum()
            log_density += jnp.sum(move.log_abs_det_jacobian(free[name], site["value"]))
        values = {name: site["value"] for name, site in sites.items()}
        return Origins(ravel_pytree(free)[0], values, log_density)

    def _run(self, rng_key, place=None):
        guide = self.guide if place is None else substitute(self.guide, substitute_fn=place)
        with block(), trace() as sites, substitute(data=self.params), seed(rng_seed=rng_key):
            self.arguments(guide)
        kept = {name: site for name, site in sites.items() if is_latent(site)}
        return {name: site for name, site in kept.items() if name not in self.elsewhere and not _is_fixed(site["fn"])}


def _placed(free, site):
    name = site["name"]
    return biject_to(site["fn"].support)(free[name]) if name in free else None


def _is_fixed(distribution):
    while not isinstance(distribution, dist.Delta) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


class Resampled(NamedTuple):
    """Draws of global sites from their posterior.

    `result` is what was evaluated with them, by `key` and `values`, which are those of what the guide draws them from.
    `log_weights` are those of all draws that there were to choose from, the guide's first; without a number there is none.
    """

    result: Any
    key: jax.Array
    values: dict[str, jax.Array]
    log_weights: jax.Array


class _Rounds(NamedTuple):
    """What was drawn in each round, and what from: the guide in the first, then one t after the other."""

    distributions: Moments
    points: jax.Array
    keys: jax.Array
    log_guide: jax.Array
    log_target: jax.Array

    def log_density_of_round(self, number):
        distribution = _student(jax.tree.map(lambda x: x[number], self.distributions))
        return jnp.where(number == 0, self.log_guide, distribution.log_prob(self.points))

    def log_weights(self, begun):
        """Those of draws of the rounds that have been, one after the other."""
        numbers = jnp.arange(len(self.points))
        of_rounds = lax.map(self.log_density_of_round, numbers)
        log_q = jax.nn.logsumexp(jnp.where(numbers[:, None, None] < begun, of_rounds, -jnp.inf), axis=0)
        return jnp.where(numbers[:, None] < begun, self.log_target - log_q + jnp.log(begun), -jnp.inf).reshape(-1)


def resample_globals(
    rng_key: jax.Array,
    guide: Guide,
    evaluate: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], tuple[Any, jax.Array]],
    number: int,
) -> Resampled:
    """Draw global sites from their posterior.

    :param guide: the guide.
    :param evaluate: takes a key, another for what is not weighed, and values of what the guide draws its global sites from, or
        none; returns anything, and the log of the weight of these sites under the guide.
    :param number: how many to draw.
    :return: the draws: of as many from the guide, and as many in each round of fitting.
    """
    key_guide, key_rounds = random.split(rng_key)
    keys = random.split(key_guide, number)
    first = jax.eval_shape(guide.origins, key_guide)
    if first is None or number < _PER_COORDINATE * first.coordinates.size:
        others = jax.vmap(lambda key: random.fold_in(key, 1))(keys)
        result, log_weights = lax.map(lambda drawn: evaluate(*drawn, {}), (keys, others))
        chosen = systematic(key_rounds, log_weights, number)
        return Resampled(jax.tree.map(lambda x: x[chosen], result), keys[chosen], {}, log_weights)
    start = jax.vmap(guide.origins)(keys).coordinates

    def one(drawn):
        rng_key, other_key, coordinates = drawn
        origins = guide.origins(rng_key, coordinates)
        result, log_weight = evaluate(rng_key, other_key, origins.values)
        return result, origins, log_weight + origins.log_density

    def around(i, state):
        rounds, *_ = state
        key_points, key_draws, key_others, key_chosen = random.split(random.fold_in(key_rounds, i), 4)
        distribution = jax.tree.map(lambda x: x[jnp.minimum(i, ROUNDS)], rounds.distributions)
        points = jnp.where(i == 0, start, _student(distribution).sample(key_points, (number,)))
        keys = random.split(key_draws, number)
        # In the end those chosen are made again, with their own keys, so that there is never more than one round of them.
        chosen = systematic(key_chosen, rounds.log_weights(i), number)
        unknown = jnp.isnan(rounds.log_target[0])  # of the guide: it is chosen, for all to see
        chosen = chosen.at[0].set(jnp.where(unknown.any(), unknown.argmax(), chosen[0]))
        points, keys = (
            jnp.where(jnp.reshape(i > ROUNDS, (1,) * new.ndim), x.reshape(-1, *x.shape[2:])[chosen], new)
            for x, new in ((rounds.points, points), (rounds.keys, keys))
        )
        result, origins, log_target = lax.map(one, (keys, random.split(key_others, number), points))
        # Beyond their last round nothing is written.
        put = lambda x, new: x.at[i].set(new, mode="drop")
        log_q = jnp.where(i == 0, origins.log_density, _student(distribution).log_prob(points))
        fitted = refit(distribution, points[None], jax.nn.log_softmax(_known(log_target - log_q))[None])
        rounds = _Rounds(
            jax.tree.map(lambda x, new: x.at[i + 1].set(new, mode="drop"), rounds.distributions, fitted),
            *map(put, rounds[1:], (points, keys, origins.log_density, log_target)),
        )
        return rounds, result, keys, origins.values

    example = jax.eval_shape(one, (keys[0], keys[0], start[0]))
    empty = lambda shape, like: jnp.empty(shape + like.shape, like.dtype)
    of_rounds = lambda like: jnp.zeros((ROUNDS + 1, number, *like.shape), like.dtype)
    distributions = jax.tree.map(lambda x: jnp.broadcast_to(x, (ROUNDS + 1, *x.shape)), _gaussian(start))
    rounds = _Rounds(
        distributions, of_rounds(start[0]), jnp.broadcast_to(keys, (ROUNDS + 1, number)), *2 * [of_rounds(example[2])]
    )
    result, values = (jax.tree.map(functools.partial(empty, (number,)), x) for x in (example[0], example[1].values))
    rounds, result, keys, values = lax.fori_loop(0, ROUNDS + 2, around, (rounds, result, keys, values))
    return Resampled(result, keys, values, rounds.log_weights(ROUNDS + 1))


def systematic(rng_key: jax.Array, log_weights: jax.Array, number: int) -> jax.Array:
    """Indices, each as often as its weight says, in random order.

    :param log_weights: logs of weights; what is not a number has none.
    :param number: how many indices.
    """
    key_start, key_order = random.split(rng_key)
    points = (random.uniform(key_start) + jnp.arange(number)) / number
    chosen = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(_known(log_weights))), points)
    return random.permutation(key_order, jnp.minimum(chosen, len(log_weights) - 1))


def _gaussian(draws):
    """Mean and covariance of draws."""
    mean = draws.mean(0, keepdims=True)
    ridge = 1e-6 * draws.var(0) + jnp.finfo(draws.dtype).tiny
    return Moments(mean, jnp.linalg.cholesky((draws - mean).T @ (draws - mean) / len(draws) + jnp.diag(ridge))[None])


def _student(moments):
    return dist.MultivariateStudentT(_FREEDOM, moments.mean[0], moments.factor[0])


def _known(log_weights):
    return jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
