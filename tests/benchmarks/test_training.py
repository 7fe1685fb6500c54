"""A step of training by ours and by other methods on the linear-Gaussian experiment, and how good its bound is.

Each row keeps the root mean square error of the estimate of log Z, or of the bound, for one series.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO
from peers import RESAMPLING, training_step

from linear_gaussian import DECAY, SERIES, model
from numpyro_pvmc import ImportanceSmoothedELBO

LONG_RUNS = True
K, KEYS, ROUNDS = 64, 8, 21


@pytest.fixture
def row(measure, exact):
    """Measure a function of a key and the parameter that returns minus the log evidence of all series, and its gradient."""

    def row(function, **facts):
        function, decay = jax.jit(function), jnp.float32(DECAY)
        found = np.array([-function(key, decay)[0] for key in jax.random.split(jax.random.key(1), KEYS)])
        error = float(np.sqrt(np.mean((found - exact[0].sum()) ** 2)) / SERIES)
        measure(function, jax.random.key(0), decay, rounds=ROUNDS, **facts, **{"error of log Z": error})

    return row


# The two of NumPyro take K whole trajectories.
@pytest.mark.parametrize(
    "loss", [ImportanceSmoothedELBO(K), Trace_ELBO(K), RenyiELBO(alpha=0.0, num_particles=K)], ids=["pvmc", "elbo", "renyi"]
)
def test_bound(row, data, guide, loss):
    step = lambda key, decay: jax.value_and_grad(lambda p: loss.loss(key, p, model, guide, data))({"decay": decay})
    own = isinstance(loss, ImportanceSmoothedELBO)
    row(step, method="PVMC" if own else f"NumPyro SVI, {type(loss).__name__}", K=K)


@pytest.mark.parametrize("num_particles", [K, 256])
def test_filter(row, data, num_particles):
    step = lambda key, decay: training_step(key, data, decay, num_particles, RESAMPLING["xla"])
    row(step, method="bootstrap filter, stop-gradient resampling (cuthbert)", K=num_particles)
