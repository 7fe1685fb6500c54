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

from numpyro_pvmc.dependence import marks_of_rows
from numpyro_pvmc.facts import Book, Value
from numpyro_pvmc.program import Arguments, mask_of, run_body
from numpyro_pvmc.provenance import Follower
from numpyro_pvmc.structure import Structure
from numpyro_pvmc.survey import capture, unknown

_OLD = np.uint64(1 << 63)  # the mark of the state before a step; lower ones are of series
_PATTERNS = 10  # of truth values that a mask is assumed to have, among them all and none


def check_masks(
    structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any], unread: tuple[bool, ...]
) -> str | None:
    """Look at the masks of a step, and at what becomes of the state where they are false.

    :param structure: the structure of the program's chain.
    :param model: a NumPyro program.
    :param arguments: what it is called with.
    :param values: values of parameters.
    :param unread: of each state leaf, whether nothing reads it.
    :return: how the state is kept without being held, ``"window"`` or ``"other"``; ``None`` if it is held, or needs not be.
    :raises ValueError: if a mask reads latent sites, or sites whose state is held stand under different masks.
    """
    book = Book(numbered=True)
    steps = [_Step(structure, model, arguments, values, t, book) for t in sorted({0, structure.length - 1})]
    for step in steps:
        step.given = steps[0].given
        step.check_what_masks_read()
    if not structure.holding or structure.length == 1:  # after the only step nothing reads the state
        return None
    masks = [step.number_of_mask() for step in steps]
    if any(numbers is None for numbers in masks):
        return steps[0].how_it_keeps()
    # What does not change with time leaves out whole series, and holds nothing.
    always = [
        frozenset.intersection(*map(book.conjuncts, of_series)) for of_series in zip(*(m.tolist() for m in masks), strict=True)
    ]
    always = always if len(steps) > 1 else [frozenset()] * len(always)
    for step, numbers in zip(steps, masks, strict=True):
        if not step.holds(numbers, always, unread):
            return step.how_it_keeps()
    return None


class _Step:
    """One step of the chain, traced, and what is said of its state and its masks."""

    def __init__(self, structure, model, arguments, values, t, book):
        self.structure, self.book = structure, book
        init = jax.eval_shape(lambda *given: jax.tree.leaves(capture(model, *given, structure)[0].init), arguments, values)
        leaves = list(zip(init, structure.is_state, strict=True))
        old, clocks = ([leaf for leaf, is_kind in leaves if is_kind == kind] for kind in (True, False))
        latent = {site.name: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in structure.step_latents}

        def step(old, latent, clocks, arguments, values):
            scan, _ = capture(model, arguments, values, structure)
            state, others = iter(old), iter(clocks)
            carry = [next(state) if is_state else next(others) for is_state in structure.is_state]
            carry = jax.tree.unflatten(jax.tree.structure(scan.init), carry)
            x = unknown(jax.tree.map(lambda leaf: jnp.asarray(leaf)[t], scan.xs))
            carry, _, sites = run_body(scan, t, carry, x, latent, structure.length)
            new = [leaf for leaf, is_state in zip(jax.tree.leaves(carry), structure.is_state, strict=True) if is_state]
            masks = {name: mask_of(site) for name, site in sites.items() if site["type"] == "sample"}
            return new, {name: mask for name, mask in masks.items() if mask is not None}

        parts = (old, latent, clocks, arguments, values)
        self.program, self.out = jax.make_jaxpr(step, return_shape=True)(*parts)
        series = {name: _series(structure, name) for name in latent}
        marks = [np.full(leaf.shape, _OLD) for leaf in old] + [series[name] for name in sorted(latent)] + [None] * len(clocks)
        avals = self.program.in_avals
        self.own = list(map(self.book.fresh, avals, marks))
        self.old, self.given = self.own[: len(old)], list(map(self.book.fresh, avals[len(marks) :]))

    def results(self) -> tuple[list[Value], dict[str, Value]]:
        """What is said of the new state and of the masks."""
        return jax.tree.unflatten(jax.tree.structure(self.out), Follower(self.book).run(self.program, [*self.own, *self.given]))

    def check_what_masks_read(self):
        """The masks of latent sites say which steps there are; so do those of observed sites, where latent ones have any."""
        for name, mask in self.results()[1].items():
            if not mask.marks.any():
                continue
            what = "its own step" if not (mask.marks & _OLD).any() else "the step before"
            raise ValueError(
                f"The mask of site '{name}' reads latent sites of {what}, so which steps the chain has would differ between "
                "its particles. Where latent sites are masked, masks may read data, inputs of the scan and clocks only. What "
                "counts in some states only is written with `jnp.where` in the parameters of a distribution."
            )

    def holds(self, numbers, always, unread):
        """Whether the state is held where the mask is false, and only there; `always` are conjuncts of it that never change."""
        self.book.assume({})
        parts = [self.book.conjuncts(number) - constant for number, constant in zip(numbers.tolist(), always, strict=True)]
        changing = sorted(frozenset().union(*parts))
        rng, constant = np.random.default_rng(0), dict.fromkeys(frozenset().union(*always), True)
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
        marks = (value.marks & ~_OLD).ravel()
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
