"""Programs made to be misread: what the library accepts of them it answers right, and the rest it refuses in words of the kind.

`python tests/test_tricky_programs.py --kind couplings --from 0 --to 40` says what becomes of each, and counts.
"""

import argparse
import os
import sys
import time
from collections import Counter

import jax
import pytest

from tricky_casts import random_cast
from tricky_counts import random_count
from tricky_couplings import random_coupling
from tricky_holds import random_hold
from tricky_outcomes import WRONG, outcome

KINDS = {"casts": random_cast, "holds": random_hold, "couplings": random_coupling, "counts": random_count}
NUMBER = 130  # programs of a kind
QUICK = {"casts": (6, 54), "holds": (1, 8), "couplings": (4, 14), "counts": (5, 26)}
ACCEPTED = 0.6  # of the legitimate ones, at least
LONG_RUNS = False


@pytest.fixture(scope="module")
def counted():
    """What became of the legitimate programs of each kind."""
    return {kind: Counter() for kind in KINDS}


PROGRAMS = [
    pytest.param(kind, seed, marks=[] if seed in QUICK[kind] else pytest.mark.slow) for kind in KINDS for seed in range(NUMBER)
]


@pytest.mark.parametrize(("kind", "seed"), PROGRAMS)
def test_no_wrong_number(x64, counted, kind, seed):
    program = KINDS[kind](seed)
    found = outcome(program)
    if program.is_legitimate:
        counted[kind][found.what] += 1
    assert found.what not in WRONG, f"{program}\n{found.what}: {found.said}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_most_legitimate_programs_are_accepted(x64, counted, kind):
    """Run after the programs themselves."""
    total = counted[kind].total()
    if not total:
        pytest.skip("no program of this kind has run")
    assert counted[kind]["right"] >= ACCEPTED * total, dict(counted[kind])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int, default=NUMBER)
    parser.add_argument("--all", action="store_true", help="every outcome, not only those that are not as they should be")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # compiles in 0.6 of the time
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", True)
    for kind in arguments.kind or KINDS:
        started, counts = time.perf_counter(), Counter()
        for seed in range(arguments.first, arguments.last):
            program = KINDS[kind](seed)
            found = outcome(program)
            counts["legitimate" if program.is_legitimate else "not legitimate", found.what] += 1
            is_fine = found.what == ("right" if program.is_legitimate else "refused")
            if arguments.all or not is_fine:
                print(f"{found.what.upper()}: {program}\n    {found.said[:400]}", flush=True)
            if seed % 20 == 19:
                jax.clear_caches()
        seconds = time.perf_counter() - started
        print(f"\n{kind} {arguments.first} to {arguments.last - 1}, {seconds:.0f} s")
        for (legitimate, what), number in sorted(counts.items()):
            print(f"    {legitimate}, {what}: {number}")
        print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
