"""Plan a run: the phases of a cold start, and how many updates each compiled call makes."""

import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

MOST_AT_ONCE = 128  # updates in one compiled call
_SECONDS = 0.5  # between two looks at the progress bar
_FEWEST_REWEIGHTED = 4  # with one all weights are 1, and the reweighted gradient of the guide is noise around zero
_ROUNDS, _POWER = 15, 0.1  # of the warm-up of a refitted guide: how many at most, and the first power


def growth(num_steps: int, num_particles: int, reweighted: bool = False) -> list[tuple[int, int]]:
    """Numbers of particles, and of steps for each, of a run that starts cold.

    :param reweighted: whether a site of the guide learns by the reweighted gradient, which is noise with one particle.
    :return: pairs of a number of particles and a number of steps: a tenth of the steps with one particle, or 500 if that is
        more and not above a third; a twentieth for each of the numbers growing fourfold; the rest with K. Where a gradient is
        reweighted the first number is 4.

    .. doctest::

        >>> from numpyro_pvmc.infer.schedule import growth
        >>> growth(6000, 64)
        [(1, 600), (4, 300), (16, 300), (64, 4800)]
        >>> growth(6000, 32, reweighted=True)
        [(4, 600), (8, 300), (32, 5100)]
    """
    numbers, fewest = [num_particles], _FEWEST_REWEIGHTED if reweighted else 1
    while numbers[0] > fewest:
        numbers.insert(0, max(numbers[0] // 4, fewest))
    alone = max(num_steps // 10, min(num_steps // 3, 500))  # in 500 steps of 0.01 to 0.02 the guide comes near the data
    steps = [alone, *[num_steps // 20] * (len(numbers) - 2)][: len(numbers) - 1]
    steps.append(num_steps - sum(steps))
    return [(number, count) for number, count in zip(numbers, steps, strict=True) if count]


def calls(num_steps: int, watched: bool) -> Iterator[int]:
    """How many updates each compiled call makes: as many as may be, or what takes half a second if someone is watching.

    A watched run begins with one update, whose time includes compilation, and another one that tells how long they take.
    Numbers are powers of two, for few shapes.

    :param num_steps: number of updates in all.
    :param watched: whether progress is shown after each call; then the time that the consumer takes is measured.
    """
    most = 1 if watched else MOST_AT_ONCE
    while num_steps:
        count, start = min(most, num_steps), time.perf_counter()
        yield count
        num_steps -= count
        if watched:
            in_time = count * _SECONDS / max(time.perf_counter() - start, 1e-6)
            most = 2 ** int(math.log2(min(max(in_time, 1), MOST_AT_ONCE)))


def warm_up(num_steps: int) -> int:
    """For how many steps of a run a refitted guide warms up, while the parameters of the model rest.

    :return: a third of them, and no more than 15.
    """
    return min(num_steps // 3, _ROUNDS)


def warming_power(left: jax.Array, rounds: jax.Array) -> jax.Array:
    """The power to which transition densities are raised in a step of the warm-up: it rises from 0.1 to 1.

    :param left: how many of its steps are left; 0 or less when it is over.
    :param rounds: how many there were.
    """
    return _POWER ** (jnp.maximum(left, 0) / jnp.maximum(rounds, 1))


def default_optimiser() -> optax.GradientTransformation:
    """Adam, with a step that is halved in the first 6000 updates and goes on decreasing."""
    return optax.adam(lambda step: 2e-2 / jnp.sqrt(1.0 + step / 2000.0))
