"""Results: weighted particles, what can be asked of them, and what tells whether to believe them."""
