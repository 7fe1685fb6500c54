"""What `PVMC.run` costs beside its updates: the first call, and the progress bar. The quickstart's model and guide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from floor import seconds

from numpyro_pvmc import PVMC, AutoSmoothedNormal
from numpyro_pvmc.datasets import load_sp500_returns
from volatility import model

LONG_RUNS = True
K, STEPS = 64, 100


def fit():
    return PVMC(model, AutoSmoothedNormal(model), optax.adam(0.1), num_particles=K)


@pytest.fixture(scope="module")
def y():
    return jnp.asarray(load_sp500_returns(2516)[0], jnp.float32)


def test_first_run_of_one_step(benchmark, y):
    """Reading the program, checking it, compiling, and one step."""
    first = lambda: jax.block_until_ready(fit().run(jax.random.key(0), 1, y, progress_bar=False).losses)
    benchmark.pedantic(first, setup=jax.clear_caches, rounds=3)


def test_first_posterior(benchmark, y):
    params = {"mu": -0.5, "s": 0.3, "phi": 0.95}
    first = lambda: jax.block_until_ready(fit().posterior(jax.random.key(0), params, y, refine=4).log_normalizer)
    benchmark.pedantic(first, setup=jax.clear_caches, rounds=3)


def test_progress_bar(benchmark, y):
    """A run that shows it, after one that does not, in each round."""
    pvmc, hidden = fit(), []
    run = lambda shown: pvmc.run(jax.random.key(0), STEPS, y, progress_bar=shown).losses
    benchmark.pedantic(run, (True,), setup=lambda: hidden.append(seconds(run, False)), rounds=15, warmup_rounds=1)
    benchmark.extra_info |= {"steps": STEPS, "seconds without": np.median(hidden[1:])}
