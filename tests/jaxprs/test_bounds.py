"""Bounds of what functions return, for inputs within bounds: they hold for all such inputs, and are as narrow as can be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from numpyro_pvmc.jaxprs.bounds import Interval, as_interval, bounded

TABLE = jnp.array([4, 7, 1])
INF = np.inf
FUNCTIONS = {
    "sums": (lambda n, k: n + 2 * k - 3, (-7, 12)),
    "negative": (lambda n, k: -(n - k), (-11, 3)),
    "products": (lambda n, k: (n - 4) * k, (-12, 15)),
    "squares": (lambda n, k: k * k, (-6, 9)),
    "quotients": (lambda n, k: n // 2, (-1, 4)),
    "distance": (lambda n, k: jnp.abs(n - 4), (0, 5)),
    "rounded": (lambda n, k: jnp.ceil(0.3 * n).astype(int) + jnp.floor(0.5 * k).astype(int), (-1, 4)),
    "clipped": (lambda n, k: jnp.clip(n, 2, 5) + jax.nn.relu(k), (2, 8)),
    "chosen": (lambda n, k: jnp.where(n > 20, 50, n), (0, 9)),
    "either": (lambda n, k: jnp.where((n > 5) & (k != 1), 50, n), (0, 50)),
    "neither": (lambda n, k: jnp.where((n < 0) | ~(k <= 3), 50, n), (0, 9)),
    "counted": (lambda n, k: n * (k > 0), (0, 9)),
    "branches": (lambda n, k: jax.lax.cond(k > 0, lambda n: n + 1, lambda n: -n, n), (-9, 10)),
    "gathered": (lambda n, k: TABLE[n % 3] + TABLE[1], (8, 14)),
    "gathered outside": (lambda n, k: TABLE.at[n].get(mode="fill", fill_value=20), (1, 20)),
    "put": (lambda n, k: jnp.zeros(3, int).at[1].set(n).at[1].add(k)[1:2].sum(), (-2, 12)),
    "stacked": (lambda n, k: jnp.cumsum(jnp.stack([n, k, n]))[::-1][0], (-2, 21)),
    "compiled": (lambda n, k: jax.jit(lambda n: jnp.max(jnp.array([n, 3])))(n), (3, 9)),
    "unknown": (lambda n, k: jnp.sin(n), (-INF, INF)),
    "random": (lambda n, k: n + jax.random.poisson(jax.random.key(0), jnp.exp(1.0 * n)), (-INF, INF)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds(name):
    function, (least, most) = FUNCTIONS[name]
    whole = jax.ShapeDtypeStruct((), int)
    found = bounded(function, whole, whole)(*(Interval(jnp.float32(a), jnp.float32(b)) for a, b in ((0, 9), (-2, 3))))
    assert_array_equal(found, (least, most))
    n, k = np.array(list(itertools.product(range(10), range(-2, 4)))).T
    results = jax.vmap(function)(n, k)
    assert (found.lower <= results).all()
    assert (results <= found.upper).all()


def test_what_is_known_exactly_stays_so():
    known = bounded(lambda n, k: (jnp.sin(n) * 2, jax.jit(lambda n: n // 2)(n), n + k), jnp.zeros(()), jnp.zeros((), int))
    twice, half, total = known(jnp.float32(5.0), Interval(jnp.zeros(()), jnp.float32(jnp.inf)))
    assert_array_equal((twice, half), (2 * jnp.sin(5.0), 2.0))
    assert_array_equal(total, (5.0, INF))
    assert_array_equal(as_interval(half), (2.0, 2.0))


def test_bounds_may_be_traced():
    grown = bounded(lambda n: n + 3, jax.ShapeDtypeStruct((), int))
    step = lambda known, _: (grown(known), None)
    last, _ = jax.jit(lambda known: jax.lax.scan(step, known, length=4))(Interval(jnp.zeros(()), jnp.ones(())))
    assert_array_equal(last, (12.0, 13.0))
