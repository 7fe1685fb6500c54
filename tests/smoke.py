"""Fit a small model, write its posterior to netCDF and read it back: what a Python and its newest packages must do."""

import sys
import tempfile
from pathlib import Path

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import PVMC


def model(y):
    scale = numpyro.param("scale", 0.3, constraint=dist.constraints.positive)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


y = jnp.sin(jnp.arange(20.0))
pvmc = PVMC(model, num_particles=8)
result = pvmc.run(jax.random.key(0), 20, y, progress_bar=False)
posterior = pvmc.posterior(jax.random.key(1), result.params, y)
assert np.isfinite(result.losses).all()
data = posterior.to_arviz(num_samples=10)
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "posterior.nc")
    data.to_netcdf(path)
    if int(arviz.__version__.split(".")[0]) >= 1:
        back = xarray.open_datatree(path, engine="h5netcdf").load()
    else:
        back = arviz.from_netcdf(path)
assert back["posterior"]["x"].dims == ("chain", "draw", "time")
np.testing.assert_array_equal(back["posterior"]["x"], data["posterior"]["x"])
np.testing.assert_array_equal(back["smoothing"]["x_mean"], data["smoothing"]["x_mean"])
print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}, ArviZ {arviz.__version__}: fitted, written and read back")
