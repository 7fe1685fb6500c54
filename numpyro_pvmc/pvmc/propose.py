"""Draw particles from a guide, and weigh them so that the guide can learn."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_pvmc.chain.chain import presence, read_chain
from numpyro_pvmc.chain.densities import particles_of
from numpyro_pvmc.chain.enumeration import at_points
from numpyro_pvmc.chain.potentials import ChainPotentials, chain_potentials
from numpyro_pvmc.guides.checks import AdaptiveGuide, check_guide, proposal_log_densities
from numpyro_pvmc.guides.draws import draw, sites_to_draw
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.structure import Structure, align

GRADIENTS = ("doubly_reparam", "reparam", "sticking", "reweighted")


class Proposed(NamedTuple):
    """Particles, and what a guide learns by.

    `slack` is zero. Added to the log normalizer, it lets the doubly reparameterised gradient see the cotangent of each
    series. `refitted_by` are the guides that want to be refitted from the weights.
    """

    potentials: ChainPotentials
    slack: jax.Array
    refitted_by: tuple[AdaptiveGuide, ...] = ()


def propose(
    rng_key: jax.Array,
    structure: Structure,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    params: dict[str, Any],
    num_particles: int,
    gradient: str = "reparam",
    particles: str = "iid",
    gradient_scale: Mapping[str, Any] = MappingProxyType({}),
) -> Proposed:
    """Draw particles from the guide, and weigh them.

    :param guide: a NumPyro program that samples the chain's sites with a leading time axis, and the global sites.
    :param gradient: which gradient the guide's parameters get from the log normalizer: ``"reparam"`` that of the bound;
        ``"doubly_reparam"`` one of the same mean whose noise does not drown it as K grows; ``"sticking"`` that of the bound
        with the parameters in log q held fixed, biased for K > 1; ``"reweighted"`` that of the mean of log q over the
        smoothed particles, which needs no gradient of draws. Sites without such gradients get this one in any case; a
        Markovian guide gets ``"reparam"`` in place of ``"doubly_reparam"``.
    :param particles: ``"iid"`` or ``"rqmc"``; see :func:`numpyro_pvmc.guides.draws.draw`.
    :param gradient_scale: what the gradient of the log density of a site of the model is multiplied by, by name.
    :return: particles and potentials.
    :raises ValueError: if the guide does not fit the chain.
    """
    form = check_guide(structure, guide, arguments, params)
    structure = structure.summing(form.summed)
    num_particles = num_particles if structure.sites else 1
    _, guide_key = random.split(rng_key)  # as `Trace_ELBO` splits it
    drawn, global_values, log_q_globals, mutable = draw(
        guide,
        arguments,
        params,
        guide_key,
        sites_to_draw(structure),
        num_particles,
        particles,
        form.markovian.scan_index if form.markovian else None,
        structure.free,
    )
    reweighted = form.not_reparameterised
    if gradient == "reweighted" or (reweighted and form.markovian):  # the density of a mixture is not one of its sites
        reweighted = tuple(structure.sites)
    drawn = {name: lax.stop_gradient(x) if name in reweighted else x for name, x in drawn.items()}
    plates = tuple(plate.size for plate in structure.plates)
    slack_node, slack = _slack(structure, num_particles)
    is_doubly = gradient == "doubly_reparam" and form.markovian is None
    if is_doubly:
        learning = {name: x for name, x in drawn.items() if name not in reweighted}
        learning, slack_node, slack = _weigh_cotangents(structure, num_particles)(learning)
        drawn = drawn | learning
    drawn = particles_of(structure, drawn)
    chain = read_chain(structure, model, arguments, params | mutable | global_values, gradient_scale)
    present = presence(chain)

    def log_density(params, global_values, particles, names):
        of_guide = params | global_values
        return proposal_log_densities(structure, guide, arguments, of_guide, guide_key, particles, present, form, names)

    fixed = lax.stop_gradient((params, global_values))
    log_q = jnp.zeros((structure.length + 1, *plates, num_particles))
    if reparameterised := tuple(name for name in structure.sites if name not in reweighted):
        log_q = log_density(
            *(fixed if is_doubly or gradient == "sticking" else (params, global_values)), drawn, reparameterised
        )
    if reweighted:
        live = log_density(params, fixed[1], lax.stop_gradient(drawn), reweighted)
        live = live if num_particles > 1 else _without_gradient(live, reweighted)
        # Its value is that of the density, and its slope the opposite: the guide climbs log q where the weights are.
        log_q = log_q + 2 * lax.stop_gradient(live) - live
    potentials = chain_potentials(chain, drawn, log_q, present, log_q_globals, mutable)
    potentials = potentials._replace(node=potentials.node + at_points(structure, slack_node))
    return Proposed(potentials, slack, form.refitted_by)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_gradient(log_q, names):
    """A log density of one particle, whose smoothing weight is 1 whatever the guide."""
    return log_q


@_without_gradient.defjvp
def _(names, primals, tangents):
    raise ValueError(
        f"Sites {list(names)} have no gradient of their draws: the guide learns them from the weights of particles, and with "
        "one particle every weight is 1. Train with `num_particles` of at least 2."
    )


def _slack(structure, num_particles):
    """Zeros, one for each node and one for each log normalizer."""
    plates = tuple(plate.size for plate in structure.plates)
    return jnp.zeros((structure.length + 1, *plates, num_particles)), jnp.zeros(plates)


def _weigh_cotangents(structure, num_particles):
    """The identity on particles, which passes their cotangents back times the particle's smoothing weight.

    Each particle enters log Z as log(a + rest), where a is the weight of the trajectories through it and W = a / (a + rest)
    its smoothing weight. With dW/dx = W (1 - W) d log a / dx and E[W d log q] = E[dW/dx dx/dphi], the gradient without the
    terms of d log q has the coefficient W^2 where that of log Z has W (Tucker et al. 2019). W is the cotangent of the
    particle's node, relative to that of log Z: so two zeros go along, one added to the nodes, one to log Z.
    """

    @jax.custom_vjp
    def identity(particles):
        return particles, *_slack(structure, num_particles)

    def forward(particles):
        return identity(particles), None

    def backward(_, cotangents):
        particles, of_node, of_log_z = cotangents
        nonzero = of_log_z[..., None] != 0
        weights = jnp.where(nonzero, of_node / jnp.where(nonzero, of_log_z[..., None], 1.0), 0.0)
        weights = jnp.moveaxis(weights, -1, 0)  # (K, T + 1, *plates)
        own = {name: weights[:, 1:] if name in structure.step else weights[:, 0] for name in particles}
        return ({name: x * align(own[name], structure.sites[name], structure) for name, x in particles.items()},)

    identity.defvjp(forward, backward)
    return identity
