"""Parallel variational Monte Carlo for state-space models written in NumPyro."""

from numpyro_pvmc.guides.amortised_normal import AutoAmortisedNormal
from numpyro_pvmc.guides.smoothed_normal import AutoSmoothedNormal
from numpyro_pvmc.guides.state_space import AutoStateSpace
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.program.compiled import enable_compilation_cache
from numpyro_pvmc.program.markov import markov
from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO
from numpyro_pvmc.pvmc.pvmc import PVMC
from numpyro_pvmc.pvmc.supervised import SupervisedELBO

__version__ = "0.1.0"

__all__ = [
    "PVMC",
    "AutoAmortisedNormal",
    "AutoSmoothedNormal",
    "AutoStateSpace",
    "ImportanceSmoothedELBO",
    "SmoothedPosterior",
    "SupervisedELBO",
    "enable_compilation_cache",
    "markov",
]
