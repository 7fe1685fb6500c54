"""What an entry of the contract is: a NumPyro program, what it is called with, and one way to use it wrongly."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import Predictive


class Wrong(NamedTuple):
    """A use that cannot work: what of it differs from the entry's own, and a pattern of the error that says so."""

    message: str
    model: Callable | None = None
    guide: Callable | None = None
    args: Callable[..., tuple] | None = None


class Entry(NamedTuple):
    """A program `model(y=None, *inputs, T=None)`, and what it takes to ask things of it.

    `observed` is what forecasts are of; it is `imputed` where the data, at a site of their own, have gaps. `guide` makes a
    guide of the model; None: the default one.
    `inputs(T)` are the known inputs of T steps, which `model` takes after the data. Data are drawn from the program at the
    parameters `truth` and passed through `spoil`, or are real, `data()`; they have `rows` rows before that of the first step.
    `plates` are those around the chain, with their sizes; `states` are the discrete sites that the guide leaves out, with their
    numbers of states. `exact(y, *inputs)` is the log evidence at the program's initial parameters, where there is an exact one.
    `defects` are questions, by name, that the library answers wrongly, and how.
    """

    name: str
    about: str
    model: Callable
    wrong: Wrong
    observed: str = "y"
    imputed: bool = False
    guide: Callable | None = None
    inputs: Callable[[int], tuple] = lambda T: ()
    truth: Mapping[str, Any] = MappingProxyType({})
    data: Callable[[], np.ndarray] | None = None
    spoil: Callable[[np.ndarray], np.ndarray] = lambda y: y
    length: int = 24
    rows: int = 0
    plates: Mapping[str, int] = MappingProxyType({})
    states: Mapping[str, int] = MappingProxyType({})
    exact: Callable[..., float] | None = None
    num_particles: int = 16
    num_steps: int = 30
    defects: Mapping[str, str] = MappingProxyType({})

    def __repr__(self):
        return self.name

    @property
    def data_site(self):
        return f"{self.observed}_observed" if self.imputed else self.observed

    def args(self, length=None):
        """The data and the inputs of the first `length` steps, of all by default."""
        length = self.length if length is None else length
        return observations(self)[: length + self.rows], *self.inputs(length)

    def forecast(self, horizon):
        """Arguments of `horizon` steps more, without data."""
        return (None, *self.inputs(self.length + horizon)), {"T": self.length + horizon}


_DRAWN: dict[str, np.ndarray] = {}


def observations(entry):
    """The data of an entry, drawn once, and the same in both precisions."""
    if entry.name not in _DRAWN:
        with jax.enable_x64(False):
            y = np.asarray(_simulate(entry) if entry.data is None else entry.data())
        _DRAWN[entry.name] = entry.spoil(y.astype(float) if y.dtype.kind == "f" else y)
    return _DRAWN[entry.name]


def _simulate(entry):
    predict = Predictive(entry.model, num_samples=1, params=jax.tree.map(jnp.asarray, dict(entry.truth)))
    return predict(jax.random.key(0), None, *entry.inputs(entry.length), T=entry.length)[entry.observed][0]
