"""A chain and a guide in, the potentials of a chain of particles out.

K particles are drawn from the guide at each point of the chain: point 0 is the beginning, points 1 to T the steps of the
scan. With the proposal q_t and `log K` for each proposed step, and lower indices for the particles,

    node[0, k] = log p(x_0^k) + log p(y_0 | x_0^k) - log q_0(x_0^k) - log K
    node[t, k] = log p(y_t | x_t^k)                - log q_t(x_t^k) - log K
    edge[t, j, k] = log p(x_t^k | x_{t-1}^j)

(an emission that reads the previous state belongs to the edge; a latent site that does not, to the node). A deterministic
start is a point of K equal particles, each of weight 1 / K.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random

from numpyro_pvmc.chain import Chain, after_scan, begin, global_log_density, mutable_state, presence, read_chain, step
from numpyro_pvmc.program import Arguments, Drawn, draw, log_densities, log_prob
from numpyro_pvmc.smoothing import Edges
from numpyro_pvmc.structure import Latent, Structure, per_series

GRADIENTS = ("doubly_reparam", "reparam", "sticking")


class Particles(NamedTuple):
    """Values of the chain's sites: `initial` has leading axis K, `steps` leading axes (T, K)."""

    initial: dict[str, jax.Array]
    steps: dict[str, jax.Array]


class Lattice(NamedTuple):
    """Particles at every point of a chain, and its potentials: arguments of :mod:`numpyro_pvmc.smoothing`.

    `slack` is zero. Added to the log normalizer, it lets the doubly reparameterised gradient see the cotangent of each
    series. `log_weight_globals` is log p - log q of the global sites, summed, with all that reads nothing of the chain.
    """

    particles: Particles
    node: jax.Array
    edges: Edges
    mask: jax.Array | None
    slack: jax.Array
    globals: dict[str, jax.Array]
    log_weight_globals: jax.Array
    mutable_state: dict[str, Any]


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
) -> Lattice:
    """Draw particles from the guide, and weigh them.

    :param rng_key: random key.
    :param structure: the structure of the model's chain.
    :param model: a NumPyro program.
    :param guide: a NumPyro program that samples the chain's sites with a leading time axis, and the global sites.
    :param arguments: what both are called with.
    :param params: values of parameters and mutable state.
    :param num_particles: K, the number of particles at each time step.
    :param gradient: which gradient the guide's parameters get from the log normalizer: ``"reparam"`` that of the bound;
        ``"doubly_reparam"`` one of the same mean whose noise does not drown it as K grows; ``"sticking"`` that of the bound
        with the parameters in log q held fixed, biased for K > 1.
    :param particles: ``"iid"`` or ``"rqmc"``; see :func:`numpyro_pvmc.program.draw`.
    :return: particles and potentials.
    :raises ValueError: if the guide does not fit the chain.
    """
    check_guide(structure, guide, arguments, params)
    _, guide_key = random.split(rng_key)  # as `Trace_ELBO` splits it
    drawn, global_values, log_q_globals, mutable = draw(
        guide, arguments, params, guide_key, sites_to_draw(structure), num_particles, particles
    )
    drawn = particles_of(structure, drawn)
    plates = tuple(plate.size for plate in structure.plates)
    dtype = jnp.result_type(*jax.tree.leaves(drawn))
    slack_node, slack = jnp.zeros((structure.length + 1, *plates, num_particles), dtype), jnp.zeros(plates, dtype)
    if gradient == "doubly_reparam":
        drawn, slack_node, slack = _weigh_cotangents(structure, slack_node, slack)(drawn)
    q_params, q_globals = params, global_values
    if gradient in ("doubly_reparam", "sticking"):
        q_params, q_globals = lax.stop_gradient((params, global_values))
    chain = read_chain(structure, model, arguments, params | mutable | global_values)
    present = presence(chain)
    log_q = proposal_log_densities(structure, guide, arguments, q_params | q_globals, guide_key, drawn, present)
    node, edges, mask = weigh(chain, drawn, log_q, present)
    log_weight_globals = global_log_density(chain) - log_q_globals
    mutable = mutable | mutable_state(chain)
    return Lattice(drawn, node + slack_node, edges, mask, slack, global_values, log_weight_globals, mutable)


def weigh(
    chain: Chain, particles: Particles, log_q: jax.Array, present: dict[str, jax.Array] | None
) -> tuple[jax.Array, Edges, jax.Array | None]:
    """The potentials of particles.

    :param chain: the chain.
    :param particles: its particles.
    :param log_q: log densities of the law they were drawn from, shape ``(T + 1, *plates, K)``.
    :param present: for each site of a step where it is not masked.
    :return: nodes, edges, mask: arguments of :mod:`numpyro_pvmc.smoothing`.
    """
    log_p, edges = target(chain, particles)
    node, mask = log_p - log_q - math.log(log_q.shape[-1]), None
    if present is not None:
        steps = functools.reduce(jnp.logical_or, present.values())
        mask = jnp.concatenate([jnp.ones((1, *steps.shape[1:]), bool), steps])
    return node, edges, mask


