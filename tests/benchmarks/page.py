"""The page of the documentation that shows what was measured: `python tests/benchmarks/page.py > docs/speed.rst`.

Reads the files that `pytest tests/benchmarks/test_NAME.py --benchmark-json=tests/benchmarks/results/NAME.json` wrote.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

HEAD = """\
Speed and memory
================

.. Written by ``python tests/benchmarks/page.py > docs/speed.rst`` from the files in ``tests/benchmarks/results``.

Measured on two CPU cores ({machines}), {date}, JAX {jax}, float32. Times are
medians of finished calls, without compilation; where other work shares the cores they vary by half. The unit is E, the time
of one exponential for every pair of particles of 500 steps, 16 series and 64 particles, which no exact sum over trajectories
can do without; it is measured before each call of the same run, and was {least:.3f} to {most:.3f} s in the first table, on an
{machine}. No figure on this page was measured on a GPU.

The files in ``tests/benchmarks`` are run by ``pip install -e ".[bench]"`` and ``python -m pytest tests/benchmarks``.
"""


def load(name):
    """Benchmarks of a file by name, and on which day and processor they were measured."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    rows = {one["name"]: one["extra_info"] | {"seconds": one["stats"]["median"]} for one in found["benchmarks"]}
    return rows, {"date": found["datetime"][:10], "machine": found["machine_info"]["cpu"]["brand_raw"]}


def table(title, columns, rows):
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in (columns, *rows):
        first, *others = (str(cell) for cell in row)
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join(lines) + "\n"


def section(title, *parts):
    return "\n".join([title, "-" * len(title), "", *parts])


def short(x):
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


def kernel():
    rows, _ = load("kernel")
    names = {
        "test_lattice[log_normalizer]": "log normalizer",
        "test_lattice[marginals]": "smoothing and filtering weights",
        "test_value_and_gradient": "value and gradient for model and guide, draws included",
        "test_value_and_gradient_on_two_devices": "the same, with half of the series on each of two devices",
        "test_update": "``PVMC.update``, draws and Adam included",
        "test_draws": "draws alone, quasi-random",
    }
    cells = [(title, f"{short(rows[name]['ratio to E'])} E", f"{rows[name]['seconds']:.3f}") for name, title in names.items()]
    compiled = rows["test_compile_value_and_gradient"]["seconds"]
    return section(
        "One size",
        "500 steps, 16 series, 64 particles in 5 dimensions: the linear-Gaussian experiment of the PVMC paper. The authors'",
        "PyTorch code took 5.4 s for the weights and 12.6 s for a training step of guide and model, on two cores of another",
        "machine.",
        "",
        table("Linear-Gaussian", ("Work", "Ratio", "Seconds"), cells),
        f"Compiling the value and the gradient takes {compiled:.1f} s.",
        "",
    )


def known_states():
    rows, _ = load("known_states")
    update, networks = rows["test_update"]["seconds"], rows["test_networks_alone"]["seconds"]
    return section(
        "Learning from known states",
        "A training step of the paper's prey-predator experiment (256 steps, 16 series, 32 particles, two networks of 5 x 32,",
        f"a guide of convolutions) takes {update:.2f} s. Value and gradient of the two networks alone, all steps at once, take",
        f"{networks:.2f} s; the update takes a few steps at a time, whose numbers stay in the processor's caches. On two cores",
        "of another machine the authors' PyTorch code took 15 s, the fastest filter of pydpf 0.52 s.",
        "",
    )


def curves():
    return section(
        "How cost grows",
        "One of T, K and B moves, the others stay at 500, 64 and 4, in units of E, against lines of slope 1, 2 and 1: the log",
        "normalizer and the smoothing weights of given particles; and whole calls, the posterior and the bound with its",
        "gradient, in which are independent draws and distributions, whose cost is linear in K. To JAX the processor is one "
        "device, and",
        "of few series one core does most of the work; as two devices with half of the series each, both cores do theirs",
        "(:doc:`choosing`).",
        "",
        ".. plot:: speed_plots.py time",
        "   :show-source-link: False",
        "",
    )


def memory():
    rows, _ = load("peak_memory")
    cells = [(*(f"{row[axis]:,}" for axis in "TKB"), f"{row['peak in GB']:.2f}") for row in rows.values()]
    return section(
        "Memory",
        "Peak of resident memory of a process that computes the value and the gradient, for states of two dimensions; Python,",
        "JAX and compilation are in it.",
        "",
        table("Peak memory", ("T", "K", "B", "GB"), cells),
    )


