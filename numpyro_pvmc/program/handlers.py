"""Run programs under NumPyro's effect handlers.

A program is run with given values; the scans that it reaches are handed over instead of being run; and the body of a scan is
run for one step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random
from numpyro.handlers import block, condition, seed, substitute, trace
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import base_distribution, mask_of

Site = dict[str, Any]
Sites = dict[str, Site]
Shapes = dict[str, tuple[int, ...]]


class Scan(NamedTuple):
    """What a program passed to NumPyro's `scan`, at the moment it got there.

    `around` is what the handlers around the scan do to the sites of its body, by name: stand-ins with a leading time axis,
    masked and scaled. It is filled when the program goes on after a scan that was replaced.
    """

    body: Callable
    init: Any
    xs: Any
    length: int | None
    reverse: bool
    history: int
    substitutions: tuple[tuple[str, Any], ...]
    rng_key: jax.Array | None
    around: dict[str, Site]

    @property
    def is_marked(self) -> bool:
        return getattr(self.body, "is_markov", False)


_PROBE = "_scan_probe"


class AtScan(Messenger):
    """Hands each scan to a function, which may return ``(last carry, outputs, sites)`` in place of running it.

    On the way it looks at plates: at their sizes, and at their indices, which may be given and not fit.

    :param fn: a program, if it is not used as a context.
    :param at_scan: as for :func:`run`.
    """

    def __init__(self, fn: Callable | None, at_scan: Callable[[int, Scan], tuple[Any, Any, Shapes] | None]):
        self.at_scan = at_scan
        super().__init__(fn)

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def process_message(self, msg):
        if msg["type"] == "control_flow" and msg["fn"].__name__ == "scan_wrapper":
            body, init, xs, length, reverse = msg["args"]
            kwargs = msg["kwargs"]
            substitutions = tuple(kwargs["substitute_stack"])
            scan = Scan(body, init, xs, length, reverse, kwargs["history"], substitutions, kwargs["rng_key"], {})
            replacement = self.at_scan(self.count, scan)
            self.count += 1
            if replacement is not None:
                carry, outputs, shapes = replacement
                # Handlers around a scan act on its sites when NumPyro hands these out again after it. So stand-ins are handed
                # out: what has become of them is what those handlers do.
                probes = {name: _probe(name, shape, scan.around) for name, shape in shapes.items()}
                msg["value"] = ((0, None, carry), (PytreeTrace(probes), outputs))
        elif msg["type"] == "plate":
            total, size = msg["args"]
            # Before NumPyro draws indices: on an accelerator its way of drawing them fails with words of its own.
            if size is not None and size > total:
                raise ValueError(f"The plate '{msg['name']}' has {total} elements, fewer than its `subsample_size={size}`.")
        elif (
            msg["type"] == "sample" and msg["value"] is None and isinstance(base_distribution(msg["fn"]), dist.ImproperUniform)
        ):
            raise ValueError(
                f"Latent site '{msg['name']}' outside the scan has an `ImproperUniform` distribution, of which nothing can be "
                "drawn, and the chain has no evidence under it. Give it a proper one, such as a wide Normal."
            )
        elif msg["type"] == "sample" and _PROBE in msg["infer"]:
            msg["stop"] = True
            name, around = msg["infer"][_PROBE]
            if msg["name"] != name:
                raise ValueError(
                    f"A `scope` handler around the chain's `scan` renames the sites of its body ('{name}' to '{msg['name']}'), "
                    "which its step does not know. Enter the handler around the whole model, or not at all."
                )
            around[name] = msg

    def postprocess_message(self, msg):
        if msg["type"] == "plate":
            (total, size), given = msg["args"], msg["value"]
            size = total if size is None else size
            if jnp.shape(given) != (size,) or not jnp.issubdtype(jnp.result_type(given), jnp.integer):
                raise ValueError(
                    f"The indices given for the plate '{msg['name']}' have the shape {jnp.shape(given)} and the type "
                    f"{jnp.result_type(given)}, but its minibatch is of {size} series: give as many integers."
                )


def _probe(name, shape, around):
    return {
        "type": "sample",
        "name": name,
        "fn": dist.Normal(0.0, 1.0).expand(shape),
        "args": (),
        "kwargs": {"rng_key": None, "sample_shape": ()},
        "value": jnp.zeros(shape),
        "scale": None,
        "is_observed": True,
        "intermediates": [],
        "cond_indep_stack": [],
        "infer": {_PROBE: (name, around)},
        "_control_flow_done": True,
    }


def run(
    program: Callable,
    arguments: Arguments,
    values: dict[str, Any],
    rng_key: jax.Array,
    at_scan: Callable[[int, Scan], tuple[Any, Any, Shapes] | None] = lambda index, scan: None,
) -> Sites:
    """Run a program with some of its sites given.

    :param values: values of parameters and sites, by name; sites not among them are drawn.
    :param at_scan: is told of each scan, in order; what it returns stands for the last carry, the outputs and the batch shapes
        of the sample sites of the scan, time included, which the program then does not have. ``None`` runs the scan.
    :return: the sites outside the scans that were replaced, by name.
    """
    with block(), trace() as sites, AtScan(None, at_scan), substitute(data=values), seed(rng_seed=rng_key):
        arguments(program)
    return sites


def parameters_of(program: Callable, arguments: Arguments, values: dict[str, Any]) -> set[str]:
    """Names of the parameters that a program declares.

    :param values: values of parameters and sites.
    """
    names = set()

    def abstractly(arguments, values):
        sites = run(program, arguments, values, random.key(0))
        names.update(name for name, site in sites.items() if site["type"] == "param")

    jax.eval_shape(abstractly, arguments, values)
    return names


def run_body(scan: Scan, t: Any, carry: Any, x: Any, values: dict[str, Any], length: int) -> tuple[Any, Any, Sites]:
    """Run the body of a scan for one step, under the handlers that stood around the scan.

    :param t: number of the step, from 0.
    :param carry: carry before the step.
    :param x: inputs of the step.
    :param values: values of latent sites of the step; others are drawn.
    :return: carry after the step, output, sites.
    """
    rng_key = random.key(0) if scan.rng_key is None else scan.rng_key
    body = seed(scan.body, random.fold_in(rng_key, t))
    for kind, given in scan.substitutions:
        given_here = functools.partial(_given_at_step, given, t, length)
        if kind == "condition":
            body = condition(body, condition_fn=given_here)
        elif kind == "substitute":
            body = substitute(body, substitute_fn=given_here)
    with block(), trace() as sites, substitute(data=values), _InBody():
        result = body(carry, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"The step function of a `scan` must return two things, the new carry and an output, but it returned a "
            f"{type(result).__name__}. Write `return x, x`, or `return x, None`."
        )
    carry, output = result
    return carry, output, under_handlers(sites, scan, t)


def under_handlers(sites: Sites, scan: Scan, t: Any) -> Sites:
    """The sites of a step as the handlers around the scan leave them: masked, scaled.

    :param sites: sites of one step.
    :param t: number of the step, from 0.
    """
    changed = {}
    for name, around in scan.around.items():
        site, mask, scale = sites[name], mask_of(around), around["scale"]
        if mask is not None:
            site = {**site, "fn": site["fn"].mask(mask[t])}
        if scale is not None:
            scale = jnp.broadcast_to(scale, around["fn"].batch_shape)[t] if jnp.ndim(scale) else scale
            site = {**site, "scale": scale if site["scale"] is None else scale * site["scale"]}
        changed[name] = site
    return sites | changed


def batch_shapes(sites: Sites, length: int) -> Shapes:
    """Batch shapes of the sample sites of a scan, by name.

    :param sites: sites of one step.
    """
    return {name: (length, *site["fn"].batch_shape) for name, site in sites.items() if site["type"] == "sample"}


class _InBody(Messenger):
    def process_message(self, msg):
        if msg["type"] == "sample" and msg["value"] is None and isinstance(base_distribution(msg["fn"]), dist.ImproperUniform):
            raise ValueError(
                f"Latent site '{msg['name']}' of the scan has an `ImproperUniform` distribution, of which nothing can be "
                "drawn. Give it a proper one, such as a wide Normal."
            )
        if msg["type"] == "prng_key":
            raise ValueError(
                "The body of the chain's `scan` calls `numpyro.prng_key()`: what is drawn with that key is noise without a "
                "density, over which nothing here integrates. Draw it with `numpyro.sample`, as a site of the step, or pass it "
                "in as an input of the scan."
            )
        if msg["type"] == "control_flow" and msg["fn"].__name__ == "scan_wrapper":
            raise ValueError(
                "The body of the chain's `scan` contains another NumPyro `scan`: a nested scan is not a Markov chain in one "
                "time index. Use `jax.lax.scan` for loops without sample sites, or write the inner steps as one vector site."
            )


def _given_at_step(given, t, length, site):
    if site["type"] != "sample":
        return None
    value = given.get(site["name"]) if isinstance(given, dict) else given(site)
    if value is None:
        return None
    value, ndim = jnp.asarray(value), len(site["kwargs"]["sample_shape"] + site["fn"].shape())
    if value.ndim == ndim:
        return value
    if value.ndim == ndim + 1 and len(value) == length:
        return value[t]
    raise ValueError(
        f"Site '{site['name']}' in the scan is given a value of shape {value.shape}. It needs the shape of one step, "
        f"{site['fn'].shape()}, or that of all {length} steps, {(length, *site['fn'].shape())}."
    )


def log_prob(site: Site) -> jax.Array:
    """Log density of a site at its value, masked and scaled, not summed.

    :return: an array of the site's batch shape.
    """
    log_density = site["fn"].log_prob(site["value"])
    return log_density if site["scale"] is None else site["scale"] * log_density


def log_densities(
    guide: Callable, arguments: Arguments, params: dict[str, Any], rng_key: jax.Array, values: dict[str, Any]
) -> Sites:
    """Run a guide at given values of its sites.

    :param values: values of its sample sites.
    :return: its latent sample sites.
    """
    sites = run(guide, arguments, {**params, **values}, rng_key)
    return {name: site for name, site in sites.items() if is_latent(site)}


def is_latent(site):
    return site["type"] == "sample" and not site["is_observed"]
