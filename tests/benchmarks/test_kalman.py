"""The evidence of a linear-Gaussian chain with its gradient, against cuthbert and statsmodels.

1,000 steps, 13 states, 64 series: ``pytest tests/benchmarks/test_kalman.py``. Cuthbert predicts and updates in turn, in square
roots of covariances. Statsmodels' filter has no gradient: what is measured is the value for one series.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm
from cuthbertlib.kalman import filter_update, predict
from jax import lax

from numpyro_pvmc.ops.kalman import Matrices, log_evidence

LONG_RUNS = True  # else XLA would leave out the optimisations that are measured here
T, D, SERIES = 1000, 13, 64


def matrices():
    rng = np.random.default_rng(0)
    F = np.broadcast_to(0.99 * np.linalg.qr(rng.normal(size=(D, D)))[0], (T, D, D)).copy()
    root_Q = np.broadcast_to(0.1 * np.eye(D), (T, D, D)).copy()
    F[0], root_Q[0] = 0.0, 10 * np.eye(D)
    H, none = np.broadcast_to(rng.normal(size=(1, D)), (T, 1, D)), np.zeros((T, 1))
    return Matrices(F, np.zeros((T, D)), root_Q, H, none, np.full((T, 1, 1), 0.3), none)


def ours(scale, chain, ys):
    of_all = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (T, SERIES, *x.shape[1:])), chain)
    return log_evidence(of_all._replace(root_Q=scale * of_all.root_Q, y=ys)).sum()


def cuthberts(scale, chain, ys):
    def one(y):
        def advance(state, row):
            predicted = predict(*state, row.F, row.c, row.root_Q)
            state, log_density = filter_update(*predicted, row.H, row.d, row.root_R, row.y, jnp.zeros((), y.dtype))
            return state, log_density

        start = jnp.zeros_like(chain.c[0]), jnp.eye(D, dtype=y.dtype)
        return lax.scan(advance, start, chain._replace(root_Q=scale * chain.root_Q, y=y))[1].sum()

    return jax.vmap(one, in_axes=1)(ys).sum()


@pytest.mark.parametrize("precision", [64, 32])
@pytest.mark.parametrize("way", [ours, cuthberts])
def test_value_and_gradient(benchmark, way, precision):
    with jax.enable_x64(precision == 64):
        chain = jax.tree.map(lambda x: jnp.asarray(x, float), matrices())
        ys = jnp.asarray(np.random.default_rng(1).normal(size=(T, SERIES, 1)), float)
        function = jax.jit(jax.value_and_grad(way))
        one = jnp.ones((), ys.dtype)
        run = lambda: jax.block_until_ready(function(one, chain, ys))
        run()
        benchmark.pedantic(run, rounds=5)


def test_statsmodels_value_of_one_series(benchmark):
    chain = matrices()
    model = sm.tsa.statespace.MLEModel(np.random.default_rng(1).normal(size=T), k_states=D, initialization="known",
                                       initial_state=np.zeros(D), initial_state_cov=100 * np.eye(D))  # fmt: skip
    model["transition"], model["design"], model["selection"] = chain.F[1], chain.H[0], np.eye(D)
    model["state_cov"], model["obs_cov"] = 0.01 * np.eye(D), np.array([[0.09]])
    benchmark.pedantic(lambda: model.loglike([]), rounds=5)
