"""Learn from known states."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.semiring import logsumexp
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.posterior.particles import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.structure import to_canonical
from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO, refitted_state

GRADIENTS = ("reparam", "sticking")


class Error(Protocol):
    """How far the weighted particles of one site, at one time of one series, are from the truth.

    It gets weights of shape ``(K,)`` that sum to 1, particles of shape ``(K, *event)`` and the truth, of shape ``(*event)``,
    and returns a scalar that JAX can differentiate. A truth with NaN in it never reaches it, unless it has a true attribute
    ``skips_nan``: then it leaves out the elements that are NaN, and is asked wherever there are others.
    """

    def __call__(self, weights: jax.Array, particles: jax.Array, truth: jax.Array) -> jax.Array: ...


@full_precision
def squared_error(weights: jax.Array, particles: jax.Array, truth: jax.Array) -> jax.Array:
    """Squared Euclidean distance of the weighted mean from the truth.

    :param weights: shape ``(K,)``, with the sum 1.
    :param particles: shape ``(K, *event)``.
    :param truth: shape ``(*event)``; elements that are NaN are left out.
    :return: a scalar.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.pvmc.supervised import squared_error
        >>> float(squared_error(jnp.array([0.5, 0.5]), jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([3.0, jnp.nan])))
        4.0
    """
    labelled = ~jnp.isnan(truth)
    distance = jnp.tensordot(weights, particles, 1) - jnp.where(labelled, truth, 0.0)
    return jnp.sum(jnp.where(labelled, distance, 0.0) ** 2)


squared_error.skips_nan = True


def kernel_log_density(bandwidth: float | jax.Array) -> Error:
    """Minus the log of the particles' kernel density at the truth, with a Gaussian product kernel.

    :param bandwidth: standard deviation of the kernel: one, or an array that broadcasts with one particle.
    :return: a function of weights ``(K,)``, particles ``(K, *event)`` and a truth ``(*event)``. Elements of the truth that are
        NaN are left out: the density is that of the others.
    :raises ValueError: if `bandwidth` is not positive.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_pvmc.pvmc.supervised import kernel_log_density
        >>> error = kernel_log_density(0.5)
        >>> weights, particles = jnp.array([0.3, 0.7]), jnp.array([0.0, 1.0])
        >>> round(float(error(weights, particles, jnp.array(1.0))), 3)          # -log(0.3 * 0.108 + 0.7 * 0.798)
        0.526
    """
    if not isinstance(bandwidth, jax.core.Tracer) and not np.all(np.asarray(bandwidth) > 0):
        raise ValueError(f"`bandwidth` must be positive, but got {bandwidth}. It has the unit of the states.")

    def error(weights, particles, truth):
        labelled = ~jnp.isnan(truth)
        distance = (particles - jnp.where(labelled, truth, 0.0)) / bandwidth
        log_kernel = -0.5 * distance**2 - jnp.log(bandwidth) - 0.5 * math.log(2 * math.pi)
        log_kernel = jnp.where(labelled, log_kernel, 0.0).reshape(len(weights), -1).sum(-1)
        possible = weights > 0  # the slope of log at 0 is infinite, and times a cotangent of zero nan
        log_weights = jnp.where(possible, jnp.log(jnp.where(possible, weights, 1.0)), -jnp.inf)
        return -logsumexp(log_weights + log_kernel, 0)

    error.skips_nan = True
    return error


class SupervisedELBO(ImportanceSmoothedELBO):
    """The error of the smoothed states where they are known, less the bound of importance smoothing.

    For training series whose true states are known, all or some of them. The smoothing weights are functions of all
    parameters, and so is an estimate of the state made of weighted particles: model and guide learn from its error. The loss
    is the sum over series of ::

        mean over known times of error(weights, particles, truth)  -  bound * log Z / (T + 1)

    and less ``bound * (log p - log q) / (T + 1)`` of the global sites, if there are any. T + 1 counts the time steps of the
    chain as the program has them, padding included: the steps of the scan, and the initial step if it has a latent site, else
    T. Where several sites are known at one time their errors add up. A series of which nothing is known has the error 0. With
    the squared error this is the loss of the prey-predator experiment of the PVMC paper, ``-bound / 257 + squared error``.

    Give it a guide that reads the data. One with free means for each series and time, such as ``AutoNormal``, would move
    them onto the known states and learn nothing for other series.

    Ask for the posterior of data without known states as always: neither the guide nor the weights read the truth.

    :param truth: a function of the arguments of the model that returns ``{site: array}`` for some latent sites of the chain, in
        the shapes that the model gives them: ``(T, *batch, *event)`` for a site of the scan, ``(*batch, *event)`` for one
        before it. NaN is unknown: an element, a step, a whole series. The model takes the same arguments, and ignores those
        that are for `truth` only.
    :param num_particles: K, the number of particles at each time step.
    :param error: a function of weights, particles and truth, for one site at one time of one series; see :class:`Error`.
        :func:`squared_error`, ``kernel_log_density(bandwidth)``, or your own.
    :param bound: weight of the bound; 0 for the error alone.
    :param filtering: whether weights are those given the data up to each time only.
    :param gradient: ``"reparam"``, the gradient of this loss, or ``"sticking"``, that with the parameters of log q held fixed.
    :param method: how trajectories are summed, as for :class:`~numpyro_pvmc.pvmc.elbo.ImportanceSmoothedELBO`.
    :param particles: how particles are drawn, likewise.
    :raises TypeError: if `truth` or `error` is no function.
    :raises ValueError: for a choice that does not exist; in use, if what `truth` or `error` returns does not fit.

    **Reference**

    *Efficient Learning of Deep State Space Models via Importance Smoothing*, John-Joseph Brady, Nikolas Nüsken, Yunpeng Li
    (ICML 2026), section on the prey-predator model and appendix G.4.

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc import PVMC, SupervisedELBO
        >>> def model(y, states=None):                                          # states are for the loss
        ...     decay = numpyro.param("decay", 0.1)
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(decay * x_prev, 0.3))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)
        >>> def guide(y, states=None):
        ...     numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(numpyro.param("gain", 0.5) * y, 0.5))
        >>> loss = SupervisedELBO(lambda y, states=None: {"x": states}, num_particles=8)
        >>> y, states = jnp.cos(jnp.arange(20) / 4), jnp.cos(jnp.arange(20) / 4 - 0.1).at[5:].set(jnp.nan)
        >>> pvmc = PVMC(model, guide, loss=loss)
        >>> result = pvmc.run(jax.random.key(0), 100, y, states, progress_bar=False, grow=False)
        >>> bool(result.params["decay"] > 0.2)
        True
        >>> pvmc.posterior(jax.random.key(1), result.params, y).mean()["x"].shape
        (20,)
    """

    reported = "loss", 1.0

    def __init__(
        self,
        truth: Callable[..., Mapping[str, Any]],
        num_particles: int = 32,
        *,
        error: Error = squared_error,
        bound: float = 1.0,
        filtering: bool = False,
        gradient: str = "reparam",
        method: str = "auto",
        particles: str = "rqmc",
    ):
        if not callable(truth):
            raise TypeError(
                f"`truth` must be a function of the arguments of the model that returns {{site: array}}, but got "
                f"{type(truth).__name__}. Give the states as an argument: `truth=lambda y, states: {{'x': states}}`."
            )
        if not callable(error):
            raise TypeError(
                f"`error` must be a function of weights, particles and truth, but got {error!r}. Take `squared_error` or "
                "`kernel_log_density(bandwidth)` of `numpyro_pvmc.pvmc.supervised`, or write one."
            )
        if isinstance(bound, bool) or not isinstance(bound, numbers.Real) or not 0 <= bound < math.inf:
            raise ValueError(f"`bound`, the weight of the bound, must be a finite number of at least 0, but got {bound!r}.")
        if gradient not in GRADIENTS:
            raise ValueError(
                f"`gradient` must be one of {GRADIENTS} where states are known, but got {gradient!r}. The doubly "
                "reparameterised gradient is one of the bound alone: supervised terms use 'reparam'."
            )
        super().__init__(num_particles, gradient=gradient, method=method, particles=particles)
        self.truth = truth
        self.error = error
        self.bound = float(bound)
        self.filtering = bool(filtering)

    def loss_with_mutable_state(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The error where states are known less the bound, summed over series, and the mutable state.

        :param rng_key: random key.
        :param param_map: values of the parameters, by name.
        :param model: a NumPyro program with a chain.
        :param guide: a NumPyro program that samples all its latent sites.
        :param args: arguments of both, and of `truth`.
        :param kwargs: keyword arguments of the same.
        :return: ``{"loss": ..., "mutable_state": ...}``.
        :raises TypeError: if `truth` returns no mapping.
        :raises ValueError: if the program has no Markov chain that can be read, the guide does not fit it, `truth` has an
            unknown site or a wrong shape, or `error` returns no scalar.
        """
        proposed = self._propose(rng_key, param_map, model, guide, Arguments(args, kwargs))
        potentials = proposed.potentials
        structure = potentials.chain.structure
        _check_continuous(structure)
        truth = _check_truth(self.truth(*args, **kwargs), structure)
        weighed = marginals(potentials.node, potentials.edges, potentials.mask, self.method)
        posterior = smoothed_posterior(potentials, weighed)
        loss = structure.scale * _mean_error(self.error, posterior, truth, self.filtering).sum()
        if self.bound:
            points = structure.length + bool(structure.initial_latents)
            bound = structure.scale * posterior.log_normalizer.sum() + potentials.log_weight_globals
            loss = loss - self.bound * bound / points
        return {"loss": loss, "mutable_state": refitted_state(proposed, weighed.log_weights, self.particles) or None}


