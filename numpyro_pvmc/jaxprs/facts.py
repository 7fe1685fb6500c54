"""Keep what is said of the elements of an array: which marks they read, which values they have, which are equal."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_pvmc.jaxprs.movement import COMMUTATIVE

LARGE = 2**16  # elements, above which values and numbers are not followed


class Aval(NamedTuple):
    """A shape and a type."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


class Value(NamedTuple):
    """What is said of the elements of an array: marks that they read, if any; values, where `sure`; numbers, if asked for."""

    shape: tuple[int, ...]
    dtype: Any
    reads: np.ndarray | None = None
    known: np.ndarray | None = None
    sure: np.ndarray | None = None
    number: np.ndarray | None = None

    @property
    def is_sure(self) -> bool:
        """Whether all its values are known."""
        return self.known is not None and bool(self.sure.all())

    @property
    def marks(self) -> np.ndarray:
        """The marks, zero where there are none."""
        return np.zeros(self.shape, np.uint64) if self.reads is None else np.broadcast_to(self.reads, self.shape)


class Book:
    """Numbers that two elements share only if they are equal, whatever the inputs of a program; values assumed of them.

    :param numbered: whether elements get numbers.
    :param of_time: the mark of time, which masks may read.
    """

    def __init__(self, numbered: bool = False, of_time: int = 0):
        self.numbered, self._of_time = numbered, np.uint64(of_time)
        self._timed: set[int] = set()
        self._assumed = np.empty(0, np.int64), np.empty(0, bool)
        self._numbers: dict[Any, np.ndarray] = {}
        self._elements: dict[Any, int] = {}
        self._count = 0
        self._opposite: dict[int, int] = {}
        self._conjuncts: dict[int, tuple[int, ...]] = {}

    def assume(self, values: dict[int, bool]) -> None:
        """From now on elements of these numbers have these truth values, and their opposites the others.

        :param values: truth values, by number.
        """
        opposite = {self._opposite[n]: not value for n, value in values.items() if n in self._opposite}
        assumed = sorted((opposite | values).items())
        self._assumed = np.array([n for n, _ in assumed], np.int64), np.array([value for _, value in assumed], bool)

    def conjuncts(self, number: int) -> frozenset[int]:
        """The truth values of which one is the conjunction, taken apart as far as they are; itself, if it is none.

        :param number: of a truth value.
        """
        parts = self._conjuncts.get(number, ())
        return frozenset().union(*map(self.conjuncts, parts)) if parts else frozenset({number})

    def changes_with_time(self, number: int) -> bool:
        """Whether a conjunct reads time.

        :param number: of a truth value that is part of a conjunction.
        """
        return number in self._timed

    def fresh(self, aval: Any, reads: np.ndarray | None = None) -> Value:
        """An array of which nothing is known but its marks.

        :param aval: anything with a shape and a type.
        :param reads: marks, which are broadcast.
        """
        reads = None if reads is None else np.broadcast_to(reads, aval.shape)
        return Value(tuple(aval.shape), aval.dtype, reads, number=self._new(aval.shape))

    def constant(self, x: Any) -> Value:
        """An array whose values are given, if it is not traced.

        :param x: an array or a number, or what is already said of one.
        """
        if isinstance(x, Value):
            return x
        is_number = not jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.extended)
        if isinstance(x, jax.core.Tracer) or not is_number or np.size(x) > LARGE:
            return self.fresh(jax.typeof(x))
        known = np.asarray(x)
        # An array of the same numbers at other times is another one: only as a whole are two arrays known to be equal.
        number = self._array((known.dtype.str, known.shape, known.tobytes()), known.shape) if self.numbered else None
        if self.numbered and known.ndim:  # rows of an array may be of times: what is so of one is not of the others
            return Value(known.shape, known.dtype, number=number)
        return Value(known.shape, known.dtype, None, known, np.ones(known.shape, bool), number)

    def numbers_of(self, name: str, how: str, aval: Any, values: Sequence[Value]) -> np.ndarray | None:
        """Numbers of what an operation on elements returns: the same for the same operation on equal elements.

        :param how: what else it depends on.
        :param aval: shape and type of the result. Only of truth values without marks, which masks are, is every element
            compared with others by itself.
        :param values: its operands, which are broadcast.
        """
        if not self.numbered:
            return None
        numbers = [np.broadcast_to(value.number, aval.shape).ravel() for value in values]
        numbers = np.sort(numbers, 0) if name in COMMUTATIVE else np.array(numbers)
        key = (name, how, numbers.shape, numbers.tobytes())
        is_mask = aval.dtype == bool and all(map(self._reads_time_only, values)) and numbers.size <= LARGE
        if key in self._numbers or not is_mask:
            return self._array(key, aval.shape).reshape(aval.shape)
        different, inverse = np.unique(numbers, axis=1, return_inverse=True)
        found = [self._element((name, how, *column)) for column in different.T.tolist()]
        if name == "and":
            self._conjuncts |= {number: tuple(parts) for number, parts in zip(found, different.T.tolist(), strict=True)}
            for value in values:
                self._timed |= set(value.number[(value.marks & self._of_time) != 0].tolist())
        if name == "not":
            pairs = list(zip(found, different[0].tolist(), strict=True))
            self._opposite |= dict(pairs) | {of: number for number, of in pairs}
        self._numbers[key] = np.array(found, np.int64)[inverse.ravel()].reshape(aval.shape)
        return self._numbers[key]

    def numbers_of_whole(self, name: str, how: str, shape: tuple[int, ...], values: Sequence[Value]) -> np.ndarray:
        """Numbers of what an operation returns that mixes elements: the same for the same operation on equal operands.

        :param how: what else it depends on.
        :param shape: of the result.
        :param values: its operands.
        """
        return self._array((name, how, *((value.shape, value.number.tobytes()) for value in values)), shape)

    def with_assumed(self, value: Value) -> Value:
        """What is said of an array, with what is assumed of its elements.

        :param value: an array.
        """
        numbers, given = self._assumed
        if not len(numbers) or value.dtype != bool or not self._reads_time_only(value):
            return value
        place = np.minimum(np.searchsorted(numbers, value.number), len(numbers) - 1)
        is_assumed = numbers[place] == value.number
        known = given[place] if value.known is None else np.where(is_assumed, given[place], value.known)
        sure = is_assumed if value.sure is None else is_assumed | value.sure
        return value._replace(known=known, sure=sure)

    def _reads_time_only(self, value):
        return value.reads is None or not (value.marks & ~self._of_time).any()

    def _array(self, key, shape):
        """The numbers of an array that is known by a key."""
        if key not in self._numbers:
            self._numbers[key] = self._new(shape)
        return self._numbers[key]

    def _element(self, key):
        """The number of an element that is known by a key."""
        if key not in self._elements:
            self._elements[key], self._count = self._count, self._count + 1
        return self._elements[key]

    def _new(self, shape):
        if not self.numbered:
            return None
        first, self._count = self._count, self._count + math.prod(shape)
        return np.arange(first, self._count).reshape(shape)
