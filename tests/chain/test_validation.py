"""NumPyro's checks of what distributions are given, which are on by default, see no values but those that a program can
have.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC


def test_hold_of_a_positive_state_with_a_matrix_of_probabilities():
    """A hold is recognised by arbitrary numbers: zero is no positive state, and the rows of a matrix do not sum to one."""

    def model(y, present, move):
        def step(carry, present_t):
            z_prev, x_prev = carry
            with numpyro.handlers.mask(mask=present_t):
                z = numpyro.sample("z", dist.Categorical(move[z_prev]))
                x = numpyro.sample("x", dist.LogNormal(0.9 * jnp.log(x_prev) + z, 0.5))
            return (jnp.where(present_t, z, z_prev), jnp.where(present_t, x, x_prev)), x

        _, x = scan(step, (0, 1.0), present)
        with numpyro.handlers.mask(mask=present):
            numpyro.sample("y", dist.Normal(jnp.sin(jnp.log(x)), 0.7), obs=y)

    def guide(y, present, move):
        numpyro.sample("z", dist.Categorical(jnp.full((3, 2), 0.5)))
        numpyro.sample("x", dist.LogNormal(jnp.zeros(3), 0.8))

    move = jnp.array([[0.7, 0.3], [0.2, 0.8]])
    with numpyro.validation_enabled():
        pvmc = PVMC(model, guide, num_particles=2, particles="iid")
        posterior = pvmc.posterior(jax.random.key(0), {}, jnp.ones(3), jnp.array([True, False, True]), move)
    assert jnp.isfinite(posterior.log_normalizer)
