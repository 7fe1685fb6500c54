"""Weighted particles in; draws, summaries, diagnostics, ArviZ data out."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_pvmc.chain import read_chain
from numpyro_pvmc.compiled import for_each_model
from numpyro_pvmc.densities import Particles, target
from numpyro_pvmc.potentials import Lattice, align
from numpyro_pvmc.program import Arguments, run
from numpyro_pvmc.smoothing import Marginals, sample_backward
from numpyro_pvmc.states import joint_values, number_of_states, of_particles, probabilities
from numpyro_pvmc.structure import Latent, Structure


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
    ),
    meta_fields=("structure", "model"),
)
@dataclasses.dataclass(frozen=True)
class SmoothedPosterior:
    """The posterior of a chain given its data, as weighted particles at each time.

    T is the number of steps of the scan, K that of particles; `plates` are those around the chain, and nothing else is a
    batch axis. Sites before the scan, such as ``x_0``, have no T axis. Discrete sites that are summed have no particles, but
    probabilities, which are exact for a chain that has no other sites.

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
    log_filtering: jax.Array = dataclasses.field(repr=False)
    arguments: Arguments = dataclasses.field(repr=False)
    params: dict[str, Any] = dataclasses.field(repr=False)
    structure: Structure = dataclasses.field(repr=False)
    model: Callable = dataclasses.field(repr=False)

    @property
    def num_particles(self) -> int:
        """K, the number of particles at each time step; 1 if all sites are summed."""
        return self.log_filtering.shape[-1] // number_of_states(self.structure)

    def mean(self) -> dict[str, jax.Array]:
        """Posterior means.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self._map(lambda x, w: (w * x).sum(0))

    def variance(self) -> dict[str, jax.Array]:
        """Posterior variances.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self._map(lambda x, w: (w * (x - (w * x).sum(0)) ** 2).sum(0))

    def quantile(self, q: float | jax.Array) -> dict[str, jax.Array]:
        """Posterior quantiles, by interpolation of the weighted particles.

        :param q: one probability or several.
        :return: ``{site: (T, *plates, *event)}``, with the shape of `q` in front.
        :raises ValueError: if `q` is not between 0 and 1.
        """
        if not isinstance(q, jax.core.Tracer) and np.any((np.asarray(q) < 0) | (np.asarray(q) > 1)):
            raise ValueError(f"`q` must be between 0 and 1, but got {q}.")
        q = jnp.asarray(q)

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
        """Draw joint trajectories through the particles, backwards in time.

        :param rng_key: random key.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, T, ...)}`` in the shapes that the model gives its sites, with the global sites and
            the deterministic sites of the model; what :class:`numpyro.infer.Predictive` takes.
        """
        return _sample(self.model, dataclasses.replace(self, model=None), rng_key, tuple(sample_shape))

    def to_arviz(self, rng_key: jax.Array | None = None, num_samples: int = 1000, time: Any = None) -> Any:
        """Convert to ArviZ data: joint trajectories as draws, with coordinates for time and plates.

        The group ``smoothing`` has what belongs to no draw: effective sample sizes, smoothed means and standard deviations,
        and the log normalizer.

        :param rng_key: random key of the draws; the key of seed 0 by default.
        :param num_samples: number of draws.
        :param time: coordinate of the T steps, such as dates; 0 to T - 1 by default.
        :return: an `arviz.InferenceData`, or from ArviZ 1 an `xarray.DataTree`.
        :raises ValueError: if `time` has not T elements.
        """
        rng_key = random.key(0) if rng_key is None else rng_key
        time = np.arange(self.structure.length) if time is None else np.asarray(time)
        if time.shape != (self.structure.length,):
            raise ValueError(f"`time` must have shape {(self.structure.length,)}, but it has shape {time.shape}.")
        samples = self.sample(rng_key, (num_samples,))
        observed = _observed(self, jax.tree.map(lambda x: x[0], samples))
        size = self.effective_sample_size()
        summary = {"log_normalizer": self.log_normalizer}
        summary |= {f"{name}_mean": x for name, x in self.mean().items()}
        summary |= {f"{name}_sd": jnp.sqrt(x) for name, x in self.variance().items()}
        summary |= {f"{name}_effective_sample_size": x for name, x in size.items()}
        summary |= {f"{name}_probability": x for name, x in self.state_probabilities.items()}
        return _arviz(self.structure, time, samples, observed, summary)

    def _map(self, function):
        """`function` of particles and weights, with the particles' axis first, at each time."""
        result = {}
        for name, x in self.particles.items():
            weights = jnp.exp(self.log_weights[name])
            weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
            result[name] = (jax.vmap(function) if name in self.structure.step else function)(x, weights)
        return result


