"""Check that a training state fits the inference that is to go on from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIState
from numpyro.optim import _NumPyroOptim

Looks = dict[str, tuple[tuple[int, ...], str]]  # shape and type, by name

_ANEW = "or start anew from its values: `init_params=result.params`."


class Expected(NamedTuple):
    """What a state looks like: its parameters and its mutable state, by name, and the structure of the optimiser's state."""

    params: Looks
    mutable: Looks
    optim: Any


def precision() -> str:
    """The type that JAX gives to Python's floats now."""
    return str(jnp.result_type(float))


def expected(state: SVIState, optim: _NumPyroOptim) -> Expected:
    """What the states of an inference look like.

    :param state: one of them.
    """
    of_optim = jax.tree.structure(state.optim_state), tuple(map(jnp.shape, jax.tree.leaves(state.optim_state)))
    return Expected(_looks(optim.get_params(state.optim_state)), _looks(state.mutable_state or {}), of_optim)


def check_state(state: SVIState, optim: _NumPyroOptim, by_precision: Mapping[str, list[Expected]] | None = None) -> None:
    """Refuse a state of another model, guide, optimiser or precision.

    :param state: the state; may be traced.
    :param by_precision: what its states look like, by the precision in which they were made; ``None`` if any will do.
    :raises TypeError: if it is no state.
    :raises ValueError: naming what differs.
    """
    if not isinstance(state, SVIState):
        raise TypeError(
            f"A state must be an `SVIState`, such as `result.state` of `run` or what `init` returns, but got a "
            f"{type(state).__name__}."
        )
    if by_precision is None:
        return
    try:
        found = expected(state, optim)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(_of_another_optimiser()) from error
    if precision() not in by_precision:
        _refuse_precision(*by_precision)
    wanted = by_precision[precision()]
    if found in wanted:
        return
    _check_looks("parameter", found.params, wanted[-1].params)
    _check_looks("mutable state", found.mutable, wanted[-1].mutable)
    raise ValueError(_of_another_optimiser())


def _looks(tree):
    leaves, _ = jax.tree.flatten_with_path(tree)
    # A type as it is: asked of `jax.numpy`, float64 would be float32 where it is switched off.
    kind = lambda leaf: str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
    return {jax.tree_util.keystr(path, simple=True, separator="."): (jnp.shape(leaf), kind(leaf)) for path, leaf in leaves}


def _check_looks(what, found, wanted):
    if found.keys() != wanted.keys():
        raise ValueError(
            f"The state is one of another model or guide: its {what} has the names {sorted(found)}, and here they are "
            f"{sorted(wanted)}. Go on with the model and the guide that it was made with, {_ANEW}"
        )
    for name, (shape, kind) in wanted.items():
        if found[name][0] != shape:
            raise ValueError(
                f"The {what} '{name}' has the shape {found[name][0]} in the state, and {shape} for this model, this guide and "
                "the data they met here. A state goes on with data of the shapes that it was made with."
            )
        if found[name][1] != kind:
            raise ValueError(
                f"The {what} '{name}' is {found[name][1]} in the state, and {kind} here, where floats are {precision()}. Set "
                f"`jax_enable_x64` as it was when the state was made, {_ANEW}"
            )


def _refuse_precision(before, *others):
    raise ValueError(
        f"This inference met its data when floats were {before}, and now they are {precision()}. Set `jax_enable_x64` once, "
        "before anything else, or make the guide and the inference again after it; parameters can be carried over as "
        "`init_params=`."
    )


def _of_another_optimiser():
    return f"The state is one of another optimiser. Go on with the optimiser that it was made with, {_ANEW}"
