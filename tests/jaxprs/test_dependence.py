"""What depends on what, asked of functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_pvmc.jaxprs.dependence import changes_by_steps, follows_slope, mixes_rows

ROWS = np.linspace(-1.0, 1.0, 20).reshape(5, 4)
IDENTITY, TABLE = np.eye(5), np.arange(20.0).reshape(5, 4)


def mixes(function, *others):
    mixed, strange = mixes_rows(function, ROWS, *others)
    assert not strange
    return mixed


def gram(x):
    return jnp.einsum("ni,nj->nij", x, x) + jnp.eye(4)


OWN = {
    "function": jnp.sin,
    "comparison": lambda x: jnp.where(x > 0.1, x, -x),
    "mean of the row": lambda x: x - x.mean(-1, keepdims=True),
    "largest of the row": lambda x: jnp.argmax(x, -1),
    "sorted row": lambda x: jnp.sort(x, -1),
    "order of the row": lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    "median of the row": lambda x: jnp.median(x, -1),
    "sum along the row": lambda x: jnp.cumsum(x, 1),
    "turned row": lambda x: jnp.roll(x, 1, 1),
    "spectrum of the row": lambda x: jnp.abs(jnp.fft.fft(x)),
    "convolved row": lambda x: lax.conv_general_dilated(x[:, None], jnp.ones((2, 1, 3)), (1,), "SAME"),
    "product with a matrix": lambda x: x @ jnp.ones((4, 3)),
    "product with a known identity": lambda x: IDENTITY @ x,
    "product with an identity made inside": lambda x: jnp.eye(5) @ x,
    "product with a diagonal": lambda x: jnp.diag(x.mean() * 0 + jnp.arange(5.0)) @ x,
    "known rows in their order": lambda x: x[np.arange(5)],
    "known rows of a table": lambda x: x + TABLE[np.array([4, 3, 2, 1, 0])],
    "a known mask": lambda x: jnp.where(np.ones((5, 1), bool), x, x.mean()),
    "matrices": lambda x: jnp.linalg.cholesky(gram(x)),
    "linear equations": lambda x: jnp.linalg.solve(gram(x), x[..., None]),
    "linear equations of one matrix, a column for each row": lambda x: jnp.linalg.solve(TABLE[:4] + jnp.eye(4), x.T).T,
    "triangular equations of one matrix": lambda x: (
        jax.scipy.linalg.solve_triangular(jnp.eye(4) + TABLE[:4], x.T, lower=True).T
    ),
    "eigenvalues": lambda x: jnp.linalg.eigvalsh(gram(x)),
    "loop by row": jax.vmap(lambda row: lax.while_loop(lambda c: c.sum() < 10, lambda c: 1.1 * c + 1, row)),
    "loop of so many steps": lambda x: lax.fori_loop(0, 3, lambda i, c: c + i * jnp.sin(c), x),
    "loop over rows": lambda x: lax.fori_loop(0, 5, lambda i, c: c.at[i].set(2 * x[i]), x),
    "scan over rows": lambda x: lax.scan(lambda c, row: (c, 2 * row), 0.0, x)[1],
    "branch by row": jax.vmap(lambda row: lax.cond(row[0] > 0, jnp.sin, jnp.cos, row)),
    "element by row": jax.vmap(lambda row: row[jnp.argmax(row)]),
    "own derivative": jax.nn.relu,
    "stopped": lambda x: lax.stop_gradient(x) + x,
}
OTHERS = {
    "comparison with the mean": lambda x: x * (x > x.mean(0)),
    "stopped mean": lambda x: x + lax.stop_gradient(x.mean()),
    "rounded mean": lambda x: x + jnp.round(x.mean()),
    "largest": lambda x: x + jnp.argmax(x, 0),
    "median": lambda x: x + jnp.median(x, 0),
    "sorted": lambda x: jnp.sort(x, 0),
    "rank": lambda x: x + jnp.argsort(jnp.argsort(x, 0), 0),
    "sum along": lambda x: jnp.cumsum(x, 0),
    "in parallel": lambda x: lax.associative_scan(jnp.add, x),
    "turned": lambda x: jnp.roll(x, 1, 0),
    "in another order": lambda x: x[np.array([1, 0, 2, 3, 4])],
    "backwards": lambda x: x[::-1],
    "far away only": lambda x: jnp.where(jnp.abs(x.sum(0)) > 50, -x, x),
    "product over rows": lambda x: np.ones((5, 5)) @ x,
    "products of rows": lambda x: x @ x.T,
    "loop until all are done": lambda x: lax.while_loop(lambda c: c.sum() < 10, lambda c: 1.1 * c + 1, x),
    "scan that accumulates": lambda x: lax.scan(lambda c, row: (c + row.sum(), row + c), 0.0, x)[1],
    "long scan that accumulates": lambda x: lax.scan(lambda c, _: (c + x.sum() * 1e-9, None), x, None, length=20_001)[0],
    "branch": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "singular values": lambda x: jnp.linalg.svd(x)[0],
}


@pytest.mark.parametrize("name", OWN)
def test_rows_that_read_themselves(x64, name):
    assert mixes(OWN[name]) is False


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_read_others(x64, name):
    assert mixes(OTHERS[name]) is True


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_what_is_said_of_marks_is_so_of_values(x64, name):
    """Where other rows are replaced by anything, a row that reads itself stays."""
    function = jax.jit({**OWN, **OTHERS}[name])
    first = np.asarray(function(ROWS))
    rng, moved = np.random.default_rng(0), False
    for scale in (1.0, 100.0):
        other = rng.normal(size=ROWS.shape) * scale
        other[1] = ROWS[1]
        moved = moved or not np.allclose(np.asarray(function(other))[1], first[1], rtol=1e-10)
    assert moved == (name in OTHERS)


def test_indices_that_are_given_may_be_any(x64):
    assert mixes(lambda x, i: x[i], np.arange(5)) is True
    assert mixes(lambda x, i: x[:, i], np.arange(3)) is False
    assert mixes(lambda x, i: x[jnp.arange(5), i], np.zeros(5, int)) is False
    assert mixes(lambda x, i: x.at[jnp.arange(5), i].set(0.0), np.zeros(5, int)) is False
    assert mixes(lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 4)).sum() + x, np.int64(0)) is True
    assert mixes(lambda x, mask: jnp.where(mask, x, x.mean()), np.ones((5, 1), bool)) is True


def test_many_rows_are_told_apart(x64):
    rows = np.zeros(5_000)
    assert mixes_rows(jnp.sin, rows)[0] is False
    for other in (np.arange(5_000) ^ 1, np.arange(5_000)[::-1], np.minimum(np.arange(5_000) + 1, 4_999)):
        assert mixes_rows(lambda x, other=other: x[other], rows)[0] is True


def test_an_unknown_operation_counts_as_mixing():
    def called(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    mixed, strange = mixes_rows(lambda x: {"called": called(x), "own": x}, np.zeros(3, np.float32))
    assert mixed == {"called": True, "own": False}
    assert strange == {"pure_callback"}


def test_one_row_reads_no_other():
    assert mixes(lambda x: x - x.mean()) is True
    assert mixes_rows(lambda x: x - x.mean(), ROWS[:1]) == (False, set())


def test_inside_jit(x64):
    found = []

    @jax.jit
    def traced(rows, scale):
        found.append(mixes_rows(lambda rows: scale * rows + rows[::-1], rows)[0])
        found.append(mixes_rows(lambda rows: scale * rows, rows)[0])
        return rows

    traced(ROWS, 2.0)
    assert found == [True, False]


def test_steps_are_no_slope(x64):
    steps = {
        "line": lambda x: 2 * x + 1,
        "sum": lambda x: x @ np.ones((4, 3)),
        "far away": lambda x: x + 1.0 * (x > 1e9),
        "rounded": lambda x: x + jnp.round(1e-9 * x),
        "cut": lambda x: x + (1e-9 * x).astype(int),
        "stopped": lambda x: x + lax.stop_gradient(x),
        "in a loop": lambda x: lax.fori_loop(0, 3, lambda i, c: c + jnp.floor(1e-9 * c), x),
        "of a constant": lambda x: x + jnp.floor(jnp.arange(4.0) / 3),
    }
    found = changes_by_steps(lambda x: {name: function(x) for name, function in steps.items()}, ROWS)
    assert {name for name, is_found in found.items() if not is_found} == {"line", "sum", "of a constant"}


def test_slope_inside_jit(x64):
    """A program may be read while another is traced; constants of the functions are computed with them."""
    found = []

    @jax.jit
    def traced(x):
        found.append(follows_slope(lambda x: {"line": 2 * x + jnp.ones(3).sum(), "steps": jnp.floor(x)}, x))
        return x

    traced(jnp.arange(3.0))
    assert found == [{"line": True, "steps": False}]


def test_questions_where_nothing_is_compiled():
    with jax.disable_jit():
        assert follows_slope(lambda x: 2 * x + 1, jnp.ones(3))
        assert not follows_slope(jnp.floor, jnp.ones(3))
