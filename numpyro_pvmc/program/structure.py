"""Describe a Markov chain: names, shapes and roles of its sites, without any arrays."""

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from numpyro_pvmc.program.handlers import Site, log_prob


class Plate(NamedTuple):
    """A plate that encloses all latent sites of the chain: its elements are independent series, `size` of `total`."""

    name: str
    dim: int
    size: int
    total: int


class Latent(NamedTuple):
    """One draw of a latent site: its shapes left and right of the border between batch and event axes.

    `is_bounded` says that its distribution does not have all real numbers. `support` are the values of one of its elements, if
    it is discrete and they are finitely many: if it `moves`, those that it can have at any step, not all at each. Counts above
    `max_count`, declared for each element or for all, are left out; `is_cut` says that there are such. `unlisted` is why a
    discrete site has no `support`.
    """

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    dtype: Any
    support: Sequence[int] | None = None
    is_bounded: bool = False
    is_discrete: bool = False
    moves: bool = False
    max_count: int | tuple[int, ...] | None = None
    is_cut: bool = False
    unlisted: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch_shape + self.event_shape

    def shape_of_one(self, plates: tuple[Plate, ...]) -> tuple[int, ...]:
        """The shape in one series: axes of plates have one element."""
        axes = {len(self.batch_shape) + plate.dim for plate in plates}
        return tuple(1 if axis in axes else size for axis, size in enumerate(self.shape))

    def elements(self, plates: tuple[Plate, ...]) -> int:
        """How many numbers one series has."""
        return math.prod(self.shape_of_one(plates))


class Structure(NamedTuple):
    """What of a program is its chain. Hashable Python values only: nothing here is traced.

    A *factor* is a site of which the chain has a log density: a latent site, or an observed one. Latent sites of the chain are
    those that have particles, `initial_sites` and `step_sites`, and those that are summed over all their values,
    `initial_states` and `step_states`. `free_sites` are latent sites that nothing else reads: they have no density here, and
    are drawn from their own distributions. `subsampled` are the plates that draw a minibatch. `carry_dtypes` are the types of
    the leaves of the carry. `by_value` are the arguments of the program whose numbers bound a count, by their places: with
    other numbers the structure is another. `sum_of` are two counts of a step of which all that is read is their sum; the
    density of the first may read the state. `parameters` are those of the program, with what they look like, and `outside` the
    names of all other sites outside of the scan. `carried` says that the state has components without noise of their own, or
    that an observation after the scan reads the state before its step: the chain is then one of its carry, not of its sites.
    """

    scan_index: int
    length: int
    carry_dtypes: tuple[Any, ...]
    plates: tuple[Plate, ...]
    initial_sites: tuple[Latent, ...]
    step_sites: tuple[Latent, ...]
    global_sites: tuple[str, ...]
    is_state: tuple[bool, ...]
    holding: bool
    masked: bool
    edge_factors: tuple[str, ...]
    node_factors: tuple[str, ...]
    initial_factors: tuple[str, ...]
    later_factors: tuple[str, ...]
    global_factors: tuple[str, ...]
    free_sites: tuple[Latent, ...] = ()
    subsampled: tuple[str, ...] = ()
    initial_states: tuple[Latent, ...] = ()
    step_states: tuple[Latent, ...] = ()
    by_value: tuple[str, ...] = ()
    sum_of: tuple[str, ...] = ()
    parameters: tuple[tuple[str, Hashable], ...] = ()
    outside: tuple[str, ...] = ()
    carried: bool = False

    @property
    def summary(self) -> str:
        """The chain in half a line: latent sites, steps, series."""
        sites = ", ".join(f"'{site.name}'" for site in (*self.initial_latents, *self.step_latents))
        plates = "".join(f", {plate.size} series of plate '{plate.name}'" for plate in self.plates)
        return f"{sites}: T = {self.length} steps{plates}"

    @property
    def initial(self) -> dict[str, Latent]:
        """Latent sites of the chain's initial step that have particles, by name."""
        return {site.name: site for site in self.initial_sites}

    @property
    def step(self) -> dict[str, Latent]:
        """Latent sites of one step that have particles, by name."""
        return {site.name: site for site in self.step_sites}

    @property
    def free(self) -> dict[str, Latent]:
        """Latent sites that nothing else reads, by name."""
        return {site.name: site for site in self.free_sites}

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of all sites that have a log density."""
        own = self.edge_factors + self.node_factors + self.initial_factors + self.later_factors
        return (*(site.name for site in self.initial_latents), *own, *self.global_sites, *self.global_factors)

    @property
    def sites(self) -> dict[str, Latent]:
        """Latent sites of the chain that have particles: the initial ones, then those of a step."""
        return {**self.initial, **self.step}

    @property
    def states(self) -> dict[str, Latent]:
        """Latent sites of the chain that are summed over all their values: the initial ones, then those of a step."""
        return {site.name: site for site in (*self.initial_states, *self.step_states)}

    @property
    def initial_latents(self) -> tuple[Latent, ...]:
        """All latent sites of the chain's initial step."""
        return self.initial_sites + self.initial_states

    @property
    def step_latents(self) -> tuple[Latent, ...]:
        """All latent sites of one step."""
        return self.step_sites + self.step_states

    @property
    def latents(self) -> dict[str, Latent]:
        """All latent sites of the chain, by name."""
        return {site.name: site for site in (*self.initial_latents, *self.step_latents)}

    @property
    def parts(self) -> tuple[Latent, ...]:
        """Two counts of a step whose sum is summed over, in place of their pairs."""
        of_name = {site.name: site for site in self.step_states}
        is_all = bool(self.sum_of) and not self.step_sites and set(of_name) == set(self.sum_of)
        return tuple(of_name[name] for name in self.sum_of) if is_all else ()

    @property
    def scale(self) -> float:
        """How many series each one stands for, in a minibatch."""
        return math.prod(plate.total / plate.size for plate in self.plates)

    @property
    def finite(self) -> tuple[str, ...]:
        """Names of the latent sites of the chain that can be summed over all their values."""
        return tuple(site.name for site in (*self.initial_latents, *self.step_latents) if site.support is not None)

    def summing(self, names: Collection[str]) -> "Structure":
        """The structure of the chain in which some discrete sites are summed over all their values.

        :param names: the names of the sites.
        """

        def split(sites):
            return tuple(s for s in sites if s.name not in names), tuple(s for s in sites if s.name in names)

        (initial_sites, initial_states), (step_sites, step_states) = split(self.initial_latents), split(self.step_latents)
        return self._replace(
            initial_sites=initial_sites, initial_states=initial_states, step_sites=step_sites, step_states=step_states
        )


