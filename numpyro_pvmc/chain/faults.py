"""Find what of a site's distribution makes its log density no number, and put it into words."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_pvmc.program.distributions import base_distribution
from numpyro_pvmc.program.handlers import Site
from numpyro_pvmc.program.structure import Structure


class Flaws(NamedTuple):
    """What is wrong with the parameters of a distribution: whether each thing that may be is, by what to say of it.

    `spectrum` has the least and the largest eigenvalue of a covariance matrix that has no Cholesky factor; else NaN.
    """

    found: dict[str, jax.Array]
    spectrum: jax.Array


def flaws(site: Site) -> Flaws:
    """Look at the parameters of a site's distribution, those that the program gave.

    :return: whether any element of each is NaN, or none that the distribution can have.
    """
    distribution = base_distribution(site["fn"])
    while isinstance(distribution, dist.TransformedDistribution) and not distribution.arg_constraints:
        distribution = base_distribution(distribution.base_dist)
    given, found, matrix = vars(distribution), {}, None
    if isinstance(distribution, dist.MultivariateNormal):
        matrix = given.get("covariance_matrix")
    for name, constraint in distribution.arg_constraints.items():
        value = given.get(name)
        # A root that NumPyro could not take is no fault of its own.
        if value is None or (name == "scale_tril" and matrix is not None):
            continue
        is_nan = jnp.isnan(value).any()
        found[f"its `{name}` is not a number"] = is_nan
        if not constraints.is_dependent(constraint) and name != "covariance_matrix":
            words = (
                "not positive" if constraint is constraints.positive else f"none that a {type(distribution).__name__} can have"
            )
            found[f"its `{name}` is {words}"] = ~is_nan & ~jnp.all(constraint(value))
    spectrum = jnp.full(2, jnp.nan)
    if matrix is not None:
        has_no_root = jnp.isfinite(matrix).all((-2, -1)) & jnp.isnan(given["scale_tril"]).any((-2, -1))
        eigenvalues = jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(matrix), matrix, 0.0))
        least = jnp.where(has_no_root[..., None], eigenvalues, jnp.nan)
        spectrum = jnp.stack([jnp.nanmin(least), jnp.nanmax(least)])
    return Flaws(found, spectrum)


def any_of(many: Flaws) -> Flaws:
    """The flaws of several distributions together.

    :param many: flaws with a leading axis.
    """
    least, largest = jnp.nanmin(many.spectrum[..., 0], 0), jnp.nanmax(many.spectrum[..., 1], 0)
    return Flaws({what: where.any(0) for what, where in many.found.items()}, jnp.stack([least, largest], -1))


def reason(found: Flaws | None) -> tuple[str, str]:
    """Say what is wrong with a distribution, and what to do.

    :param found: flaws of one distribution, not traced.
    :return: a clause that begins with a colon, which is empty if nothing is known; advice.
    """
    if found is not None and not np.isnan(found.spectrum[0]):
        least, largest = found.spectrum
        dtype = found.spectrum.dtype
        double = ", or compute in float64: `jax.config.update('jax_enable_x64', True)`" if dtype == np.float32 else ""
        return (
            f": its covariance matrix is not positive definite in {dtype}, with eigenvalues from {least:.2g} to {largest:.2g}",
            f"Write it without differences of nearly equal numbers (`jnp.expm1`){double}.",
        )
    where = "the inputs of the scan, other arguments of the model, values of parameters"
    if found is not None and (known := [what for what, is_there in found.found.items() if is_there]):
        return f": {' and '.join(known)}", f"Look at what it is computed from: {where}."
    return "", f"Look for NaN, or a scale that is not positive, in what its distribution reads: {where}."


def series(index: Sequence[int], structure: Structure) -> str:
    """Say which series is meant, if there are several.

    :param index: its place along each plate around the chain.
    """
    places = [f"{number} of plate '{plate.name}'" for number, plate in zip(index, structure.plates, strict=True)]
    return f" in series {' and '.join(places)}" if places else ""


def at_point(number: int) -> str:
    """Say which time step of a chain is meant.

    :param number: 0 for the initial step, t + 1 for time t of the scan.
    """
    return f"at time {number - 1} of the scan" if number else "at the initial step"


def first_place(where: np.ndarray) -> tuple[int, ...]:
    """The first index at which an array is true.

    :param where: an array of booleans, some of them true.
    """
    return tuple(int(i) for i in np.argwhere(where)[0])
