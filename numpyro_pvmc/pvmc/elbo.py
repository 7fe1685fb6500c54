"""The evidence lower bound of importance smoothing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_pvmc.chain.enumeration import of_particles
from numpyro_pvmc.chain.minibatch import draw_indices
from numpyro_pvmc.chain.potentials import tempered
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.checks import GuideKind
from numpyro_pvmc.guides.quasirandom import check_particles
from numpyro_pvmc.infer.objective import ChainELBO, Phase, TrainingStep
from numpyro_pvmc.infer.schedule import growth, warm_up
from numpyro_pvmc.ops.smoothing import check_method, log_normalizer, log_normalizer_and_weights
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.program.arguments import Arguments, Held
from numpyro_pvmc.pvmc.propose import GRADIENTS, Proposed, propose
from numpyro_pvmc.pvmc.smoother import smooth


class ImportanceSmoothedELBO(ChainELBO):
    """The evidence lower bound of importance smoothing: K particles at each time, K^T trajectories.

    The guide proposes K particles independently at every time step. The average of p / q over all K^T trajectories through
    them, an unbiased estimate of the evidence, is computed in T K^2 operations; the bound is the mean of its log. With one
    particle it is the plain ELBO. Every series of the plates around the chain has an estimate of its own.

    :param num_particles: K, the number of particles at each time step.
    :param gradient: how the guide learns. ``"doubly_reparam"``: an unbiased gradient of the bound whose signal grows with
        K. ``"reparam"``: the plain gradient of the bound, whose signal vanishes as K grows. ``"sticking"``: the plain
        gradient with the parameters of log q held fixed, as in the experiments of the PVMC paper; biased for K > 1.
        ``"reweighted"``: the mean of the gradient of log q over the smoothed particles, which needs K > 1. Sites whose draws
        have no gradient, such as discrete ones, learn by the last in any case.
    :param method: how trajectories are summed, ``"sequential"``, ``"blocked"``, ``"associative"`` or ``"auto"``; see
        :func:`numpyro_pvmc.ops.smoothing.log_normalizer`.
    :param particles: ``"rqmc"``, draws of a step that are evenly spread, which keeps the estimate unbiased and makes it several
        times more accurate (:mod:`numpyro_pvmc.guides.quasirandom`); where the guide's distribution has no quantile function
        they are independent, and a warning says so. ``"iid"``, independent draws.
    :param gradient_scale: ``{site: number or schedule}``: what the gradient of the log density of a site of the model is
        multiplied by, its value unchanged; for instance less than 1 for the transition at the start of training. A
        schedule is a function of the number of the update, as Optax has them, and needs :class:`numpyro_pvmc.PVMC`.
    :raises ValueError: for a choice that does not exist.

    **References**

    1. *Efficient Learning of Deep State Space Models via Importance Smoothing*, John-Joseph Brady, Nikolas Nüsken, Yunpeng
       Li (ICML 2026).
    2. *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, George Tucker, Dieterich Lawson, Shixiang Gu,
       Chris Maddison (ICLR 2019).

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_pvmc import ImportanceSmoothedELBO
        >>> def model(y):
        ...     def step(x_prev, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.3))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)
        >>> svi = SVI(model, AutoNormal(model), optax.adam(1e-2), loss=ImportanceSmoothedELBO(num_particles=8))
        >>> result = svi.run(jax.random.key(0), 100, jnp.ones(10), progress_bar=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """

    def __init__(
        self,
        num_particles: int = 32,
        *,
        gradient: str = "doubly_reparam",
        method: str = "auto",
        particles: str = "rqmc",
        gradient_scale: Mapping[str, float | Callable] | None = None,
    ):
        super().__init__(num_particles)
        if gradient not in GRADIENTS:
            raise ValueError(f"`gradient` must be one of {GRADIENTS}, but got {gradient!r}.")
        if gradient == "reweighted" and num_particles == 1:
            raise ValueError(
                "`gradient='reweighted'` needs at least `num_particles=2`: with one particle every weight is 1, and the "
                "gradient of the guide is noise around zero."
            )
        check_particles(particles, num_particles)
        check_method(method)
        self.gradient = gradient
        self.method = method
        self.particles = particles
        self.gradient_scale = dict(gradient_scale or {})

    def schedule(self, num_steps: int, kind: GuideKind) -> list[Phase]:
        """How a run that starts cold goes: a refitted guide warms up, and for others K grows."""
        if kind.refitted_by:
            return [Phase(num_steps, warm_up=warm_up(num_steps))]
        reweighted = self.gradient == "reweighted" or bool(kind.not_reparameterised)
        first, *others = growth(num_steps, self.num_particles, reweighted)
        own = self.num_particles
        phases = [Phase(count, None if number == own else number) for number, count in (first, *others)]
        return [phases[0]._replace(model_rests=bool(others)), *phases[1:]]

    def at(self, step: TrainingStep) -> "ImportanceSmoothedELBO":
        own = super().at(step)
        own.num_particles = self.num_particles if step.num_particles is None else step.num_particles
        return own

    def posterior(
        self,
        rng_key: jax.Array,
        model: Callable,
        guide: Callable,
        arguments: Arguments,
        params: dict[str, Any],
        refine: int = 0,
        temper: float | jax.Array = 1.0,
    ) -> SmoothedPosterior:
        """The smoothed posterior, see :func:`numpyro_pvmc.pvmc.smoother.smooth`."""
        return smooth(rng_key, model, guide, arguments, params, self, refine, temper)

    def advice(self, refine: int = 0, temper: float | jax.Array = 1.0) -> str:
        if not refine:
            return (
                "Train the guide for longer, refit it (`refine=15`, with `temper=0.05` where transitions have little noise), "
                "or take more particles."
            )
        rounds = "more rounds" if temper < 1 else "more rounds, tempered (`temper=0.05`)"
        mode = "`AutoSmoothedNormal(model, covariance='full', init='laplace')`"
        return f"Take {rounds}, more particles, or a guide that starts at the mode ({mode})."

    def loss_with_mutable_state(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The negative bound, summed over series, and the mutable state.

        :param rng_key: random key.
        :param param_map: values of the parameters, by name.
        :param model: a NumPyro program with a chain.
        :param guide: a NumPyro program that samples all its latent sites.
        :param args: arguments of both.
        :param kwargs: keyword arguments of both.
        :return: ``{"loss": ..., "mutable_state": ...}``.
        :raises ValueError: if the program has no Markov chain that can be read, or the guide does not fit it.
        """
        proposed = self._propose(rng_key, param_map, model, guide, Arguments(args, kwargs))
        potentials, structure = proposed.potentials, proposed.potentials.chain.structure
        if proposed.refitted_by:
            log_z, log_weights = log_normalizer_and_weights(potentials.node, potentials.edges, potentials.mask, self.method)
        else:
            log_z, log_weights = log_normalizer(potentials.node, potentials.edges, potentials.mask, self.method).sum(), None
        bound = structure.scale * (log_z + proposed.slack.sum()) + potentials.log_weight_globals
        return {"loss": -bound, "mutable_state": refitted_state(proposed, log_weights, self.particles) or None}

    def _propose(self, rng_key, params, model, guide, arguments):
        """Particles on the chain."""
        step = self.step
        params = params | {name: lax.stop_gradient(params[name]) for name in step.frozen}
        if step.power is not None:
            params = jax.tree.map(lambda x: jnp.where(step.resting, lax.stop_gradient(x), x), params)
        structure = read_structure(model, arguments, params)
        arguments = Held(arguments, structure.by_value)
        params = params | draw_indices(structure, model, arguments, params, rng_key)
        proposed = propose(
            rng_key,
            structure,
            model,
            guide,
            arguments,
            params,
            self.num_particles,
            self.gradient,
            self.particles,
            self._gradient_scale(structure),
        )
        if step.power is not None:
            potentials = proposed.potentials
            proposed = proposed._replace(potentials=potentials._replace(edges=tempered(potentials.edges, step.power)))
        return proposed

    def _gradient_scale(self, structure):
        if unknown := sorted(set(self.gradient_scale) - set(structure.factors)):
            raise ValueError(
                f"`gradient_scale` names {unknown}, which are no sites of the model: it has {sorted(structure.factors)}."
            )
        if self.step.number is None and any(map(callable, self.gradient_scale.values())):
            raise ValueError(
                "A schedule in `gradient_scale` needs the number of the update, which `PVMC` tells the loss and a stock `SVI` "
                "does not. Use `PVMC(..., loss=...)`, or a number."
            )
        return {
            name: jnp.asarray(scale(self.step.number) if callable(scale) else scale)
            for name, scale in self.gradient_scale.items()
        }


def refitted_state(proposed: Proposed, log_weights: jax.Array | None, particles: str) -> dict[str, Any]:
    """Mutable state after an evaluation, that of refitted guides among it.

    :param proposed: particles, potentials, mutable state before.
    :param log_weights: logs of the smoothing weights of its time steps, if a guide is to be refitted.
    :param particles: how particles are drawn.
    """
    potentials, state = proposed.potentials, proposed.potentials.mutable_state
    for guide in proposed.refitted_by:
        of_points = of_particles(potentials.chain.structure, lax.stop_gradient(log_weights))
        state = state | guide.refitted(potentials, of_points, particles)
    return state
