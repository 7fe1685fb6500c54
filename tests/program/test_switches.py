"""JAX's debugging switches do not stop a sound program, with an observation missing under a mask, or in a plate."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from numpyro_pvmc import PVMC
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.checks import check_guide
from numpyro_pvmc.program.arguments import Arguments

Y = np.array([[0.3, 0.1], [np.nan, 0.4], [0.2, -0.5]], np.float32)


def model(y):
    series = numpyro.plate("series", 2)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 1.0))
            with numpyro.handlers.mask(mask=~jnp.isnan(y_t)):
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


SWITCHES = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "nan": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
}


@pytest.mark.parametrize("guide", [AutoNormal, pytest.param(lambda model: None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "switch", [pytest.param(s, id=n, marks=pytest.mark.slow if n == "leaks" else ()) for n, s in SWITCHES.items()]
)  # where leaks are looked for, nothing that has been traced is kept
def test_a_sound_program_passes(switch, guide):
    with switch():
        pvmc = PVMC(model, guide(model), num_particles=2)
        params = pvmc.run(jax.random.key(0), 2, Y, progress_bar=False, grow=False).params
        posterior = pvmc.posterior(jax.random.key(1), params, Y)
        samples = pvmc.sample_posterior(jax.random.key(2), params, Y, sample_shape=(3,))
    assert np.isfinite(posterior.log_normalizer).all()
    assert np.isfinite(samples["x"]).all()


def test_reading_a_guide_leaks_nothing():
    def guide(y):
        with numpyro.plate("series", 2):
            numpyro.sample("x_0", dist.Normal(numpyro.param("start", jnp.zeros(2)), 1.0))
            numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.zeros((3, 2))), 1.0))

    arguments = Arguments((Y,))
    structure = read_structure(model, arguments, {})
    with jax.checking_leaks():
        assert check_guide(structure, guide, arguments, {}).not_reparameterised == ()
