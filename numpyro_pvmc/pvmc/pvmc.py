"""Fit a state-space model by parallel variational Monte Carlo, and smooth."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import ELBO

from numpyro_pvmc.guides.state_space import automatic_guide
from numpyro_pvmc.infer import requests
from numpyro_pvmc.infer.schedule import default_optimiser
from numpyro_pvmc.infer.svi import ChainSVI
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.program.tracebacks import with_short_tracebacks
from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO


class PVMC(ChainSVI):
    """Parallel variational Monte Carlo: fit a state-space model, and smooth.

    A sibling of :class:`numpyro.infer.SVI` for models whose latent process is a Markov chain in a NumPyro `scan`. The guide
    proposes K particles independently at every time step, and the objective sums over all K^T trajectories through them
    (:class:`numpyro_pvmc.ImportanceSmoothedELBO`); the same weights give the smoothed posterior.

    :param model: a NumPyro program with one latent `scan`, or one marked with :func:`numpyro_pvmc.markov`.
    :param guide: a NumPyro program that samples the chain's sites with a leading time axis, independently over time, such as
        :class:`numpyro.infer.autoguide.AutoNormal`; by default :class:`numpyro_pvmc.AutoSmoothedNormal` with full
        covariances, which has nothing to train, and a Gaussian guide for global sites, if any
        (:class:`numpyro_pvmc.AutoStateSpace`).
    :param optim: an optimiser of NumPyro or Optax; Adam with a slowly decaying step by default.
    :param loss: an objective; by default ``ImportanceSmoothedELBO`` with the four choices below.
    :param num_particles: K, the number of particles at each time step.
    :param gradient: how the guide learns.
    :param method: how trajectories are summed.
    :param particles: how particles are drawn.
    :param static_kwargs: keyword arguments of model and guide that stay the same.
    :raises ValueError: if choices of the default loss are given beside an explicit one, or do not exist.

    **Reference**

    *Efficient Learning of Deep State Space Models via Importance Smoothing*, John-Joseph Brady, Nikolas Nüsken, Yunpeng Li
    (ICML 2026).

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_pvmc import PVMC
        >>> def model(y):
        ...     scale = numpyro.param("scale", 0.3, constraint=dist.constraints.positive)
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)
        >>> y = jnp.sin(jnp.arange(20.0))
        >>> pvmc = PVMC(model, AutoNormal(model), num_particles=8)
        >>> result = pvmc.run(jax.random.key(0), 200, y, progress_bar=False)
        >>> posterior = pvmc.posterior(jax.random.key(1), result.params, y)
        >>> posterior.particles["x"].shape, posterior.mean()["x"].shape
        ((20, 8), (20,))
        >>> pvmc.sample_posterior(jax.random.key(2), result.params, y, sample_shape=(5,))["x"].shape
        (5, 20)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable | None = None,
        optim: Any = None,
        loss: ELBO | None = None,
        *,
        num_particles: int | None = None,
        gradient: str | None = None,
        method: str | None = None,
        particles: str | None = None,
        **static_kwargs: Any,
    ):
        given = {"num_particles": num_particles, "gradient": gradient, "method": method, "particles": particles}
        choices = {name: choice for name, choice in given.items() if choice is not None}
        if loss is None:
            loss = ImportanceSmoothedELBO(**choices)
        elif choices:
            raise ValueError(
                f"{sorted(choices)} are choices of the default loss, and cannot be given beside an explicit `loss`. Give them "
                "to the loss: `loss=ImportanceSmoothedELBO(...)`."
            )
        requests.check_programs(model, model if guide is None else guide)
        guide = automatic_guide(model) if guide is None else guide
        super().__init__(model, guide, default_optimiser() if optim is None else optim, loss, **static_kwargs)

    @with_short_tracebacks
    def posterior(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        *args: Any,
        refine: int = 0,
        temper: float = 1.0,
        **kwargs: Any,
    ) -> SmoothedPosterior:
        """The smoothed posterior: fresh particles from the guide, weighed.

        :param rng_key: random key.
        :param params: trained parameters. With a guide that has none of its own and `refine`, known ones will do.
        :param args: arguments of the model and the guide.
        :param refine: for how many rounds the guide's Gaussians are first refitted to the weighted particles, for any guide
            that is Gaussian in unconstrained space; see :func:`numpyro_pvmc.pvmc.smoother.refine_proposal`. The particles are
            drawn after the last, so the estimate of the evidence stays unbiased.
        :param temper: the power to which transition densities are raised in the first of these rounds, rising to 1. Less
            than 1, such as 0.02, helps where the noise of transitions is small against the width of the guide.
        :param kwargs: keyword arguments of the model and the guide.
        :return: weighted particles; global sites are drawn once.
        :raises ValueError: if `refine` is negative, `temper` is not above 0 and at most 1, the guide is not Gaussian, the data
            contain NaN, or the posterior does: the message names the site, the time and the series.
        :warns UserWarning: if it rests on few particles at some times, or no trajectory is possible; not while compiling.
        """
        requests.check_refinement(refine, temper)
        choices = {"refine": refine, "temper": jnp.asarray(temper)}
        return self._weighed(rng_key, params, self._arguments(args, kwargs), **choices)

    @with_short_tracebacks
    def sample_posterior(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        refine: int = 0,
        temper: float = 1.0,
        resample: bool = False,
        **kwargs: Any,
    ) -> dict[str, jax.Array]:
        """Draw joint trajectories from the smoothed posterior, and global sites afresh for each.

        Pass the result to :class:`numpyro.infer.Predictive`, with a longer time axis for forecasts. Global sites are draws of
        their guide, each with particles of its own. With `resample` they are draws of their posterior: chosen by p Z / q, their
        importance weights, where Z is the estimate of the evidence, from draws of the guide and of wider distributions fitted
        to these (:mod:`numpyro_pvmc.posterior.resampling`). As the number of draws grows the joint distribution becomes the
        posterior, whatever the guide. That serves a few global sites, not hundreds, and costs as much as six times the draws.

        The other arguments, errors and warnings are those of :meth:`posterior`.

        :param sample_shape: how many to draw.
        :param resample: whether to draw global sites from their posterior rather than from their guide.
        :return: ``{site: (*sample_shape, ...)}``, latent and deterministic sites in the shapes that the model gives them.
        """
        requests.check_refinement(refine, temper)
        choices = {"refine": refine, "temper": jnp.asarray(temper)}
        return self._drawn(rng_key, params, self._arguments(args, kwargs), choices, sample_shape, resample)
