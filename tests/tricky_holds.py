"""Write programs with masked steps over which the state is held, rightly or not."""

import contextlib
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
    "not held at all": Wrong(leaf=lambda m, new, old, hold: new),
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


class Design(NamedTuple):
    """What was chosen. `joins`: both sites are in one leaf of the carry. `unheld`: nothing follows, so nothing is held."""

    size: Sizes
    wrong: Wrong
    fault: str
    has_two: bool
    starts: bool
    source: str
    hold: Callable
    around: str
    leaf_of: Callable
    joins: bool
    unheld: bool
    length: np.ndarray

    @property
    def shape(self):
        return (*self.size.plates, *self.size.event)

    def mask_of(self, t, m, y_t, present):
        """Which steps are present, in the way in which the program finds it out."""
        if self.source == "by index":
            return present[t]
        ways = {"data": m, "length": t < self.length, "isnan": ~jnp.isnan(y_t), "weights": m.astype(float) > 0.5}
        return ways[self.source]

    def over_event(self, mask):
        """A mask of the series, for all elements of each."""
        return mask.reshape(*mask.shape, *(1,) * len(self.size.event)) if mask.ndim == len(self.size.plates) else mask

    def by_series(self, x):
        """One number for each series, to compare."""
        return x.sum(tuple(range(-len(self.size.event), 0))) if self.size.event else x


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
    present, other = _masks(c, size, by_series, only_gaps=not is_right)
    source = "data" if fault else _source(c, present, by_series or not plates)
    ways = 4 if wrong == RIGHT else 3  # not around the scan, where the sites' mask is another
    design = Design(
        size=size,
        wrong=wrong,
        fault=fault,
        has_two=has_two,
        starts=starts,
        source=source,
        hold=HOLDS[c.pick("hold", *_holds_of(present, event))],
        around=c.pick("mask", MASKS_AROUND[:ways], (3, 2, 1, 1)[:ways]),
        leaf_of=c.pick("state leaf", {"raw": lambda x: x, "tanh": jnp.tanh, "double": lambda x: 2 * x}, (3, 1, 1)),
        joins=has_two and not event and not fault and c.chance("both sites in one leaf", 0.4),
        unheld=is_right and _is_padding(present) and c.chance("padding is not held", 0.3),
        length=present.sum(0),
    )
    y = c.numbers(T, *plates)
    if source == "isnan" or (wrong.emission_is_masked and c.chance("NaN where absent", 0.7)):
        y[~_by_series(present, size)] = np.nan
    if is_right and source != "isnan" and c.chance("an observation is missing", 0.3):
        y[np.argmax(present.reshape(T, -1).any(1))] = np.nan
    proposals = {"x_0": Proposal(True, event)} if starts else {}
    proposals |= {name: Proposal(False, event) for name in ("x", "z")[: 1 + has_two]}
    masked = None
    if wrong.site is not None and fault != "the mask reads the state before":
        mask = _by_series(wrong.site(present, _before(np, present), other, None, None), size)
        masked = {name: mask for name in proposals if name != "x_0"}
    args = tuple(jnp.asarray(a) for a in (y, present, other))
    return Tricky("holds", seed, tuple(c.made), is_right, _model(design), args, proposals, K, T, plates, masked)


def _model(design):
    def model(y, present, other):
        shape, event = design.shape, len(design.size.event)
        start = jnp.full(shape, 0.3)
        if design.starts:
            with plates_of(design.size.plates):
                start = design.leaf_of(numpyro.sample("x_0", dist.Normal(jnp.zeros(shape), 1.0).to_event(event)))
        inputs = y, present, _before(jnp, present), other
        is_around = design.around == "around the scan"
        with handlers.mask(mask=present) if is_around else contextlib.nullcontext():
            if design.joins:
                both = jnp.stack([start, start], -1)
                scan(lambda carry, now: _joint_step(design, present, carry, now), (both, 0), inputs)
            elif design.has_two:
                scan(lambda carry, now: _step(design, present, carry, now), ((start, start), 0), inputs)
            else:
                scan(lambda carry, now: _single_step(design, present, carry, now), (start, 0), inputs)

    return model


