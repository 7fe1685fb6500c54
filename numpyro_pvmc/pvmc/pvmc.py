"""A program, a guide, data in; trained parameters and the smoothed posterior out."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from jax import lax
from numpyro.infer import ELBO, SVI
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_pvmc.guides.state_space import automatic_guide
from numpyro_pvmc.infer import requests
from numpyro_pvmc.infer.endings import warn_of_ending
from numpyro_pvmc.infer.resume import check_state
from numpyro_pvmc.infer.schedule import MOST_AT_ONCE, calls, default_optimiser, growth, warm_up, warming_power
from numpyro_pvmc.infer.svi import CheckedSVI
from numpyro_pvmc.posterior.diagnostics import check_posterior, health
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.program.arguments import is_traced
from numpyro_pvmc.program.handlers import parameters_of_the_model
from numpyro_pvmc.program.switches import of_the_library, where_nan_means_missing
from numpyro_pvmc.program.tracebacks import with_short_tracebacks
from numpyro_pvmc.pvmc.elbo import ImportanceSmoothedELBO, progress
from numpyro_pvmc.pvmc.smoother import check_samples, sample, smooth


class PVMC(CheckedSVI):
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

    def _forget(self):
        super()._forget()
        self._compiled_update = jax.jit(self._update, static_argnames=("stable",))
        self._compiled_evaluate = jax.jit(self._evaluate)
        self._compiled_updates = jax.jit(self._updates, static_argnames=("num_particles", "frozen", "rounds", "stable"))
        self._compiled_posterior = jax.jit(self._posterior, static_argnames=("refine",))
        self._compiled_sample = jax.jit(self._sample, static_argnames=("sample_shape", "refine", "resample"))

    @with_short_tracebacks
    def update(
        self, svi_state: SVIState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> tuple[SVIState, jax.Array]:
        """Take one step of the optimiser. Compiled: arrays among the arguments are traced, anything else is static.

        :param svi_state: the state.
        :param args: arguments of the model and the guide; keyword arguments alike.
        :param forward_mode_differentiation: not available, and refused.
        :return: the new state, and the loss at the old one.
        """
        requests.refuse_forward_mode(forward_mode_differentiation)
        return self._compiled_update(svi_state, self._constraints(args, kwargs), self._passed(args, kwargs), stable=False)

    @with_short_tracebacks
    def stable_update(
        self, svi_state: SVIState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> tuple[SVIState, jax.Array]:
        """Like :meth:`update`, but keep the old state if the loss or the new state is not finite."""
        requests.refuse_forward_mode(forward_mode_differentiation)
        return self._compiled_update(svi_state, self._constraints(args, kwargs), self._passed(args, kwargs), stable=True)

    @with_short_tracebacks
    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The loss that :meth:`update` would report at a state, with the same arguments."""
        return self._compiled_evaluate(svi_state, self._constraints(args, kwargs), self._passed(args, kwargs))

    @with_short_tracebacks
    def run(
        self,
        rng_key: jax.Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: SVIState | None = None,
        init_params: dict[str, Any] | None = None,
        grow: bool = True,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Train for a number of steps.

        From a cold start the weights of many particles all go to one of them before the guide is near the posterior, and the
        objective stalls. So training of a guide with parameters starts with one particle, or with four where a site learns by
        the reweighted gradient, and grows to K in a few phases, each compiled once; see
        :func:`numpyro_pvmc.infer.schedule.growth`. In the first phase the parameters of the model rest, since the plain bound
        of a guide that is independent over time would draw them towards a chain without memory.
        A refitted guide has K particles throughout; for a few steps it is refitted alone, to tempered transitions. A run that
        goes on from `init_state` does neither.

        :param rng_key: random key.
        :param num_steps: number of updates.
        :param args: arguments of the model and the guide.
        :param progress_bar: whether to show progress, with the bound.
        :param stable_update: whether to skip updates that are not finite.
        :param forward_mode_differentiation: not available.
        :param init_state: a state to go on from.
        :param init_params: initial values of parameters, by name.
        :param grow: whether to begin with few particles, or by refitting alone. Without, each step equals one of
            :class:`numpyro.infer.SVI`.
        :return: parameters, last state, and the losses; while the number of particles grows a loss is that of the number in
            use, and while transitions are tempered that of the tempered chain. A warning says so if they, or the parameters,
            are not finite, or if they end above where they began.
        :raises ValueError: for `num_steps` below 1, or as :meth:`init`.
        """
        requests.check_steps(num_steps)
        requests.refuse_forward_mode(forward_mode_differentiation)
        state = self.init(rng_key, *args, init_params=init_params, **kwargs) if init_state is None else init_state
        check_state(state, self.optim)
        constraints, arguments, own = self._constraints(args, kwargs), self._passed(args, kwargs), self._arguments(args, kwargs)
        phases, frozen, rounds = [(None, num_steps)], (), None
        if grow and init_state is None and isinstance(self.loss, ImportanceSmoothedELBO):
            if self._form.refitted_by:
                rounds = warm_up(num_steps)
            else:
                reweighted = self.loss.gradient == "reweighted" or bool(self._form.not_reparameterised)
                phases = growth(num_steps, self.loss.num_particles, reweighted)
                if len(phases) > 1:
                    frozen = parameters_of_the_model(self.model, self.guide, own, self.get_params(state))
        losses, total, first = [], 0, state.optim_state[0]
        hidden = not progress_bar or is_traced((state, arguments))
        with tqdm.tqdm(total=num_steps, disable=hidden) as bar:
            for num_particles, steps in phases:
                for count in calls(steps, watched=not hidden):
                    state, chunk = self._compiled_updates(
                        state,
                        constraints,
                        arguments,
                        jnp.asarray(count),
                        None if rounds is None else jnp.asarray(rounds - total),
                        num_particles=num_particles,
                        frozen=frozen if total < phases[0][1] else (),
                        rounds=rounds,
                        stable=stable_update,
                    )
                    losses.append(chunk[:count])
                    if not (total or stable_update or is_traced(chunk)):
                        self._look_at_data.explain_nan(losses[0], own)
                    total += count
                    if not hidden:
                        bar.set_postfix_str(progress(self.loss, num_particles, losses[-1]), refresh=False)
                        bar.update(count)
        params, losses = self.get_params(state), jnp.concatenate(losses)
        if not is_traced((params, losses)):
            skipped = num_steps - int(state.optim_state[0] - first) if stable_update else None
            warn_of_ending(losses, num_steps - phases[-1][1] if rounds is None else rounds, params, skipped)
        return SVIRunResult(params, state, losses)

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
            that is Gaussian in unconstrained space; see :func:`numpyro_pvmc.pvmc.refinement.refine`. The particles are drawn
            after the last, so the estimate of the evidence stays unbiased.
        :param temper: the power to which transition densities are raised in the first of these rounds, rising to 1. Less
            than 1, such as 0.02, helps where the noise of transitions is small against the width of the guide.
        :param kwargs: keyword arguments of the model and the guide.
        :return: weighted particles; global sites are drawn once.
        :raises ValueError: if `refine` is negative, `temper` is not above 0 and at most 1, the guide is not Gaussian, the data
            contain NaN, or the posterior does: the message names the site, the time and the series.
        :warns UserWarning: if it rests on few particles at some times, or no trajectory is possible; not while compiling.
        """
        requests.check_refinement(refine, temper)
        arguments = self._arguments(args, kwargs)
        self._look_first(rng_key, arguments, params)
        with where_nan_means_missing():
            posterior, found = self._compiled_posterior(rng_key, params, arguments, temper, refine=refine)
        posterior = self._whole(posterior, arguments, refine)
        check_posterior(posterior, found, refine, temper)
        return posterior

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
        importance weights, where Z is the estimate of the evidence, from draws of the guide and of wider laws fitted to these
        (:mod:`numpyro_pvmc.posterior.resampling`). As the number of draws grows the joint law becomes the posterior, whatever
        the guide. That serves a few global sites, not hundreds, and costs as much as six times the draws.

        The other arguments, errors and warnings are those of :meth:`posterior`.

        :param sample_shape: how many to draw.
        :param resample: whether to draw global sites from their posterior rather than from their guide.
        :return: ``{site: (*sample_shape, ...)}``, latent and deterministic sites in the shapes that the model gives them.
        """
        requests.check_refinement(refine, temper)
        requests.check_sample_shape(sample_shape)
        arguments = self._arguments(args, kwargs)
        self._look_first(rng_key, arguments, params)
        return self._draw(rng_key, params, arguments, tuple(sample_shape), refine, temper, resample)

    def _draw(self, rng_key, params, arguments, sample_shape, refine, temper, resample=False):
        choices = {"sample_shape": sample_shape, "refine": refine, "resample": resample}
        drawn = self._compiled_sample(rng_key, params, arguments, temper, **choices)

        def again(key, values):
            posterior, _ = self._compiled_posterior(key, params | values, arguments, temper, refine=refine)
            return self._whole(posterior, arguments, refine)

        check_samples(drawn, again, refine, temper)
        return drawn.samples

    @of_the_library
    def _update(self, state, constraints, arguments, stable):
        update = SVI.stable_update if stable else SVI.update
        return update(self._at(state, constraints), state, *arguments.args, **arguments.kwargs)

    @of_the_library
    def _evaluate(self, state, constraints, arguments):
        return SVI.evaluate(self._at(state, constraints), state, *arguments.args, **arguments.kwargs)

    def _at(self, state, constraints):
        own = super()._at(state, constraints)
        if isinstance(self.loss, ImportanceSmoothedELBO):
            own.loss = self.loss.at_update(state.optim_state[0])
        return own

    def _updates(self, state, constraints, arguments, count, left, num_particles, frozen, rounds, stable):
        own = copy.copy(self)
        if num_particles not in (None, self.loss.num_particles):
            own.loss = self.loss.with_num_particles(num_particles, frozen)

        def body(i, state_and_losses):
            state, losses = state_and_losses
            here = copy.copy(own)
            if rounds is not None:
                here.loss = self.loss.while_warming(warming_power(left - i, rounds), left > i)
            state, loss = here._update(state, constraints, arguments, stable)
            return state, losses.at[i].set(loss.astype(losses.dtype))

        dtype = jax.eval_shape(lambda: self._update(state, constraints, arguments, stable)[1]).dtype
        return lax.fori_loop(0, count, body, (state, jnp.zeros(MOST_AT_ONCE, dtype)))

    @of_the_library
    def _posterior(self, rng_key, params, arguments, temper, refine):
        posterior = smooth(rng_key, self.model, self.guide, arguments, params, self._lattice_loss(), refine, temper)
        # JAX never forgets the structure of a compiled function's result, and what is static in it.
        return dataclasses.replace(posterior, model=None, arguments=None), health(posterior)

    def _whole(self, posterior, arguments, refine):
        """A posterior with what is static in it."""
        with where_nan_means_missing():
            arguments = jax.tree.map(jnp.asarray, arguments)
        return dataclasses.replace(posterior, model=self.model, arguments=arguments, source=Source(self, refine))

    @of_the_library
    def _sample(self, rng_key, params, arguments, temper, sample_shape, refine, resample):
        parts = self.model, self.guide, arguments, params, self._lattice_loss(), refine, temper, sample_shape, resample
        return sample(rng_key, *parts)

    def _lattice_loss(self):
        if isinstance(self.loss, ImportanceSmoothedELBO):
            return self.loss
        raise TypeError(f"The posterior needs the loss `ImportanceSmoothedELBO`, but here it is {type(self.loss).__name__}.")


class Source:
    """What a posterior was made by: it makes others, given other draws of the global sites.

    Two are equal if they have the same model, guide and objective, which need not be hashable.

    :param pvmc: an inference.
    :param refine: number of rounds in which the guide's Gaussians were refitted.
    """

    def __init__(self, pvmc: PVMC, refine: int):
        self.pvmc, self.refine = pvmc, refine

    def __eq__(self, other):
        return isinstance(other, Source) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self):
        return id(self.pvmc.model), id(self.pvmc.guide), id(self.pvmc.loss), self.refine

    def sample(self, rng_key: jax.Array, posterior: SmoothedPosterior, sample_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Draw trajectories, and global sites afresh for each; see :meth:`PVMC.sample_posterior`.

        :param rng_key: random key.
        :param posterior: a posterior that was made by this.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, ...)}``.
        :raises ValueError: if a density is not a number, or a series is impossible whose sites are integers.
        """
        given = posterior.params, posterior.arguments, sample_shape, self.refine, posterior.temper
        return self.pvmc._draw(rng_key, *given)
