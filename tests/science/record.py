"""Rows of `notebooks/papers/results.csv`: what was measured, and what it is to be compared with.

Runs of the tests leave it alone; `RECORD=1 python -m pytest tests/science -m "slow or not slow"` writes it.
"""

import csv
import datetime
import os
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "notebooks" / "papers" / "results.csv"
COLUMNS = ("experiment", "setting", "metric", "value", "reference", "seconds", "date")


def record(experiment, setting, metric, value, reference="", seconds=None):
    """Write one row in place of an older one of the same experiment, setting and metric, if `RECORD` is set."""
    if not os.environ.get("RECORD"):
        return
    rows = list(csv.DictReader(RESULTS.read_text().splitlines())) if RESULTS.exists() else []
    key = (experiment, setting, metric)
    rows = [row for row in rows if (row["experiment"], row["setting"], row["metric"]) != key]
    time = "" if seconds is None else f"{seconds:.1f}"
    values = (*key, f"{value:.6g}", reference, time, datetime.date.today().isoformat())
    rows.append(dict(zip(COLUMNS, values, strict=True)))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[name] for name in COLUMNS[:3]]))
