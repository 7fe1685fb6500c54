"""Integrate the chain out of a program: what is left is a program of its parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import lax, random
from numpyro.handlers import block, substitute, trace

from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.chain.validation import check_data
from numpyro_pvmc.exact.evidence import integrable, log_evidence
from numpyro_pvmc.exact.posterior import exact_posterior
from numpyro_pvmc.jaxprs.dependence import influence
from numpyro_pvmc.program.arguments import Arguments, called, is_traced
from numpyro_pvmc.program.find_chain import capture, first, stacked_zeros, without_chain
from numpyro_pvmc.program.handlers import run, run_body
from numpyro_pvmc.program.switches import of_the_library, where_nan_means_missing
from numpyro_pvmc.program.tracebacks import with_short_tracebacks


def marginalize(model: Callable) -> "Marginal":
    """The program with its chain integrated out, exactly: a NumPyro program of the parameters, for any of NumPyro's inferences.

    It takes the same arguments. Global sites, parameters, plates, and observations outside of the chain keep their names; the
    chain, with all that it observes, becomes one :func:`numpyro.factor` of the log evidence, ``"x_log_evidence"`` for a chain
    of the site ``"x"``, one for each series of its plates. So ``MCMC(NUTS(marginalize(model)))`` draws the parameters from
    their posterior without drawing a state, and :func:`sample_states` draws the states given these. Called without data it is
    the original program, so that :class:`numpyro.infer.Predictive` draws from the prior.

    The chain must be linear-Gaussian, or have finitely many states, given the global sites. The evidence has gradients of any
    order, forwards and backwards; where no trajectory is possible, or a distribution is none, it is -inf. In float64 it has
    more digits, and with many states it is quicker.

    :param model: a NumPyro program with one latent `scan`, or one marked with :func:`numpyro_pvmc.markov`.
    :return: a program.
    :raises ValueError: when it is called, naming a site by which the chain is neither linear-Gaussian nor finite.

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_pvmc.exact import marginalize, sample_states
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, scale))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y, length=20)
        >>> y = jnp.sin(jnp.arange(20.0) / 3)
        >>> mcmc = MCMC(NUTS(marginalize(model)), num_warmup=100, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y)
        >>> states = sample_states(jax.random.key(1), model, mcmc.get_samples(), y)
        >>> states["x"].shape
        (50, 20)
    """
    return Marginal(model)


class Marginal:
    """A program without its chain; see :func:`marginalize`.

    :param model: a NumPyro program with a chain.
    """

    def __init__(self, model: Callable):
        if isinstance(model, Marginal):
            raise TypeError("The chain of this program has been integrated out already.")
        if not callable(model):
            raise TypeError(f"A model is a function, but got a {type(model).__name__}.")
        self.model = model
        self.__name__ = called(model)

    def __repr__(self):
        return f"marginalize({self.__name__})"

    @with_short_tracebacks
    @of_the_library
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        arguments = Arguments(args, kwargs)
        structure = read_structure(self.model, arguments, {}, carried=True)
        factors = {*structure.node_factors, *structure.edge_factors, *structure.initial_factors, *structure.later_factors}
        observed = factors - set(structure.latents)
        if not observed:
            return self.model(*args, **kwargs)
        if not is_traced(arguments):
            with where_nan_means_missing():
                check_data(structure, self.model, arguments, {}, with_densities=False)
        own = {*structure.latents, *structure.free, *observed, *self._derived(structure, arguments)}
        with trace() as sites, block(hide_fn=lambda site: site.get("name") in own or site["type"] == "control_flow"):
            without_chain(self.model, structure)(*args, **kwargs)
        values = {name: site["value"] for name, site in sites.items() if site["type"] in ("param", "sample", "plate")}
        structure = integrable(structure, self.model, arguments, values)
        log_z = log_evidence(self.model, structure, arguments, values)
        indices = {plate.name: values[plate.name] for plate in structure.plates}
        with substitute(data=indices):
            _factor(f"{structure.step_latents[0].name}_log_evidence", log_z, structure.plates)

    def _derived(self, structure, arguments):
        names = []
        jax.eval_shape(lambda arguments: names.extend(_derived(structure, self.model, arguments)), arguments)
        return names


def _factor(name, log_z, plates):
    """One factor for each series, under their plates."""
    first = min((plate.dim for plate in plates), default=0)
    shape = [1] * -first
    for plate in plates:
        shape[plate.dim] = plate.size
    log_z = jnp.where(jnp.isnan(log_z), -jnp.inf, log_z).reshape(shape)

    def within(plates):
        if not plates:
            return numpyro.factor(name, log_z)
        plate, *others = plates
        with numpyro.plate(plate.name, plate.total, subsample_size=plate.size, dim=plate.dim):
            within(others)

    within(plates)


def _derived(structure, model, arguments):
    """Deterministic sites that read states, which have no values without the chain."""
    scan, outside = capture(model, arguments, {}, structure)
    if not any(site["type"] == "deterministic" for site in outside.values()):
        return []
    _, output, _ = run_body(scan, 0, scan.init, first(scan.xs), {}, structure.length)
    initial = {site.name: outside[site.name]["value"] for site in structure.initial_latents}
    parts = {"outputs": stacked_zeros(output, structure.length), "carry": scan.init, "initial": initial}

    def look(parts):
        after = parts["carry"], parts["outputs"], {}
        replace = lambda index, _: after if index == structure.scan_index else None
        sites = run(model, arguments, parts["initial"], random.key(0), replace)
        return {name: site["value"] for name, site in sites.items() if site["type"] == "deterministic"}

    reads = influence(look, parts).values()
    return [name for read in reads for name, is_read in read.items() if any(jax.tree.leaves(is_read))]


@with_short_tracebacks
def sample_states(
    rng_key: jax.Array, model: Callable, samples: dict[str, jax.Array], *args: Any, batch_ndims: int = 1, **kwargs: Any
) -> dict[str, jax.Array]:
    """Draw the states of a chain given draws of its parameters, one trajectory for each.

    :param rng_key: random key.
    :param model: the program with the chain, or what :func:`marginalize` made of it.
    :param samples: draws of global sites and parameters, as from :meth:`numpyro.infer.MCMC.get_samples`.
    :param args: arguments of the model.
    :param batch_ndims: how many axes of the samples are those of draws: 2 for those of several chains.
    :param kwargs: keyword arguments of the model.
    :return: ``{site: (draws, T, ...)}``: latent sites of the chain, and deterministic sites that are not among the samples.
        ``Predictive(model, samples | states)`` takes both.
    :raises ValueError: as :func:`exact_posterior`.
    """
    model = model.model if isinstance(model, Marginal) else model
    batch = jnp.shape(next(iter(samples.values())))[:batch_ndims]
    flat = {name: jnp.reshape(x, (-1, *jnp.shape(x)[batch_ndims:])) for name, x in samples.items()}
    number = len(next(iter(flat.values())))

    def one(key_and_values):
        rng_key, values = key_and_values
        return exact_posterior(model, values, *args, **kwargs).sample(rng_key)

    drawn = jax.jit(functools.partial(lax.map, one))((random.split(rng_key, number), flat))
    return {name: x.reshape(*batch, *x.shape[1:]) for name, x in drawn.items() if name not in samples}
