"""What depends on what, asked of functions."""

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.dependence import couples, follows_slope, holds


@jax.custom_jvp
def rounded(x):
    """x; beside its derivative another number in the last bits, as compiled code may round by what it is compiled with."""
    return x


@rounded.defjvp
def _(primals, tangents):
    (x,), (slope,) = primals, tangents
    return x * (1 + 4 * jnp.finfo(x.dtype).eps), slope


ROWS = {"switch": np.array([0, 1, 0]), "x": np.array([0.3, 0.5, 0.4])}


def test_rounding_is_no_coupling(tolerance):
    def own(rows):
        return jnp.sin(rows["x"]) + rounded(rows["x"] + rows["switch"])

    assert couples(own, ROWS) is False


def test_an_integer_couples(tolerance):
    assert couples(lambda rows: rows["x"] + 1e-3 * rows["switch"].sum(), ROWS) is True
    assert couples(lambda rows: rows["x"] + 1e3 * rows["switch"], ROWS) is False


def test_inside_jit(x64):
    found = []

    @jax.jit
    def traced(rows):
        found.append(couples(lambda rows: rows["x"] + rows["switch"][::-1], rows))
        return rows

    traced(ROWS)
    assert found == [True]


def test_held_or_not(x64):
    mask, old, new = np.array([True, False]), np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert holds(lambda old, mask, new: jnp.where(mask, new, old), old, mask, new)
    assert not holds(lambda old, mask, new: jnp.where(mask, old + new, old), old, mask, new)
    assert holds(lambda old: old, old)
    assert not holds(lambda old: old + 1.0, old)


def test_all_questions_inside_jit(x64):
    """A program may be read while another is traced; constants of the functions are computed with them."""
    found = []

    @jax.jit
    def traced(x, mask):
        found.append(holds(lambda old, mask: jnp.where(mask, jnp.ones(3).sum(), old), x, mask))
        found.append(holds(lambda old, mask: jnp.where(mask, jnp.ones(3).sum() * old, old), x, mask))
        found.append(follows_slope(lambda x: {"line": 2 * x + jnp.ones(3).sum(), "steps": jnp.floor(x)}, x))
        return x

    traced(jnp.arange(3.0), jnp.array([True, False, True]))
    assert found == [True, False, {"line": True, "steps": False}]


def test_questions_where_nothing_is_compiled():
    with jax.disable_jit():
        assert follows_slope(lambda x: 2 * x + 1, jnp.ones(3))
        assert not follows_slope(jnp.floor, jnp.ones(3))
