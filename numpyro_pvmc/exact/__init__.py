"""Integrate linear-Gaussian and finite chains out exactly: their evidence, their posterior, programs without them."""

from numpyro_pvmc.exact.likelihood import Estimate, maximum_likelihood
from numpyro_pvmc.exact.marginal import marginalize, sample_states
from numpyro_pvmc.exact.posterior import ExactPosterior, exact_posterior

__all__ = ["Estimate", "ExactPosterior", "exact_posterior", "marginalize", "maximum_likelihood", "sample_states"]