def refuse_unlisted(sites: Iterable[Latent], why: str = "and the guide does not sample it") -> None:
    """Refuse discrete sites whose values are not known, where they would have to be summed.

    :param sites: latent sites.
    :param why: why they would.
    :raises ValueError: naming the first one, and what its support reads.
    """
    for site in sites:
        if site.is_discrete and site.support is None:
            raise ValueError(
                f"Latent site '{site.name}' is discrete, {why}; it cannot be summed over its values, which are not finitely "
                f"many, or not known to be: its support {site.unlisted}. Declare the largest count that matters, with "
                f"`numpyro.sample('{site.name}', ..., infer={{'max_count': n}})`, or sample the site in a guide, as with "
                "`numpyro.sample(name, dist.Poisson(rate))` whose rate, a parameter, has a leading time axis."
            )


def per_series(log_density: jax.Array, plates: tuple[Plate, ...]) -> jax.Array:
    """Sum a log density over all axes but those of the plates.

    :param log_density: an array of a site's batch shape.
    :return: an array of shape ``(*plates)``.
    """
    ndim = max([log_density.ndim] + [-plate.dim for plate in plates])
    log_density = log_density.reshape((1,) * (ndim - log_density.ndim) + log_density.shape)
    kept = {ndim + plate.dim for plate in plates}
    summed = log_density.sum([axis for axis in range(ndim) if axis not in kept])
    return jnp.broadcast_to(summed, tuple(plate.size for plate in plates))


def align(weights: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Give weights the axes of a site.

    :param weights: an array with trailing axes ``(*plates)``.
    :return: the array, with trailing axes that broadcast with the site's shape.
    """
    shape = [1] * len(latent.shape)
    for plate in structure.plates:
        shape[len(latent.batch_shape) + plate.dim] = plate.size
    return weights.reshape(weights.shape[: weights.ndim - len(structure.plates)] + tuple(shape))


def time_rows(site: Site, length: int, plates: tuple[Plate, ...]) -> jax.Array:
    """Log density of a site after the scan, by time.

    :param site: an observed site, with time as its leading axis.
    :param length: number of steps of the scan.
    :return: an array of shape ``(length, *plates)`` or ``(length + 1, *plates)``.
    :raises ValueError: if the site has no leading time axis.
    """
    fn, shift = site["fn"], 0
    while (not fn.batch_shape or fn.batch_shape[0] not in (length, length + 1)) and isinstance(fn, dist.Independent):
        shift += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    log_density = log_prob({**site, "fn": fn})
    if not log_density.ndim or log_density.shape[0] not in (length, length + 1):
        raise ValueError(
            f"Site '{site['name']}' reads the outputs of the chain's `scan`, but its log density of shape "
            f"{log_density.shape} has no leading axis of {length} or {length + 1} times. Observe it inside the body of the "
            "scan, or give it time as its first axis."
        )
    shifted = tuple(plate._replace(dim=plate.dim - shift) for plate in plates)
    return jax.vmap(lambda row: per_series(row, shifted))(log_density)


def _axes(latent: Latent, structure: Structure):
    """Axes of a site: those of plates, then other batch axes of more than one element, then those of the event."""
    border = len(latent.batch_shape)
    plates = [border + plate.dim for plate in structure.plates]
    others = [axis for axis in range(border) if axis not in plates and latent.batch_shape[axis] != 1]
    return plates + others + list(range(border, len(latent.shape)))


def to_canonical(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Move plates to the front of a site's axes, and drop batch axes of one element that are no plate.

    :param x: an array whose trailing axes are those that the model gives the site.
    :return: an array of shape ``(..., *plates, *event)``; batch axes that are no plate count as event axes.
    """
    axes, leading = _axes(latent, structure), x.ndim - len(latent.shape)
    singletons = [leading + axis for axis in range(len(latent.shape)) if axis not in axes]
    order = [*range(leading), *(leading + axis for axis in axes), *singletons]
    return x.transpose(order).reshape(x.shape[:leading] + tuple(latent.shape[axis] for axis in axes))


def from_canonical(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Undo :func:`to_canonical`.

    :param x: an array of shape ``(..., *plates, *event)``.
    :return: an array whose trailing axes are those that the model gives the site.
    """
    axes = _axes(latent, structure)
    leading = x.ndim - len(axes)
    order = [*range(leading), *(leading + int(position) for position in np.argsort(axes))]
    return x.transpose(order).reshape(x.shape[:leading] + latent.shape)
