"""Say what went wrong in a run, from its losses and where it ended."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.program.tracebacks import warn_caller

_FEWEST, _SHARE = 40, 10  # steps of a run that is judged by its losses, and which part of them is a window at either end
_ERRORS, _RISE = 5.0, 1e-3  # a rise that is told: in standard errors of the difference, and relative to the loss


def not_finite(params: dict[str, Any]) -> list[str]:
    """Names of parameters that have NaN or infinite values.

    :param params: values by name, not traced; a value may be a pytree.
    """
    return [name for name, value in params.items() if not all(map(_is_finite, jax.tree.leaves(value)))]


def check_finite(params: dict[str, Any]) -> None:
    """Refuse parameters from which no particle can be drawn or weighed.

    :param params: values by name, not traced.
    :raises ValueError: naming those that are NaN or infinite.
    """
    if names := not_finite(params):
        raise ValueError(
            f"Parameters {names} are not finite, so there is no posterior: the run that they are from diverged. Its losses say "
            "when. Train again, with smaller steps, clipped gradients or `stable_update=True`."
        )


def warn_of_ending(losses: Any, start: int, params: dict[str, Any], skipped: int | None = None) -> None:
    """Say so if losses or parameters are not finite, or if the loss ends above where it began.

    Losses are noisy, so means over a tenth of the steps at either end are compared, by their standard errors. A rise that is
    less than the noise of one loss, or than a thousandth of it, is not told.

    :param losses: the losses of a run, not traced.
    :param start: the number of the first step whose objective is that of the last.
    :param params: values of parameters at the end, by name.
    :param skipped: how many updates were skipped because they were not finite; ``None`` if none may be.
    """
    losses, names = np.asarray(losses, np.float64), not_finite(params)
    strange = ~np.isfinite(losses)
    if skipped:
        first = f" The loss was not finite first at step {np.argmax(strange) + 1}." if strange.any() else ""
        warn_caller(f"{skipped} of {len(losses)} updates were not finite, and were skipped.{first}")
    elif strange.any():
        end = f"the parameters {names} are not finite at the end" if names else "the parameters are finite at the end"
        at = np.argmax(strange) + 1
        warn_caller(
            f"The loss was not finite at {strange.sum()} of {len(losses)} steps, first at step {at}; {end}: "
            "take smaller steps, clip gradients (`optax.clip_by_global_norm`), or give `stable_update=True`."
        )
    elif names:
        warn_caller(f"The parameters {names} are not finite after the last of {len(losses)} steps: the run diverged.")
    elif rise := _rise(losses[start:]):
        before, after, size = rise
        warn_caller(
            f"The loss ends above where it began: its mean is {after:.5g} over the last {size} steps, and {before:.5g} over "
            f"the first {size} of this objective (from step {start + 1}). Take smaller steps, or more particles."
        )


def _is_finite(value):
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        dtype = jnp.result_type(value)
    return not jnp.issubdtype(dtype, jnp.inexact) or bool(np.isfinite(np.asarray(value)).all())


def _rise(losses):
    """Means before and after, and over how many steps, if the loss rose."""
    if len(losses) < _FEWEST:
        return None
    size = max(len(losses) // _SHARE, _FEWEST // 4)
    first, last = losses[:size], losses[-size:]
    rise, errors = last.mean() - first.mean(), np.hypot(first.std(ddof=1), last.std(ddof=1)) / np.sqrt(size)
    least = max(_ERRORS * errors, 2 * min(first.std(ddof=1), last.std(ddof=1)), _RISE * abs(first.mean()))
    return (first.mean(), last.mean(), size) if rise > least else None
