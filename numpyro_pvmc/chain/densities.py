"""Evaluate the log densities of a chain at all particles and at all pairs of neighbouring ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_pvmc.chain.chain import Chain, after_scan, begin, log_density, sites_of_step, step, with_gradient_scale
from numpyro_pvmc.chain.convolution import edges_of_totals
from numpyro_pvmc.chain.enumeration import check_size, joint_values, number_of_states, values_of_numbers
from numpyro_pvmc.chain.pairwise import read_pair
from numpyro_pvmc.jaxprs.dependence import influence
from numpyro_pvmc.ops.chunks import at_all_steps
from numpyro_pvmc.ops.smoothing import Edges
from numpyro_pvmc.program.counts import bounds_of_counts
from numpyro_pvmc.program.structure import Structure


class Particles(NamedTuple):
    """Values of the chain's sites: `initial` has leading axis K, `steps` leading axes (T, K).

    A chain without sites that have particles has one, without values.
    """

    initial: dict[str, jax.Array]
    steps: dict[str, jax.Array]

    @property
    def number(self) -> int:
        """K, the number of particles at each time step."""
        numbers = [x.shape[1] for x in self.steps.values()] + [x.shape[0] for x in self.initial.values()]
        return numbers[0] if numbers else 1


def target(chain: Chain, particles: Particles, closed_form: bool = True) -> tuple[jax.Array, Edges]:
    """Log densities of the model at the particles.

    :param closed_form: whether blocks of pairs may be put together from distributions and values
        (:mod:`numpyro_pvmc.chain.pairwise`): faster, but without derivatives in forward mode.
    :return: the part that reads one particle, shape ``(T + 1, *plates, K)``; the part that reads two, a block ``(*plates, K,
        K)`` for each step. With sites that are summed over S joint values, a particle is K * S points: see
        :mod:`numpyro_pvmc.chain.enumeration`.
    """
    structure = chain.structure
    check_size(structure, particles.number)
    particles = with_states(structure, particles)
    ends = _ends_of_counts(chain)
    chain_of_points = _chain_of_totals(chain) if structure.parts else chain
    log_p, first_state, states = _nodes(chain_of_points, ends, particles)
    if structure.states:
        # What has no mass is evaluated where there is some: the slope of a density may be infinite where it is zero, as that of
        # a Poisson count at the rate zero is, and infinity times a weight of zero is nan.
        log_p_alive, _, _ = _nodes(chain_of_points, ends, _with_mass(structure, particles, log_p))
        log_p = jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p_alive)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), first_state, states)
    if structure.parts:
        return log_p, edges_of_totals(chain, before, particles.number)
    return log_p, _edges(chain, particles.number, (chain.inputs, before, particles.steps), closed_form)


def _nodes(chain, ends, particles):
    """The part of the log densities that reads one particle; state leaves of the first carry, and of those after each step."""
    structure, number = chain.structure, particles.number
    log_begin, first_state = jax.vmap(lambda x_0: begin(chain, x_0), out_axes=(-1, 0), axis_size=number)(particles.initial)

    def node(inputs_and_ends, state, latent):
        inputs, ends = inputs_and_ends
        now = step(chain, inputs, state, latent, ends)
        return now.node, now.state, now.output

    inputs = chain.inputs, ends
    nodes = jax.vmap(node, in_axes=(None, 0, 0), out_axes=(-1, 0, 0))
    if structure.holding:
        # A held state is that of an earlier step, so states come one after the other.
        def advance(state, inputs_and_latent):
            inputs, latent = inputs_and_latent
            log_density, state, output = nodes(inputs, state, latent)
            return state, (log_density, state, output)

        _, (log_node, states, outputs) = lax.scan(advance, first_state, (inputs, particles.steps))
    else:
        at_step = lambda inputs_and_latent: nodes(inputs_and_latent[0], first_state, inputs_and_latent[1])
        log_node, states, outputs = at_all_steps(at_step, (inputs, particles.steps))
    log_p = jnp.concatenate([log_begin[None], log_node])
    if structure.later_factors:
        log_p = log_p + jax.vmap(lambda x_0, y: after_scan(chain, x_0, y), in_axes=(0, 1), out_axes=-1, axis_size=number)(
            particles.initial, outputs
        )
    return log_p, first_state, states


def _with_mass(structure, particles, log_p):
    """Particles whose summed values without mass are replaced by the likeliest of the same particle."""
    by_particle = log_p.reshape(*log_p.shape[:-1], -1, number_of_states(structure))
    likeliest = by_particle.argmax(-1, keepdims=True)
    numbers = jnp.where(jnp.isneginf(by_particle), likeliest, jnp.arange(by_particle.shape[-1])).reshape(log_p.shape)
    values = values_of_numbers(structure, jnp.moveaxis(numbers, -1, 1))
    at_start = {site.name: values[site.name].astype(site.dtype) for site in structure.initial_states}
    at_steps = {site.name: values[site.name].astype(site.dtype) for site in structure.step_states}
    return Particles(particles.initial | at_start, particles.steps | at_steps)


def _ends_of_counts(chain):
    """Limits by time of counts whose supports read the state: of what no state can reach a density means nothing."""
    counts = [name for name, site in chain.structure.latents.items() if site.moves and name in chain.structure.edge_factors]
    if not counts:
        return {}
    found = bounds_of_counts(chain.structure, chain.model, chain.arguments, chain.values)
    if chain.structure.parts:
        mover, other = (site.name for site in chain.structure.parts)
        return {mover: (found[mover].lower + found[other].lower, found[mover].upper + found[other].upper)}
    return {name: (found[name].lower, found[name].upper) for name in counts}


def _chain_of_totals(chain):
    """The chain in which the first of two counts that are read through their sum is that sum, and neither has a density."""
    structure, (mover, other) = chain.structure, chain.structure.parts
    nodes = tuple(name for name in structure.node_factors if name != other.name)
    totals = tuple(site._replace(moves=site.name == mover.name) for site in structure.step_states)
    return chain._replace(structure=structure._replace(node_factors=nodes, step_states=totals))


def _edges(chain, number, inputs, closed_form):
    """Blocks of pairs.

    Factors whose distribution reads what was before, and whose value is what comes after, are put together from J distributions
    and K values, which are evaluated for all steps beforehand; all other factors are evaluated at every pair, one step after
    the other.
    """
    structure = chain.structure
    apart = _read_apart(chain, *jax.tree.map(lambda x: x[0], inputs)) if closed_form else {}
    others = tuple(name for name in structure.edge_factors if name not in apart)

    def prepared(inputs):
        inputs, before, latent = inputs
        state_of_one, latent_of_one = (jax.tree.map(lambda x: x[0], values) for values in (before, latent))

        def parts(state, latent):
            _, _, sites = sites_of_step(chain, inputs, state, latent)
            return {name: read_pair(sites[name], structure)[0] for name in apart}

        of_one = parts(state_of_one, latent_of_one)
        parameters_of = lambda state: {name: pair.parameters for name, pair in parts(state, latent_of_one).items()}
        values_of = lambda latent: {name: (pair.value, pair.log_volume) for name, pair in parts(state_of_one, latent).items()}
        parameters = jax.vmap(parameters_of, out_axes=-1, axis_size=number)(before)
        values = jax.vmap(values_of, out_axes=-1)(latent)
        ready = {}
        for name, (form, shared) in apart.items():
            here = of_one[name]
            distribution = parameters[name] | {p: here.parameters[p][..., None] for p in shared}
            value, log_volume = values[name]
            ready[name] = form.prepare(distribution, value, here.mask), log_volume, here.scale
        return ready

    def block(inputs):
        raw, ready = inputs
        total = jnp.zeros([*(plate.size for plate in structure.plates), number, number])
        if others:
            inputs, before, latent = raw
            pair = lambda state, latent: log_density(chain, sites_of_step(chain, inputs, state, latent)[2], others)
            to_all = jax.vmap(pair, in_axes=(None, 0), out_axes=-1)
            # A chain may have no state: then no leaf says how many particles there are before.
            total = jax.vmap(to_all, in_axes=(0, None), out_axes=-2, axis_size=number)(before, latent)
        for name, (form, _) in apart.items():
            distributions_and_values, log_volume, scale = ready[name]
            of_site = form.density(distributions_and_values) + log_volume[..., None, :]
            of_site = of_site if scale is None else scale * of_site
            total = total + with_gradient_scale(chain, name, of_site) / structure.scale
        return total

    if not apart:
        return Edges(block, (inputs, {}))
    return Edges(block, (inputs if others else (), at_all_steps(prepared, inputs)))


def _read_apart(chain, inputs, before, latent):
    """Factors of pairs that can be put together, by name: how, and which parameters do not read the state before."""
    forms = {}

    def look(parts):
        _, _, sites = sites_of_step(chain, inputs, parts["state"], parts["latent"])
        read = {name: read_pair(sites[name], chain.structure) for name in chain.structure.edge_factors}
        # Not their parameters: these are traced here, and what is traced stays in its trace.
        forms.update({name: pair[1]._replace(parameters={}) for name, pair in read.items() if pair is not None})
        return {name: pair[0]._asdict() for name, pair in read.items() if pair is not None}

    one = lambda values: jax.tree.map(lambda x: x[0], values)
    read = influence(look, {"state": one(before), "latent": one(latent)})
    apart = {}
    for name, form in forms.items():
        by_state, by_latent = read["state"][name], read["latent"][name]
        reads = lambda what, *parts: any(jax.tree.leaves([what[part] for part in parts]))
        if not (reads(by_latent, "parameters", "mask", "scale") or reads(by_state, "value", "log_volume", "mask", "scale")):
            apart[name] = form, {p for p, is_read in by_state["parameters"].items() if not is_read}
    return apart


def with_states(structure: Structure, particles: Particles) -> Particles:
    """Each particle with all joint values of the sites that are summed.

    :param particles: particles without these sites.
    """
    number, particle = number_of_states(structure), particles.number
    if not structure.states:
        return particles

    def tiled(values):
        return {name: jnp.concatenate([jnp.asarray(x)] * particle) for name, x in values.items()}

    repeated = lambda x, axis: jnp.repeat(x, number, axis)
    initial = {name: repeated(x, 0) for name, x in particles.initial.items()} | tiled(joint_values(structure, False))
    steps = {
        name: jnp.broadcast_to(x, (structure.length, *x.shape)) for name, x in tiled(joint_values(structure, True)).items()
    }
    return Particles(initial, {name: repeated(x, 1) for name, x in particles.steps.items()} | steps)


def particles_of(structure: Structure, drawn: dict[str, jax.Array]) -> Particles:
    """Sort draws by time step.

    :param drawn: ``{site: (K, ...)}``.
    """
    return Particles(
        {name: drawn[name] for name in structure.initial},
        {name: jnp.swapaxes(drawn[name], 0, 1) for name in structure.step},
    )
