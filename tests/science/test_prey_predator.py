"""The prey-predator experiment of the PVMC paper under its true dynamics: a refitted proposal for tight transitions.

The smoothing error under the true dynamics was 0.052 for very many particles, the filtering error 0.124.
"""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prey_predator
from numpyro_pvmc import PVMC
from record import record

LONG_RUNS = True


@pytest.mark.slow
@pytest.mark.parametrize(("num_particles", "rounds", "at_most"), [(64, 25, 0.08), (256, 12, 0.065)])
def test_tempered_from_a_blind_start(num_particles, rounds, at_most):
    states, counts = prey_predator.simulate(16, seed=1)
    pvmc = PVMC(prey_predator.model, num_particles=num_particles)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "After refinement")  # a few steps in a thousand
        posterior = pvmc.posterior(jax.random.key(1), {}, jnp.asarray(counts), refine=rounds, temper=0.02)
    weights = np.exp(np.asarray(posterior.log_weights["log_x"]))
    mean = np.einsum("tkn,tknd->tnd", weights, np.exp(np.asarray(posterior.particles["log_x"])))
    error = ((mean - states) ** 2).sum(-1).mean()
    setting = f"true dynamics, refitted from a blind start, K = {num_particles}, {rounds} tempered rounds"
    record("prey_predator", setting, "smoothing MSE", error, "floor 0.052", time.perf_counter() - started)
    assert error <= at_most
