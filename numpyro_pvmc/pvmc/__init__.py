"""Parallel variational Monte Carlo: K particles a step, all K^T trajectories through them."""

from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO
from numpyro_pvmc.pvmc.pvmc import PVMC
from numpyro_pvmc.pvmc.supervised import SupervisedELBO, kernel_log_density, squared_error

__all__ = ["PVMC", "ImportanceSmoothedELBO", "SupervisedELBO", "kernel_log_density", "squared_error"]
