"""Refuse what is asked of an inference where it means nothing."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def check_programs(model: Callable, guide: Callable) -> None:
    """Refuse what is no program.

    :raises TypeError: naming what is wrong.
    """
    for name, program in (("model", model), ("guide", guide)):
        if isinstance(program, type):
            raise TypeError(f"`{name}` is the class `{program.__name__}`. Make one: `{program.__name__}(model)`.")
        if not callable(program):
            raise TypeError(f"`{name}` must be a NumPyro program, a function, but got a {type(program).__name__}.")


def check_key(rng_key: jax.Array) -> None:
    """Refuse what is no random key.

    :raises TypeError: if it is none.
    """
    if not isinstance(rng_key, jax.Array | np.ndarray):
        raise TypeError(f"`rng_key` must be a random key, as `jax.random.key(0)`, but got a {type(rng_key).__name__}.")


def check_params(params: dict[str, Any]) -> None:
    """Refuse what are no parameters.

    :param params: values of parameters, by name.
    :raises TypeError: if they are no dictionary.
    """
    if not isinstance(params, dict):
        raise TypeError(
            f"`params` must be a dictionary of values by name, such as `result.params` of `PVMC.run`, but got a "
            f"{type(params).__name__}. Without any, pass `{{}}`."
        )


def check_steps(num_steps: int) -> None:
    """Refuse a number of updates that is none.

    :raises ValueError: naming it.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"`num_steps` must be a positive integer, but got {num_steps!r}.")


def check_sample_shape(sample_shape: tuple[int, ...]) -> None:
    """Refuse a shape that is none.

    :raises TypeError: naming it.
    """
    if not isinstance(sample_shape, tuple | list) or not all(isinstance(size, int | np.integer) for size in sample_shape):
        raise TypeError(f"`sample_shape` must be a tuple of integers, such as `(100,)`, but got {sample_shape!r}.")


def check_refinement(refine: int, temper: float | jax.Array) -> None:
    """Refuse a number of rounds, or a power, that means nothing.

    :param refine: number of rounds.
    :param temper: power of the transition densities in the first of them.
    :raises ValueError: naming what is wrong.
    """
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ValueError(f"`refine` must be a number of rounds, an integer of at least 0, but got {refine!r}.")
    if not isinstance(temper, jax.core.Tracer) and not 0 < temper <= 1:
        raise ValueError(f"`temper` must be above 0 and at most 1, but got {temper}.")
    if not refine and not isinstance(temper, jax.core.Tracer) and temper != 1:
        raise ValueError(f"`temper={temper}` tempers the rounds of `refine`, but there are none. Give `refine=` too.")


def refuse_forward_mode(asked: bool) -> None:
    """Refuse forward-mode differentiation.

    :param asked: whether it is asked for.
    :raises ValueError: if so.
    """
    if asked:
        raise ValueError(
            "`forward_mode_differentiation=True` is not available: the doubly reparameterised gradient is a rule for "
            "reverse-mode differentiation. Leave it out."
        )
