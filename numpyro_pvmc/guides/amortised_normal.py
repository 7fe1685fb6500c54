"""Propose states from a network that reads the observations."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import random
from jax.scipy.special import ndtri
from numpyro.contrib.module import eqx_module, nnx_module
from numpyro.handlers import block, seed, substitute
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger, mutable

from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.minibatch import minibatch_plates
from numpyro_pvmc.chain.observations import observations
from numpyro_pvmc.chain.reading import summed_structure
from numpyro_pvmc.chain.unconstrained import Coordinates, coordinates_of_model, from_coordinates
from numpyro_pvmc.guides.gaussian import Proposal, sample_proposal
from numpyro_pvmc.guides.prior import at_medians, prior_coordinates
from numpyro_pvmc.ops.gaussian import Moments, spread
from numpyro_pvmc.program.arguments import Arguments, called
from numpyro_pvmc.program.structure import Structure

_WIDEST = 4.0  # logs of scales stay within this of the prior's
_PRIOR_POINTS = 20_000  # about how many points of the prior tell its place and width


class AutoAmortisedNormal(AutoGuide):
    """A guide for a chain, for many series and ones not seen before: a network reads the data and proposes.

    At every time and for every series the proposal is a Normal with independent components, on the unconstrained scale of the
    sites. One network gives location and scale of all of them from the observations around each time; so training on some
    series, or on minibatches of them, is training for others, of any number and length.

    What the network reads are *features*: for each series a row for each time, the first of which belongs to the chain's
    initial step. A row has the observed values, standardised, and then for each of them 1 if it is observed and 0 if it is
    missing: masked, NaN, or not there, as when nothing is observed at the initial step. The value of a missing one is 0. So
    missing observations, padded steps and the ends of a series look alike.

    What it returns, two numbers for each component of the state, is in units of the model's prior: a location of 0 and a log
    scale of 0 are its median and its width, over all times and series. These units, and those of the data, are found once, when
    the guide is initialised, and kept as `mutable` state, so that other data are later read in the same ones. They
    belong to the trained parameters: with stock ``SVI``, which hands them out apart, pass
    ``svi.get_params(state) | state.mutable_state``.

    :param model: a NumPyro program with one latent `scan`, or one marked with :func:`numpyro_pvmc.markov`. It may have no
        latent sites outside the chain.
    :param network: what makes a network: it is called with a number of features, a number of outputs and a random key, and
        returns a module of Flax (``nnx``) or Equinox that maps an array ``(T + 1, features)`` to one of shape
        ``(T + 1, outputs)``; such as those in :mod:`numpyro_pvmc.networks`. Or such a module, whose sizes then must fit.
    :param features: what to read in place of the observed values: a function of the arguments of the model that returns an
        array ``(T, *plates, E)``, or ``(T + 1, *plates, E)`` with a row for the initial step; NaN where a value is missing.
    :param prefix: begins the names of parameters and mutable state.

    **Reference**

    *Efficient Learning of Deep State Space Models via Importance Smoothing*, John-Joseph Brady, Nikolas Nüsken, Yunpeng Li
    (ICML 2026).

    **Example**

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc import PVMC, AutoAmortisedNormal
        >>> from numpyro_pvmc.networks import Convolutions
        >>> def model(y):
        ...     series = numpyro.plate("series", y.shape[1])
        ...     def step(x_prev, y_t):
        ...         with series:
        ...             x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
        ...             numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     with series:
        ...         x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        ...     scan(step, x_0, y)
        >>> guide = AutoAmortisedNormal(model, Convolutions(channels=(8,), width=5))
        >>> pvmc = PVMC(model, guide, num_particles=8)
        >>> y = jax.random.normal(jax.random.key(0), (20, 6))
        >>> result = pvmc.run(jax.random.key(1), 100, y, progress_bar=False)
        >>> others = jax.random.normal(jax.random.key(2), (30, 2))  # longer, and fewer
        >>> pvmc.posterior(jax.random.key(3), result.params, others).mean()["x"].shape
        (30, 2)
    """

    def __init__(self, model: Callable, network: Any, *, features: Callable | None = None, prefix: str = "auto"):
        if not callable(network):
            raise TypeError(
                "`network` must be a module of Flax (nnx) or Equinox, or a function of a number of features, a number of "
                f"outputs and a random key that returns one, but got a {type(network).__name__}."
            )
        self.network, self.features = network, features
        super().__init__(model, prefix=prefix)

    def __repr__(self):
        return f"AutoAmortisedNormal (network={called(self.network)}, prefix={self.prefix!r})"

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """What of the guide needs numbers to set itself up, as a program: nothing, so it may be set up while it is compiled."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Sample the chain's sites.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: ``{site: value}``, with a leading time axis for the sites of a step.
        :raises ValueError: if the model has latent sites outside the chain or observes nothing, if the features or the outputs
            of the network are of a wrong shape, or if only a part of the trained state is given.
        :raises TypeError: if the network is no module.
        """
        arguments = Arguments(args, kwargs)
        with minibatch_plates(self._structure(arguments)) as indices:
            return sample_proposal(*self._propose(arguments, indices))

    def sample_posterior(
        self, rng_key: jax.Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, jax.Array]:
        """Draw from the proposal, independent over time.

        It is not the posterior: for that, weigh the draws, as :meth:`numpyro_pvmc.PVMC.sample_posterior` does.

        :param rng_key: random key.
        :param params: trained parameters and mutable state.
        :param args: arguments of the model, with the data.
        :param sample_shape: how many to draw.
        :param kwargs: keyword arguments of the model.
        :return: ``{site: (*sample_shape, ...)}``.
        """
        chain = self._given(params, args, kwargs)
        keys = random.split(rng_key, tuple(sample_shape))
        draw = lambda rng_key: seed(sample_proposal, rng_key)(*chain)
        with block():
            for _ in sample_shape:
                draw = jax.vmap(draw)
            return draw(keys)

    def median(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Medians of the proposal. They are not those of the posterior, which are in ``PVMC.posterior(...).quantile(0.5)``.

        :param params: trained parameters and mutable state.
        :param args: arguments of the model, with the data.
        :param kwargs: keyword arguments of the model.
        :return: ``{site: value}``.
        """
        return {name: value[0] for name, value in self.quantiles(params, [0.5], *args, **kwargs).items()}

    def quantiles(self, params: dict[str, Any], quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Quantiles of the proposal. They are not those of the posterior, which are in ``PVMC.posterior(...).quantile(q)``.

        :param params: trained parameters and mutable state.
        :param quantiles: numbers between 0 and 1.
        :param args: arguments of the model, with the data.
        :param kwargs: keyword arguments of the model.
        :return: ``{site: (len(quantiles), ...)}``.
        """
        coordinates, proposal = self._given(params, args, kwargs)

        def at(quantile):
            of = lambda moments: moments.mean + ndtri(quantile) * moments.factor
            values = {}
            if proposal.initial is not None:
                values = from_coordinates(coordinates.initial, of(proposal.initial)[0])
            return values | from_coordinates(coordinates.steps, of(proposal.steps))

        return jax.vmap(at)(jnp.asarray(quantiles, proposal.steps.mean.dtype))

    def _given(self, params, args, kwargs):
        try:
            with block(), substitute(data=params), seed(rng_seed=0):
                return self._propose(Arguments(args, kwargs), params)
        except Exception as error:
            if args or kwargs:
                raise
            raise ValueError(
                "An amortised guide reads the data: pass the arguments of the model after the others, as in "
                "`guide.median(params, y)`."
            ) from error

    def _propose(self, arguments: Arguments, indices: Mapping[str, Any]) -> tuple[Coordinates, Proposal]:
        structure = self._structure(arguments)
        indices = {name: indices[name] for name in structure.subsampled if name in indices}
        chain = read_chain(structure, self.model, arguments, indices)
        coordinates = coordinates_of_model(chain)
        values, present = _features(chain, self.features, arguments)
        sizes = [sum(block.size for block in blocks) for blocks in coordinates]
        network, is_trained = self._network(2 * values.shape[-1], 2 * max(sizes))
        of_features, of_initial, of_steps = self._units(structure, arguments, indices, is_trained)
        standard = jnp.where(present, (values - of_features.mean) / of_features.factor, 0.0)
        output = _by_series(network, jnp.concatenate([standard, present.astype(standard.dtype)], -1), 2 * max(sizes))

        def moments(rows, units, size):
            loc, log_scale = rows[..., :size], rows[..., max(sizes) : max(sizes) + size]
            scale = units.factor * jnp.exp(_WIDEST * jnp.tanh(log_scale / _WIDEST))
            return Moments(units.mean + units.factor * loc, scale)

        initial = moments(output[:1], of_initial, sizes[0]) if coordinates.initial else None
        return coordinates, Proposal(initial, moments(output[1:], of_steps, sizes[1]))

    def _structure(self, arguments: Arguments) -> Structure:
        structure = summed_structure(self.model, arguments)
        if structure.global_sites:
            raise ValueError(
                f"`AutoAmortisedNormal` proposes the sites of the chain, and the model has others: {structure.global_sites}. "
                "Combine it with a guide for these in `numpyro.infer.autoguide.AutoGuideList`: append "
                f"`AutoAmortisedNormal(block(seed(model, 0), hide={list(structure.global_sites)}), network)` and "
                f"`AutoNormal(block(seed(model, 0), expose={list(structure.global_sites)}), prefix='globals')`, with "
                "`block` and `seed` from `numpyro.handlers`."
            )
        return structure

    def _network(self, in_features, out_features):
        """The network, and whether its parameters are given."""
        network, name = self.network, f"{self.prefix}_network"
        if not (_is_a(network, "flax.nnx") or _is_a(network, "equinox")):
            key = numpyro.prng_key()
            network = network(in_features, out_features, random.key(0) if key is None else key)
        arrays = _OneSiteForEachArray(name)
        with arrays:
            if _is_a(network, "flax.nnx"):
                return nnx_module(name, network), arrays.given
            if _is_a(network, "equinox"):
                return eqx_module(name, network), arrays.given
        raise TypeError(f"`network` must make a module of Flax (nnx) or Equinox, but made a {type(network).__name__}.")

    def _units(self, structure, arguments, indices, is_trained) -> list[Moments]:
        """Place and width of the features, and of the coordinates at the initial step and at the steps."""
        names = [f"{self.prefix}_{what}" for what in ("features", "initial", "steps")]
        units = [mutable(name) for name in names]
        missing = [name for name, value in zip(names, units, strict=True) if value is None]
        if missing and is_trained:
            raise ValueError(
                f"The parameters of the network are given, but the units of what it reads and returns, {missing}, are not. "
                "With stock `SVI` they are mutable state: pass `svi.get_params(state) | state.mutable_state`."
            )
        if missing:

            @jax.jit
            def first_units(arguments, indices):
                chain = read_chain(structure, self.model, arguments, indices)
                values, present = _features(chain, self.features, arguments)
                of_features = _pooled(jnp.where(present, values, jnp.nan))
                return [jnp.stack(moments) for moments in (of_features, *_prior_spread(chain))]

            units = [mutable(name, value) for name, value in zip(names, first_units(arguments, indices), strict=True)]
        return [Moments(*place_and_width) for place_and_width in units]


class _OneSiteForEachArray(Messenger):
    """Makes one `param` of each array of a network.

    NumPyro's modules make one of them all, a dictionary, and NumPyro's `scan` takes the shape of all that the guide's trace
    has, which JAX will refuse for dictionaries. State that is not to be learned stays in the network: random keys, if any.
    """

    def __init__(self, name):
        self.name, self.given = name, False
        super().__init__()

    def process_message(self, msg):
        if msg["type"] == "param" and msg["name"] == f"{self.name}$params":
            msg["stop"] = True
            start = msg["fn"](*msg["args"], **msg["kwargs"])
            if start is None:
                return
            leaves, treedef = jax.tree.flatten_with_path(start)
            arrays = [
                self._param(f"{self.name}.{jax.tree_util.keystr(path, simple=True, separator='.')}", x) for path, x in leaves
            ]
            msg["value"] = jax.tree.unflatten(treedef, arrays)
        elif msg["type"] == "mutable" and msg["name"] == f"{self.name}$state":
            msg["stop"] = True
            state = msg["args"][0]
            if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)):
                raise ValueError(
                    "The network keeps numbers that change as it is called, such as those of a `BatchNorm`. A guide is called "
                    "again for every particle's density: use a network without, such as one with a `LayerNorm`."
                )

    def _param(self, name, start):
        value = numpyro.param(name)
        self.given = self.given or value is not None
        return numpyro.param(name, start) if value is None else value


def _is_a(network, library):
    """Whether something is a module of a library, which need not be installed: what is one has imported it."""
    module = sys.modules.get(library)
    return module is not None and isinstance(network, module.Module)


def _features(chain, function, arguments):
    """Rows of features, ``(T + 1, *plates, E)``, and where there are some."""
    length, plates = chain.structure.length, tuple(plate.size for plate in chain.structure.plates)
    if function is None:
        values, present = observations(chain)
        if not values.shape[-1]:
            raise ValueError(
                "The model observes nothing with these arguments, and an amortised guide reads the data: pass what the model "
                "observes, or say with `features=` what to read."
            )
        return values, present
    values = jnp.asarray(arguments(function)).astype(jnp.result_type(float))
    if values.shape[:-1] not in ((length, *plates), (length + 1, *plates)):
        raise ValueError(
            f"`features` returned an array of shape {values.shape}, but the chain needs {(length, *plates, 'E')}, a row of E "
            f"features for each step and series, or {(length + 1, *plates, 'E')} with one for its initial step."
        )
    if len(values) == length:
        values = jnp.concatenate([jnp.full_like(values[:1], jnp.nan), values])
    present = jnp.isfinite(values)
    return jnp.where(present, values, 0.0), present


def _by_series(network, features, out_features):
    """Outputs of a network for one series, for all of them."""
    length, *plates, number = features.shape
    series = jnp.moveaxis(features.reshape(length, -1, number), 0, 1)
    try:
        output = jax.vmap(network)(series)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The network cannot read the features of one series, an array of shape {(length, number)}: at each of {length} "
            f"times {number // 2} values, and for each of these whether it is there. See the error above."
        ) from error
    if jnp.shape(output)[1:] != (length, out_features):
        raise ValueError(
            f"The network returned an array of shape {jnp.shape(output)[1:]} for one series of features of shape "
            f"{(length, number)}, but the guide needs {(length, out_features)}: a location and a log scale for each of the "
            f"{out_features // 2} components of the state, at each time."
        )
    return jnp.moveaxis(output, 1, 0).reshape(length, *plates, out_features)


def _prior_spread(chain):
    """Place and width of coordinates under the model's prior, over all times and series."""
    chain = at_medians(chain)
    structure, coordinates = chain.structure, coordinates_of_model(chain)
    points = structure.length * math.prod(plate.size for plate in structure.plates)
    number = min(max(_PRIOR_POINTS // max(points, 1), 4), 256)
    draws = prior_coordinates(chain, coordinates, random.key(0), number)
    return [_pooled(jnp.zeros((1, 0)) if part is None else part) for part in draws]


def _pooled(draws):
    """One place and width for each of the last axis."""
    return spread(draws.reshape(math.prod(draws.shape[:-1]), draws.shape[-1]))