def _check_continuous(structure):
    for name, site in structure.sites.items():
        if not jnp.issubdtype(site.dtype, jnp.inexact):
            raise ValueError(
                f"Latent site '{name}' is discrete: the guide learns it by the reweighted gradient, which is one of the bound "
                "and not of an error. Train with `ImportanceSmoothedELBO`, or sum the site out of the model."
            )


def _check_truth(truth, structure):
    """True states as arrays in the shapes of the model."""
    if not isinstance(truth, Mapping):
        what = "an array" if isinstance(truth, jax.Array) else type(truth).__name__
        raise TypeError(f"`truth` must return {{site: array}}, but it returned {what}. Name the site: `{{'x': states}}`.")
    unknown = [name for name in truth if name not in structure.sites]
    if unknown or not truth:
        raise ValueError(
            f"`truth` returned {unknown or 'no site'}, but true states belong to latent sites of the chain, which are "
            f"{sorted(structure.sites)}. A site of which nothing is known can be left out, or be NaN."
        )
    arrays = {}
    for name, value in truth.items():
        latent = structure.sites[name]
        expected = (structure.length, *latent.shape) if name in structure.step else latent.shape
        if jnp.shape(value) != expected:
            what = f"{structure.length} steps of {latent.shape}" if name in structure.step else "no time axis"
            raise ValueError(
                f"`truth` gives site '{name}' the shape {jnp.shape(value)}, but the model gives it {expected}: {what}. Pad "
                "with NaN what is not known."
            )
        arrays[name] = jnp.asarray(value, latent.dtype)
    return arrays