def target(chain: Chain, particles: Particles) -> tuple[jax.Array, Edges]:
    """Log densities of the model at the particles.

    :param chain: the chain.
    :param particles: its particles.
    :return: the part that reads one particle, shape ``(T + 1, *plates, K)``; the part that reads two, a block ``(*plates, K,
        K)`` for each step.
    """
    structure = chain.structure
    number = len(next(iter(particles.steps.values()))[0])
    log_begin, first_state = jax.vmap(lambda x_0: begin(chain, x_0), out_axes=(-1, 0), axis_size=number)(particles.initial)

    def node(inputs, state, latent):
        now = step(chain, inputs, state, latent)
        return now.node, now.state, now.output

    nodes = jax.vmap(node, in_axes=(None, 0, 0), out_axes=(-1, 0, 0))
    if structure.holding:
        # A held state is that of an earlier step, so states come one after the other.
        def advance(state, inputs_and_latent):
            inputs, latent = inputs_and_latent
            log_density, state, output = nodes(inputs, state, latent)
            return state, (log_density, state, output)

        _, (log_node, states, outputs) = lax.scan(advance, first_state, (chain.inputs, particles.steps))
    else:
        log_node, states, outputs = jax.vmap(nodes, in_axes=(0, None, 0))(chain.inputs, first_state, particles.steps)
    log_p = jnp.concatenate([log_begin[None], log_node])
    if structure.later_factors:
        log_p = log_p + jax.vmap(lambda x_0, y: after_scan(chain, x_0, y), in_axes=(0, 1), out_axes=-1, axis_size=number)(
            particles.initial, outputs
        )

    def edge(inputs):
        inputs, before, latent = inputs
        pair = lambda state, latent: step(chain, inputs, state, latent).edge
        to_all = jax.vmap(pair, in_axes=(None, 0), out_axes=-1)
        return jax.vmap(to_all, in_axes=(0, None), out_axes=-2)(before, latent)

    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), first_state, states)
    return log_p, Edges(edge, (chain.inputs, before, particles.steps))


def proposal_log_densities(
    structure: Structure,
    guide: Callable,
    arguments: Arguments,
    values: dict[str, Any],
    rng_key: jax.Array,
    particles: Particles,
    present: dict[str, jax.Array] | None,
) -> jax.Array:
    """Log densities of the guide at the particles.

    :param structure: the structure of the model's chain.
    :param guide: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of its parameters, mutable state and global sites.
    :param rng_key: random key.
    :param particles: particles.
    :param present: for each site of a step where it is not masked in the model; a masked site has no density, neither here nor
        there.
    :return: an array of shape ``(T + 1, *plates, K)``.
    :raises ValueError: if the log density of a site has no time axis, or lacks a plate.
    """

    def one(initial, steps):
        sites = log_densities(guide, arguments, values, rng_key, initial | steps)
        at_start = [_by_series(sites[name], site, structure, 0) for name, site in structure.initial.items()]
        at_steps = {name: _by_series(sites[name], site, structure, 1) for name, site in structure.step.items()}
        if present is not None:
            at_steps = {name: jnp.where(present[name], log_q, 0.0) for name, log_q in at_steps.items()}
        at_steps = list(at_steps.values())
        log_steps = sum(at_steps[1:], start=at_steps[0])
        log_start = sum(at_start[1:], start=at_start[0]) if at_start else jnp.zeros_like(log_steps[0])
        return jnp.concatenate([log_start[None], log_steps])

    return jax.vmap(one, in_axes=(0, 1), out_axes=-1)(particles.initial, particles.steps)


def check_guide(structure: Structure, guide: Callable, arguments: Arguments, params: dict[str, Any]) -> None:
    """Refuse a guide that does not fit the chain.

    :param structure: the structure of the model's chain.
    :param guide: a NumPyro program.
    :param arguments: what it is called with.
    :param params: values of its parameters.
    :raises ValueError: naming the site that is missing, unknown, of a wrong shape, not independent over time, or not
        reparameterisable.
    """
    found = []
    jax.eval_shape(
        lambda params, arguments: found.append(log_densities(guide, arguments, params, random.key(0), {})), params, arguments
    )
    (sites,) = found
    expected = (*structure.sites, *structure.global_sites)
    missing = [name for name in expected if name not in sites]
    unknown = [name for name, site in sites.items() if name not in expected and not site["infer"].get("is_auxiliary")]
    joint = [name for name, site in sites.items() if name not in expected and site["infer"].get("is_auxiliary")]
    if missing:
        raise ValueError(
            f"The guide does not sample {missing}. It must sample every latent site of the model: {sorted(expected)}; the "
            f"sites of the scan, {sorted(structure.step)}, with a leading time axis of {structure.length}."
        )
    if unknown:
        raise ValueError(
            f"The guide samples {unknown}, which the model does not have. Its latent sites are {sorted(expected)}. Rename "
            "the site, or mark it with `infer={'is_auxiliary': True}`."
        )
    for name, latent in structure.sites.items():
        steps = (structure.length,) if name in structure.step else ()
        _check_guide_site(name, sites[name], latent, steps, joint)


