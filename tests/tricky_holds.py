"""Write programs with masked steps over which the state is held, rightly or not."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from tricky import Chooser, Proposal, Tricky, emit, plates_of

HOLDS = {  # of a mask, what is new and what was there
    "where(m, new, old)": lambda m, new, old: jnp.where(m, new, old),
    "where(~m, old, new)": lambda m, new, old: jnp.where(~m, old, new),
    "select": lambda m, new, old: lax.select(jnp.broadcast_to(m, jnp.shape(new)), new, old),
    "select_n": lambda m, new, old: lax.select_n(jnp.broadcast_to(m, jnp.shape(new)), old, new),
    "jnp.select": lambda m, new, old: jnp.select([m, ~m], [new, old]),
    "m * new + (1 - m) * old": lambda m, new, old: m * new + (1 - m) * old,
    "cond": lambda m, new, old: lax.cond(m, lambda: new, lambda: old),
}
HOLD_WEIGHTS = (4, 2, 1, 1, 1, 0.7, 1)


class Wrong(NamedTuple):
    """What is wrong: how the mask on the sites and the hold come from the data's mask, and how the state leaf is made.

    `site` and `hold` take (mask of this step, of the one before, another mask, old state, new state). `leaf` takes
    (mask, new, old, hold).
    """

    site: Callable | None = lambda m, before, other, old, new: m
    hold: Callable = lambda m, before, other, old, new: m
    leaf: Callable = lambda m, new, old, hold: hold(m, new, old)
    emission_is_masked: bool = True
    needs_gap: bool = False


RIGHT = Wrong()
WRONGS = {
    "the state's own value holds": Wrong(None, lambda m, before, other, old, new: ~(new > 0.3), emission_is_masked=False),
    "the state before holds": Wrong(None, lambda m, before, other, old, new: old > 0.1, emission_is_masked=False),
    "data hold, without a mask": Wrong(None, emission_is_masked=False),
    "data hold, with a mask on the emission only": Wrong(None),
    "the mask reads the state before": Wrong(
        lambda m, before, other, old, new: old > 0.1, lambda m, before, other, old, new: old > 0.1, emission_is_masked=False
    ),
    "accumulates where present": Wrong(leaf=lambda m, new, old, hold: hold(m, old + new, old)),
    "accumulates where present, new where absent": Wrong(leaf=lambda m, new, old, hold: hold(m, old + new, new)),
    "decays where absent": Wrong(leaf=lambda m, new, old, hold: hold(m, new, 0.9 * old)),
    "starts anew where absent": Wrong(leaf=lambda m, new, old, hold: hold(m, new, jnp.full_like(old, 0.4))),
    "held where present": Wrong(leaf=lambda m, new, old, hold: hold(m, old, new)),
    "another mask": Wrong(hold=lambda m, before, other, old, new: other),
    "another mask on the sites": Wrong(lambda m, before, other, old, new: other),
    "the mask of the step before": Wrong(hold=lambda m, before, other, old, new: before),
    "the mask of the step before, on the sites": Wrong(lambda m, before, other, old, new: before),
    "held where one of two masks is": Wrong(hold=lambda m, before, other, old, new: m & other),
    "held with the state's value too": Wrong(hold=lambda m, before, other, old, new: m & (new < 0.6)),
    "not held at all": Wrong(leaf=lambda m, new, old, hold: new, needs_gap=True),
    "the emission is not masked": Wrong(emission_is_masked=False),
    "the second site is not held": Wrong(),
    "the second site is held by the other mask": Wrong(),
    "the second site is held as the first": Wrong(),
}
SECOND = tuple(name for name in WRONGS if name.startswith("the second site"))
MASKS_AROUND = ("together", "apart", "mask of the distribution", "around the scan")


class Sizes(NamedTuple):
    K: int
    T: int
    plates: tuple[int, ...]
    event: tuple[int, ...]


SIZES = {
    "one series": Sizes(3, 3, (), ()),
    "one series, 4 steps": Sizes(2, 4, (), ()),
    "2 series": Sizes(2, 3, (2,), ()),
    "3 series": Sizes(2, 2, (3,), ()),
    "2 x 2 series": Sizes(2, 2, (2, 2), ()),
    "event of 2": Sizes(2, 3, (), (2,)),
    "2 series, event of 2": Sizes(2, 3, (2,), (2,)),
}


def random_hold(seed: int) -> Tricky:
    """A chain over steps of which some are absent."""
    c = Chooser(2, seed)
    is_right = c.chance("legitimate", 0.5)
    K, T, plates, event = size = c.pick("size", SIZES, (2, 2, 3, 1, 1, 1, 1))
    wrong = RIGHT if is_right else c.pick("what is wrong", WRONGS)
    fault = "" if is_right else c.made[-1].removeprefix("what is wrong: ")
    has_two = fault in SECOND or c.chance("two sites", 0.3)
    # Over two steps from a constant nothing is seen of what is held.
    starts = c.chance("starts from a site", 0.5) or (T == 2 and not is_right)
    by_series = bool(plates) and c.chance("a mask for each series", 0.75)
    present, other = _masks(c, size, by_series, starts, fault, wrong)
    source = "data" if fault else _source(c, present, by_series or not plates)
    hold = HOLDS[c.pick("hold", *_holds_of(wrong, present, event))]
    around = c.pick("mask", MASKS_AROUND[: 4 if wrong == RIGHT else 3], (3, 2, 1, 1)[: 4 if wrong == RIGHT else 3])
    leaf_of = c.pick("state leaf", {"raw": lambda x: x, "tanh": jnp.tanh, "double": lambda x: 2 * x}, (3, 1, 1))
    joins = has_two and not event and not fault and c.chance("both sites in one leaf", 0.4)
    unheld = is_right and _is_padding(present) and c.chance("padding is not held", 0.3)
    y, length = c.numbers(T, *plates), present.sum(0)
    if source == "isnan" or (wrong.emission_is_masked and c.chance("NaN where absent", 0.7)):
        y[~_by_series(present, size)] = np.nan
    if is_right and source != "isnan" and c.chance("an observation is missing", 0.3):
        y[np.argmax(present.reshape(T, -1).any(1))] = np.nan

    def model(y, present, other):
        event_of = lambda m: m.reshape(*m.shape, *(1,) * len(event)) if jnp.ndim(m) == len(plates) else m
        own = {"length": lambda t, m, y_t: t < length, "isnan": lambda t, m, y_t: ~jnp.isnan(y_t)}
        own |= {"data": lambda t, m, y_t: m, "by index": lambda t, m, y_t: present[t]}
        own |= {"weights": lambda t, m, y_t: m.astype(float) > 0.5}

        def step(carry, inputs):
            y_t, m, before, other_t = inputs
            (old, old_z), t = carry
            m = own[source](t, m, y_t)
            first = lambda s: s[..., 0] if joins else s
            second = lambda s: s[..., 1] if joins else s
            with plates_of(plates):
                # The masks may read the state: what is drawn first is read by the hold alone.
                site_mask = None if wrong.site is None else wrong.site(m, before, other_t, _flat(old, event), None)
                inner = None if around == "around the scan" else site_mask
                x = _sample("x", 0.8 * first(old), inner, around, event)
                z = None
                if has_two:
                    z = _sample("z", 0.5 * second(old_z) + 0.4 * x, inner, around, event)
                mean = x if z is None else x + z
                mean = (
                    mean
                    if fault != "the emission is not masked"
                    else hold(event_of(m), mean, old + (0.0 if z is None else old_z))
                )
                with handlers.mask(mask=m & ~jnp.isnan(y_t) if wrong.emission_is_masked else True):
                    emit(mean, y_t)
            hold_mask = event_of(wrong.hold(m, before, other_t, _flat(old, event), _flat(x, event)))
            if joins:
                both = jnp.stack([leaf_of(x), leaf_of(z)], -1)
                both = both if unheld else hold(hold_mask[..., None], both, old)
                return ((both, both), t + 1), x
            new = leaf_of(x) if unheld else wrong.leaf(hold_mask, leaf_of(x), old, hold)
            new_z = old_z
            if has_two:
                new_z = leaf_of(z) if unheld else wrong.leaf(hold_mask, leaf_of(z), old_z, hold)
            if fault == "the second site is not held":
                new_z = leaf_of(z)
            if fault == "the second site is held by the other mask":
                new_z = hold(event_of(other_t), leaf_of(z), old_z)
            if fault == "the second site is held as the first":
                new_z = hold(hold_mask, leaf_of(z), old)
            return ((new, new_z), t + 1), x

        shape = (*plates, *event)
        x_0 = z_0 = jnp.full(shape, 0.3)
        if starts:
            with plates_of(plates):
                x_0 = z_0 = leaf_of(numpyro.sample("x_0", dist.Normal(jnp.zeros(shape), 1.0).to_event(len(event))))
        if joins:
            x_0 = z_0 = jnp.stack([x_0, z_0], -1)
        before = jnp.concatenate([jnp.ones_like(present[:1]), present[:-1]])
        body = step if has_two and not joins else _without_second(step)
        carry = ((x_0, z_0) if has_two and not joins else x_0), 0
        if around == "around the scan":
            with handlers.mask(mask=present):
                scan(body, carry, (y, present, before, other))
        else:
            scan(body, carry, (y, present, before, other))

    proposals = {"x_0": Proposal(True, event)} if starts else {}
    proposals |= {name: Proposal(False, event) for name in (("x", "z") if has_two else ("x",))}
    site_masks = None
    if wrong.site is not None and fault != "the mask reads the state before":
        before = np.concatenate([np.ones_like(present[:1]), present[:-1]])
        mask = wrong.site(present, before, other, None, None)
        site_masks = {name: _by_series(mask, size) for name in proposals if name != "x_0"}
    args = tuple(jnp.asarray(a) for a in (y, present, other))
    return Tricky("holds", seed, tuple(c.made), is_right, model, args, proposals, K, T, plates, site_masks)


def _by_series(mask, size):
    return np.broadcast_to(mask.reshape(size.T, *(mask.shape[1:] or (1,) * len(size.plates))), (size.T, *size.plates))


def _flat(x, event):
    """One number for each series, to compare."""
    return x.sum(tuple(range(-len(event), 0))) if event else x


def _sample(name, mean, mask, around, event):
    fn = dist.Normal(mean, 0.6).to_event(len(event))
    if mask is None:
        return numpyro.sample(name, fn)
    if around == "mask of the distribution":
        return numpyro.sample(name, fn.mask(mask))
    with handlers.mask(mask=mask):
        return numpyro.sample(name, fn)


def _without_second(step):
    def one(carry, inputs):
        ((new, _), t), out = step(((carry[0], carry[0]), carry[1]), inputs)
        return (new, t), out

    return one


def _is_padding(present):
    """Absent at the end only."""
    return bool(np.all(present[:-1] | ~present[1:]))


def _masks(c, size, by_series, starts, fault, wrong):
    """A mask of the steps and another one: (T, *plates), or (T,) for all series alike."""
    shape = (size.T, *(size.plates if by_series else ()))
    patterns = ("the end is absent", "the start is absent", "a gap", "any")
    pattern = c.pick("absent", patterns[2:3] if wrong.needs_gap or fault else patterns)
    times = np.arange(size.T).reshape(-1, *(1,) * (len(shape) - 1))
    length = c.rng.integers(1, size.T + 1, shape[1:])
    if pattern == "the end is absent":
        present = times < length
    elif pattern == "the start is absent":
        present = times >= length - 1
    elif pattern == "a gap":
        present = times != c.rng.integers(0, size.T - 1, shape[1:])
    else:
        present = c.rng.random(shape) < 0.6
    if present.all():
        present.reshape(size.T, -1)[0 if pattern == "the start is absent" else -1, 0] = False
    return present, np.roll(present, 1, 0) if size.T > 2 else ~present


def _source(c, present, in_all_axes):
    sources = ["data", "by index", "weights"] + ["isnan"] * in_all_axes + ["length"] * _is_padding(present)
    return c.pick("the mask is", sources)


def _holds_of(wrong, present, event):
    """A `cond` has one predicate: for all series alike."""
    names = [name for name in HOLDS if name != "cond" or (present.ndim == 1 and not event)]
    return names, HOLD_WEIGHTS[: len(names)]
