"""Keep JAX's debugging switches, which are for programs of users, from stopping the library's own array code."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax


def of_the_library(function: Callable) -> Callable:
    """A function whose arrays may be broadcast to other ranks, whatever `jax_numpy_rank_promotion` says.

    Potentials and weights have leading axes for time and particles that values of a model lack: they are broadcast all over.

    :param function: any function.
    """

    @functools.wraps(function)
    def allowed(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_numpy_rank_promotion == "allow":
            return function(*args, **kwargs)
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return allowed


def where_nan_means_missing() -> contextlib.AbstractContextManager:
    """Where data are looked at, NaN under a mask among them: `jax_debug_nans` would take it for an error."""
    return jax.debug_nans(False) if jax.config.jax_debug_nans else contextlib.nullcontext()
