"""The posterior as weighted particles."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.convolution import draw_parts, filtering_probabilities_of_parts, probabilities_of_parts
from numpyro_pvmc.chain.densities import Particles, target
from numpyro_pvmc.chain.enumeration import number_of_states, of_particles, probabilities, values_of_numbers
from numpyro_pvmc.chain.potentials import ChainPotentials
from numpyro_pvmc.ops.smoothing import Marginals, sample_backward
from numpyro_pvmc.posterior.base import ChainPosterior, check_probabilities, derived, given
from numpyro_pvmc.posterior.diagnostics import check_drawable
from numpyro_pvmc.program.arguments import Arguments, is_traced
from numpyro_pvmc.program.compiled import for_each_model
from numpyro_pvmc.program.structure import Structure, align, from_canonical, to_canonical


class Source(Protocol):
    """What a posterior was made with: it makes others, given other draws of the global sites."""

    def sample(self, rng_key: jax.Array, posterior: "SmoothedPosterior", sample_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Draw trajectories, and global sites afresh for each, from parameters and data of a posterior."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "log_normalizer",
        "particles",
        "log_weights",
        "log_filtering_weights",
        "globals",
        "log_weight_globals",
        "state_probabilities",
        "filtering_state_probabilities",
        "present",
        "log_filtering",
        "arguments",
        "params",
        "choices",
    ),
    meta_fields=("structure", "model", "source"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class SmoothedPosterior(ChainPosterior):
    """The posterior of a chain given its data, as weighted particles at each time.

    T is the number of steps of the scan, K that of particles; `plates` are those around the chain, and nothing else is a
    batch axis. Sites before the scan, such as ``x_0``, have no T axis. Discrete sites that are summed have no particles, but
    probabilities, which are exact for a chain that has no other sites. A series of evidence 0, without any possible trajectory,
    has NaN for means, variances, quantiles, probabilities and draws.

    :param log_normalizer: log of an unbiased estimate of the evidence of each series, shape ``(*plates)``, given `globals`.
    :param particles: ``{site: (T, K, *plates, *event)}``.
    :param log_weights: ``{site: (T, K, *plates)}``, logs of smoothing weights, which sum to 1 over K. Where a series is
        padded they repeat those of its last step.
    :param log_filtering_weights: the same given the data up to each time only.
    :param globals: the draw of the global sites that was used, by name.
    :param log_weight_globals: log p - log q of that draw, and log p of what the model observes without the chain. The sum of
        it and the log normalizers of all series is the log importance weight of the draw.
    :param state_probabilities: ``{site: (T, *plates, S)}`` for the sites that are summed: probabilities of their S values, in
        the order of their support, given all data. Where a series is padded they repeat those of its last step.
    :param filtering_state_probabilities: the same given the data up to each time only.
    :param present: ``(T, *plates)``, false where a series is padded; ``None`` if none is.

    It is a pytree, and may be returned from `jax.jit`.
    """

    log_normalizer: jax.Array
    particles: dict[str, jax.Array]
    log_weights: dict[str, jax.Array]
    log_filtering_weights: dict[str, jax.Array]
    globals: dict[str, jax.Array]
    log_weight_globals: jax.Array
    state_probabilities: dict[str, jax.Array]
    filtering_state_probabilities: dict[str, jax.Array]
    present: jax.Array | None
    log_filtering: jax.Array
    arguments: Arguments
    params: dict[str, Any]
    choices: Arguments
    structure: Structure
    model: Callable
    source: Source | None

    def __repr__(self):
        particles = f", K = {self.num_particles} particles" if self.structure.sites else ", states summed"
        least = ""
        if not is_traced(self):
            sizes = {name: np.asarray(size) for name, size in self.effective_sample_size().items()}
            name = min(sizes, key=lambda name: np.nanmin(sizes[name], initial=np.inf), default=None)
            least = f", least effective sample size {np.nanmin(sizes[name]):.3g} (site '{name}')" if sizes else ""
        return f"{self._shown(particles, least)}{given(self.globals)}"

    @property
    def num_particles(self) -> int:
        """K, the number of particles at each time step; 1 if all sites are summed."""
        return self.log_filtering.shape[-1] // number_of_states(self.structure)

    def mean(self) -> dict[str, jax.Array]:
        """Posterior means, given the one draw of the global sites in `globals`.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self._map(lambda x, w: (w * x).sum(0))

    def variance(self) -> dict[str, jax.Array]:
        """Posterior variances, given the one draw of the global sites in `globals`: their own spread is not in it.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self._map(lambda x, w: (w * (x - (w * x).sum(0)) ** 2).sum(0))

    def quantile(self, q: float | jax.Array) -> dict[str, jax.Array]:
        """Posterior quantiles given the one draw of the global sites in `globals`, by interpolation of the weighted particles.

        :param q: one probability or several.
        :return: ``{site: (T, *plates, *event)}``, with the shape of `q` in front.
        :raises ValueError: if `q` is not between 0 and 1.
        """
        q = check_probabilities(q)

        def quantiles(x, w):
            x, w = jnp.moveaxis(x, 0, -1), jnp.moveaxis(jnp.broadcast_to(w, x.shape), 0, -1)
            order = jnp.argsort(x, -1)
            x, w = jnp.take_along_axis(x, order, -1), jnp.take_along_axis(w, order, -1)
            # Each particle stands at the middle of its share of the mass.
            position = jnp.cumsum(w, -1) - w / 2
            one = jnp.vectorize(lambda x, p: jnp.interp(q.ravel(), p, x), signature="(k),(k)->(q)")
            return jnp.moveaxis(one(x, position), -1, 0)

        steps = self._map(quantiles)
        moved = {n: jnp.moveaxis(x, 1, 0) if n in self.structure.step else x for n, x in steps.items()}
        return {name: x.reshape(q.shape + x.shape[1:]) for name, x in moved.items()}

    def effective_sample_size(self) -> dict[str, jax.Array]:
        """Effective number of particles by time, 1 / sum of squared weights; NaN where a series is padded.

        :return: ``{site: (T, *plates)}``, numbers from 1 to K; 0 for a series without any possible trajectory.
        """
        sizes = {}
        for name, log_weights in self.log_weights.items():
            is_step = name in self.structure.step
            total = jnp.sum(jnp.exp(2 * log_weights), int(is_step))
            size = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
            sizes[name] = size if self.present is None or not is_step else jnp.where(self.present, size, jnp.nan)
        return sizes

    def sample(self, rng_key: jax.Array, sample_shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Draw joint trajectories through the particles, backwards in time, given the global sites in `globals`.

        :param rng_key: random key.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, T, ...)}`` in the shapes that the model gives its sites, with the global sites and
            the deterministic sites of the model; what :class:`numpyro.infer.Predictive` takes.
        :raises ValueError: if the posterior is not a number; or a series of it has evidence 0, where real-valued sites are NaN,
            and a site has integer values.
        """
        check_drawable(self)
        return _sample(self.model, dataclasses.replace(self, model=None, source=None), rng_key, tuple(sample_shape))

    def _draws(self, rng_key, number):
        afresh = self.globals and self.source is not None
        return self.source.sample(rng_key, self, (number,)) if afresh else self.sample(rng_key, (number,))

    def _summaries(self):
        sizes = {f"{name}_effective_sample_size": x for name, x in self.effective_sample_size().items()}
        return sizes | {f"{name}_probability": x for name, x in self.state_probabilities.items()}

    def _map(self, function):
        """`function` of particles and weights, with the particles' axis first, at each time."""
        result, is_possible = {}, self.log_normalizer > -jnp.inf
        for name, x in self.particles.items():
            weights = jnp.where(is_possible, jnp.exp(self.log_weights[name]), jnp.nan)
            weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
            result[name] = (jax.vmap(function) if name in self.structure.step else function)(x, weights)
        return result


