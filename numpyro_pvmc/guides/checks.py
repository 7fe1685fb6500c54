"""Check that a guide fits a chain, and evaluate its log density at particles.

A guide that samples a site with a leading time axis is independent over time. One with a `scan` of its own over the chain's
sites is Markovian: each particle of a step is drawn given one of the step before, and its density is that of the mixture

    q_t(x) = 1 / K sum_i q(x | x_{t-1}^i)

of which the K particles are one draw for each component. Given the particles before, the sum over k of f(x^k) / q_t(x^k)
has mean K times the integral of f, and integrating backwards from the last step exp(log Z) stays unbiased.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer.autoguide import AutoGuide, AutoGuideList

from numpyro_pvmc.chain.chain import Chain, Presence, read_chain
from numpyro_pvmc.chain.densities import Particles, target
from numpyro_pvmc.chain.enumeration import number_of_states
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.ops.semiring import logsumexp
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import base_distribution, is_bounded
from numpyro_pvmc.program.find_chain import first, length_of
from numpyro_pvmc.program.handlers import Scan, is_latent, log_densities, log_prob, run, run_body
from numpyro_pvmc.program.structure import Latent, Structure, per_series, refuse_unlisted


class AdaptiveGuide(Protocol):
    """A guide, or part of one, that takes its proposal from mutable state; its sites carry it as ``infer["refitted_by"]``."""

    def start(self, chain: Chain) -> dict[str, Any]:
        """Mutable state before any data have been seen.

        :param chain: the chain of the model, at the parameters to start from.
        """

    def proposal(self, state: dict[str, Any]) -> Any:
        """The Gaussians that a state holds, in the coordinates of the model.

        :param state: mutable state, by name.
        """

    def refitted(self, potentials: Any, log_weights: jax.Array, particles: str) -> dict[str, Any]:
        """Mutable state after an evaluation.

        :param potentials: particles, potentials, mutable state before.
        :param log_weights: logs of the smoothing weights, shape ``(T + 1, *plates, K)``.
        :param particles: how the particles were drawn.
        """


class GuideKind(NamedTuple):
    """What kind of guide it is.

    `markovian` is the structure of the guide's own chain, if it has one. `not_reparameterised` are the chain's sites whose
    draws have no gradient. `refitted_by` are the parts of the guide that want to be refitted from the weights. `summed` are
    the discrete sites of the chain that the guide leaves out.
    """

    markovian: Structure | None = None
    not_reparameterised: tuple[str, ...] = ()
    refitted_by: tuple[AdaptiveGuide, ...] = ()
    summed: tuple[str, ...] = ()


def proposal_log_densities(
    structure: Structure,
    guide: Callable,
    arguments: Arguments,
    values: dict[str, Any],
    rng_key: jax.Array,
    particles: Particles,
    present: Presence | None,
    form: GuideKind,
    names: tuple[str, ...] | None = None,
) -> jax.Array:
    """Log densities of the guide at the particles.

    :param values: values of its parameters, mutable state and global sites.
    :param present: where the chain is present; a site that is masked in the model has no density, neither here nor there.
    :param form: what kind of guide it is.
    :param names: the sites that count; all by default.
    :return: an array of shape ``(T + 1, *plates, K)``.
    :raises ValueError: if the log density of a site has no time axis, or lacks a plate.
    """
    names = tuple(structure.sites) if names is None else names

    def one(initial, steps):
        sites = log_densities(guide, arguments, values, rng_key, initial | steps)
        at_start = [_by_series(sites[name], site, structure, 0) for name, site in structure.initial.items() if name in names]
        at_steps = {name: _by_series(sites[name], site, structure, 1) for name, site in structure.step.items() if name in names}
        if present is not None:
            at_steps = {name: jnp.where(present.sites[name], log_q, 0.0) for name, log_q in at_steps.items()}
        nothing = jnp.zeros([structure.length, *(plate.size for plate in structure.plates)])
        log_steps, log_start = sum(at_steps.values(), start=nothing), sum(at_start, start=nothing[0])
        return jnp.concatenate([log_start[None], log_steps])

    log_q = jax.vmap(one, in_axes=(0, 1), out_axes=-1, axis_size=particles.number)(particles.initial, particles.steps)
    if form.markovian is None:
        return log_q
    log_steps = _mixture(form.markovian, guide, arguments, values, particles)
    if present is not None:
        log_steps = jnp.where(next(iter(present.sites.values()))[..., None], log_steps, 0.0)
    return jnp.concatenate([log_q[:1], log_steps])


def check_guide(structure: Structure, guide: Callable, arguments: Arguments, params: dict[str, Any]) -> GuideKind:
    """Refuse a guide that does not fit the chain.

    :return: what kind of guide it is.
    :raises ValueError: naming the site that is missing, unknown, of a wrong shape, or not independent over time; or what of
        the guide's own chain differs from the model's.
    """
    forms, scanned = [], []

    def look(params, arguments):
        sites = run(guide, arguments, params, random.key(0), lambda _, scan: scanned.extend(_scanned(scan)))
        # Judged in here: sites are traced, and must not get out.
        forms.append(_form(structure, {name: site for name, site in sites.items() if is_latent(site)}))

    jax.eval_shape(look, params, arguments)
    is_markovian = bool(set(scanned) & set(structure.step))
    return forms[0]._replace(markovian=_guide_chain(structure, guide, arguments, params) if is_markovian else None)


def _form(structure, sites):
    """What kind of guide has these sites, or an error if they do not fit."""
    summed = tuple(name for name in structure.finite if name not in sites)
    structure = structure.summing(summed)
    number_of_states(structure)  # or there are too many
    expected = (*structure.sites, *structure.global_sites)
    missing = [name for name in expected if name not in sites]
    others = {name: site for name, site in sites.items() if name not in (*expected, *structure.free)}
    unknown = [name for name, site in others.items() if not site["infer"].get("is_auxiliary")]
    joint = [name for name, site in others.items() if site["infer"].get("is_auxiliary")]
    refuse_unlisted(structure.sites[name] for name in missing if name in structure.sites)
    if missing:
        raise ValueError(
            f"The guide does not sample {missing}. It must sample every latent site of the model: {sorted(expected)}; the "
            f"sites of the scan, {sorted(structure.step)}, with a leading time axis of {structure.length}. Parts that sample "
            "some sites each go together in an `AutoGuideList`, or in a function that calls them."
        )
    if unknown:
        raise ValueError(
            f"The guide samples {unknown}, which the model does not have. Its latent sites are {sorted(expected)}. Rename "
            "the site, or mark it with `infer={'is_auxiliary': True}`."
        )
    for name, latent in structure.sites.items():
        steps = (structure.length,) if name in structure.step else ()
        _check_guide_site(name, sites[name], latent, steps, joint, _may_be_bounded(sites[name]["fn"]))
    marks = [sites[name]["infer"].get("refitted_by") for name in structure.sites]
    if len(set(marks)) > 1:
        raise ValueError(
            "One refitted guide samples all sites of the chain, but here "
            f"{[name for name, mark in zip(structure.sites, marks, strict=True) if mark is None] or 'several do'}: leave the "
            "chain to one `AutoSmoothedNormal`, and global sites to another guide."
        )
    return GuideKind(
        not_reparameterised=tuple(name for name in structure.sites if not sites[name]["fn"].has_rsample),
        refitted_by=tuple(dict.fromkeys(mark for mark in marks if mark is not None)),
        summed=summed,
    )


def _scanned(scan: Scan):
    """Names of the latent sites of a scan's body."""
    _, _, sites = run_body(scan, 0, scan.init, first(scan.xs), {}, length_of(scan))
    return [name for name, site in sites.items() if is_latent(site)]