def _step(design, present, carry, now):
    """Two leaves, of which a chain with one site has the second without a use."""
    (old, old_z), t = carry
    y_t, m, before, other = now
    m = design.mask_of(t, m, y_t, present)
    x, z = _draw(design, (old, old_z), y_t, m, before, other)
    mask = design.over_event(design.wrong.hold(m, before, other, design.by_series(old), design.by_series(x)))

    def leaf(site, old):
        new = design.leaf_of(site)
        return new if design.unheld else design.wrong.leaf(mask, new, old, design.hold)

    new, new_z = leaf(x, old), None if z is None else leaf(z, old_z)
    if design.fault == "the second site is not held":
        new_z = design.leaf_of(z)
    if design.fault == "the second site is held by the other mask":
        new_z = design.hold(design.over_event(other), design.leaf_of(z), old_z)
    if design.fault == "the second site is held as the first":
        new_z = design.hold(mask, design.leaf_of(z), old)
    return ((new, new_z), t + 1), x


def _single_step(design, present, carry, now):
    ((new, _), t), output = _step(design, present, ((carry[0], None), carry[1]), now)
    return (new, t), output


def _joint_step(design, present, carry, now):
    old, t = carry
    y_t, m, before, other = now
    m = design.mask_of(t, m, y_t, present)
    sites = _draw(design, (old[..., 0], old[..., 1]), y_t, m, before, other)
    new = jnp.stack([design.leaf_of(site) for site in sites], -1)
    new = new if design.unheld else design.hold(design.over_event(m)[..., None], new, old)
    return (new, t + 1), sites[0]


def _draw(design, old, y_t, m, before, other):
    """The sites of a step under their masks."""
    masked = lambda mask: contextlib.nullcontext() if mask is None else handlers.mask(mask=mask)
    wrong, mask = design.wrong, None
    if wrong.site is not None and design.around != "around the scan":
        mask = wrong.site(m, before, other, design.by_series(old[0]), None)
    is_together = design.around == "together" and wrong.emission_is_masked

    def latent(name, mean):
        fn = dist.Normal(mean, 0.6).to_event(len(design.size.event))
        if mask is not None and design.around == "mask of the distribution":
            return numpyro.sample(name, fn.mask(mask))
        with masked(None if is_together else mask):
            return numpyro.sample(name, fn)

    with plates_of(design.size.plates), masked(mask if is_together else None):
        x = latent("x", 0.8 * old[0])
        z = latent("z", 0.5 * old[1] + 0.4 * x) if design.has_two else None
        mean = x if z is None else x + z
        if design.fault == "the emission is not masked":
            mean = design.hold(design.over_event(m), mean, old[0] if z is None else old[0] + old[1])
        with masked(m & ~jnp.isnan(y_t) if wrong.emission_is_masked else None):
            emit(mean, y_t)
    return x, z


def _before(xp, present):
    """The mask of the step before each."""
    return xp.concatenate([xp.ones_like(present[:1]), present[:-1]])


def _by_series(mask, size):
    return np.broadcast_to(mask.reshape(size.T, *(mask.shape[1:] or (1,) * len(size.plates))), (size.T, *size.plates))


def _is_padding(present):
    """Absent at the end only."""
    return bool(np.all(present[:-1] | ~present[1:]))


def _masks(c, size, by_series, only_gaps):
    """A mask of the steps and another one: (T, *plates), or (T,) for all series alike."""
    shape = (size.T, *(size.plates if by_series else ()))
    patterns = ("the end is absent", "the start is absent", "a gap", "any")
    pattern = c.pick("absent", patterns[2:3] if only_gaps else patterns)
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


def _holds_of(present, event):
    """A `cond` has one predicate: for all series alike."""
    names = [name for name in HOLDS if name != "cond" or (present.ndim == 1 and not event)]
    return names, HOLD_WEIGHTS[: len(names)]
