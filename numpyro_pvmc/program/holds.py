"""Check that masked steps of a chain hold its state, and that its masks do not read what is latent.

At a step whose latent sites are masked, as in the padding of a short series, the state must stay what it was::

    with numpyro.handlers.mask(mask=present):
        x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
    return jnp.where(present, x, x_prev), x

That the carry is chosen by the very mask under which the sites stand is followed through the traced step, element by element:
whatever truth values the mask is assumed to have, the new state is the old one where it is false, and does not read the old one
where it is true.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.jaxprs.dependence import marks_of_rows
from numpyro_pvmc.jaxprs.facts import Book, Value
from numpyro_pvmc.jaxprs.provenance import Follower
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.distributions import mask_of
from numpyro_pvmc.program.find_chain import capture, unknown
from numpyro_pvmc.program.handlers import run_body
from numpyro_pvmc.program.structure import Structure

# Marks of the state before a step, and of its time; lower ones are of series.
_OLD, _TIME = np.uint64(1 << 63), np.uint64(1 << 62)
_PATTERNS = 10  # of truth values that a mask is assumed to have, among them all and none


def check_masks(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], unread: tuple[bool, ...]
) -> str | None:
    """Look at the masks of a step, and at what becomes of the state where they are false.

    :param unread: of each state leaf, whether nothing reads it.
    :return: how the state is kept without being held, ``"window"`` or ``"other"``; ``None`` if it is held, or needs not be.
    :raises ValueError: if a mask reads latent sites, or sites whose state is held stand under different masks.
    """
    step = _Step(structure, model, arguments, values)
    step.check_what_masks_read()
    if not structure.holding or structure.length == 1:  # after the only step nothing reads the state
        return None
    numbers = step.number_of_mask()
    return None if numbers is not None and step.holds(numbers, unread) else step.how_it_keeps()


class _Step:
    """A step of the chain, whichever it is, traced, and what is said of its state and its masks."""

    def __init__(self, structure, model, arguments, values):
        self.structure, self.book = structure, Book(numbered=True, of_time=_TIME)
        init = jax.eval_shape(lambda *given: jax.tree.leaves(capture(model, *given, structure)[0].init), arguments, values)
        leaves = list(zip(init, structure.is_state, strict=True))
        old, clocks = ([leaf for leaf, is_kind in leaves if is_kind == kind] for kind in (True, False))
        latent = {site.name: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in structure.step_latents}

        def step(old, latent, clocks, t, arguments, values):
            scan, _ = capture(model, arguments, values, structure)
            state, others = iter(old), iter(clocks)
            carry = [next(state) if is_state else next(others) for is_state in structure.is_state]
            carry = jax.tree.unflatten(jax.tree.structure(scan.init), carry)
            x = unknown(jax.tree.map(lambda leaf: jnp.asarray(leaf)[t], scan.xs))
            carry, _, sites = run_body(scan, t, carry, x, latent, structure.length)
            new = [leaf for leaf, is_state in zip(jax.tree.leaves(carry), structure.is_state, strict=True) if is_state]
            masks = {name: mask_of(site) for name, site in sites.items() if site["type"] == "sample"}
            return new, {name: mask for name, mask in masks.items() if mask is not None}

        parts = (old, latent, clocks, jax.ShapeDtypeStruct((), jnp.int32), arguments, values)
        self.program, self.out = jax.make_jaxpr(step, return_shape=True)(*parts)
        series = {name: _series(structure, name) for name in latent}
        marks = [np.full(leaf.shape, _OLD) for leaf in old] + [series[name] for name in sorted(latent)]
        marks += [_TIME] * (len(clocks) + 1)  # clocks change with time, too
        marks += [None] * (len(self.program.in_avals) - len(marks))
        self.inputs = list(map(self.book.fresh, self.program.in_avals, marks))
        self.old = self.inputs[: len(old)]

    def results(self) -> tuple[list[Value], dict[str, Value]]:
        """What is said of the new state and of the masks."""
        return jax.tree.unflatten(jax.tree.structure(self.out), Follower(self.book).run(self.program, self.inputs))

    def check_what_masks_read(self):
        """The masks of latent sites say which steps there are; so do those of observed sites, where latent ones have any."""
        for name, mask in self.results()[1].items():
            if not (mask.marks & ~_TIME).any():
                continue
            what = "its own step" if not (mask.marks & _OLD).any() else "the step before"
            raise ValueError(
                f"The mask of site '{name}' reads latent sites of {what}, so which steps the chain has would differ between "
                "its particles. Where latent sites are masked, masks may read data, inputs of the scan and clocks only. What "
                "counts in some states only is written with `jnp.where` in the parameters of a distribution."
            )

    def holds(self, numbers, unread):
        """Whether the state is held where the mask is false, and only there."""
        whole = [self.book.conjuncts(number) for number in numbers.tolist()]
        # What of a conjunction does not change with time leaves out whole series, and holds nothing.
        parts = [frozenset(filter(self.book.changes_with_time, of_series)) or of_series for of_series in whole]
        changing = sorted(frozenset().union(*parts))
        rng, constant = np.random.default_rng(0), dict.fromkeys(frozenset().union(*whole), True)
        series = [self._series_of(value) for value in self.results()[0]]
        # An element that reads no series is of the only mask there is, or may not be held at all.
        series = series if len(set(parts)) > 1 else [np.zeros_like(of_element) for of_element in series]
        for pattern in range(_PATTERNS if len(changing) > 1 else 2):
            is_true = np.full(len(changing), pattern == 0) if pattern < 2 else rng.random(len(changing)) < 0.6
            truth = dict(zip(changing, map(bool, is_true), strict=True))
            self.book.assume(constant | truth)
            present = np.array([all(truth[part] for part in of_series) for of_series in parts])
            for old, value, of_element, is_unread in zip(self.old, self.results()[0], series, unread, strict=True):
                is_held, is_new = value.number == old.number, (value.marks & _OLD) == 0
                right = np.where(present[of_element] | (of_element < 0), is_new, is_held)
                if not (is_unread or right.all()):
                    return False
        return True

    def number_of_mask(self):
        """The number of the mask of each series, if there is one; it must be the same for all its latent sites."""
        masks = self.results()[1]
        sites = {site.name: site for site in self.structure.step_latents}
        if not set(sites) & set(masks):
            return None
        total = int(np.prod([plate.size for plate in self.structure.plates], dtype=int))
        numbers, ends = np.full(total, np.iinfo(np.int64).max), np.full(total, -1)
        for name in sites:
            if name in masks:
                of_series = np.broadcast_to(_series_numbers(self.structure, name, masks[name].shape), masks[name].shape)
                np.minimum.at(numbers, of_series, masks[name].number)
                np.maximum.at(ends, of_series, masks[name].number)
        if set(sites) - set(masks) or (numbers != ends).any():
            raise ValueError(
                f"The carry holds the state at masked steps, but the latent sites {sorted(sites)} of a step, or the elements "
                "of one series, are not all under one mask: where some are masked and others are not, the state would be held "
                "in part. Put all latent sites of the step under one `numpyro.handlers.mask`, with one truth value for each "
                "series."
            )
        return numbers

    def _series_of(self, value):
        """The series that each element of a new state reads, -1 where it reads none, or several."""
        total = int(np.prod([plate.size for plate in self.structure.plates], dtype=int))
        of_mark = {int(mark): number for number, mark in enumerate(marks_of_rows(total))}
        marks = (value.marks & ~(_OLD | _TIME)).ravel()
        return np.array([of_mark.get(int(mark), -1) for mark in marks], int).reshape(value.shape)

    def how_it_keeps(self):
        """Whether elements of the old state are moved to other places of the new one, or something else is made of them."""
        self.book.assume({})
        old = np.concatenate([value.number.ravel() for value in self.old])
        are_old = [np.isin(value.number, old) for value in self.results()[0]]
        return "window" if any(is_old.any() and not is_old.all() for is_old in are_old) else "other"


def _series(structure, name):
    """Marks of the series of each element of a latent site."""
    site = {site.name: site for site in structure.step_latents}[name]
    total = int(np.prod([plate.size for plate in structure.plates], dtype=int))
    numbers = np.broadcast_to(_series_numbers(structure, name, site.batch_shape), site.batch_shape)
    marks = marks_of_rows(total)[numbers]
    return np.broadcast_to(marks.reshape(marks.shape + (1,) * len(site.event_shape)), site.shape)


def _series_numbers(structure, name, batch_shape):
    """The number of the series of each element of a batch."""
    numbers = np.zeros((1,) * len(batch_shape), int)
    for plate in structure.plates:
        where = [1] * len(batch_shape)
        where[len(batch_shape) + plate.dim] = plate.size
        numbers = numbers * plate.size + np.arange(plate.size).reshape(where)
    return numbers
