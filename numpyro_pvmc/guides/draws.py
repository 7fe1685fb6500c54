"""Draw the sites of a guide K times."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from numpyro.handlers import block, seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_pvmc.guides.quasirandom import from_uniform, has_points, noise_shape, uniform_points
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.handlers import is_latent
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.tracebacks import warn_caller


class Drawn(NamedTuple):
    """A site that is drawn K times.

    Sites of one `point` of the chain are drawn together. `shared_axes` are those axes of its distribution's batch, counted from
    the left, along which draws are independent: time, and the series.
    """

    name: str
    point: int
    shared_axes: tuple[int, ...]


class _ParticleDraws(Messenger):
    """Draws the named sites once for each particle: evenly spread, or with a key of the particle's own.

    With one particle, the draw and its key are those of the guide without it.
    """

    def __init__(self, drawn, particle, num_particles, is_even, chain_scan):
        self.drawn, self.particle, self.num_particles = {site.name: site for site in drawn}, particle, num_particles
        self.is_even, self.chain_scan, self.scans = is_even, chain_scan, 0
        self.coordinates = dict.fromkeys((site.point for site in drawn), 0)
        self.independent = []
        super().__init__()

    def process_message(self, msg):
        if self.num_particles == 1:
            return
        if msg["type"] == "control_flow" and msg["fn"].__name__ == "scan_wrapper":
            if self.scans == self.chain_scan:
                msg["kwargs"]["rng_key"] = random.split(msg["kwargs"]["rng_key"], self.num_particles)[self.particle]
            self.scans += 1
        site = self.drawn.get(msg.get("name"))
        if msg["type"] != "sample" or site is None:
            return
        if msg.get("_control_flow_done"):
            self.independent.append(site.name)  # drawn in the scan
            return
        if self.is_even and self._draw_evenly(msg, site):
            return
        self.independent.append(site.name)
        msg["kwargs"]["rng_key"] = random.split(msg["kwargs"]["rng_key"], self.num_particles)[self.particle]

    def _draw_evenly(self, msg, site):
        shape, first = noise_shape(msg["fn"]), self.coordinates[site.point]
        if shape is None or shape[: len(msg["fn"].batch_shape)] != msg["fn"].batch_shape:
            return False
        last = first + math.prod(size for axis, size in enumerate(shape) if axis not in site.shared_axes)
        if not has_points(last):
            return False
        uniform = uniform_points(msg["kwargs"]["rng_key"], shape, site.shared_axes, self.particle, self.num_particles, first)
        msg["value"] = from_uniform(msg["fn"], uniform)
        self.coordinates[site.point] = last
        return True


def draw(
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    rng_key: jax.Array,
    drawn: Sequence[Drawn],
    num_particles: int,
    particles: str = "iid",
    chain_scan: int | None = None,
    ignored: Collection[str] = (),
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array, dict[str, Any]]:
    """Draw the sites of a guide, some of them K times.

    Only what depends on the sites drawn K times is computed K times.

    :param rng_key: random key; with K = 1 the draws are those that `Trace_ELBO` makes with it.
    :param drawn: the sites to draw K times.
    :param particles: ``"iid"``, independent draws; ``"rqmc"``, draws that are evenly spread where the distribution of a site
        allows it, see :mod:`numpyro_pvmc.guides.quasirandom`, with a warning where it does not.
    :param chain_scan: which of the guide's scans draws such sites, if one does: K trajectories, then, one for each key.
    :param ignored: sites of the guide that do not count.
    :return: ``{site: (K, ...)}``; the values of the other sites; their log density, summed; mutable state.
    :raises ValueError: if another site depends on those drawn K times.
    """
    names, distributions, independent = [site.name for site in drawn], {}, []

    def particle(number):
        draws = _ParticleDraws(drawn, number, num_particles, particles == "rqmc", chain_scan)
        with block(), trace() as sites, substitute(data=params), draws, seed(rng_seed=rng_key):
            arguments(guide)
        distributions.update({name: type(sites[name]["fn"]).__name__ for name in names})
        independent.extend(draws.independent)
        samples = {name: site for name, site in sites.items() if is_latent(site)}
        others = {name: site for name, site in samples.items() if name not in names and name not in ignored}
        log_q = sum((_log_prob_as_drawn(site).sum() for site in others.values()), start=jnp.zeros(()))
        mutable = {name: site["value"] for name, site in sites.items() if site["type"] == "mutable"}
        values = {name: site["value"] for name, site in samples.items()}
        return {n: values[n] for n in names}, {n: values[n] for n in others}, log_q, mutable

    try:
        result = jax.vmap(particle, out_axes=(0, None, None, None))(jnp.arange(num_particles))
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            "In the guide a global site, or mutable state, depends on the values of the chain's sites "
            f"{sorted(names)}. Each particle would have another value of it: draw global sites first."
        ) from error
    if particles == "rqmc" and independent:
        warn_caller(
            f"The particles of {sorted(set(independent))} are independent draws: quasi-random ones need a guide without a "
            "scan, and distributions with a quantile function, but its distributions are "
            f"{sorted({distributions[name] for name in independent})}. `particles='iid'` says the same without this warning.",
        )
    return result


def _log_prob_as_drawn(site):
    # As `Trace_ELBO` does: a transformed distribution that remembers where its draw came from need not invert the transform.
    log_density = (
        site["fn"].log_prob(site["value"], site["intermediates"])
        if site["intermediates"]
        else site["fn"].log_prob(site["value"])
    )
    return log_density if site["scale"] is None else site["scale"] * log_density


def sites_to_draw(structure: Structure) -> list[Drawn]:
    """The sites that have particles, and over which of their axes particles are independent: time and plates."""
    sites = []
    for name, site in structure.sites.items():
        time = int(name in structure.step)
        plates = tuple(time + len(site.batch_shape) + plate.dim for plate in structure.plates)
        sites.append(Drawn(name, time, (0,) * time + plates))
    return sites
