"""Counts that cannot be summed, and largest counts that are none: each says so in words of its own."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.exact import exact_posterior


def counting(distribution, most, start):
    """A program with one count, whose distribution reads the state, the inputs and a parameter."""

    def model(y):
        total = numpyro.param("total", 5.0)

        def step(previous, y_t):
            infer = {} if most is None else {"max_count": most}
            n = numpyro.sample("n", distribution(previous, y_t, total), infer=infer)
            numpyro.sample("y", dist.Normal(n, 1.0), obs=y_t)
            return n, None

        scan(step, start, y)

    return model


@pytest.mark.parametrize(
    ("distribution", "most", "message"),
    [
        (lambda n, y, total: dist.Poisson(n + 1.0), None, "support has no end"),
        (
            lambda n, y, total: dist.Binomial(jnp.floor(total).astype(int), 0.5),
            None,
            "reads parameters or global sites, of which no bound",
        ),
        (
            lambda n, y, total: dist.Binomial((9 * jnp.sin(n)).astype(int), 0.5),
            None,
            "reads the state before, of which no bound is known",
        ),
        (lambda n, y, total: dist.Binomial(n + 9, 0.5), -1, r"`max_count` of site 'n' is -1\. Give it a whole number"),
        (lambda n, y, total: dist.Binomial(n + 9, 0.5), 7.5, r"`max_count` of site 'n' is 7\.5\. Give it a whole number"),
        (lambda n, y, total: dist.Binomial(n + 9, 0.5), np.array([3, 4]), r"of site 'n' has the shape \(2,\)"),
        (lambda n, y, total: dist.Poisson(n + 1.0), 4096, "4097 joint values.*declare a smaller largest count"),
    ],
)
def test_what_is_refused(distribution, most, message):
    with pytest.raises(ValueError, match=message):
        exact_posterior(counting(distribution, most, 0), {"total": 5.0}, jnp.ones(3))


def test_what_has_no_largest_count():
    y = jnp.ones(3)
    with pytest.raises(ValueError, match="Site 'n' is continuous, and declares a `max_count`"):
        exact_posterior(counting(lambda n, y, total: dist.Normal(n, 1.0), 7, 0.0), {}, y)
    with pytest.raises(ValueError, match="support has no end"):
        exact_posterior(counting(lambda n, y, total: dist.Geometric(0.5), None, 0.0), {}, y)
