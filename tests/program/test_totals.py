"""Which two counts of a step are read through their sum only."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments


def population(kind):
    def model(y):
        def step(previous, y_t):
            g = numpyro.sample("g", dist.Poisson(1.5), infer={"max_count": 6})
            survivors = dist.BetaBinomial(2.0 + g, 1.0, previous) if kind == "reads the other" else dist.Binomial(previous, 0.8)
            s = numpyro.sample("s", survivors, infer={"max_count": 10})
            n = s + g + jnp.where(s > 5, 1, 0) if kind == "bent" else s + 2 * g if kind == "weighted" else s + g
            numpyro.sample("y", dist.Normal(0.5 * n, 1.0), obs=y_t)
            if kind == "seen apart":
                numpyro.sample("z", dist.Poisson(1.0 + g), obs=y_t)
            if kind == "both read the state":
                numpyro.sample("z", dist.Normal(previous, 1.0), obs=y_t)
            return n, (s, g)

        return scan(step, 4, y)[1]

    def with_observation(y):
        s, _ = model(y)
        numpyro.sample("later", dist.Normal(s, 1.0), obs=y)

    return with_observation if kind == "seen later" else model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", ("s", "g")),
        *((kind, ()) for kind in ("bent", "weighted", "seen apart", "both read the state", "reads the other", "seen later")),
    ],
)
def test_counts_that_are_read_through_their_sum(kind, expected):
    assert read_structure(population(kind), Arguments((jnp.ones(3),)), {}).sum_of == expected
