"""Look at the data of a program: refuse numbers that mean nothing, and masks that are not padding."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoGuide

from numpyro_pvmc.chain.chain import at_all_steps, begin, presence, read_chain, step, unmasked
from numpyro_pvmc.chain.faults import Flaws, any_of, first_place, flaws, reason, series
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments, Held, is_traced, signature
from numpyro_pvmc.program.compiled import BRIEFLY, for_each_model
from numpyro_pvmc.program.counts import reads_numbers
from numpyro_pvmc.program.distributions import base_support, mask_of
from numpyro_pvmc.program.handlers import log_prob, run
from numpyro_pvmc.program.structure import Structure, per_series

_DRAWS = 3  # of the latent sites, to tell what reads them


class DataCheck:
    """Looks at the data of a program, each time with what is known of arguments of these shapes.

    :param guide: the guide, if there is one.
    """

    def __init__(self, model: Callable, guide: Callable | None = None):
        self.model, self.guide = model, guide
        self._known: dict[Any, tuple[Structure, dict[str, Any]]] = {}
        self._by_value: dict[Any, tuple[str, ...]] = {}

    def __call__(
        self, arguments: Arguments, params: dict[str, Any], structure: Structure | None = None
    ) -> tuple[Structure, bool]:
        """Look at data.

        :param params: values of parameters. Masks and data do not read them: those given first will do.
        :param structure: the structure of the program's chain, if it is known.
        :return: the structure, and whether arguments of these shapes are new.
        :raises ValueError: as :func:`check_data`.
        """
        known_for = signature(arguments)
        if is_new := known_for not in self._known:
            self._known[known_for] = structure or read_structure(self.model, arguments, params), params
        structure, params = self._known[known_for]
        check_data(structure, self.model, arguments, params)
        return structure, is_new

    @property
    def seen(self) -> Structure | None:
        """The structure of the chain of the data met last, of those that looked new."""
        structures = [structure for structure, _ in self._known.values()]
        return structures[-1] if structures else None

    def parameters(self, arguments: Arguments) -> tuple[str, ...]:
        """Names of the parameters of the program."""
        structure, _ = self._known.get(signature(arguments), (None, None))
        structure = read_structure(self.model, arguments, {}) if structure is None else structure
        return tuple(name for name, _ in structure.parameters)

    def held(self, arguments: Arguments) -> Arguments:
        """Arguments of which the arrays whose numbers bound a count are held by value.

        What is compiled, or known, for such arguments is so for these numbers.
        """
        known_for = signature(arguments)
        if is_traced(arguments):
            by_value = self._numbers_read(arguments)  # which of them are traced is not known by their shapes
        else:
            if known_for not in self._by_value:
                self._by_value[known_for] = self._numbers_read(arguments)
            by_value = self._by_value[known_for]
        return Held(arguments, by_value) if by_value else arguments

    def _numbers_read(self, arguments):
        if not reads_numbers(self.model, arguments):
            return ()
        structure = read_structure(self.model, arguments, {})
        counts = {site.name for site in structure.latents.values() if site.moves}
        return () if counts <= self._sampled(Held(arguments, structure.by_value)) else structure.by_value

    def _sampled(self, arguments):
        """What the guide samples. One of NumPyro's own, which sets itself up when it is run, samples no counts."""
        names = set()
        if self.guide is not None and not isinstance(self.guide, AutoGuide):
            jax.eval_shape(lambda arguments: names.update(run(self.guide, arguments, {}, random.key(0))), arguments)
        return names

    def explain_nan(self, results: jax.Array, arguments: Arguments) -> None:
        """Find out why a result is NaN, if one is.

        :param results: an array, not traced.
        :raises ValueError: naming a site whose distribution is none.
        """
        structure, params = self._known.get(signature(arguments), (None, None))
        if structure is not None and np.isnan(results).any():
            check_distributions(structure, self.model, arguments, params)


def check_data(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], with_densities: bool = True
) -> None:
    """Look at the numbers: refuse data that are none or that their distributions cannot have, and masks that are not padding.

    :param values: values of parameters; those not given take their initial values.
    :param with_densities: whether a site without a density is refused where there are NaN among the arguments, which may be
        why; a singular covariance has none either.
    :raises ValueError: naming the site and the first time.
    """
    seen = jax.tree.map(np.asarray, _look(model, structure, arguments, values))
    drawn = None
    if _has_nan(arguments) or any(site.impossible.any() for site in seen.in_scan.values()):
        drawn = _draw(structure, model, arguments, values)
    for name, site in seen.in_scan.items():
        _check_site(name, site, "time {0} of the scan", drawn is not None and drawn.supports_move[name])
    for name, site in seen.outside.items():
        _check_site(name, site, "index {}")
    if drawn is not None and with_densities:
        _check_densities(drawn, structure)
    if seen.masks is not None:
        _check_masks(structure, seen.masks)


