"""The state is held where the latent sites are masked, by the same mask, or the program is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.program.arguments import Arguments

T = 4
Y = np.linspace(-1.0, 1.0, T)
PRESENT = np.array([True, True, False, True])


def padded(leaf, mask=lambda m, x, old, other: m, event=()):
    """A chain whose carry is made by `leaf` and whose sites are masked by `mask`, of present and other steps, new and old."""

    def model(y, present, other):
        def step(old, inputs):
            y_t, present_t, other_t = inputs
            of_event = lambda m: m.reshape(m.shape + (1,) * len(event))
            distribution = dist.Normal(0.8 * old, 0.5).to_event(len(event))
            m = mask(present_t, jnp.zeros(()), old, other_t)
            with handlers.mask(mask=m) if m is not None else handlers.scale(scale=1.0):
                x = numpyro.sample("x", distribution)
                numpyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y_t)
            return leaf(of_event(present_t), x, old, of_event(other_t)), x

        scan(step, jnp.zeros(event), (y, present, other))

    return model


def read(model, *args):
    return read_structure(model, Arguments(args or (Y, PRESENT, PRESENT[::-1])), {})


HELD = {
    "where": lambda m, x, old, other: jnp.where(m, x, old),
    "the other way round": lambda m, x, old, other: jnp.where(~m, old, x),
    "select": lambda m, x, old, other: lax.select(jnp.broadcast_to(m, x.shape), x, old),
    "a function of the new state": lambda m, x, old, other: jnp.where(m, jnp.tanh(x), old),
    "as numbers": lambda m, x, old, other: m * x + (1 - m) * old,
}
KEPT = {
    "accumulated": lambda m, x, old, other: jnp.where(m, old + x, x),
    "accumulated where present": lambda m, x, old, other: jnp.where(m, old + x, old),
    "damped where absent": lambda m, x, old, other: jnp.where(m, x, 0.9 * old),
    "held where present": lambda m, x, old, other: jnp.where(m, old, x),
    "held by another mask": lambda m, x, old, other: jnp.where(other, x, old),
    "held by both masks": lambda m, x, old, other: jnp.where(m & other, x, old),
    "held by the value": lambda m, x, old, other: jnp.where(x > 0.3, x, old),
    "held by mask and value": lambda m, x, old, other: jnp.where(m & (x < 9.0), x, old),
    "anew where absent": lambda m, x, old, other: jnp.where(m, jnp.where(other, x, old), old),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("event", [(), (2,)], ids=["number", "vector"])
def test_held(name, event):
    assert read(padded(HELD[name], event=event)).holding


@pytest.mark.parametrize("name", KEPT)
def test_kept_otherwise(name):
    with pytest.raises(ValueError, match=r"not a first-order Markov chain.*under that very mask"):
        read(padded(KEPT[name]))


@pytest.mark.parametrize("name", HELD)
def test_without_a_mask_on_the_sites(name):
    with pytest.raises(ValueError, match=r"not a first-order Markov chain.*numpyro\.handlers\.mask"):
        read(padded(HELD[name], mask=lambda m, x, old, other: None))


def test_the_mask_of_the_sites_is_another():
    with pytest.raises(ValueError, match="under that very mask"):
        read(padded(HELD["where"], mask=lambda m, x, old, other: other))


@pytest.mark.parametrize("held", [True, False])
def test_a_mask_that_reads_the_state(held):
    leaf = (lambda m, x, old, other: jnp.where(old > 0, x, old)) if held else (lambda m, x, old, other: x)
    with pytest.raises(ValueError, match="The mask of site 'x' reads latent sites of the step before"):
        read(padded(leaf, mask=lambda m, x, old, other: old > 0))


def panel(leaf, masks=lambda m: (m, m)):
    """Three series of two sites each."""

    def model(y, present):
        series = numpyro.plate("series", 3)

        def step(carry, inputs):
            (x, z), (y_t, m) = carry, inputs
            of_x, of_z = masks(m)
            with series:
                with handlers.mask(mask=of_x):
                    new_x = numpyro.sample("x", dist.Normal(x, 0.5))
                with handlers.mask(mask=of_z):
                    new_z = numpyro.sample("z", dist.Normal(z + x, 0.5))
                with handlers.mask(mask=m):
                    numpyro.sample("y", dist.Normal(new_x + new_z, 0.5), obs=y_t)
            return (leaf(m, new_x, x), leaf(m, new_z, z)), None

        scan(step, (jnp.zeros(3), jnp.zeros(3)), (y, present))

    return model


PANEL = np.zeros((T, 3)), np.ones((T, 3), bool)
HELD_BY_SERIES = lambda m, x, old: jnp.where(m, x, old)


def test_each_series_has_a_mask():
    assert read(panel(HELD_BY_SERIES), *PANEL).holding


@pytest.mark.parametrize("by_time", [False, True])
def test_a_mask_around_the_scan(by_time):
    """One that leaves out whole series holds nothing; one that changes with time has no hold."""
    off = np.ones((T, 3), bool)
    off[1 if by_time else slice(None), 1] = False
    around = handlers.mask(panel(HELD_BY_SERIES), mask=jnp.asarray(off if by_time else off[0]))
    if by_time:
        with pytest.raises(ValueError, match="under that very mask"):
            read(around, *PANEL)
    else:
        assert read(around, *PANEL).holding


def test_masks_that_differ_in_the_middle_only():
    """The first and the last step do not stand for the others."""

    def model(y, a, b):
        present = jnp.broadcast_to(a, (T,))

        def step(x, inputs):
            y_t, of_site, of_hold = inputs
            with handlers.mask(mask=of_site):
                new = numpyro.sample("x", dist.Normal(x, 0.5))
                numpyro.sample("y", dist.Normal(new, 0.5), obs=y_t)
            return jnp.where(of_hold, new, x), None

        scan(step, 0.0, (y, present, present.at[1].set(b)))

    with pytest.raises(ValueError, match="under that very mask"):
        read(model, Y, np.array(True), np.array(False))


@pytest.mark.parametrize("by_both", [True, False])
def test_a_mask_that_a_clock_has_a_part_in(by_both):
    """A clock changes with time as an input does: what it leaves out must be held."""

    def model(y, present):
        def step(carry, inputs):
            (x, t), (y_t, m) = carry, inputs
            both = m & (t < 2)
            with handlers.mask(mask=both):
                new = numpyro.sample("x", dist.Normal(x, 0.5))
                numpyro.sample("y", dist.Normal(new, 0.5), obs=y_t)
            return (jnp.where(both if by_both else m, new, x), t + 1), None

        scan(step, (0.0, 0), (y, present))

    if by_both:
        assert read(model, Y, PRESENT).holding
    else:
        with pytest.raises(ValueError, match="under that very mask"):
            read(model, Y, PRESENT)


def test_the_mask_of_another_series():
    with pytest.raises(ValueError, match="under that very mask"):
        read(panel(lambda m, x, old: jnp.where(m[::-1], x, old)), *PANEL)


@pytest.mark.parametrize("masks", [lambda m: (m, True), lambda m: (m, m[::-1])], ids=["one of them", "another's"])
def test_sites_held_in_part(masks):
    with pytest.raises(ValueError, match=r"latent sites \['x', 'z'\] of a step.*not all under one mask"):
        read(panel(HELD_BY_SERIES, masks), *PANEL)


def test_a_second_leaf_that_is_not_held():
    def model(y, present, other):
        def step(carry, inputs):
            (x, shown), (y_t, m, _) = carry, inputs
            with handlers.mask(mask=m):
                new = numpyro.sample("x", dist.Normal(x + shown, 0.5))
                numpyro.sample("y", dist.Normal(new, 0.5), obs=y_t)
            return (jnp.where(m, new, x), jnp.tanh(new)), None

        scan(step, (0.0, 0.0), (y, present, other))

    with pytest.raises(ValueError, match="not a first-order Markov chain"):
        read(model)


def test_a_window_of_lags():
    def model(y):
        def step(window, y_t):
            x = numpyro.sample("x", dist.Normal(window.mean(), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return jnp.concatenate([x[None], window[:-1]]), None

        scan(step, jnp.zeros(3), y)

    with pytest.raises(ValueError, match=r"a window of lags\. Scan over blocks of L steps"):
        read(model, Y)


def test_inside_jit():
    """The mask need not be known, and whatever it is the answer is the same."""

    @jax.jit
    def traced(y, present):
        assert read(padded(HELD["where"]), y, present, present).holding
        with pytest.raises(ValueError, match="under that very mask"):
            read(padded(KEPT["held by another mask"]), y, present, present[::-1])
        return y

    traced(Y, PRESENT)
