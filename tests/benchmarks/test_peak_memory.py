"""Peak of resident memory of a value and a gradient: linear in T, linear in K apart from one block of pairs."""

import sys

import pytest

from peak_memory import peak_memory

SIZES = [
    *[(T, 64, 1) for T in (100, 1_000, 10_000, 100_000)],
    *[(1_000, K, 1) for K in (16, 64, 256, 1_024)],
    *[(1_000, 64, B) for B in (4, 16, 64)],
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(("T", "K", "B"), SIZES)
def test_value_and_gradient(benchmark, T, K, B):
    peak = benchmark.pedantic(peak_memory, (T, K, B), rounds=1)
    benchmark.extra_info |= {"T": T, "K": K, "B": B, "peak in GB": peak / 1e9}
    print(f"\nT {T}, K {K}, B {B}: {peak / 1e9:.2f} GB")
    assert peak < 2e9