def _check_guide_site(name, site, latent, steps, joint):
    fn, shape = site["fn"], tuple(site["fn"].shape())
    base = fn
    while isinstance(base, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        base = base.base_dist
    if isinstance(base, dist.Delta):
        raise ValueError(
            f"The guide gives site '{name}' a `Delta` law"
            + (f", a part of the joint draw {joint}" if joint else "")
            + ". PVMC proposes particles independently at each time, so the guide needs a density for each time of its own: "
            "use `AutoNormal`, or a guide that samples the site with a leading time axis."
        )
    if shape != (*steps, *latent.shape):
        what = f"a leading time axis of {steps[0]} and then the shape of one step, {latent.shape}" if steps else "the shape"
        raise ValueError(
            f"The guide samples site '{name}' with shape {shape}, but the model needs {what}: {(*steps, *latent.shape)}."
        )
    if steps and len(fn.batch_shape) < 1:
        raise ValueError(
            f"The guide gives site '{name}' a joint law over time: time is part of its event shape {fn.event_shape}. PVMC "
            "proposes particles independently at each time. Keep time as the first batch axis: use `.to_event` for the axes "
            "of one step only."
        )
    if not fn.has_rsample:
        raise ValueError(
            f"The guide's law for site '{name}', {type(fn).__name__}, cannot be reparameterised. Use one with `has_rsample`."
        )


def _by_series(site, latent: Latent, structure, leading):
    """Log density of a guide's site, summed over all axes but time and plates."""
    log_density = log_prob(site)
    for plate in structure.plates:
        if log_density.ndim <= leading + len(latent.batch_shape) + plate.dim:
            raise ValueError(
                f"The guide's log density of site '{site['name']}' has shape {log_density.shape}, without an axis for plate "
                f"'{plate.name}'. Use `.to_event` for the event axes of one step only."
            )
    # Batch axes that the guide counts as event axes are summed already.
    missing = leading + len(latent.batch_shape) - log_density.ndim
    plates = tuple(plate._replace(dim=plate.dim + missing) for plate in structure.plates)
    log_density = jnp.broadcast_to(log_density, jnp.shape(site["value"])[: log_density.ndim])
    return jax.vmap(lambda row: per_series(row, plates))(log_density) if leading else per_series(log_density, plates)


def align(weights: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Give weights the axes of a site.

    :param weights: an array with trailing axes ``(*plates)``.
    :param latent: a site of the chain.
    :param structure: the structure of the chain.
    :return: the array, with trailing axes that broadcast with the site's shape.
    """
    shape = [1] * len(latent.shape)
    for plate in structure.plates:
        shape[len(latent.batch_shape) + plate.dim] = plate.size
    return weights.reshape(weights.shape[: weights.ndim - len(structure.plates)] + tuple(shape))


def sites_to_draw(structure: Structure) -> list[Drawn]:
    """The sites that have particles, and over which of their axes particles are independent: time and plates.

    :param structure: the structure of the chain.
    """
    sites = []
    for name, site in structure.sites.items():
        time = int(name in structure.step)
        plates = tuple(time + len(site.batch_shape) + plate.dim for plate in structure.plates)
        sites.append(Drawn(name, time, (0,) * time + plates))
    return sites


def particles_of(structure: Structure, drawn: dict[str, jax.Array]) -> Particles:
    """Sort draws by point.

    :param structure: the structure of the chain.
    :param drawn: ``{site: (K, ...)}``.
    """
    return Particles(
        {name: drawn[name] for name in structure.initial},
        {name: jnp.swapaxes(drawn[name], 0, 1) for name in structure.step},
    )


def _weigh_cotangents(structure, slack_node, slack):
    """The identity on particles, which passes their cotangents back times the particle's smoothing weight.

    Each particle enters log Z as log(a + rest), where a is the weight of the trajectories through it and W = a / (a + rest)
    its smoothing weight. With dW/dx = W (1 - W) d log a / dx and E[W d log q] = E[dW/dx dx/dphi], the gradient without the
    terms of d log q has the coefficient W^2 where that of log Z has W (Tucker et al. 2019). W is the cotangent of the
    particle's node, relative to that of log Z: so two zeros go along, one added to the nodes, one to log Z.
    """

    @jax.custom_vjp
    def identity(particles):
        return particles, slack_node, slack

    def forward(particles):
        return identity(particles), None

    def backward(_, cotangents):
        particles, of_node, of_log_z = cotangents
        nonzero = of_log_z[..., None] != 0
        weights = jnp.where(nonzero, of_node / jnp.where(nonzero, of_log_z[..., None], 1.0), 0.0)
        weights = jnp.moveaxis(weights, -1, 1)
        scaled = Particles(
            {n: x * align(weights[0], structure.initial[n], structure) for n, x in particles.initial.items()},
            {n: x * align(weights[1:], structure.step[n], structure) for n, x in particles.steps.items()},
        )
        return (scaled,)

    identity.defvjp(forward, backward)
    return identity
