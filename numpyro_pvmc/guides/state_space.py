"""Join a guide for states and one for parameters."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import random
from numpyro.handlers import block, mask, substitute, trace
from numpyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal

from numpyro_pvmc.chain.minibatch import minibatch_plates, subsampled
from numpyro_pvmc.chain.reading import summed_structure
from numpyro_pvmc.guides.prior import prior_medians
from numpyro_pvmc.guides.smoothed_normal import AutoSmoothedNormal
from numpyro_pvmc.program.arguments import Arguments, called
from numpyro_pvmc.program.find_chain import capture, without_chain

_MOST_TOGETHER = 50  # numbers whose correlations are learnt


class AutoStateSpace(AutoGuide):
    """A guide for a model with priors on its parameters: states by one guide, global sites by another.

    The sites of the chain go to `states`, all other latent sites to `parameters`; a model without either leaves that guide out.
    Discrete sites of the chain that can be summed, and missing observations, have no guide.

    :param model: a NumPyro program with a chain.
    :param parameters: takes a model and returns a guide, such as the automatic guides of NumPyro do; it is given a model that
        has the global sites only, and starts at the medians of their priors unless it is told `init_loc_fn`. By default
        :class:`numpyro.infer.autoguide.AutoMultivariateNormal`, since parameters of a chain are seldom independent; or
        :class:`numpyro.infer.autoguide.AutoNormal` for more than 50 numbers, and under plates that draw minibatches.
    :param states: takes a model and returns a guide for its chain. Choices of a guide's own can be given with
        :func:`functools.partial`.
    :param prefix: begins the names of parameters and state.

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> from numpyro_pvmc import PVMC, AutoStateSpace
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, scale))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)
        >>> y = jnp.sin(jnp.arange(20.0) / 3)
        >>> pvmc = PVMC(model, AutoStateSpace(model, AutoMultivariateNormal), num_particles=16)
        >>> result = pvmc.run(jax.random.key(0), 200, y, progress_bar=False)
        >>> samples = pvmc.sample_posterior(jax.random.key(1), result.params, y, sample_shape=(10,))
        >>> samples["scale"].shape, samples["x"].shape
        ((10,), (10, 20))
    """

    def __init__(
        self,
        model: Callable,
        parameters: Callable[..., Callable] | None = None,
        states: Callable[..., Callable] = AutoSmoothedNormal,
        *,
        prefix: str = "auto",
    ):
        given = {"states": states} if parameters is None else {"parameters": parameters, "states": states}
        for name, make in given.items():
            if isinstance(make, AutoGuide) or not callable(make):
                raise TypeError(
                    f"`{name}` must take a model and return a guide, as `AutoNormal` does, but got a {type(make).__name__}. "
                    "Give the class, not a guide of it; choices of its own with `functools.partial`."
                )
        super().__init__(model, prefix=prefix)
        self.states = states(model, prefix=prefix)
        self.parameters = None if parameters is None else self._guide_of_parameters(parameters)
        self._names: tuple[str, ...] = ()
        self._medians: dict[str, jax.Array] = {}

    def __repr__(self):
        parameters = "" if self.parameters is None else called(self.parameters)
        names = f" of {', '.join(map(repr, self._names))}" if self._names else ""
        states = self.states if type(self.states).__module__.startswith("numpyro_pvmc.") else called(self.states)
        return f"AutoStateSpace\n  parameters: {parameters or 'chosen when it meets data'}{names}\n  states: {states}"

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """What of the guide needs numbers to set itself up, as a program: all but states that are refitted, or amortised."""
        self._sample(self._set_up_states, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        return self._sample(self._sample_states, args, kwargs)

    def _sample(self, sample_states, args, kwargs):
        arguments = Arguments(args, kwargs)
        structure = summed_structure(self.model, arguments)
        values, sites = {}, {}
        with minibatch_plates(structure) as indices:
            pass  # the plates are only to draw the indices: each guide enters plates of its own
        with substitute(data=indices):  # both guides see one minibatch
            if structure.global_sites:
                self._names = structure.global_sites
                if self.parameters is None:
                    self.parameters = self._guide_of_parameters(_fitting(structure, self.model, arguments))
                with trace() as sites, self._starting_at_medians(structure, arguments, indices):
                    values = dict(self.parameters(*args, **kwargs))
            if structure.sites:
                values |= sample_states(args, kwargs, functools.partial(self._centre, sites, values))
        return values

    def sample_posterior(
        self, rng_key: jax.Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, jax.Array]:
        """Draw global sites from their guide, which is their posterior, and states from the proposal, which is not.

        The joint posterior is that of :meth:`PVMC.sample_posterior`.

        :param rng_key: random key.
        :param params: parameters and mutable state.
        :param args: arguments of the model.
        :param sample_shape: how many to draw.
        :param kwargs: keyword arguments of the model.
        :return: ``{site: (*sample_shape, ...)}``.
        """
        keys = iter(random.split(rng_key))
        draw = lambda guide: guide.sample_posterior(next(keys), params, *args, sample_shape=sample_shape, **kwargs)
        return self._of_both(draw)

    def median(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Medians of global sites, and of the proposal of the states.

        :param params: parameters and mutable state.
        :param args: arguments of the model, if the guide of the states reads the data.
        :param kwargs: keyword arguments of the model.
        """
        return self._of_both(lambda guide: guide.median(params, *(args if guide is self.states else ()), **kwargs))

    def quantiles(self, params: dict[str, Any], quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Quantiles of global sites, and of the proposal of the states.

        :param params: parameters and mutable state.
        :param quantiles: numbers between 0 and 1.
        :param args: arguments of the model, if the guide of the states reads the data.
        :param kwargs: keyword arguments of the model.
        """
        of_states = lambda guide: args if guide is self.states else ()
        return self._of_both(lambda guide: guide.quantiles(params, quantiles, *of_states(guide), **kwargs))

    def _guide_of_parameters(self, make):
        guide = make(self._model_of_parameters, prefix=self.prefix, **self._start_of(make))
        if isinstance(guide, AutoGuide):
            guide.create_plates = self._plates  # those it makes itself keep the size of the first minibatch
        return guide

    def _model_of_parameters(self, *args, **kwargs):
        """The model with its global sites only. Their priors are masked while the guide looks where it starts."""
        structure = summed_structure(self.model, Arguments(args, kwargs))
        is_starting = getattr(self.parameters, "prototype_trace", self.parameters) is None
        with block(hide_fn=self._is_no_parameter), mask(mask=False) if is_starting else contextlib.nullcontext():
            without_chain(self.model, structure)(*args, **kwargs)

    @contextlib.contextmanager
    def _starting_at_medians(self, structure, arguments, values):
        if getattr(self.parameters, "prototype_trace", self.parameters) is None:
            self._medians = prior_medians(self.model, structure, arguments, values)
        try:
            yield
        finally:
            self._medians = {}

    def _start_of(self, parameters):
        """Where a guide of global sites starts that is not told: at the medians of their priors, near which chains are sane.

        The strategy of most automatic guides is the interval from -2 to 2: at an autoregressive coefficient of 2 a chain of a
        hundred steps has no numbers.
        """
        told = parameters.keywords if isinstance(parameters, functools.partial) else {}
        try:
            takes = "init_loc_fn" in inspect.signature(parameters).parameters
        except (TypeError, ValueError):
            takes = False
        return {"init_loc_fn": self._to_median} if takes and "init_loc_fn" not in told else {}

    def _to_median(self, site=None):
        """An initialisation strategy of NumPyro."""
        if site is None:
            return functools.partial(self._to_median)  # the kind of thing NumPyro looks into
        return self._medians.get(site["name"]) if site["value"] is None else None

    def _set_up_states(self, args, kwargs, centre):
        set_up = getattr(self.states, "set_up", None)
        return (self.states if set_up is None else set_up)(*args, **kwargs) or {}

    def _sample_states(self, args, kwargs, centre):
        if isinstance(self.states, AutoSmoothedNormal):
            return self.states.sample(Arguments(args, kwargs), centre)
        return self.states(*args, **kwargs)

    def _centre(self, sites, drawn):
        """Medians of the global sites under their guide; what it drew, where it has none, or has those of all series."""
        params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
        try:
            medians = self.parameters.median(params)
        except (AttributeError, NotImplementedError):
            medians = {}
        fits = lambda name: jnp.shape(medians.get(name)) == jnp.shape(drawn[name])
        own = {name: x for name, x in drawn.items() if name in self._names}
        return {name: medians[name] if name in medians and fits(name) else x for name, x in own.items()}

    def _of_both(self, function):
        values = dict(function(self.parameters)) if self._names else {}
        return values | function(self.states)

    def _plates(self, *args, **kwargs):
        structure = summed_structure(self.model, Arguments(args, kwargs))
        return [numpyro.plate(p.name, p.total, subsample_size=p.size, dim=p.dim) for p in structure.plates]

    def _is_no_parameter(self, site):
        return site["type"] != "plate" and site.get("name") not in self._names


def _fitting(structure, model, arguments):
    """The kind of guide for the global sites of a model."""

    def look(arguments):
        _, outside = capture(model, arguments, {}, structure)
        return [outside[name]["value"] for name in structure.global_sites]

    number = sum(math.prod(value.shape) for value in jax.eval_shape(look, arguments))
    return AutoNormal if number > _MOST_TOGETHER or subsampled(structure) else AutoMultivariateNormal


def automatic_guide(model: Callable) -> AutoStateSpace:
    """The guide of a model for which none is given: states with full covariances.

    :param model: a NumPyro program with a chain.
    """
    return AutoStateSpace(model, states=functools.partial(AutoSmoothedNormal, covariance="full"))