def _guide_chain(structure, guide, arguments, params):
    """The structure of a Markovian guide."""
    try:
        own = read_structure(guide, arguments, params)
    except ValueError as error:
        raise ValueError(f"The guide has a `scan` of its own over the chain's sites, and cannot be read: {error}") from error
    if set(own.step) != set(structure.step):
        raise ValueError(
            f"The guide's `scan` samples {sorted(own.step)}, but the model's samples {sorted(structure.step)}. A Markovian "
            "guide samples all sites of a step inside its `scan`."
        )
    if read := sorted(set(own.global_sites) & set(structure.sites)):
        raise ValueError(
            f"The guide's `scan` does not start from {read}, which the chain does: each particle of the first step continues "
            f"one of {read}. Pass it to the guide's `scan` as the first carry, and read it there only."
        )
    if unknown := sorted(set(own.initial) - set(structure.sites)):
        raise ValueError(
            f"The guide's `scan` starts from {unknown}, which is no initial site of the model's chain. Start it from "
            f"{sorted(structure.initial) or 'a constant'}."
        )
    sizes = [[plate.size for plate in one.plates] for one in (own, structure)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"Around the sites of the guide's `scan` there are plates of sizes {sizes[0]}, and around those of the model's "
            f"{sizes[1]}. Enter the same plates in the guide."
        )
    if structure.masked and len(structure.step) > 1:
        raise ValueError(
            f"The model masks latent sites, and a step has several, {sorted(structure.step)}: a Markovian guide has one "
            "density for all of them. Use a guide that is independent over time."
        )
    if own.holding or own.masked:
        raise ValueError(
            "The guide's `scan` masks its sites or holds its state. Leave padding to the model: a guide proposes at every step."
        )
    return own


