"""Find the mode of the states of a chain, and the Gaussian with the curvature there.

The log density of all states of a series, on their unconstrained scale, is maximised by Newton steps. Neighbours in time alone
interact, so its second derivatives are a matrix of blocks on three diagonals, and a step costs one pass forwards through the
series, and one back. At the mode the inverse of that matrix has the covariances of the Gaussian on its diagonal. For a chain
that is linear and Gaussian this is the exact smoother, after one step.

Shapes: P time steps (the initial step, if it has sites, and T steps), N series, D coordinates.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from numpyro_pvmc.chain.chain import Chain, presence
from numpyro_pvmc.chain.densities import Particles, target
from numpyro_pvmc.chain.unconstrained import Coordinates, from_coordinates, log_jacobians
from numpyro_pvmc.guides.gaussian import Proposal
from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.ops.gaussian import Moments, dense

_LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e8


class Points(NamedTuple):
    """All time steps of all series in arrays of one shape, and what of them is there.

    Where the initial step has fewer coordinates than a step, or more, the missing ones stand as absent. Absent time steps come
    after the present ones, so that those that interact are neighbours; `order` says where a time step was.
    """

    mean: Float[Array, "P N D"]
    factor: Float[Array, "P N D D"]
    present: Bool[Array, "P N D"]
    order: Int[Array, "P N 1"]


def laplace(chain: Chain, coordinates: Coordinates, start: Proposal, iterations: int = 30) -> Proposal:
    """The Gaussian at the mode of the states of a chain, given its parameters and global sites.

    A step of Newton's method is damped where it would not raise the density: that of each series by itself, and not at all at
    first. The method may end at one mode of several; and it needs densities that are twice
    differentiable.

    :param start: Gaussians in these coordinates to start from. A series at whose end point the density is not concave keeps
        their covariances, and an absent step all of them.
    :param iterations: how many steps to try.
    :return: Gaussians with full covariances: for each time step its mode, and the covariance of the joint Gaussian there.
    :raises ValueError: if the density cannot be differentiated twice.

    **References**

    1. *Approximate Bayesian inference for latent Gaussian models by using integrated nested Laplace approximations*,
       Håvard Rue, Sara Martino, Nicolas Chopin (JRSS B 2009).
    2. *A method for the solution of certain non-linear problems in least squares*, Kenneth Levenberg (1944), and *An algorithm
       for least-squares estimation of nonlinear parameters*, Donald Marquardt (1963).

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc.chain.chain import read_chain
        >>> from numpyro_pvmc.chain.reading import read_structure
        >>> from numpyro_pvmc.chain.unconstrained import coordinates_of_model
        >>> from numpyro_pvmc.guides.gaussian import Proposal
        >>> from numpyro_pvmc.guides.laplace import laplace
        >>> from numpyro_pvmc.ops.gaussian import Moments
        >>> from numpyro_pvmc.program.arguments import Arguments
        >>> def model(y):
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, 0.3))
        ...         numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> arguments = Arguments((jnp.array([2.0, 3.0, 5.0, 8.0]),))
        >>> chain = read_chain(read_structure(model, arguments, {}), model, arguments, {})
        >>> start = Proposal(None, Moments(jnp.zeros((4, 1)), jnp.ones((4, 1))))
        >>> found = laplace(chain, coordinates_of_model(chain), start)
        >>> [round(float(mode), 1) for mode in found.steps.mean[:, 0]], found.steps.factor.shape
        ([0.5, 0.9, 1.3, 1.6], (4, 1, 1))
    """
    if iterations < 1:
        raise ValueError(f"`iterations` must be a positive integer, but got {iterations}.")
    points = _points(chain, coordinates, start)
    number, width = points.mean.shape[0], points.mean.shape[2]
    weight = 1 / jnp.sum(points.factor**2, -1)

    def log_density(z):
        # An absent coordinate must have some distribution, that of no other coordinate.
        alone = -0.5 * jnp.where(points.present, 0.0, weight * (z - points.mean) ** 2).sum((0, 2))
        return _log_joint(chain, coordinates, jnp.where(points.present, z, points.mean), points.order) + alone

    gradient = jax.grad(lambda z: log_density(z).sum())

    def precision(z):
        """Blocks of minus the second derivatives: on the diagonal, and below it.

        Points three apart have no block in common, so one product with the matrix gives a column of a third of the blocks.
        """
        colour = jnp.arange(number) % 3
        is_colour = (colour == jnp.arange(3)[:, None]).astype(z.dtype)
        along = is_colour[:, None, :, None] * jnp.eye(width, dtype=z.dtype)[:, None]  # [colour, column, point, row]
        product = lambda tangent: jax.jvp(gradient, (z,), (jnp.broadcast_to(tangent[:, None], z.shape),))[1]
        columns = -jax.vmap(jax.vmap(product))(along)  # [colour, column, point, series, row]
        block = lambda which: jnp.moveaxis(columns[which, :, jnp.arange(number)], 1, -1)
        below = block((colour - 1) % 3).at[0].set(0.0)
        on = block(colour)
        return (on + jnp.swapaxes(on, -1, -2)) / 2, below

    def step(state, _):
        z, log_p, damping = state
        on, below = precision(z)
        damped = on + damping[:, None, None] * weight[..., None] * jnp.eye(width, dtype=z.dtype)
        moved, _ = _solve(damped, below, gradient(z))
        moved = z + moved
        log_moved = log_density(moved)
        rises = (log_moved > log_p) & jnp.isfinite(moved).all((0, 2))
        softer = jnp.where(damping > _LEAST_DAMPING, damping / 10, 0.0)
        harder = jnp.clip(damping * 10, _LEAST_DAMPING, _MOST_DAMPING)
        return (jnp.where(rises[:, None], moved, z), jnp.where(rises, log_moved, log_p), jnp.where(rises, softer, harder)), None

    log_start = log_density(points.mean)
    log_start = jnp.where(jnp.isfinite(log_start), log_start, -jnp.inf)
    try:
        (z, _, _), _ = lax.scan(step, (points.mean, log_start, jnp.zeros_like(log_start)), length=iterations)
        on, below = precision(z)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"The density of the model's states {sorted(chain.structure.sites)} cannot be differentiated twice, as the search "
            "for its mode needs; see the error above. Loops of an unknown number of turns, and callbacks to "
            "Python, are common causes. Start elsewhere: proposals that are refitted to weighted particles need no derivatives."
        ) from error
    _, factor = _solve(on, below, jnp.zeros_like(z))
    sound = jnp.isfinite(factor).all((0, 2, 3))[:, None, None] & points.present.any(-1)[..., None, None]
    return _proposal(chain, coordinates, points, z, jnp.where(sound, factor, points.factor))


def _points(chain, coordinates, start):
    plates = [plate.size for plate in chain.structure.plates]
    sizes = [sum(block.size for block in blocks) for blocks in coordinates]
    width = max(sizes)

    def of_point(moments, present):
        moments, missing = dense(moments), width - moments.mean.shape[-1]
        shape = (len(moments.mean), math.prod(plates))
        mean = jnp.broadcast_to(moments.mean, (len(moments.mean), *plates, width - missing)).reshape(*shape, -1)
        factor = jnp.broadcast_to(moments.factor, (*moments.factor.shape[:1], *plates, *moments.factor.shape[-2:]))
        factor = jnp.pad(factor.reshape(*shape, *factor.shape[-2:]), ((0, 0), (0, 0), (0, missing), (0, missing)))
        filled = jnp.diag((jnp.arange(width) >= width - missing).astype(mean.dtype))
        aside = ((0, 0), (0, 0), (0, missing))
        return jnp.pad(mean, aside), factor + filled, jnp.pad(present.reshape(*shape, -1), aside)

    there = presence(chain)
    length = chain.structure.length
    full = lambda block: jnp.ones((length, *plates, 1), bool) if there is None else there.sites[block.latent.name][..., None]
    at_steps = [jnp.broadcast_to(full(block), (length, *plates, block.size)) for block in coordinates.steps]
    parts = [of_point(start.steps, jnp.concatenate(at_steps, -1))]
    if coordinates.initial:
        parts.insert(0, of_point(start.initial, jnp.ones((1, *plates, sizes[0]), bool)))
    mean, factor, present = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    order = jnp.argsort(~present.any(-1), axis=0, stable=True)[..., None]
    sort = lambda x: jnp.take_along_axis(x, order, 0)
    return Points(sort(mean), jnp.take_along_axis(factor, order[..., None], 0), sort(present), order)


def _by_time(order, sorted_points):
    place = jnp.argsort(order, axis=0)
    return jnp.take_along_axis(sorted_points, place.reshape(place.shape + (1,) * (sorted_points.ndim - place.ndim)), 0)


def _log_joint(chain, coordinates, z, order):
    """Log density of the unconstrained states, by series."""
    structure = chain.structure
    plates = [plate.size for plate in structure.plates]
    initial, steps = _parts(coordinates, _by_time(order, z), plates)
    at_start, at_steps = {}, from_coordinates(coordinates.steps, steps)
    if initial is not None:
        at_start = from_coordinates(coordinates.initial, initial)
    particles = Particles(
        {name: value[None] for name, value in at_start.items()}, {name: value[:, None] for name, value in at_steps.items()}
    )
    log_p, edges = target(chain, particles, closed_form=False)
    total = log_p[..., 0].sum(0) + jax.vmap(edges.function)(edges.inputs)[..., 0, 0].sum(0)
    if initial is not None:
        total = total + sum(log_jacobians(structure, coordinates.initial, initial).values())
    volumes, there = jax.vmap(functools.partial(log_jacobians, structure, coordinates.steps))(steps), presence(chain)
    for name, volume in volumes.items():
        total = total + (volume if there is None else jnp.where(there.sites[name], volume, 0.0)).sum(0)
    return total.reshape(-1)


def _parts(coordinates, z, plates):
    """The time steps by time as those of the initial step, `None` without any, and of the steps."""
    sizes = [sum(block.size for block in blocks) for blocks in coordinates]
    z = z.reshape(len(z), *plates, -1)
    if not coordinates.initial:
        return None, z[..., : sizes[1]]
    return z[0, ..., : sizes[0]], z[1:, ..., : sizes[1]]


def _proposal(chain, coordinates, points, z, factor):
    plates = [plate.size for plate in chain.structure.plates]
    mean = jnp.where(points.present, z, points.mean)
    mean, factor = _by_time(points.order, mean), _by_time(points.order, factor)
    factor = factor.reshape(len(factor), *plates, *factor.shape[-2:])
    first, rest = _parts(coordinates, mean, plates)
    if first is None:
        return Proposal(None, Moments(rest, factor))
    cut = lambda factor, size: factor[..., :size, :size]
    initial = Moments(first[None], cut(factor[:1], first.shape[-1]))
    return Proposal(initial, Moments(rest, cut(factor[1:], rest.shape[-1])))


@full_precision
def _solve(
    on: Float[Array, "P N D D"], below: Float[Array, "P N D D"], right: Float[Array, "P N D"]
) -> tuple[Float[Array, "P N D"], Float[Array, "P N D D"]]:
    """Solve with a positive definite matrix of blocks on three diagonals.

    :param on: the blocks on the diagonal.
    :param below: the blocks left of them; the first is zero.
    :param right: the right hand side.
    :return: the solution, and Cholesky factors of the blocks of the inverse on the diagonal; NaN for a matrix that is not
        positive definite.
    """
    transposed = lambda x: jnp.swapaxes(x, -1, -2)
    times = lambda a, x: jnp.einsum("nij,nj->ni", a, x)
    eye = jnp.broadcast_to(jnp.eye(on.shape[-1], dtype=on.dtype), on.shape[1:])

    def forwards(before, here):
        inverse_before, y_before = before
        diagonal, left, right = here
        coupling = left @ transposed(inverse_before)
        triangle = jnp.linalg.cholesky(diagonal - coupling @ transposed(coupling))
        inverse = solve_triangular(triangle, eye, lower=True)
        y = times(inverse, right - times(coupling, y_before))
        return (inverse, y), (inverse, coupling, y)

    def backwards(after, here):
        x_after, covariance_after, coupling_after = after
        inverse, coupling, y = here
        x = times(transposed(inverse), y - times(transposed(coupling_after), x_after))
        spread = eye + transposed(coupling_after) @ covariance_after @ coupling_after
        covariance = transposed(inverse) @ spread @ inverse
        return (x, covariance, coupling), (x, covariance)

    nothing = jnp.zeros_like(on[0])
    _, passed = lax.scan(forwards, (eye, jnp.zeros_like(right[0])), (on, below, right))
    _, (x, covariance) = lax.scan(backwards, (jnp.zeros_like(right[0]), nothing, nothing), passed, reverse=True)
    return x, jnp.linalg.cholesky(covariance)
