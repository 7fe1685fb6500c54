"""Ask of a function of JAX what its results read, and within which bounds they lie. JAX only."""
