"""Say what the library makes of a tricky program: a right number, a wrong one, a refusal in words of its kind or in others."""

import re
import warnings
from typing import NamedTuple

import numpy as np
from jax import random

from numpyro_pvmc import PVMC
from tricky import Tricky, right_values, stock_error

WRONG = ("wrong number", "broke", "other words", "accepted what NumPyro raises at")
WORDS = {
    "casts": "carry",
    "holds": "hold|mask|Markov|accumulat",
    "couplings": "read each other|mixes times",
    "counts": "support|max_count|discrete",
}


class Outcome(NamedTuple):
    """`what` is one of "right", "refused", or of `WRONG`; `said` are the numbers, or the message."""

    what: str
    said: str


def outcome(program: Tricky) -> Outcome:
    """What the library makes of a program."""
    raised = stock_error(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of mass at the largest count
            pvmc = PVMC(program.model, program.guide, num_particles=program.K, particles="iid")
            posterior = pvmc.posterior(random.key(1), {}, *program.args)
    except (ValueError, TypeError) as error:
        # What the body itself raises at, such as `~` of a float, has its own words in NumPyro too.
        of_body = raised is not None and not re.search(WORDS[program.kind], str(raised))
        fits = of_body or re.search(WORDS[program.kind], str(error))
        return Outcome("refused" if fits else "other words", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("refused" if raised is not None else "broke", f"{type(error).__name__}: {error}")
    found = float(posterior.log_normalizer.sum())
    if raised is not None:
        return Outcome("accepted what NumPyro raises at", f"{found}; NumPyro: {raised}")
    right = (program.right or right_values)(program, posterior.particles)
    # What is rounded to float32 may be so in another order.
    atol = 1e-5 if any("float32" in choice for choice in program.choices) else 1e-6
    is_right = any(np.isclose(found, value, rtol=1e-9, atol=atol) for value in right)
    return Outcome("right" if is_right else "wrong number", f"{found:.6f}, right {', '.join(f'{x:.6f}' for x in right)}")
