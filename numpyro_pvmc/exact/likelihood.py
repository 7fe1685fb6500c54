"""Estimate the parameters of a program by maximum likelihood, with its chain integrated out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to, constraints
from scipy.optimize import minimize

from numpyro_pvmc.exact.marginal import Marginal, marginalize
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.handlers import is_latent, log_prob, run
from numpyro_pvmc.program.tracebacks import warn_caller, with_short_tracebacks


class Estimate(NamedTuple):
    """Parameters at which the data are most likely.

    :param params: values by name, as :func:`exact_posterior` takes them.
    :param log_evidence: log evidence of all data there.
    :param standard_errors: by name, from the curvature there; NaN where it is not that of a maximum.
    """

    params: dict[str, jax.Array]
    log_evidence: jax.Array
    standard_errors: dict[str, jax.Array]


@with_short_tracebacks
def maximum_likelihood(
    model: Callable, *args: Any, init_params: dict[str, Any] | None = None, max_steps: int = 500, **kwargs: Any
) -> Estimate:
    """The parameters and global sites of a program at which its data are most likely, with the chain integrated out.

    Priors of global sites do not count, but their supports do. The search is BFGS on unconstrained values.

    :param model: a NumPyro program with a chain that :func:`marginalize` takes.
    :param args: arguments of the model, with the data.
    :param init_params: where to start, by name; else parameters start at their initial values, global sites at a draw of their
        prior.
    :param max_steps: of the search, at most.
    :param kwargs: keyword arguments of the model.
    :return: parameters, log evidence and standard errors, by the delta method from the inverse of the negative Hessian.
    :raises ValueError: if there is nothing to estimate, or the evidence is not finite where the search starts.
    :warns UserWarning: if the search ends before its gradient vanishes.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_pvmc.exact import maximum_likelihood
        >>> def model(y):
        ...     scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x_prev, scale))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> estimate = maximum_likelihood(model, jnp.sin(jnp.arange(30.0)))
        >>> bool(0.5 < estimate.params["scale"] < 1.5)
        True
    """
    program = model if isinstance(model, Marginal) else marginalize(model)
    arguments, given = Arguments(args, kwargs), init_params or {}
    sites = run(program, arguments, given, random.key(0))
    transforms = {
        name: biject_to(site["kwargs"].get("constraint", constraints.real)) for name, site in _of_type(sites, "param")
    }
    transforms |= {name: biject_to(site["fn"].support) for name, site in _of_type(sites, "sample") if is_latent(site)}
    if not transforms:
        raise ValueError("The model has no parameters and no global sites, so there is nothing to estimate.")
    start = {name: transforms[name].inv(jnp.asarray(sites[name]["value"], float)) for name in transforms}
    flat, unravel = ravel_pytree(start)

    def constrained(flat):
        return {name: transforms[name](x) for name, x in unravel(flat).items()}

    @jax.jit
    def loss(flat, arguments):
        found = run(program, arguments, constrained(flat), random.key(0))
        return -sum(log_prob(site).sum() for _, site in _of_type(found, "sample") if site["is_observed"])

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    if not np.isfinite(loss(flat, arguments)):
        raise ValueError("The log evidence is not finite where the search starts. Give other `init_params`.")
    numbers = lambda x: tuple(np.asarray(part, float) for part in value_and_grad(jnp.asarray(x, flat.dtype), arguments))
    # In single precision a loss of thousands says no more of a gradient than this.
    least = 1e-5 if flat.dtype == jnp.float64 else 1e-2
    found = minimize(numbers, np.asarray(flat, float), jac=True, method="BFGS", options={"maxiter": max_steps, "gtol": least})
    best = jnp.asarray(found.x, flat.dtype)
    size = np.abs(numbers(best)[1]).max()
    if not size < 100 * least:
        warn_caller(f"The search for the maximum ended where the gradient is still {size:.3g}: {found.message}")
    covariance = jnp.linalg.inv(jax.jit(jax.hessian(loss))(best, arguments))
    slopes = jax.jacfwd(lambda flat: ravel_pytree(constrained(flat))[0])(best)
    _, unravel_constrained = ravel_pytree(constrained(best))
    errors = jnp.sqrt(jnp.diagonal(slopes @ covariance @ slopes.T))
    return Estimate(constrained(best), -loss(best, arguments), unravel_constrained(errors))


def _of_type(sites, kind):
    return [(name, site) for name, site in sites.items() if site["type"] == kind]