def _mixture(own, guide, arguments, values, particles):
    """Log densities of the steps' particles under a Markovian guide, shape ``(T, *plates, K)``."""
    chain = read_chain(own, guide, arguments, values)
    initial = {name: particles.initial[name] for name in own.initial}
    node, edges = target(chain, Particles(initial, particles.steps))

    @jax.checkpoint  # without it the backward pass would keep all T blocks of K x K
    def mix(_, inputs):
        block = edges.function(inputs)
        return None, logsumexp(block, -2) - math.log(block.shape[-1])

    return node[1:] + lax.scan(mix, None, edges.inputs)[1]


def refuse_discrete(structure: Structure, model: Callable, guide: Callable) -> None:
    """Refuse an automatic guide of NumPyro's for discrete sites, none of which can sample them.

    :raises ValueError: naming the site.
    """
    is_stock = isinstance(guide, AutoGuide) and type(guide).__module__.startswith("numpyro.")
    if not is_stock or isinstance(guide, AutoGuideList) or guide.model is not model:
        return
    missing = [site.name for site in structure.free_sites if not jnp.issubdtype(site.dtype, jnp.inexact)]
    names, own = [*structure.finite, *missing], type(guide).__name__
    if names:
        raise ValueError(
            f"Latent sites {names} are discrete, and `{own}` cannot sample them. Hide them from it: "
            f"`{own}(numpyro.handlers.block(model, hide={names}))`. What the guide leaves out is summed over all its values; "
            "missing observations are imputed."
        )
    refuse_unlisted(structure.sites.values())


def _may_be_bounded(fn):
    return isinstance(base_distribution(fn), dist.TransformedDistribution) or is_bounded(fn)


def _check_guide_site(name, site, latent, steps, joint, may_be_bounded):
    fn, shape = site["fn"], tuple(site["fn"].shape())
    if isinstance(base_distribution(fn), dist.Delta):
        raise ValueError(
            f"The guide gives site '{name}' a `Delta` distribution"
            + (f", a part of the joint draw {joint}" if joint else "")
            + ". PVMC proposes particles independently at each time, so the guide needs a density for each time of its own: "
            "use `AutoNormal`, or a guide that samples the site with a leading time axis."
        )
    if shape != (*steps, *latent.shape):
        what = f"a leading time axis of {steps[0]} and then the shape of one step, {latent.shape}" if steps else "the shape"
        raise ValueError(
            f"The guide samples site '{name}' with shape {shape}, but the model needs {what}: {(*steps, *latent.shape)}."
        )
    discrete, of_guide = (not jnp.issubdtype(dtype, jnp.inexact) for dtype in (latent.dtype, jnp.result_type(site["value"])))
    if discrete != of_guide:
        kinds = {True: "discrete", False: "continuous"}
        raise ValueError(
            f"The guide's distribution of site '{name}', a {type(base_distribution(fn)).__name__}, is {kinds[of_guide]}, and "
            f"the model's is {kinds[discrete]}: give it one on the same values."
        )
    if latent.is_bounded and not may_be_bounded:
        raise ValueError(
            f"The guide's distribution of site '{name}', a {type(base_distribution(fn)).__name__}, has all real numbers, and "
            "the model's not: some particles would have no density. Give the guide a distribution on the same values, such as "
            "a `LogNormal` for positive ones, or a Normal transformed: `dist.TransformedDistribution(normal, "
            "dist.biject_to(support))`."
        )
    if steps and len(fn.batch_shape) < 1:
        raise ValueError(
            f"The guide gives site '{name}' a joint distribution over time: time is part of its event shape {fn.event_shape}. "
            "PVMC proposes particles independently at each time. Keep time as the first batch axis: use `.to_event` for the "
            "axes of one step only."
        )


def _by_series(site, latent: Latent, structure, leading):
    """Log density of a guide's site, summed over all axes but time and plates."""
    log_density = log_prob(site) / _scale(site, structure)
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


def _scale(site, structure):
    """How many series each one stands for in a minibatch, if the guide says so too."""
    around = {frame.name for frame in site["cond_indep_stack"]} if site["scale"] is not None else ()
    return math.prod(plate.total / plate.size for plate in structure.plates if plate.name in around)
