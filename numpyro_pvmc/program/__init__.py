"""Read a NumPyro program: the structure of its chain, and what is refused. NumPyro's handlers live here."""
