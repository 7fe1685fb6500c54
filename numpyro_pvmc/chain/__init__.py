"""A structure and values make the Markov chain: its log densities, potentials and matrices."""
