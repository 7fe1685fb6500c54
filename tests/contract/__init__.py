"""The programs that people bring, each written as NumPyro's own documentation would write it."""

from contract.classical import ENTRIES as CLASSICAL
from contract.counts import ENTRIES as COUNTS
from contract.deep import ENTRIES as DEEP
from contract.nonlinear import ENTRIES as NONLINEAR
from contract.panels import ENTRIES as PANELS
from contract.switching import ENTRIES as SWITCHING

FIELDS = {
    "Classical": CLASSICAL,
    "Counts and categories": COUNTS,
    "Nonlinear": NONLINEAR,
    "Panels": PANELS,
    "Switching": SWITCHING,
    "Networks": DEEP,
}
ENTRIES = {entry.name: entry for entries in FIELDS.values() for entry in entries}
