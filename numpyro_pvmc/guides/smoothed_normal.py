"""Propose states from Gaussians that are refitted to the weighted particles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jax.scipy.special import ndtri
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import mutable

from numpyro_pvmc.chain.chain import Chain, read_chain
from numpyro_pvmc.chain.minibatch import coordinates_of_all, minibatch_plates, subsampled
from numpyro_pvmc.chain.potentials import ChainPotentials
from numpyro_pvmc.chain.reading import summed_structure
from numpyro_pvmc.chain.unconstrained import Coordinates, coordinates_of_model, from_coordinates
from numpyro_pvmc.guides.gaussian import Proposal, for_all_series, put_series, sample_proposal, take_series
from numpyro_pvmc.guides.laplace import laplace
from numpyro_pvmc.guides.prior import at_medians, prior_coordinates
from numpyro_pvmc.guides.refitting import refitted, unless_worse
from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.gaussian import Moments, dense, diagonal, spread
from numpyro_pvmc.program.arguments import Arguments, is_traced

COVARIANCES = ("diagonal", "full")
INITS = ("prior", "laplace")

_DRAWS = 128  # of the prior, for where to start


class AutoSmoothedNormal(AutoGuide):
    """A guide without parameters: one Gaussian for each time and series, refitted to the smoothed posterior.

    In unconstrained space, each step of the chain has a Gaussian proposal, independent of the other steps. Its mean and
    covariance are no parameters but mutable state (:func:`numpyro.mutable`): each evaluation of
    :class:`numpyro_pvmc.ImportanceSmoothedELBO` moves them towards the mean of the weighted particles, and towards their
    covariance made wider by what costs a few particles (:func:`numpyro_pvmc.ops.gaussian.widening`), without gradients, while
    the optimiser moves the parameters of the model only. A few rounds do what takes a guide with parameters thousands of
    steps. It fits one data set; for many of different lengths see :class:`numpyro_pvmc.AutoAmortisedNormal`.

    It samples the sites of the chain. Global sites need another guide, for instance in a
    :class:`numpyro.infer.autoguide.AutoGuideList`.

    :param model: a NumPyro program with a chain.
    :param covariance: of the sites of one step and series: ``"diagonal"`` or ``"full"``.
    :param prefix: begins the name of the mutable state.
    :param init: ``"prior"``, or ``"laplace"`` to go on from there to the mode of all states and start with the curvature there
        (:func:`numpyro_pvmc.guides.laplace.laplace`), for models that are differentiable; good where transitions are tight. A
        series whose estimate of the evidence is clearly lower there than at the prior starts at the prior.
    :param init_loc_fn: where to start, one of NumPyro's initialisation strategies; by default the medians of draws of the
        prior.
    :param init_scale: standard deviations to start with, in unconstrained space; by default the spread of draws of the prior.
    :param rate: largest share of the particles in one refit, between 0 and 1: less is steadier and slower.
    :raises ValueError: for a covariance that does not exist, or a rate that is not between 0 and 1.

    .. note:: Only :class:`numpyro_pvmc.ImportanceSmoothedELBO` refits; under another objective the guide stays as it is.

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc import PVMC, AutoSmoothedNormal
        >>> def model(y):
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, 0.3))
        ...         numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y_t)
        ...         return x, None
        ...     scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)
        >>> y = jnp.array([0, 1, 0, 2, 3, 5, 4, 6, 3, 2])
        >>> pvmc = PVMC(model, AutoSmoothedNormal(model), num_particles=64)
        >>> result = pvmc.run(jax.random.key(0), 10, y, progress_bar=False)
        >>> posterior = pvmc.posterior(jax.random.key(1), result.params, y)
        >>> bool(posterior.effective_sample_size()["x"].min() > 40)
        True
    """

    def __init__(
        self,
        model: Callable,
        *,
        covariance: str = "diagonal",
        prefix: str = "auto",
        init: str = "prior",
        init_loc_fn: Callable | None = None,
        init_scale: float | None = None,
        rate: float = 0.5,
    ):
        if covariance not in COVARIANCES:
            raise ValueError(f"`covariance` must be one of {COVARIANCES}, but got {covariance!r}.")
        if not 0 < rate <= 1:
            raise ValueError(f"`rate` must be above 0 and at most 1, but got {rate}.")
        if init_scale is not None and not init_scale > 0:
            raise ValueError(f"`init_scale` must be positive, but got {init_scale}.")
        if init not in INITS:
            raise ValueError(f"`init` must be one of {INITS}, but got {init!r}.")
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)
        self.init, self.covariance, self.init_scale, self.rate = init, covariance, init_scale, rate
        self._names = {of: tuple(f"{prefix}_{of}_{part}" for part in Moments._fields) for of in Coordinates._fields}
        self._coordinates: dict[tuple[int, ...], Coordinates] = {}

    def __repr__(self):
        sites = sorted({name for coordinates in self._coordinates.values() for name in _names(coordinates)})
        of_sites = f" of {', '.join(map(repr, sites))}" if sites else ""
        return f"AutoSmoothedNormal{of_sites} (covariance={self.covariance!r}, init={self.init!r}, rate={self.rate})"

    def proposal(self, state: dict[str, Any]) -> Proposal:
        """The Gaussians that a state holds.

        :param state: mutable state, by name; may hold other things as well.
        :return: Gaussians in the coordinates of the model.
        """
        initial, steps = ([state.get(name) for name in self._names[point]] for point in ("initial", "steps"))
        return Proposal(None if initial[0] is None else Moments(*initial), Moments(*steps))

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """What of the guide needs numbers to set itself up, as a program: nothing, so it may be set up while it is compiled."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        arguments = Arguments(args, kwargs)
        return self.sample(arguments, dict)

    def sample(self, arguments: Arguments, global_values: Callable[[], dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """Sample the sites of the chain.

        :param arguments: what the model is called with.
        :param global_values: returns values of global sites, by name; asked for when there is no state yet, which is then the
            prior given these. Global sites without one are at the medians of their priors.
        :return: values of the sites.
        """
        structure = summed_structure(self.model, arguments)
        if not structure.sites:
            return {}
        if self._coordinates and all(set(structure.sites) != _names(known) for known in self._coordinates.values()):
            # The model without its data has more latent sites; the guide stays that of the posterior.
            state = {name: mutable(name) for point in self._names.values() for name in point}
            return sample_proposal(self._coordinates_of(state), self.proposal(state))
        with minibatch_plates(structure) as indices:
            chain = read_chain(structure, self.model, arguments, indices)
            coordinates = coordinates_of_model(chain)
            names = [name for point in ("initial", "steps") if getattr(coordinates, point) for name in self._names[point]]
            state = {name: mutable(name) for name in names}
            if any(value is None for value in state.values()):
                first = jax.jit(lambda *read: self.start(read_chain(structure, self.model, *read)))
                state = {name: mutable(name, value) for name, value in first(arguments, indices | global_values()).items()}
            self._check_shape(state[names[-1]], chain.structure)
            if not is_traced([block.transform for block in (*coordinates.initial, *coordinates.steps)]):
                totals = tuple(plate.total for plate in structure.plates)
                self._coordinates[totals] = coordinates_of_all(coordinates, structure)
            proposal = take_series(self.proposal(state), structure, indices)
            return sample_proposal(coordinates, proposal, {"refitted_by": self})

    def start(self, chain: Chain) -> dict[str, jax.Array]:
        """The state before any data have been seen; that of all series, if the chain is one of a minibatch.

        :param chain: the chain of the model, at the parameters to start from. Global sites that are not among its values are
            put at the medians of their priors.
        :return: mutable state, by name.
        """
        chain = at_medians(chain)
        coordinates = coordinates_of_model(chain)
        draws = prior_coordinates(chain, coordinates, random.key(0), _DRAWS)
        proposal = Proposal(*(None if part is None else spread(part) for part in draws))
        if self.init_loc_fn is not None:
            place = prior_coordinates(chain, coordinates, random.key(0), 1, self.init_loc_fn)
            proposal = Proposal(*(_replace(part, mean=mean) for part, mean in zip(proposal, place, strict=True)))
        if self.init_scale is not None:
            proposal = Proposal(*(_replace(part, factor=self.init_scale) for part in proposal))
        kind = dense if self.covariance == "full" else diagonal
        of_kind = lambda proposal: Proposal(*(None if part is None else kind(part) for part in proposal))
        start = of_kind(proposal)
        if self.init == "laplace":
            _check_laplace(chain.structure)
            # The curvature at one mode of several, or at an edge, may be that of no posterior.
            mode = of_kind(laplace(chain, coordinates, proposal))
            start = unless_worse(random.key(0), chain, coordinates, mode, start, _DRAWS)
        return self._state(for_all_series(start, chain.structure))

    def refitted(self, potentials: ChainPotentials, log_weights: jax.Array, particles: str) -> dict[str, Any]:
        """The state after an evaluation of the objective.

        :param potentials: particles, potentials, state before.
        :param log_weights: logs of the smoothing weights.
        :param particles: how the particles were drawn.
        :return: mutable state, by name.
        """
        drawn, log_weights = jax.lax.stop_gradient((potentials.particles, log_weights))
        coordinates = coordinates_of_model(potentials.chain)
        structure, indices = potentials.chain.structure, potentials.chain.values
        proposal = self.proposal(potentials.mutable_state)
        part = take_series(proposal, structure, indices)
        part = refitted(coordinates, part, drawn, log_weights, potentials.mask, self.rate, particles)
        return self._state(put_series(proposal, part, structure, indices))

    def sample_posterior(
        self, rng_key: jax.Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, jax.Array]:
        """Draw from the proposal, which is independent over time, and wider than the posterior.

        The posterior is that of :meth:`PVMC.sample_posterior`.

        :param rng_key: random key.
        :param params: parameters and mutable state.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, ...)}``.
        """
        keys = random.split(rng_key)

        @full_precision
        def one(key, moments):
            noise = random.normal(key, (*sample_shape, *moments.mean.shape), moments.mean.dtype)
            moved = (moments.factor @ noise[..., None])[..., 0] if moments.is_full else moments.factor * noise
            return moments.mean + moved

        parts = zip(keys, self._proposal(params), strict=True)
        return self._values(params, [None if moments is None else one(key, moments) for key, moments in parts])

    def median(self, params: dict[str, Any]) -> dict[str, jax.Array]:
        """Medians of the proposal, site by site; those of the posterior are in :class:`numpyro_pvmc.SmoothedPosterior`.

        :param params: parameters and mutable state.
        """
        return self._values(params, [None if moments is None else moments.mean for moments in self._proposal(params)])

    def quantiles(self, params: dict[str, Any], quantiles: list[float] | jax.Array) -> dict[str, jax.Array]:
        """Quantiles of the proposal, element by element in unconstrained space.

        It is wider than the posterior, whose quantiles are in :class:`numpyro_pvmc.SmoothedPosterior`.

        :param params: parameters and mutable state.
        :param quantiles: numbers between 0 and 1.
        :return: ``{site: (len(quantiles), ...)}``.
        """
        levels = ndtri(jnp.asarray(quantiles))

        def one(moments):
            own = diagonal(moments)
            return own.mean + own.factor * levels.reshape(levels.shape + (1,) * own.mean.ndim)

        return self._values(params, [None if moments is None else one(moments) for moments in self._proposal(params)])

    def _state(self, proposal):
        parts = {of: part for of, part in zip(Proposal._fields, proposal, strict=True) if part is not None}
        return {name: value for of, part in parts.items() for name, value in zip(self._names[of], part, strict=True)}

    def _check_shape(self, factor, structure):
        expected = (structure.length, *(plate.total for plate in structure.plates))
        found = jnp.shape(factor)[: len(expected)]
        if found != expected:
            raise ValueError(
                f"The guide's state has Gaussians for (steps, *series) of {found}, but these data have {expected}. A refitted "
                f"guide belongs to one data set: leave {sorted(sum(self._names.values(), ()))} out of the parameters and "
                "refit, `posterior(..., refine=10)`, or use an amortised guide."
            )

    def _proposal(self, params):
        if self._names["steps"][0] not in params:
            raise ValueError(
                f"The parameters lack the guide's state {self._names['steps']}. `PVMC.run` returns it with them; after a stock "
                "`SVI` pass `{**result.params, **result.state.mutable_state}`."
            )
        return self.proposal(params)

    def _coordinates_of(self, state):
        """The coordinates of a state's panel: several may have been seen, of different numbers of series."""
        found = jnp.shape(state[self._names["steps"][0]])[1:-1]
        if found not in self._coordinates:
            raise ValueError("The guide has not seen the data of these parameters yet: call `init` or `run` first.")
        return self._coordinates[found]

    def _values(self, state, parts):
        (initial, steps), coordinates = parts, self._coordinates_of(state)
        values = {}
        if initial is not None:
            values = from_coordinates(coordinates.initial, jnp.squeeze(initial, -2 - len(coordinates.initial[0].plates)))
        return values | from_coordinates(coordinates.steps, steps)


def _check_laplace(structure):
    if structure.states:
        raise ValueError(
            f"`init='laplace'` needs states with a smooth density, and {sorted(structure.states)} are discrete. Use "
            "`init='prior'`."
        )
    if names := [plate.name for plate in subsampled(structure)]:
        raise ValueError(
            f"`init='laplace'` looks at all data, and the plates {names} draw minibatches. Use `init='prior'`, or start from "
            "the state of a guide of the model without `subsample_size`."
        )


def _names(coordinates):
    return {block.latent.name for block in (*coordinates.initial, *coordinates.steps)}


def _replace(moments: Moments | None, mean: Any = None, factor: Any = None) -> Moments | None:
    if moments is None:
        return None
    mean = moments.mean if mean is None else mean
    mean = mean.reshape(moments.mean.shape)
    return Moments(mean, moments.factor if factor is None else jnp.full_like(moments.factor, factor))
