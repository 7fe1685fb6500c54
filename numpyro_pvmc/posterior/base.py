"""What all posteriors of chains answer alike."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_pvmc.posterior import arviz as export
from numpyro_pvmc.program.arguments import Arguments, is_traced
from numpyro_pvmc.program.handlers import run
from numpyro_pvmc.program.structure import Structure


class ChainPosterior(abc.ABC):
    """The posterior of a chain given its data: the base of the results of all engines.

    They have `log_normalizer`, shape ``(*plates)``, the values of global sites in `globals`, and `structure`, `model`,
    `arguments` and `params` of the program.
    """

    @abc.abstractmethod
    def mean(self) -> dict[str, jax.Array]:
        """Posterior means, given `globals`: ``{site: (T, *plates, *event)}``."""

    @abc.abstractmethod
    def variance(self) -> dict[str, jax.Array]:
        """Posterior variances, given `globals`: ``{site: (T, *plates, *event)}``."""

    @abc.abstractmethod
    def quantile(self, q: float | jax.Array) -> dict[str, jax.Array]:
        """Posterior quantiles, given `globals`.

        :param q: one probability or several.
        :return: ``{site: (T, *plates, *event)}``, with the shape of `q` in front.
        """

    @abc.abstractmethod
    def sample(self, rng_key: jax.Array, sample_shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Draw joint trajectories, given `globals`.

        :param rng_key: random key.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, T, ...)}`` in the shapes that the model gives its sites.
        """

    def to_arviz(self, rng_key: jax.Array | None = None, num_samples: int = 1000, time: Any = None) -> Any:
        """Convert to ArviZ data: joint trajectories as draws, with coordinates for time and plates.

        Where global sites were drawn from a guide, the draws are those of :meth:`numpyro_pvmc.PVMC.sample_posterior`: global
        sites are drawn afresh for each, and each has particles of its own, which takes as long as so many posteriors. The
        group ``smoothing`` has what belongs to no draw: effective sample sizes, smoothed means and standard deviations, and
        the log normalizer; all given the global sites in `globals`.

        :param rng_key: random key of the draws; the key of seed 0 by default.
        :param num_samples: number of draws.
        :param time: coordinate of the T steps, such as dates; 0 to T - 1 by default.
        :return: an `arviz.InferenceData`, or from ArviZ 1 an `xarray.DataTree`.
        :raises ValueError: if `time` has not T elements, or as :meth:`sample`.
        """
        rng_key = random.key(0) if rng_key is None else rng_key
        time = np.arange(self.structure.length) if time is None else np.asarray(time)
        if time.shape != (self.structure.length,):
            raise ValueError(f"`time` must have shape {(self.structure.length,)}, but it has shape {time.shape}.")
        samples = self._draws(rng_key, num_samples)
        observed = _observed(self, jax.tree.map(lambda x: x[0], samples))
        summary = {"log_normalizer": self.log_normalizer}
        summary |= {f"{name}_mean": x for name, x in self.mean().items()}
        summary |= {f"{name}_sd": jnp.sqrt(x) for name, x in self.variance().items()}
        summary |= self._summaries()
        return export.to_arviz(self.structure, time, samples, observed, summary)

    def _draws(self, rng_key, number):
        return self.sample(rng_key, (number,))

    def _summaries(self):
        """What else is to be said of each step, by name."""
        return {}

    def _shown(self, kind, more=""):
        """What is shown of it in a line or three."""
        is_one = not is_traced(self) and self.log_normalizer.ndim == len(self.structure.plates)  # not several, under `jax.vmap`
        evidence = f"\n  log evidence {np.asarray(self.log_normalizer).sum():.6g}" if is_one else ""
        evidence += " in all" if evidence and self.log_normalizer.ndim else ""
        return f"{type(self).__name__} of {self.structure.summary}{kind}{evidence}{more if is_one else ''}"


def check_probabilities(q: float | jax.Array) -> jax.Array:
    """Refuse what are no probabilities.

    :param q: one or several.
    :raises ValueError: if one is not between 0 and 1. Nothing is looked at while they are traced.
    """
    if not isinstance(q, jax.core.Tracer) and np.any((np.asarray(q) < 0) | (np.asarray(q) > 1)):
        raise ValueError(f"`q` must be between 0 and 1, but got {q}.")
    return jnp.asarray(q)


def given(values: dict[str, jax.Array], what: str = "one draw") -> str:
    """What is shown of the global sites of a posterior.

    :param values: their values.
    :param what: what these are.
    """
    names = ", ".join(f"'{name}'" for name in sorted(values))
    return f"\n  given {what} of the global sites {names}" if values else ""


def derived(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], rng_key: jax.Array
) -> dict[str, jax.Array]:
    """Deterministic sites, and those that nothing else reads, which are drawn from their own distributions.

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
