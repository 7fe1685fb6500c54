"""Parallel variational Monte Carlo for state-space models written in NumPyro."""

from numpyro_pvmc.amortised import AutoAmortisedNormal
from numpyro_pvmc.annotation import markov
from numpyro_pvmc.combined import AutoStateSpace
from numpyro_pvmc.guides import AutoSmoothedNormal
from numpyro_pvmc.infer import PVMC
from numpyro_pvmc.objectives import ImportanceSmoothedELBO
from numpyro_pvmc.posterior import SmoothedPosterior
from numpyro_pvmc.supervised import SupervisedELBO

__version__ = "0.1.0"

__all__ = [
    "PVMC",
    "AutoAmortisedNormal",
    "AutoSmoothedNormal",
    "AutoStateSpace",
    "ImportanceSmoothedELBO",
    "SmoothedPosterior",
    "SupervisedELBO",
    "markov",
]
