"""Find out why a posterior is not a number, and say so by name."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_pvmc.chain.chain import read_chain, sites_after_scan, sites_at_start, sites_of_step
from numpyro_pvmc.chain.densities import Particles, with_states
from numpyro_pvmc.chain.faults import Flaws, any_of, at_point, first_place, flaws, reason, series
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.compiled import BRIEFLY, for_each_model
from numpyro_pvmc.program.handlers import log_prob
from numpyro_pvmc.program.structure import Structure, from_canonical, per_series, time_rows


class Weighted(Protocol):
    """What is looked at of a posterior: fields of :class:`numpyro_pvmc.SmoothedPosterior`."""

    log_normalizer: jax.Array
    log_weight_globals: jax.Array
    log_filtering: jax.Array
    present: jax.Array | None
    particles: dict[str, jax.Array]
    globals: dict[str, jax.Array]
    state_probabilities: dict[str, jax.Array]
    params: dict[str, Any]
    arguments: Arguments
    structure: Structure
    model: Callable

    @property
    def num_particles(self) -> int: ...

    def effective_sample_size(self) -> dict[str, jax.Array]: ...


class Fault(NamedTuple):
    """Where the log density of a site is NaN or plus infinity at some particle, by row and series, and what may be the reason.

    The rows are the last ones of the time steps of the chain from the initial step up to `last`.
    """

    where: jax.Array
    flaws: Flaws | None
    last: int


def explain(posterior: Weighted) -> None:
    """Find out why a posterior is not a number.

    :param posterior: a posterior, not traced, that is not.
    :raises ValueError: always, naming what is to blame: a parameter, a global site, the guide, or a site of the model with
        its role, the first time and the series.
    """
    structure = posterior.structure
    refuse_nan("the parameter", posterior.params)
    refuse_nan("the guide's draw of the global site", posterior.globals)
    _refuse_particles(posterior)
    of_chain, outside = jax.tree.map(np.asarray, _look(posterior.model, structure, posterior.arguments, *_values(posterior)))
    faults = {name: Fault(where, found, last) for name, (where, found, last) in of_chain.items() if where.any()}
    if faults:
        point = lambda fault: int(fault.last) + 1 - len(fault.where) + first_place(fault.where)[0]
        name = min(faults, key=lambda name: (point(faults[name]), structure.factors.index(name)))
        fault, (row, *index) = faults[name], first_place(faults[name].where)
        why, advice = reason(None if fault.flaws is None else jax.tree.map(lambda x: x[row], fault.flaws))
        place = at_point(point(fault)) + series(index, structure)
        raise _error(f"the log density of site '{name}', {_role(name, structure)}, is not", place, why, advice)
    for name, is_wrong in outside.items():
        if is_wrong:
            raise _error(f"the log density of the global site '{name}' is not", "", *reason(None))
    unknown = np.isnan(posterior.log_filtering).any(-1)
    if not unknown.any():
        sites = f"the global sites {sorted(posterior.globals)}"
        raise _error(f"the guide's log density of {sites} is not", "", "", "Look at its scales.")
    point, *index = first_place(unknown)
    raise _error(
        f"the guide's log density of {sorted(structure.sites)} at its own draws is not",
        at_point(point) + series(index, structure),
        ", while the densities of the model are",
        "Look at its scales.",
    )


def _error(what, place, why, advice):
    place = place and f", first {place}"
    return ValueError(f"The posterior is not a number, because {what}{place}{why}. {advice}")


def refuse_nan(kind: str, values: dict[str, Any]) -> None:
    """Refuse values that are NaN, of which a posterior has been made that is.

    :param kind: what they are.
    :param values: values by name, not traced.
    :raises ValueError: naming the first that is NaN.
    """
    for name, value in values.items():
        leaves = [leaf for leaf in map(jnp.asarray, jax.tree.leaves(value)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if any(jnp.isnan(leaf).any() for leaf in leaves):
            raise _error(f"{kind} '{name}' is NaN", "", "", "Look at where it comes from, such as a run whose losses are NaN.")


def _refuse_particles(posterior):
    structure = posterior.structure
    for name, x in posterior.particles.items():
        is_step = name in structure.step
        x = np.asarray(x)
        x = np.swapaxes(x, 0, 1) if is_step else x[:, None]  # (K, steps, *plates, *event)
        is_nan = np.isnan(x).any((0, *range(2 + len(structure.plates), x.ndim)))
        is_nan = is_nan if posterior.present is None or not is_step else is_nan & np.asarray(posterior.present)
        if is_nan.any():
            row, *index = first_place(is_nan)
            place = at_point(row + is_step) + series(index, structure)
            raise _error(f"the guide's draws of site '{name}' are NaN", place, "", "Look at its parameters and what it reads.")


def _role(name, structure):
    if name in {site.name for site in structure.step_latents}:
        return "a transition"
    if name in {site.name for site in structure.initial_latents}:
        return "an initial distribution"
    return "an emission"


def _values(posterior):
    structure = posterior.structure
    native = {name: from_canonical(x, structure.sites[name], structure) for name, x in posterior.particles.items()}
    return posterior.params | posterior.globals, native


@for_each_model(static_argnum=1, name="a look for the reason", options=BRIEFLY)
def _look(model: Callable, structure: Structure, arguments: Arguments, values: dict[str, Any], particles: dict[str, jax.Array]):
    """Faults of the sites of the chain at its particles, by name; whether those outside of it have any."""
    chain = read_chain(structure, model, arguments, values)
    parts = ({name: particles[name] for name in sites} for sites in (structure.initial, structure.step))
    particles = with_states(structure, Particles(*parts))
    number = particles.number

    def look(sites, names):
        is_wrong = lambda site: ~(log_prob(site) < jnp.inf)
        by_series = lambda site: per_series(is_wrong(site).astype(jnp.int32), structure.plates) > 0
        return {name: (by_series(sites[name]), flaws(sites[name])) for name in names}

    any_particle = lambda found: {name: (where.any(0), any_of(wrong)) for name, (where, wrong) in found.items()}

    def at_start(x_0):
        state, sites = sites_at_start(chain, x_0)
        return state, look(sites, (*(site.name for site in structure.initial_latents), *structure.initial_factors))

    def at_step(before, inputs_and_latent):
        inputs, latent = inputs_and_latent

        def one(state, latent):
            state, output, sites = sites_of_step(chain, inputs, state, latent)
            return state, output, look(sites, structure.node_factors)

        pair = lambda state, latent: look(sites_of_step(chain, inputs, state, latent)[2], structure.edge_factors)
        to_all = lambda state: any_particle(jax.vmap(lambda latent: pair(state, latent), axis_size=number)(latent))
        # One particle before after the other: in memory there are K pairs, not K^2.
        edges = any_particle(lax.map(to_all, before) if before else jax.vmap(lambda _: to_all(before))(jnp.arange(1)))
        states, outputs, nodes = jax.vmap(one, axis_size=number)(before, latent)
        return states, (outputs, any_particle(nodes) | edges)

    states, first = jax.vmap(at_start, axis_size=number)(particles.initial)
    _, (outputs, rest) = lax.scan(at_step, states, (chain.inputs, particles.steps))
    later = jax.vmap(lambda x_0, output: _rows(chain, x_0, output), in_axes=(0, 1), axis_size=number)(
        particles.initial, outputs
    )
    found = {n: (where[None], jax.tree.map(lambda x: x[None], wrong), 0) for n, (where, wrong) in any_particle(first).items()}
    found |= {name: (*fault, structure.length) for name, fault in rest.items()}
    found |= {name: (~(rows < jnp.inf).all(0), None, structure.length) for name, rows in later.items()}
    names = (*structure.global_sites, *structure.global_factors)
    return found, {name: ~(log_prob(chain.outside[name]) < jnp.inf).all() for name in names}


def _rows(chain, initial, outputs):
    structure = chain.structure
    if not structure.later_factors:
        return {}
    sites = sites_after_scan(chain, initial, outputs)
    return {name: time_rows(sites[name], structure.length, structure.plates) for name in structure.later_factors}
