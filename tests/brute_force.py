"""A posterior's own particles in, every trajectory through them scored by NumPyro out: slow, and importing nothing of ours.

Every trajectory picks one particle of the beginning and one of each step (and one state of each site that is summed exactly),
and its weight is

    log p(trajectory, data) - log q(trajectory) - (number of points with particles) * log K

with both densities NumPyro's own `log_density` of the unchanged programs, run at the trajectory's values. Of a series it counts
only what a one-hot mask over the plates leaves. A padded step is enumerated like any other: nothing depends on which particle
it picks, so it contributes K equal trajectories, each divided by K.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger


class Enumeration(NamedTuple):
    """All N trajectories.

    log_normalizer: (*plates). weights: {site: (T, K, *plates)}, without T for initial sites; they sum to 1 over K. At padded
    steps they have no meaning. state_weights: {site: (T, *plates, S)} alike. log_weights: (N, *plates), logs of what the
    trajectories of one series weigh, which sum to 1 over N. values: {site: (N, T, ...)}, in the shapes of the model.
    plate_axes: {site: axes of the plates in these shapes, without N}. present: (T, *plates).
    """

    log_normalizer: np.ndarray
    weights: dict[str, np.ndarray]
    state_weights: dict[str, np.ndarray]
    log_weights: np.ndarray
    values: dict[str, np.ndarray]
    plate_axes: dict[str, tuple[int, ...]]
    present: np.ndarray

    def log_mass(self, samples: Mapping[str, Any]) -> np.ndarray:
        """For draws {site: (M, T, ...)} how likely each is, series by series: (M, *plates), -inf where it is no trajectory."""
        same = None
        for name, values in self.values.items():
            ours, theirs = (self._by_series(name, x) for x in (values, np.asarray(samples[name])))
            equal = (ours == theirs[:, None]).all(-1)  # (M, N, *plates) or (M, N, *plates, T)
            if equal.ndim > 2 + self.log_normalizer.ndim:
                equal = (equal | ~np.moveaxis(self.present, 0, -1)).all(-1)
            same = equal if same is None else same & equal
        return np.logaddexp.reduce(np.where(same, self.log_weights, -np.inf), 1)

    def _by_series(self, name, x):
        """(N, T, ...) to (N, *plates, T, rest)."""
        x = np.moveaxis(x, [1 + axis for axis in self.plate_axes[name]], range(1, 1 + self.log_normalizer.ndim))
        in_scan = self.weights.get(name, self.state_weights.get(name)).ndim == 2 + self.log_normalizer.ndim
        return x.reshape(*x.shape[: 1 + self.log_normalizer.ndim + in_scan], -1)


class _Choice(NamedTuple):
    """What a trajectory chooses at one point: a particle of all `sites`, or a state of one."""

    time: int | None
    sites: tuple[str, ...]
    size: int
    is_particle: bool


def enumerate_posterior(
    posterior: Any,
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    params: Mapping[str, Any] = MappingProxyType({}),
    *,
    present: np.ndarray | None = None,
    states: Mapping[str, np.ndarray] = MappingProxyType({}),
    ignore: tuple[str, ...] = (),
    scale: float = 1.0,
    at_most: int = 5000,
) -> Enumeration:
    """Visit every trajectory through the particles of a posterior.

    The guide must be independent over time. Global sites are held at the posterior's draw of them, and count no density.

    posterior: has `particles`, {site: (T, K, *plates, *event)} and without T for initial sites, `globals`, and
    `log_normalizer`, of shape (*plates). present: (T, *plates), false at padded steps, where the guide's density does not
    count (the model must mask its own). states: {site: (S, *event)}, the support of each latent site that the guide does not
    sample. ignore: sites whose density does not count, such as observed ones that read nothing of the chain. scale: how many
    series NumPyro lets each one of a minibatch stand for, which is not to be counted.
    """
    fixed = {**params, **posterior.globals}
    sites = _sites(model, args, kwargs, fixed)
    chain = {*posterior.particles, *states}
    plates = sorted(set.intersection(*(set(sites[name]["plates"]) for name in chain)), key=lambda frame: frame.dim)
    sizes = tuple(frame.size for frame in plates)
    assert np.shape(posterior.log_normalizer) == sizes, (np.shape(posterior.log_normalizer), sizes)
    steps = [name for name in sites if name in chain and sites[name]["in_scan"]]
    length = sites[steps[0]]["shape"][0]

    choices = _choices(posterior, states, sites, steps, length)
    number = int(np.prod([choice.size for choice in choices]))
    assert number <= at_most, f"{number} trajectories are too many to visit"
    numbers = np.unravel_index(np.arange(number), [choice.size for choice in choices])
    values = {name: [] for name in sites if name in chain}
    for choice, picked in zip(choices, numbers, strict=True):
        for name in choice.sites:
            site = sites[name]
            if choice.is_particle:
                column = np.asarray(posterior.particles[name])
                column = _native(column if choice.time is None else column[choice.time], site, plates)
            else:
                support = np.asarray(states[name])
                shape = site["shape"][site["in_scan"] :]
                border = len(shape) - (support.ndim - 1)
                column = np.broadcast_to(
                    support.reshape(len(support), *(1,) * border, *support.shape[1:]), (len(support), *shape)
                )
            values[name].append(column[picked])
    values = {name: np.stack(v, 1) if name in steps else v[0] for name, v in values.items()}

    present = np.ones((length, *sizes), bool) if present is None else np.broadcast_to(present, (length, *sizes))
    log_p_and_q = _scorer(model, guide, args, kwargs, fixed, plates, present, steps, (*posterior.globals, *ignore), scale)
    log_p, log_q = (np.asarray(x).reshape(number, *sizes) for x in log_p_and_q(values))
    log_sizes = np.zeros(sizes)  # of what a trajectory is one of equals: K draws, or the states of an absent step
    for choice in choices:
        counts = True if choice.is_particle else False if choice.time is None else ~present[choice.time]
        log_sizes = log_sizes + np.log(choice.size) * counts
    logs = log_p - log_q - log_sizes
    log_normalizer = np.logaddexp.reduce(logs, 0)
    log_weights = logs - np.where(np.isfinite(log_normalizer), log_normalizer, 0.0)

    weights, state_weights = {}, {}
    for choice, picked in zip(choices, numbers, strict=True):
        mass = np.stack([np.exp(log_weights[picked == k]).sum(0) for k in range(choice.size)])
        for name in choice.sites:
            by_site = weights if choice.is_particle else state_weights
            by_site.setdefault(name, []).append(mass if choice.is_particle else np.moveaxis(mass, 0, -1))
    weights, state_weights = (
        {name: np.stack(mass) if name in steps else mass[0] for name, mass in by_site.items()}
        for by_site in (weights, state_weights)
    )
    plate_axes = {name: tuple(sites[name]["in_scan"] + sites[name]["batch"] + frame.dim for frame in plates) for name in values}
    return Enumeration(log_normalizer, weights, state_weights, log_weights, values, plate_axes, present)


def _sites(model, args, kwargs, fixed):
    """Of every sample site of a program its shape, the number of its batch axes, its plates, and whether it is in a scan."""
    found = {}

    def look():
        for name, site in trace(seed(substitute(model, data=fixed), random.key(0))).get_trace(*args, **kwargs).items():
            if site["type"] == "sample":
                in_scan = bool(site.get("_control_flow_done"))
                shape = jnp.shape(site["value"])
                found[name] = {
                    "shape": shape,
                    "batch": len(shape) - site["fn"].event_dim - in_scan,
                    "plates": tuple(site["cond_indep_stack"]),
                    "in_scan": in_scan,
                }

    jax.eval_shape(look)
    return found


def _choices(posterior, states, sites, steps, length):
    """In the order of time."""
    choices = []
    for time in (None, *range(length)):
        here = [name for name in sites if (name in steps) == (time is not None)]
        if drawn := tuple(name for name in here if name in posterior.particles):
            K = np.shape(posterior.particles[drawn[0]])[int(time is not None)]
            choices.append(_Choice(time, drawn, K, True))
        choices += [_Choice(time, (name,), len(states[name]), False) for name in here if name in states]
    return choices


def _native(column, site, plates):
    """Particles of one point, (K, *plates, ...), in the shape of the model: plates where they are, axes of one element back."""
    shape, batch = site["shape"][site["in_scan"] :], site["batch"]
    front = [batch + frame.dim for frame in plates]
    rest = [axis for axis in range(batch) if axis not in front and shape[axis] > 1] + list(range(batch, len(shape)))
    single = [axis for axis in range(batch) if axis not in front and shape[axis] == 1]
    order = [*front, *rest, *single]
    column = column.reshape(len(column), *(shape[axis] for axis in order))
    return column.transpose(0, *(1 + int(position) for position in np.argsort(order)))


class _Mask(Messenger):
    """Masks each sample site by what `mask_of(site)` says."""

    def __init__(self, fn, mask_of):
        self.mask_of = mask_of
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample":
            msg["fn"] = msg["fn"].mask(self.mask_of(msg))


def _scorer(model, guide, args, kwargs, fixed, plates, present, steps, ignore, scale):
    """All trajectories in, the log densities (N, series) of each series of each under the model and the guide out."""
    sizes = tuple(frame.size for frame in plates)
    aligned = [1] * max([-frame.dim for frame in plates], default=0)
    for frame in plates:
        aligned[frame.dim] = frame.size
    series = np.eye(int(np.prod(sizes)), dtype=bool).reshape(-1, *aligned)
    present = jnp.asarray(present.reshape(len(present), *aligned))

    def score(own, values):
        def mask_in_model(site):
            return False if site["name"] in ignore else own

        def mask_in_guide(site):
            if site["name"] not in values:
                return False
            if site["name"] not in steps:
                return own
            rows = present & own
            between = len(site["fn"].batch_shape) - rows.ndim
            return rows.reshape(len(rows), *(1,) * between, *rows.shape[1:])

        given = {**fixed, **values}
        programs = (_Mask(seed(model, random.key(0)), mask_in_model), _Mask(seed(guide, random.key(0)), mask_in_guide))
        return tuple(log_density(program, args, dict(kwargs), given)[0] / scale for program in programs)

    by_series = jax.vmap(score, (0, None))
    return lambda values: jax.jit(jax.vmap(by_series, (None, 0)))(jnp.asarray(series), values)
