"""Smooth linear-Gaussian and finite chains exactly."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.special import ndtri
from numpyro.handlers import condition

from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.explanation import refuse_nan
from numpyro_pvmc.chain.faults import at_point, first_place, series
from numpyro_pvmc.chain.linear_gaussian import by_site, covariances_by_site, native
from numpyro_pvmc.chain.potentials import enumerated
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.chain.validation import check_data, check_distributions
from numpyro_pvmc.exact.evidence import integrable, matrices_of
from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.kalman import Matrices, smooth, trajectory
from numpyro_pvmc.ops.smoothing import marginals
from numpyro_pvmc.posterior.base import ChainPosterior, check_probabilities, derived, given
from numpyro_pvmc.posterior.diagnostics import check_posterior, health
from numpyro_pvmc.posterior.particles import SmoothedPosterior, smoothed_posterior
from numpyro_pvmc.program.arguments import Arguments, is_traced
from numpyro_pvmc.program.compiled import for_each_model
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.switches import where_nan_means_missing
from numpyro_pvmc.program.tracebacks import with_short_tracebacks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "log_normalizer",
        "log_evidence_by_time",
        "means",
        "covariances",
        "filtering_means",
        "filtering_covariances",
        "rows",
        "globals",
        "present",
        "arguments",
        "params",
    ),
    meta_fields=("kind", "structure", "model"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class ExactPosterior(ChainPosterior):
    """The exact posterior of a chain given its data, parameters and global sites.

    T is the number of steps of the scan; `plates` are those around the chain, and nothing else is a batch axis. Sites before
    the scan, such as ``x_0``, have no T axis. D counts the elements of a site.

    :param log_normalizer: log evidence of each series, shape ``(*plates)``, given `globals`.
    :param log_evidence_by_time: log density of the observations of each time given those before, shape ``(T + 1, *plates)``:
        its sum is `log_normalizer`. Row 0 is the initial step.
    :param means: ``{site: (T, *plates, *event)}``. Where a series is padded, they are held.
    :param covariances: ``{site: (T, *plates, D, D)}``.
    :param filtering_means: the same given the data up to each time only.
    :param filtering_covariances: the same given the data up to each time only.
    :param rows: the matrices of the chain, from which :meth:`sample` draws; see :mod:`numpyro_pvmc.ops.kalman`.
    :param globals: the values of the global sites, by name.
    :param present: ``(T, *plates)``, false where a series is padded; ``None`` if none is.
    :param kind: what the chain is, ``"linear-Gaussian"``.

    It is a pytree, and may be returned from `jax.jit`.
    """

    log_normalizer: jax.Array
    log_evidence_by_time: jax.Array
    means: dict[str, jax.Array]
    covariances: dict[str, jax.Array]
    filtering_means: dict[str, jax.Array]
    filtering_covariances: dict[str, jax.Array]
    rows: Matrices
    globals: dict[str, jax.Array]
    present: jax.Array | None
    arguments: Arguments
    params: dict[str, Any]
    kind: str
    structure: Structure
    model: Callable

    def __repr__(self):
        return f"{self._shown(f', {self.kind}')}{given(self.globals, 'the values')}"

    def mean(self) -> dict[str, jax.Array]:
        """Posterior means, given the values of the global sites in `globals`.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self.means

    def variance(self) -> dict[str, jax.Array]:
        """Posterior variances, given the values of the global sites in `globals`.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return _variances(self.means, self.covariances)

    def quantile(self, q: float | jax.Array) -> dict[str, jax.Array]:
        """Posterior quantiles, given the values of the global sites in `globals`.

        :param q: one probability or several.
        :return: ``{site: (T, *plates, *event)}``, with the shape of `q` in front.
        :raises ValueError: if `q` is not between 0 and 1.
        """
        levels, variances = ndtri(check_probabilities(q)), self.variance()
        return {name: x + jnp.multiply.outer(levels, jnp.sqrt(variances[name])) for name, x in self.means.items()}

    def filtering_mean(self) -> dict[str, jax.Array]:
        """Means given the data up to each time.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return self.filtering_means

    def filtering_variance(self) -> dict[str, jax.Array]:
        """Variances given the data up to each time.

        :return: ``{site: (T, *plates, *event)}``.
        """
        return _variances(self.filtering_means, self.filtering_covariances)

    def sample(self, rng_key: jax.Array, sample_shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Draw joint trajectories.

        :param rng_key: random key.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, T, ...)}`` in the shapes that the model gives its sites, with the global sites and
            the deterministic sites of the model; what :class:`numpyro.infer.Predictive` takes.
        """
        return _sample(self.model, dataclasses.replace(self, model=None), rng_key, tuple(sample_shape))


@with_short_tracebacks
def exact_posterior(model: Callable, params: dict[str, Any], *args: Any, **kwargs: Any) -> ExactPosterior | SmoothedPosterior:
    """The evidence and the smoothed posterior of a chain that has them in closed form.

    Of a linear-Gaussian chain, by the Kalman filter (:mod:`numpyro_pvmc.ops.kalman`); of one with discrete states only, each
    with finitely many values, by the forward-backward algorithm. Which it is, is read off the program. Both are exact to
    rounding, and differentiable with respect to `params` and the data.

    Counts have finitely many values if the program bounds them, as it does those of survivors of a first population, or if they
    declare the largest that matters, ``infer={"max_count": n}``. The evidence is then that of all counts up to it, and a
    warning says so if the largest has more than a millionth of the mass.

    :param model: a NumPyro program with one latent `scan`, or one marked with :func:`numpyro_pvmc.markov`.
    :param params: values of its parameters, and of its global sites if it has some; others may be among them.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :return: the posterior of a linear-Gaussian chain as :class:`ExactPosterior`; that of a finite one as
        :class:`numpyro_pvmc.SmoothedPosterior`, without particles: its `log_normalizer` and `state_probabilities` are exact.
    :raises ValueError: naming a site by which the chain is neither, or a global site without a value; if the program has no
        chain that can be read, its data contain NaN, or the posterior does: the message names a site, the time and the series.
    :warns UserWarning: if no trajectory of a finite chain is possible; not while compiling.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc.exact import exact_posterior
        >>> def model(y):
        ...     scale = numpyro.param("scale", 1.0)
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, scale))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> posterior = exact_posterior(model, {"scale": 1.0}, jnp.array([1.0, 2.0]))
        >>> [round(float(x), 4) for x in posterior.mean()["x"]]
        [0.8, 1.4]
    """
    arguments = Arguments(args, kwargs)
    structure = read_structure(model, arguments, params, carried=True)
    if unknown := [name for name in structure.global_sites if name not in params]:
        raise ValueError(
            f"The model has the global sites {unknown}, and the posterior of its chain is exact given their values only. Give "
            "these in `params`, or with `numpyro.handlers.condition`; or use `PVMC.posterior`."
        )
    structure = integrable(structure, model, arguments, params)
    if not is_traced((arguments, params)):
        check_data(structure, model, arguments, params, with_densities=False)
    # JAX never forgets the structure of a compiled function's result, and what is static in it.
    with where_nan_means_missing():
        outside = {"model": model, "arguments": jax.tree.map(jnp.asarray, arguments)}
    if not structure.sites:
        posterior, found = _sum(model, structure, arguments, params)
        posterior = dataclasses.replace(posterior, structure=structure, **outside)
        check_posterior(posterior, found)
        return posterior
    posterior, partly = _condition(model, structure, arguments, params)
    posterior = dataclasses.replace(posterior, **outside)
    for name, is_partly_masked in partly.items():
        if not is_traced(is_partly_masked) and is_partly_masked:
            raise ValueError(
                f"Latent site '{name}' is masked while other elements of the same time step of its series are not: an element "
                "without a distribution has no posterior. Put all latent sites of the step under one mask, which leaves out "
                "whole steps."
            )
    if not is_traced(posterior):
        _check_numbers(posterior)
    return posterior


def _check_numbers(posterior):
    """Refuse a posterior that is not a number, by name."""
    structure, log_z = posterior.structure, np.asarray(posterior.log_normalizer)
    if np.isfinite(log_z).all():
        return
    refuse_nan("the parameter", posterior.params)
    check_distributions(structure, posterior.model, posterior.arguments, posterior.params)
    index = first_place(~np.isfinite(log_z))
    times = [
        np.asarray(mean)[:, *index].reshape(structure.length, -1)
        for name, mean in posterior.filtering_means.items()
        if name in structure.step
    ]
    unknown = ~np.isfinite(np.concatenate(times, -1)).all(-1)
    place = f" {at_point(int(unknown.argmax()) + 1)}" if unknown.any() else ""
    raise ValueError(
        f"The log evidence is {log_z[index]}{series(index, structure)}: the Kalman filter meets a number that {log_z.dtype} "
        f"does not hold{place}, though the distributions of all sites are sound. Observations without noise that contradict "
        "each other do that, and numbers that are many orders of magnitude apart. Rescale the data, or give the emission noise."
    )


@for_each_model(static_argnum=1, name="the exact posterior")
@full_precision
def _condition(model, structure, arguments, params):
    """The posterior, without model and arguments, and which latent sites are masked in part."""
    chain = read_chain(structure, model, arguments, params)
    rows, present, partly = matrices_of(chain)
    smooth_all = smooth
    for _ in structure.plates:
        smooth_all = jax.vmap(smooth_all, in_axes=1, out_axes=1)
    log_densities, filtered, smoothed = smooth_all(rows)

    posterior = ExactPosterior(
        log_normalizer=log_densities.sum(0),
        log_evidence_by_time=log_densities,
        means=by_site(smoothed.mean, structure),
        covariances=covariances_by_site(smoothed.root @ smoothed.root.mT, structure),
        filtering_means=by_site(filtered.mean, structure),
        filtering_covariances=covariances_by_site(filtered.root @ filtered.root.mT, structure),
        rows=rows,
        globals={name: params[name] for name in structure.global_sites},
        present=present,
        arguments=None,
        params=params,
        kind="linear-Gaussian",
        structure=structure,
        model=None,
    )
    return posterior, partly


@for_each_model(static_argnum=1, name="the exact posterior")
@full_precision
def _sum(model, structure, arguments, params):
    """The posterior of a chain with discrete states only, without model and arguments."""
    global_values = {name: params[name] for name in structure.global_sites}
    model = condition(model, global_values)
    structure = structure._replace(global_sites=(), global_factors=(*structure.global_factors, *structure.global_sites))
    potentials = enumerated(read_chain(structure, model, arguments, params))
    posterior = smoothed_posterior(potentials, marginals(potentials.node, potentials.edges, potentials.mask))
    rest = {name: x for name, x in posterior.params.items() if name not in global_values}
    found = health(posterior)
    return dataclasses.replace(posterior, globals=global_values, params=rest, model=None, arguments=None), found


def _variances(means, covariances):
    return {n: jnp.diagonal(x, axis1=-2, axis2=-1).reshape(means[n].shape) for n, x in covariances.items()}


@for_each_model(static_argnum=3, name="draws from the posterior")
@full_precision
def _sample(model, posterior, rng_key, sample_shape):
    rows, structure = posterior.rows, posterior.structure
    draw_all = trajectory
    for _ in structure.plates:
        draw_all = jax.vmap(draw_all, in_axes=1, out_axes=1)
    key_noise, key_free = random.split(rng_key)

    def draw(noise, rng_key):
        sites = native(draw_all(rows, *noise), structure) | posterior.globals
        return sites | derived(structure, model, posterior.arguments, posterior.params | sites, rng_key)

    number = math.prod(sample_shape)
    keys = random.split(key_noise)
    noise = [random.normal(key, (number, *like.shape), like.dtype) for key, like in zip(keys, (rows.c, rows.d), strict=True)]
    samples = jax.vmap(draw)(noise, random.split(key_free, number))
    return {name: x.reshape(sample_shape + x.shape[1:]) for name, x in samples.items()}
