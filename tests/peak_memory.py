"""A value and a gradient in a process of its own, and the most memory it held: a peak does not go down."""

import subprocess
import sys

PROGRAM = r"""
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from numpyro_pvmc import ImportanceSmoothedELBO, SupervisedELBO

T, K, SERIES = map(int, sys.argv[1:])


def model(y):
    slope = numpyro.param("slope", 0.9)
    series = numpyro.plate("series", SERIES)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(slope * x_prev, 0.5).to_event(1))
            numpyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scan(step, x_0, y)


def guide(y):
    loc = numpyro.param("loc", y)
    with numpyro.plate("series", SERIES):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(loc, 0.5).to_event(1))


y = jax.random.normal(jax.random.key(0), (T, SERIES, 2))
loss = LOSS
value, slope = jax.jit(jax.value_and_grad(lambda p: loss.loss(jax.random.key(1), p, model, guide, y)))({"slope": 0.9, "loc": y})
assert jnp.isfinite(value) and jnp.isfinite(slope["slope"]) and jnp.isfinite(slope["loc"]).all()
# Not `ru_maxrss`: a child process begins with the peak of its parent.
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_memory(T, K, series, loss="ImportanceSmoothedELBO(K)"):
    """Bytes, Python and JAX themselves included, for states of two dimensions."""
    program = [sys.executable, "-c", PROGRAM.replace("LOSS", loss), *map(str, (T, K, series))]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024