def smoothed_posterior(potentials: ChainPotentials, weighed: Marginals) -> SmoothedPosterior:
    """The smoothed posterior of particles.

    :param potentials: particles and potentials.
    :param weighed: the marginals of its potentials.
    :return: the posterior.
    """
    chain, structure = potentials.chain, potentials.chain.structure

    def by_site(log_weights):
        log_weights = jnp.moveaxis(of_particles(structure, log_weights), -1, 1)
        at_start = dict.fromkeys(structure.initial, log_weights[0])
        return at_start | dict.fromkeys(structure.step, log_weights[1:])

    smoothed, filtered = (_probabilities(structure, x) for x in (weighed.log_weights, weighed.log_filtering_weights))
    if structure.parts:
        totals = structure, potentials.node, potentials.edges
        smoothed |= probabilities_of_parts(*totals)
        filtered |= filtering_probabilities_of_parts(*totals, weighed.log_filtering_weights)
    particles = {n: to_canonical(x, structure.initial[n], structure) for n, x in potentials.particles.initial.items()}
    particles |= {n: to_canonical(x, structure.step[n], structure) for n, x in potentials.particles.steps.items()}
    return SmoothedPosterior(
        log_normalizer=weighed.log_normalizer,
        particles=particles,
        log_weights=by_site(weighed.log_weights),
        log_filtering_weights=by_site(weighed.log_filtering_weights),
        globals=potentials.globals,
        log_weight_globals=potentials.log_weight_globals,
        state_probabilities=smoothed,
        filtering_state_probabilities=filtered,
        present=None if potentials.mask is None else potentials.mask[1:],
        log_filtering=weighed.log_filtering_weights,
        arguments=chain.arguments,
        params={name: x for name, x in chain.values.items() if name not in potentials.globals},
        choices=Arguments(),
        structure=structure,
        model=chain.model,
        source=None,
    )