def methods():
    rows, _ = load("methods")
    names = ("sequential", "blocked", "associative")
    sizes = dict.fromkeys(tuple(row[axis] for axis in "TKB") for row in rows.values())
    seconds = {(row["T"], row["K"], row["B"], row["method"]): row["seconds"] for row in rows.values()}
    cells = []
    for size in sizes:
        times = [1e3 * seconds[*size, name] for name in names]
        cells.append((*(f"{axis:,}" for axis in size), *(f"**{short(t)}**" if t == min(times) else short(t) for t in times)))
    return section(
        "Ways of summing trajectories",
        "Value and gradient for a random walk's particles, in milliseconds; the fastest in bold.",
        "",
        table("``method=``", ("T", "K", "B", *names), cells),
    )


def runs():
    rows, _ = load("runs")
    first, posterior, bar = (rows[name] for name in ("test_first_run_of_one_step", "test_first_posterior", "test_progress_bar"))
    cost = max(bar["seconds"] / bar["seconds without"] - 1, 0.0)
    return section(
        "Before and between the steps",
        "The quickstart's volatility model, 2516 days and 64 particles: the first ``PVMC.run``, of one step, takes",
        f"{first['seconds']:.1f} s for reading and checking the program, compiling and running; the first ``PVMC.posterior``,",
        f"refined four times, {posterior['seconds']:.1f} s. Later calls compile nothing. Steps run on the device between looks",
        f"at the progress bar, two a second, which add {100 * cost:.1f}% to {bar['steps']} steps in {bar['seconds']:.2f} s.",
        "",
    )


def peers():
    smoothers, training = (list(load(name)[0].values()) for name in ("peers", "training"))
    first, second = (
        f"{min(row['E'] for row in rows):.3f} to {max(row['E'] for row in rows):.3f} s" for rows in (smoothers, training)
    )
    return section(
        "Beside other methods",
        "The same data and true parameters for all, 500 steps and 16 series. Errors are the root mean square one of the log",
        "evidence of a series (of the bound, in training), and the mean squared distance of the smoothed state from the exact",
        "one (for filters alone, of the filtered one). PVMC, the tree and SVI propose from one guide, the exact filter's",
        f"marginals, unless a blind start is named. E was {first} in the first table and {second} in the second.",
        "",
        table(
            "State estimation",
            ("Method", "K", "Seconds", "Log evidence", "State"),
            [(r["method"], r["K"], f"{r['seconds']:.2f}", short(r["error of log Z"]), short(r["e_x"])) for r in smoothers],
        ),
        time_to_accuracy(smoothers),
        table(
            "One step of training: value and gradient of the log evidence",
            ("Method", "K", "Seconds", "Log evidence, mean of series"),
            [(r["method"], r["K"], f"{r['seconds']:.2f}", short(r["error of log Z"])) for r in training],
        ),
    )


def time_to_accuracy(rows, error=0.01):
    """The first PVMC from a blind start that is accurate enough, and the particle smoother that is nearest to that."""
    ours, theirs = ([row for row in rows if word in row["method"]] for word in ("blind", "backward"))
    ours = min((row for row in ours if row["e_x"] <= error), key=lambda row: row["seconds"])
    theirs = min(theirs, key=lambda row: row["e_x"])
    return (
        f"To an error of {short(ours['e_x'])} of the state PVMC takes {ours['seconds']:.1f} s from a blind start, all rounds\n"
        f"counted. The particle smoother is at {short(theirs['e_x'])} with {theirs['K']} particles after\n"
        f"{theirs['seconds']:.0f} s, {theirs['seconds'] / ours['seconds']:.0f} times as long.\n"
    )


if __name__ == "__main__":
    import jax

    rows, facts = load("kernel")
    runs_of = [load(path.stem)[1] for path in RESULTS.glob("*.json")]
    dates, machines = (sorted({run[of] for run in runs_of}) for of in ("date", "machine"))
    floors = [row["E"] for row in rows.values() if "E" in row]
    facts |= {
        "date": f"{dates[0]} to {dates[-1]}",
        "machines": " or ".join(machines),
        "jax": jax.__version__,
        "least": min(floors),
        "most": max(floors),
    }
    print(HEAD.format(**facts))
    print("\n".join([kernel(), known_states(), peers(), methods(), curves(), memory(), runs()]), end="")
