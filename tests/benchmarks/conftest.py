"""Medians of finished work, as ratios to the floor E, which is measured before each round of the same run."""

import os

import jax
import numpy as np
import pytest
from floor import exponentials, pairs, seconds


@pytest.fixture
def measure(benchmark):
    def measure(function, *args, rounds=21, **facts):
        """The median time of a compiled function in seconds; `facts` are kept beside it."""
        floor = []
        benchmark.pedantic(
            lambda: jax.block_until_ready(function(*args)),
            setup=lambda: floor.append(seconds(exponentials, pairs())),
            rounds=rounds,
            warmup_rounds=2,
        )
        median, floor = benchmark.stats["median"], np.median(floor[2:])
        benchmark.extra_info |= {"E": floor, "ratio to E": median / floor, "load": os.getloadavg()[0]} | facts
        print(f"\n{benchmark.name}: {median:.4f} s, E {floor:.4f} s, ratio {median / floor:.2f}", facts or "")
        return median

    return measure