def smoothed_posterior(lattice: Lattice, weighed: Marginals) -> SmoothedPosterior:
    """Weigh the particles of a lattice.

    :param lattice: particles and potentials.
    :param weighed: the marginals of its potentials.
    :return: the posterior.
    """
    chain, structure = lattice.chain, lattice.chain.structure

    def by_site(log_weights):
        log_weights = jnp.moveaxis(of_particles(structure, log_weights), -1, 1)
        at_start = dict.fromkeys(structure.initial, log_weights[0])
        return at_start | dict.fromkeys(structure.step, log_weights[1:])

    particles = {n: tidy(x, structure.initial[n], structure) for n, x in lattice.particles.initial.items()}
    particles |= {n: tidy(x, structure.step[n], structure) for n, x in lattice.particles.steps.items()}
    return SmoothedPosterior(
        log_normalizer=weighed.log_normalizer,
        particles=particles,
        log_weights=by_site(weighed.log_weights),
        log_filtering_weights=by_site(weighed.log_filtering_weights),
        globals=lattice.globals,
        log_weight_globals=lattice.log_weight_globals,
        state_probabilities=probabilities(structure, weighed.log_weights),
        filtering_state_probabilities=probabilities(structure, weighed.log_filtering_weights),
        present=None if lattice.mask is None else lattice.mask[1:],
        log_filtering=weighed.log_filtering_weights,
        arguments=chain.arguments,
        params={name: x for name, x in chain.values.items() if name not in lattice.globals},
        structure=structure,
        model=chain.model,
    )


@for_each_model(static_argnum=3)
def _sample(model, posterior, rng_key, sample_shape):
    structure = posterior.structure
    values = posterior.params | posterior.globals
    chain = read_chain(structure, model, posterior.arguments, values)
    native = {n: untidy(x, structure.sites[n], structure) for n, x in posterior.particles.items()}
    particles = Particles({n: native[n] for n in structure.initial}, {n: native[n] for n in structure.step})
    _, edges = target(chain, particles)
    mask = posterior.present
    mask = None if mask is None else jnp.concatenate([jnp.ones_like(mask[:1]), mask])
    key_paths, key_free = random.split(rng_key)
    numbers = sample_backward(key_paths, posterior.log_filtering, edges, mask, (math.prod(sample_shape),))
    states = number_of_states(structure)

    def trajectory(numbers, rng_key):
        sites = {}
        for name, x in posterior.particles.items():
            of_site = (numbers[1:] if name in structure.step else numbers[0]) // states
            k_axis = int(name in structure.step)
            index = jnp.expand_dims(of_site, k_axis)
            index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
            picked = jnp.take_along_axis(x, index, k_axis).squeeze(k_axis)
            sites[name] = untidy(picked, structure.sites[name], structure)
        sites |= _values_of_states(structure, numbers % states) | posterior.globals
        values = posterior.params | sites
        return sites | derived(structure, model, posterior.arguments, values, rng_key)

    samples = jax.vmap(trajectory)(numbers, random.split(key_free, len(numbers)))
    return {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}


def _values_of_states(structure, numbers):
    """Values of the summed sites, from the numbers of their joint values, shape ``(T + 1, *plates)``."""
    values = {}
    for sites, at_steps in ((structure.initial_states, False), (structure.step_states, True)):
        tables, of_point = joint_values(structure, at_steps), numbers[1:] if at_steps else numbers[0]
        for site in sites:
            number = align(of_point, site, structure)
            table = jnp.asarray(tables[site.name])
            table = table.reshape(len(table), *(1,) * int(at_steps), *site.shape)
            number = jnp.broadcast_to(number, (*of_point.shape[: int(at_steps)], *site.shape))[None]
            values[site.name] = jnp.take_along_axis(jnp.broadcast_to(table, (len(table), *number.shape[1:])), number, 0)[0]
    return values