def check_distributions(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> None:
    """Refuse a chain of whose sites one has no distribution, whatever the states.

    :param values: values of parameters; those not given take their initial values.
    :raises ValueError: naming the site, the first time, the series, and what is wrong with the distribution.
    """
    _check_densities(_draw(structure, model, arguments, values), structure)


def _has_nan(arguments):
    floats = [leaf for leaf in map(np.asarray, jax.tree.leaves(arguments)) if np.issubdtype(leaf.dtype, np.floating)]
    return any(np.isnan(leaf).any() for leaf in floats)


def _check_site(name, site, place, support_moves=False):
    first = lambda where: tuple(int(i) for i in np.argwhere(where)[0])
    if site.nan.any():
        raise ValueError(
            f"The data of site '{name}' contain NaN, first at {place.format(*first(site.nan))}. Missing values need a mask: "
            "replace nothing, and put `numpyro.handlers.mask(mask=~jnp.isnan(y_t))` around the site."
        )
    if site.impossible.any() and not support_moves:
        index = first(site.impossible)
        raise ValueError(
            f"The data of site '{name}' contain {site.value[index]}, outside the support of its distribution, first at "
            f"{place.format(*index)}. Fix the data or choose another distribution; a missing value needs a mask, not a number "
            "that stands for it."
        )


def _check_densities(drawn, structure):
    initial = {site.name for site in structure.initial_latents} | set(structure.initial_factors)
    for name, (is_nan, found) in drawn.not_numbers.items():
        if is_nan.any():
            place, index = "at the initial step", first_place(is_nan)
            if name not in initial:
                time, *index = index
                place, found = f"first at time {time} of the scan", jax.tree.map(lambda x, t=time: x[t], found)
            why, advice = reason(found)
            raise ValueError(
                f"The log density of site '{name}' is not a number, {place}{series(index, structure)}, whatever the "
                f"state{why}. {advice}"
            )


class _Observed(NamedTuple):
    """The value of a site, and where in its batch a value under no mask is NaN, or none that the distribution can have."""

    value: jax.Array
    nan: jax.Array
    impossible: jax.Array


class _Seen(NamedTuple):
    """What the data are like: sites of the scan, by time; sites outside; masks by time and series, if latent sites have any."""

    in_scan: dict[str, _Observed]
    outside: dict[str, _Observed]
    masks: Any


class _Drawn(NamedTuple):
    """What several draws of the latent sites say: which supports they move; where log densities are never numbers, by time and
    series, and what is wrong with parameters.
    """

    supports_move: dict[str, jax.Array]
    not_numbers: dict[str, tuple[jax.Array, Flaws]]


class _Masks(NamedTuple):
    """By time and series: whether the step has latent sites, whether it is a time step of the chain, how many observations it
    has in the body and after the scan, and whether these, or the next step, read its latent sites at all.
    """

    latent: jax.Array
    steps: jax.Array
    observed: jax.Array
    observed_later: jax.Array
    read: jax.Array


def _check_masks(structure, masks):
    names = sorted(site.name for site in structure.step_latents)
    first = lambda where: int(np.argmax(where.reshape(len(where), -1).any(-1)))
    resumes, starts_late = ~masks.steps[:-1] & masks.steps[1:], ~masks.steps[0]
    if not structure.holding and (resumes.any() or (starts_late & masks.steps.any(0)).any()):
        time = first(resumes) + 1 if resumes.any() else int(np.argmax(masks.steps.reshape(len(masks.steps), -1).all(-1)))
        raise ValueError(
            f"The latent sites {names} are masked at some steps and unmasked at a later one (time {time} of the scan), and the "
            "state in between has no meaning. Hold it: return `jnp.where(mask, x, x_prev)` as the new carry. (To skip a "
            "missing observation, mask the emission only.)"
        )
    lost = ~masks.latent & (masks.observed > 0) & (structure.holding | masks.read)
    lost = lost | (~masks.steps & (masks.observed_later > 0))
    if lost.any():
        raise ValueError(
            f"At time {first(lost)} of the scan the latent sites {names} are masked, but an observation is not. A step without "
            "a state observes nothing: put the emission under the same mask."
        )


@for_each_model(static_argnum=1, name="a look at the data", options=BRIEFLY)
def _look(model, structure, arguments, values):
    chain = read_chain(structure, model, arguments, values)
    plates = [plate.size for plate in structure.plates]

    def at_step(sites):
        observed = _observed(sites)
        number = sum((unmasked(site, chain) for site in observed.values()), start=jnp.zeros(plates, jnp.int32))
        return {name: _look_at(site) for name, site in observed.items()}, number

    in_scan, observed = at_all_steps(chain, at_step)
    outside = (*structure.initial_factors, *structure.later_factors, *structure.global_factors)
    # Those after the scan stand on outputs of zero, and what their supports read of these means nothing.
    fixed = {name: not jax.tree.leaves(_support(chain.outside[name])) for name in structure.later_factors}
    outside = {name: _look_at(chain.outside[name], fixed.get(name, True)) for name in outside}
    present = presence(chain)
    if present is None:
        return _Seen(in_scan, outside, None)
    seen_later = [_seen_after_scan(chain.outside[name], structure) for name in structure.later_factors]
    later = sum(seen_later, start=jnp.zeros_like(observed))
    latent = functools.reduce(jnp.logical_or, present.sites.values())
    return _Seen(in_scan, outside, _Masks(latent, present.steps, observed, later, _reads_latent(chain)))


def _draw(structure, model, arguments, values):
    return jax.tree.map(np.asarray, _look_at_draws(model, structure, arguments, values))


@for_each_model(static_argnum=1, name="a look at the data", options=BRIEFLY)
def _look_at_draws(model, structure, arguments, values):
    chain = read_chain(structure, model, arguments, values)
    latent = {site.name for site in structure.step_latents}

    def at_step(sites):
        supports = {name: [jnp.asarray(x) for x in jax.tree.leaves(_support(site))] for name, site in _observed(sites).items()}
        names = (*structure.node_factors, *structure.edge_factors)
        return supports, {name: (log_prob(sites[name]), flaws(sites[name])) for name in names}

    supports, densities = jax.vmap(lambda seed: at_all_steps(_drawn(chain, seed), at_step))(jnp.arange(_DRAWS))
    any_of_leaves = lambda found: functools.reduce(jnp.logical_or, found, jnp.asarray(False))
    moves = {name: any_of_leaves([(x != x[0]).any() for x in leaves]) for name, leaves in supports.items()}

    def not_numbers(name, draws):
        # One drawn from its own distribution has a density.
        nowhere = ~jnp.isfinite(draws).any(0) & ((name in latent) | ~(draws < jnp.inf).all(0))
        return jax.vmap(lambda row: per_series(row.astype(jnp.int32), structure.plates) > 0)(nowhere)

    found = {name: (not_numbers(name, draws), any_of(wrong)) for name, (draws, wrong) in densities.items()}
    for name in (*(site.name for site in structure.initial_latents), *structure.initial_factors):
        site = chain.outside[name]
        found[name] = per_series(jnp.isnan(log_prob(site)).astype(jnp.int32), structure.plates) > 0, flaws(site)
    return _Drawn(moves, found)


def _observed(sites):
    return {name: site for name, site in sites.items() if site["type"] == "sample" and site["is_observed"]}


def _drawn(chain, seed):
    """The chain with other draws of its latent sites."""
    return chain._replace(scan=chain.scan._replace(rng_key=random.key(seed)))


def _support(site):
    """The support of single numbers of a site, where that can be asked of data without regard to rounding."""
    support = base_support(site["fn"])
    return constraints.real if support is None or support is constraints.circular or support.event_dim else support


def _look_at(site, with_support=True):
    fn, border = site["fn"], len(site["fn"].batch_shape)
    value = jnp.broadcast_to(site["value"], fn.shape())
    mask = True if mask_of(site) is None else mask_of(site)
    events = lambda x: x.any(range(border, value.ndim)) & mask
    nan = jnp.isnan(value) if jnp.issubdtype(value.dtype, jnp.inexact) else jnp.zeros(value.shape, bool)
    possible = _support(site)(value) if with_support else jnp.isfinite(value)
    return _Observed(value, events(nan), events(~possible & ~nan))


def _reads_latent(chain):
    """Where the densities of a step and the next are others for other draws of its latent sites, by time and series."""
    _, state = begin(chain, {site.name: chain.outside[site.name]["value"] for site in chain.structure.initial_latents})
    after = jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), chain.inputs)

    def densities(seed):
        drawn = _drawn(chain, seed)

        def two_steps(inputs, following):
            now = step(drawn, inputs, state, {})
            return now.edge + now.node + step(chain, following, now.state, {}).edge

        return jax.vmap(two_steps)(chain.inputs, after)

    one, *others = jax.vmap(densities)(jnp.arange(_DRAWS))
    differs = [(other != one) & ~(jnp.isnan(other) & jnp.isnan(one)) for other in others]
    return functools.reduce(jnp.logical_or, differs)


def _seen_after_scan(site, structure):
    """Where a site after the scan is not masked, by time and series."""
    mask, plates = mask_of(site), tuple(plate.size for plate in structure.plates)
    if mask is None or mask.ndim == 0 or mask.shape[0] not in (structure.length, structure.length + 1):
        return jnp.ones((structure.length, *plates), jnp.int32)
    rows = jax.vmap(lambda row: per_series(row.astype(jnp.int32), structure.plates))(mask)
    return rows[-structure.length :]
