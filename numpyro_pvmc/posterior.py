"""Weighted particles in; draws, summaries, diagnostics, ArviZ data out."""