def derived(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], rng_key: jax.Array
) -> dict[str, jax.Array]:
    """Deterministic sites, and those that nothing else reads, which are drawn from their own laws.

    :param structure: the structure of the chain.
    :param model: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of parameters and of all other latent sites.
    :param rng_key: random key.
    :return: their values, by name.
    """
    found = run(model, arguments, values, rng_key)
    free = structure.free
    return {name: site["value"] for name, site in found.items() if site["type"] == "deterministic" or name in free}


def _observed(posterior, sites):
    found = run(posterior.model, posterior.arguments, posterior.params | sites, random.key(0))
    return {
        name: site["value"]
        for name, site in found.items()
        if site["type"] == "sample" and site["is_observed"] and jnp.size(site["value"])
    }


def _axes(latent: Latent, structure: Structure):
    """Axes of a site: those of plates, then other batch axes of more than one element, then those of the event."""
    border = len(latent.batch_shape)
    plates = [border + plate.dim for plate in structure.plates]
    others = [axis for axis in range(border) if axis not in plates and latent.batch_shape[axis] != 1]
    return plates + others + list(range(border, len(latent.shape)))


def tidy(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Move plates to the front of a site's axes, and drop batch axes of one element that are no plate.

    :param x: an array whose trailing axes are those that the model gives the site.
    :param latent: a site of the chain.
    :param structure: the structure of the chain.
    :return: an array of shape ``(..., *plates, *event)``; batch axes that are no plate count as event axes.
    """
    axes, leading = _axes(latent, structure), x.ndim - len(latent.shape)
    singletons = [leading + axis for axis in range(len(latent.shape)) if axis not in axes]
    order = [*range(leading), *(leading + axis for axis in axes), *singletons]
    return x.transpose(order).reshape(x.shape[:leading] + tuple(latent.shape[axis] for axis in axes))


def untidy(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Undo :func:`tidy`.

    :param x: an array of shape ``(..., *plates, *event)``.
    :param latent: a site of the chain.
    :param structure: the structure of the chain.
    :return: an array whose trailing axes are those that the model gives the site.
    """
    axes = _axes(latent, structure)
    leading = x.ndim - len(axes)
    order = [*range(leading), *(leading + int(position) for position in np.argsort(axes))]
    return x.transpose(order).reshape(x.shape[:leading] + latent.shape)


def _arviz(structure, time, samples, observed, summary):
    import arviz

    plates = [plate.name for plate in structure.plates]
    sizes = tuple(plate.size for plate in structure.plates)
    coords = {"time": time} | {plate.name: np.arange(plate.size) for plate in structure.plates}

    def named(arrays, without_time):
        dims = {}
        for name, x in arrays.items():
            along = ["time"] if x.shape[:1] == (structure.length,) and name not in without_time else []
            along += plates if plates and x.shape[len(along) : len(along) + len(plates)] == sizes else []
            dims[name] = along + [f"{name}_dim_{i}" for i in range(x.ndim - len(along))]
        return dims

    samples, observed, summary = ({n: np.asarray(x) for n, x in part.items()} for part in (samples, observed, summary))
    draws = {name: x[None] for name, x in samples.items()}
    initial = tuple(site.name for site in structure.initial_latents)
    outside = (*initial, *structure.global_sites, *structure.initial_factors, *structure.global_factors)
    dims = named({name: x[0] for name, x in samples.items()}, outside) | named(observed, outside)
    kinds = ("mean", "sd", "effective_sample_size", "probability")
    summaries = ("log_normalizer", *(f"{site.name}_{of}" for site in structure.initial_latents for of in kinds))
    dataset = _dataset(summary, named(summary, summaries), coords)
    if int(arviz.__version__.split(".")[0]) >= 1:
        data = arviz.from_dict({"posterior": draws, "observed_data": observed}, dims=dims, coords=coords)
        data["smoothing"] = dataset
        return data
    data = arviz.from_dict(posterior=draws, observed_data=observed, dims=dims, coords=coords)
    data.add_groups({"smoothing": dataset}, warn_on_custom_groups=False)
    return data


def _dataset(arrays, dims, coords):
    import xarray

    used = {dim for names in dims.values() for dim in names}
    variables = {name: (dims[name], x) for name, x in arrays.items()}
    return xarray.Dataset(variables, {name: x for name, x in coords.items() if name in used})