def _mean_error(error: Error, posterior: SmoothedPosterior, truth: dict[str, jax.Array], filtering: bool) -> jax.Array:
    """The error of each series, a mean over its known times; 0 where none is."""
    structure, present = posterior.structure, posterior.present
    log_weights = posterior.log_filtering_weights if filtering else posterior.log_weights
    plates = tuple(plate.size for plate in structure.plates)
    errors = jnp.zeros((structure.length + 1, *plates), posterior.log_normalizer.dtype)
    known = jnp.zeros(errors.shape, bool)
    for name, states in truth.items():
        is_step = name in structure.step
        states = to_canonical(states, structure.sites[name], structure)
        asked = _asked(error, states, int(is_step) + len(plates))
        if is_step and present is not None:
            asked = asked & present
        of_series = _error_where_asked(error, name)
        for _ in plates:
            of_series = jax.vmap(of_series, in_axes=(1, 1, 0, 0))
        if is_step:
            of_series = jax.vmap(of_series)
        values = of_series(jnp.exp(log_weights[name]), posterior.particles[name], states, asked)
        at = slice(1, None) if is_step else 0
        errors, known = errors.at[at].add(values), known.at[at].set(known[at] | asked)
    return errors.sum(0) / jnp.maximum(known.sum(0), 1)


def _asked(error, states, leading):
    """Where the error counts: truths without NaN, or, if it skips NaN, with more than that."""
    labelled = ~jnp.isnan(states)
    event = tuple(range(leading, states.ndim))
    return labelled.any(event) if getattr(error, "skips_nan", False) else labelled.all(event)


def _error_where_asked(error, name):
    """`error`, which neither sees what stands in padding or is unknown, nor is heard of it."""

    def one(weights, particles, truth, asked):
        # All three, for its slopes there, nan or infinite, times a cotangent of zero would be nan.
        weights = jnp.where(asked, weights, 1 / len(weights))
        value = error(weights, jnp.where(asked, particles, 0.0), jnp.where(asked, truth, 0.0))
        if jnp.shape(value) != ():
            raise ValueError(
                f"`error` must return one number for one time of one series, but for site '{name}' it returned an array of "
                f"shape {jnp.shape(value)}, given weights {weights.shape}, particles {particles.shape} and truth {truth.shape}."
            )
        return jnp.where(asked, value, 0.0)

    return one
