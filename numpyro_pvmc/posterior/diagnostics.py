"""Warn of posteriors that should not be believed: those of impossible data, and those that rest on few particles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.chain.explanation import Weighted, explain
from numpyro_pvmc.chain.faults import at_point, first_place, series
from numpyro_pvmc.program.arguments import is_traced
from numpyro_pvmc.program.counts import warn_of_cut
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.tracebacks import warn_caller


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("unknown", "lost_at", "share", "first", "least"),
    meta_fields=("structure", "number"),
)
@dataclasses.dataclass(frozen=True)
class Health:
    """What of a posterior tells whether it can be believed.

    With a leading axis, that of several, which are given different draws of the global sites.

    :param unknown: whether an evidence, or the weight of the global sites, is not a number.
    :param lost_at: by series, the number of the first time step at which no particle is possible, 0 being the initial step; -1
        if there is none.
    :param share: ``{site: in which share of steps and series the effective sample size is low}``.
    :param first: ``{site: the first time}``.
    :param least: ``{site: the least effective sample size}``.
    :param number: K, the number of particles at each time step.
    """

    unknown: jax.Array
    lost_at: jax.Array
    share: dict[str, jax.Array]
    first: dict[str, jax.Array]
    least: dict[str, jax.Array]
    structure: Structure
    number: int


def health(posterior: Weighted) -> Health:
    """Sum up what tells whether a posterior can be believed; to be compiled with what makes it.

    :return: few numbers.
    """
    log_z, structure = posterior.log_normalizer, posterior.structure
    unknown = ~(log_z < jnp.inf).all() | ~(posterior.log_weight_globals < jnp.inf)
    lost = jnp.isneginf(posterior.log_filtering).all(-1)
    lost_at = jnp.where(jnp.isneginf(log_z), jnp.argmax(lost, 0), -1)
    share, first, least = {}, {}, {}
    for name, size in posterior.effective_sample_size().items():
        is_step = name in structure.step
        there = jnp.broadcast_to(lost_at < 0, size.shape)
        if is_step and posterior.present is not None:
            there = there & posterior.present
        low = there & (size < _enough(posterior.num_particles))
        share[name] = low.sum() / jnp.maximum(there.sum(), 1)
        first[name] = jnp.argmax(low.reshape(len(low), -1).any(-1)) if is_step else jnp.array(0)
        least[name] = jnp.where(there, size, jnp.inf).min()
    return Health(unknown, lost_at, share, first, least, structure, posterior.num_particles)


def _enough(number):
    """The least effective sample size, of K, with which nothing is said."""
    return max(0.05 * number, 1.5) if number > 2 else 0.0


def check_posterior(posterior: Weighted, found: Health, advice: str = "") -> None:
    """Refuse a posterior that is not a number, and say so if it is of impossible data or rests on few particles.

    :param posterior: a posterior. Nothing is looked at while it is traced.
    :param found: its health.
    :param advice: what to do where it rests on few particles.
    :raises ValueError: as :func:`numpyro_pvmc.chain.explanation.explain`.
    """
    if is_traced((posterior, found)):
        return
    if found.unknown:
        explain(posterior)
    warn(jax.tree.map(lambda x: np.asarray(x)[None], found), advice)
    program = posterior.structure, posterior.model, posterior.arguments, posterior.params
    warn_of_cut(*program, posterior.state_probabilities)


def warn(found: Health, advice: str) -> None:
    """Say so if posteriors are of impossible data, or rest on hardly any particles at some times; once for all of them.

    :param found: their health, with a leading axis, not traced.
    :param advice: what to do about the latter.
    """
    if (found.lost_at >= 0).any():
        warn_caller(_impossible(found))
    worst = max(found.share, key=lambda name: found.share[name].max(initial=0), default=None)
    if worst is not None and found.share[worst].any():
        warn_caller(f"{_collapse(found, worst)} {advice}")


def _collapse(found, site):
    draw = int(found.share[site].argmax())
    share, first, least = (float(of[site][draw]) for of in (found.share, found.first, found.least))
    part = "less than 1%" if share < 0.01 else f"{100 * share:.0f}%"
    of_draws = f", in the worst of {len(found.unknown)} draws of the global sites" if len(found.unknown) > 1 else ""
    place = f"first at time {first:.0f}" if site in found.structure.step else "at the initial step"
    return (
        f"The effective sample size of site '{site}' is below {_enough(found.number):.1f} of {found.number} in {part} of its "
        f"steps and series{of_draws}, {place} (least {least:.1f}): do not trust these."
    )


def _impossible(found):
    is_lost = found.lost_at >= 0
    draw, *index = first_place(is_lost)
    draws, others = is_lost.reshape(len(is_lost), -1).any(-1).sum(), is_lost[draw].sum() - 1
    of_draws = f", given {draws} of {len(is_lost)} draws of the global sites" if len(is_lost) > 1 else ""
    more = f", and {others} more" if others else ""
    what = f"none of the {found.number} particles is" if found.structure.sites else "no state is"
    place = at_point(found.lost_at[draw, *index])
    return (
        f"The evidence is 0{of_draws}{series(index, found.structure)}{more}: {what} possible {place}. The log normalizer is "
        "-inf, means and draws are NaN. Look at the data there, and at what the distributions of transition and emission allow."
    )


def check_drawable(posterior: Weighted) -> None:
    """Refuse to draw trajectories where there are none.

    :param posterior: a posterior. Nothing is looked at while it is traced.
    :raises ValueError: as :func:`numpyro_pvmc.chain.explanation.explain`, or as :func:`refuse_integers`.
    """
    if is_traced(posterior):
        return
    log_z = np.asarray(posterior.log_normalizer)
    if not (log_z < np.inf).all():
        explain(posterior)
    if np.isneginf(log_z).any():
        refuse_integers(jax.tree.map(lambda x: np.asarray(x)[None], health(posterior)))


def refuse_integers(found: Health) -> None:
    """Refuse to draw sites of integer values in a series without any possible trajectory.

    :param found: the health of posteriors, with a leading axis, not traced.
    :raises ValueError: naming the sites, the series and the time.
    """
    structure = found.structure
    sites = (*structure.initial_latents, *structure.step_latents, *structure.free_sites)
    whole = sorted({site.name for site in sites if not jnp.issubdtype(site.dtype, jnp.inexact)})
    if whole and (found.lost_at >= 0).any():
        place = first_place(found.lost_at >= 0)
        raise ValueError(
            f"The sites {whole} cannot be drawn{series(place[1:], structure)}: the evidence there is 0, as nothing is possible "
            f"{at_point(found.lost_at[place])}, and integers cannot be NaN. Mend the data there, or leave out the series."
        )
