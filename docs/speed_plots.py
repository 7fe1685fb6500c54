"""Curves of time, in units of E, over T, K and B, from what the benchmarks kept."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

FOUND = json.loads(Path("../tests/benchmarks/results/curves.json").read_text())["benchmarks"]  # from this directory
AXES = {"T": ("steps T", 1), "K": ("particles K", 2), "B": ("series B", 1)}


def time():
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.5), sharey=True, layout="constrained")
    for panel, (axis, (label, slope)) in zip(panels, AXES.items(), strict=True):
        curves = [one["extra_info"] for one in FOUND if one["extra_info"]["axis"] == axis]
        for curve in curves:
            sizes, ratios = np.array(curve["sizes"]), np.array(curve["seconds"]) / curve["E"]
            panel.loglog(sizes, ratios, "o-", label=f"{curve['work']}: {curve['slope']:.2f}")
        sizes = np.array(curves[0]["sizes"])  # on two devices there is no single series
        panel.loglog(sizes, ratios[-1] * (sizes / sizes[-1]) ** slope, ":", color="grey", label=f"line: {slope}")
        panel.set(xlabel=label)
        panel.minorticks_off()
        panel.set_xticks(sizes, sizes)
        panel.legend(title="slope at the end", loc="upper left", fontsize="small", title_fontsize="small")
    low, high = panels[0].get_ylim()
    panels[0].set(ylabel="E", ylim=(low, 1000 * high))