def _probabilities(structure, log_weights):
    # Where no state is possible all weights are zero, and of these there are no probabilities.
    is_possible = ~jnp.isneginf(log_weights).all(-1, keepdims=True)
    return probabilities(structure, jnp.where(is_possible, log_weights, jnp.nan)) if structure.states else {}


@for_each_model(static_argnum=3, name="draws from the posterior")
def _sample(model, posterior, rng_key, sample_shape):
    structure = posterior.structure
    values = posterior.params | posterior.globals
    chain = read_chain(structure, model, posterior.arguments, values)
    native = {n: from_canonical(x, structure.sites[n], structure) for n, x in posterior.particles.items()}
    particles = Particles({n: native[n] for n in structure.initial}, {n: native[n] for n in structure.step})
    _, edges = target(chain, particles)
    mask = posterior.present
    mask = None if mask is None else jnp.concatenate([jnp.ones_like(mask[:1]), mask])
    key_paths, key_free = random.split(rng_key)
    numbers = sample_backward(key_paths, posterior.log_filtering, edges, mask, (math.prod(sample_shape),))
    states, is_possible = number_of_states(structure), posterior.log_normalizer > -jnp.inf
    parts = {}
    if structure.parts:
        parts = draw_parts(random.fold_in(key_paths, 1), chain, edges.inputs, numbers, states)

    def trajectory(numbers, parts, rng_key):
        sites = {}
        for name, x in posterior.particles.items():
            of_site = (numbers[1:] if name in structure.step else numbers[0]) // states
            k_axis = int(name in structure.step)
            index = jnp.expand_dims(of_site, k_axis)
            index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
            picked = jnp.take_along_axis(x, index, k_axis).squeeze(k_axis)
            if jnp.issubdtype(picked.dtype, jnp.inexact):
                event = picked.ndim - k_axis - is_possible.ndim
                picked = jnp.where(is_possible.reshape(*is_possible.shape, *(1,) * event), picked, jnp.nan)
            sites[name] = from_canonical(picked, structure.sites[name], structure)
        sites |= values_of_numbers(structure, numbers % states) | posterior.globals
        for name, x in parts.items():
            sites[name] = jnp.broadcast_to(align(x, structure.states[name], structure), sites[name].shape)
        values = posterior.params | sites
        return sites | derived(structure, model, posterior.arguments, values, rng_key)

    samples = jax.vmap(trajectory)(numbers, parts, random.split(key_free, len(numbers)))
    return {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}
