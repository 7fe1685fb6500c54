"""Arrays in, arrays out: the log semiring, sums over trajectories, Gaussians. JAX only."""

from numpyro_pvmc.ops.semiring import logmatmulexp
from numpyro_pvmc.ops.smoothing import log_normalizer, marginals, pairwise_marginals, sample_trajectories

__all__ = ["log_normalizer", "logmatmulexp", "marginals", "pairwise_marginals", "sample_trajectories"]
