"""Train guides and models of chains, and ask for posteriors: what all engines share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_pvmc.infer import requests
from numpyro_pvmc.infer.endings import warn_of_ending
from numpyro_pvmc.infer.objective import Phase, TrainingStep, progress
from numpyro_pvmc.infer.result import RunResult
from numpyro_pvmc.infer.resume import check_state
from numpyro_pvmc.infer.sampling import check_samples, sample
from numpyro_pvmc.infer.schedule import MOST_AT_ONCE, calls, warming_power
from numpyro_pvmc.infer.setup import CheckedSVI
from numpyro_pvmc.posterior.diagnostics import check_posterior, health
from numpyro_pvmc.posterior.particles import SmoothedPosterior
from numpyro_pvmc.program.arguments import Arguments, is_traced
from numpyro_pvmc.program.compiled import Compiled
from numpyro_pvmc.program.handlers import parameters_of
from numpyro_pvmc.program.switches import of_the_library, where_nan_means_missing
from numpyro_pvmc.program.tracebacks import with_short_tracebacks
from numpyro_pvmc.program.waiting import unannounced

_ALONE = TrainingStep()


class ChainSVI(CheckedSVI):
    """Stochastic variational inference for models with a Markov chain, under the objective of any engine.

    The frame of :class:`numpyro_pvmc.PVMC`. What differs between engines it asks of the objective, a
    :class:`numpyro_pvmc.infer.objective.ChainELBO`; under an objective of NumPyro it is a compiled
    :class:`numpyro.infer.SVI`, without posteriors.

    :param model: a NumPyro program with a chain.
    :param guide: a NumPyro program that fits it.
    :param optim: an optimiser of NumPyro or Optax.
    :param loss: an objective.
    :param static_kwargs: keyword arguments of model and guide that stay the same.
    """

    def _forget(self):
        super()._forget()
        self._compiled_evaluate = Compiled(self._evaluate, self.model, "the loss")
        self._compiled_updates = Compiled(self._updates, self.model, "updates")
        self._compiled_posterior = Compiled(self._posterior, self.model, "the posterior")
        self._compiled_sample = Compiled(self._sample, self.model, "draws from the posterior")

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
        return self._one_update(svi_state, args, kwargs, stable=False)

    @with_short_tracebacks
    def stable_update(
        self, svi_state: SVIState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> tuple[SVIState, jax.Array]:
        """Like :meth:`update`, but keep the old state if the loss or the new state is not finite."""
        requests.refuse_forward_mode(forward_mode_differentiation)
        return self._one_update(svi_state, args, kwargs, stable=True)

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
    ) -> RunResult:
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
        with unannounced(not progress_bar):
            return self._run(rng_key, num_steps, args, kwargs, progress_bar, stable_update, init_state, init_params, grow)

    def _run(self, rng_key, num_steps, args, kwargs, progress_bar, stable_update, init_state, init_params, grow):
        state = self.init(rng_key, *args, init_params=init_params, **kwargs) if init_state is None else init_state
        check_state(state, self.optim)
        constraints, arguments, own = self._constraints(args, kwargs), self._passed(args, kwargs), self._arguments(args, kwargs)
        phases, frozen = [Phase(num_steps)], ()
        if grow and init_state is None:
            phases = self.objective.schedule(num_steps, self._form)
        if any(phase.model_rests for phase in phases):
            of_guide = parameters_of(self.guide, own, self.get_params(state))
            frozen = tuple(sorted(set(self._look_at_data.parameters(own)) - of_guide))
        losses, first = [], state.optim_state[0]
        hidden = not progress_bar or is_traced((state, arguments))
        with tqdm.tqdm(total=num_steps, disable=hidden) as bar:
            for phase in phases:
                begun = 0
                for count in calls(phase.num_steps, watched=not hidden):
                    state, chunk = self._compiled_updates(
                        state,
                        constraints,
                        arguments,
                        _of_phase(count, begun, phase),
                        num_particles=phase.num_particles,
                        frozen=frozen if phase.model_rests else (),
                        stable=stable_update,
                    )
                    losses.append(chunk[:count])
                    if not (begun or len(losses) > 1 or stable_update or is_traced(chunk)):
                        self._look_at_data.explain_nan(losses[0], own)
                    begun += count
                    if not hidden:
                        bar.set_postfix_str(progress(self.objective, phase.num_particles, losses[-1]), refresh=False)
                        bar.update(count)
        params, losses = self.get_params(state), jnp.concatenate(losses)
        if not is_traced((params, losses)):
            skipped = num_steps - int(state.optim_state[0] - first) if stable_update else None
            settled = num_steps - phases[-1].num_steps + (phases[-1].warm_up or 0)
            warn_of_ending(losses, settled, params, skipped)
        return RunResult(params, state, losses)

    def posterior(self, rng_key: jax.Array, params: dict[str, Any], *args: Any, **kwargs: Any) -> SmoothedPosterior:
        """The posterior given one draw of the global sites.

        :param rng_key: random key.
        :param params: trained parameters.
        :param args: arguments of the model and the guide.
        :param kwargs: keyword arguments of the model and the guide.
        :raises TypeError: if the objective has none.
        :raises ValueError: if the data contain NaN, or the posterior does: the message names the site, the time and the series.
        :warns UserWarning: if it rests on few particles at some times, or no trajectory is possible; not while compiling.
        """
        return self._weighed(rng_key, params, self._arguments(args, kwargs))

    def sample_posterior(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        resample: bool = False,
        **kwargs: Any,
    ) -> dict[str, jax.Array]:
        """Draw joint trajectories from the posterior, and global sites afresh for each.

        The other arguments, errors and warnings are those of :meth:`posterior`.

        :param sample_shape: how many to draw.
        :param resample: whether to draw global sites from their posterior rather than from their guide.
        :return: ``{site: (*sample_shape, ...)}``.
        """
        return self._drawn(rng_key, params, self._arguments(args, kwargs), {}, sample_shape, resample)

    @with_short_tracebacks
    def _weighed(self, rng_key, params, arguments, **choices):
        self._look_first(rng_key, arguments, params)
        given = Arguments((), choices)
        with where_nan_means_missing():
            posterior, found = self._compiled_posterior(rng_key, params, arguments, given)
        posterior = self._whole(posterior, arguments, given)
        if not is_traced(posterior):
            check_posterior(posterior, found, self.objective.advice(**choices))
        return posterior

    @with_short_tracebacks
    def _drawn(self, rng_key, params, arguments, choices, sample_shape, resample=False):
        requests.check_sample_shape(sample_shape)
        self._look_first(rng_key, arguments, params)
        given = Arguments((), choices)
        shape = {"sample_shape": tuple(sample_shape), "resample": resample}
        drawn = self._compiled_sample(rng_key, params, arguments, given, **shape)

        def again(key, values):
            posterior, _ = self._compiled_posterior(key, params | values, arguments, given)
            return self._whole(posterior, arguments, given)

        if not is_traced(drawn):
            check_samples(drawn, again, self.objective.advice(**choices))
        return drawn.samples

    def _one_update(self, state, args, kwargs, stable):
        """An update by the program that runs end with: it is compiled once for both."""
        constraints, arguments = self._constraints(args, kwargs), self._passed(args, kwargs)
        if is_traced((state, arguments)):  # a loop has no gradient, and the functions of others may want one
            return self._update(state, constraints, arguments, stable)
        last = self.objective.schedule(MOST_AT_ONCE, self._form)[-1]
        place = _of_phase(1, 0, last if last.warm_up is None else last._replace(warm_up=0))
        static = {"num_particles": last.num_particles, "frozen": (), "stable": stable}
        state, losses = self._compiled_updates(state, constraints, arguments, place, **static)
        return state, losses[0]

    @of_the_library
    def _update(self, state, constraints, arguments, stable, step=_ALONE):
        update = SVI.stable_update if stable else SVI.update
        own = self._at(state, constraints, step._replace(number=state.optim_state[0]))
        return update(own, state, *arguments.args, **arguments.kwargs)

    @of_the_library
    def _evaluate(self, state, constraints, arguments):
        own = self._at(state, constraints, TrainingStep(state.optim_state[0]))
        return SVI.evaluate(own, state, *arguments.args, **arguments.kwargs)

    def _at(self, state, constraints, step):
        own = super()._at(state, constraints)
        own.loss = self.objective.at(step)
        return own

    def _updates(self, state, constraints, arguments, place, num_particles, frozen, stable):
        def body(i, state_and_losses):
            state, losses = state_and_losses
            step = TrainingStep(num_particles=num_particles, frozen=frozen)
            if place.rounds is not None:
                left = place.rounds - place.begun - i
                step = step._replace(power=warming_power(left, place.rounds), resting=left > 0)
            state, loss = self._update(state, constraints, arguments, stable, step)
            return state, losses.at[i].set(loss.astype(losses.dtype))

        return lax.fori_loop(0, place.count, body, (state, jnp.zeros(MOST_AT_ONCE, jnp.result_type(float))))

    @of_the_library
    def _posterior(self, rng_key, params, arguments, choices):
        posterior = self.objective.posterior(rng_key, self.model, self.guide, arguments, params, **choices.kwargs)
        # JAX never forgets the structure of a compiled function's result, and what is static in it.
        return dataclasses.replace(posterior, model=None, arguments=None), health(posterior)

    def _whole(self, posterior, arguments, choices):
        """A posterior with what is static in it."""
        with where_nan_means_missing():
            arguments = jax.tree.map(jnp.asarray, arguments)
        given = {"model": self.model, "arguments": arguments, "choices": choices, "source": Source(self)}
        return dataclasses.replace(posterior, **given)

    @of_the_library
    def _sample(self, rng_key, params, arguments, choices, sample_shape, resample):
        parts = self.objective, self.model, self.guide, arguments, params, choices.kwargs, sample_shape, resample
        return sample(rng_key, *parts)


class Place(NamedTuple):
    """Which updates of a phase: how many, after how many, and for how many rounds its guide warms up, if it is refitted."""

    count: np.ndarray
    begun: np.ndarray
    rounds: np.ndarray | None


def _of_phase(count, begun, phase):
    rounds = None if phase.warm_up is None else np.int32(phase.warm_up)
    return Place(np.int32(count), np.int32(begun), rounds)


class Source:
    """What a posterior was made by: it makes others, given other draws of the global sites.

    Two are equal if they have the same model, guide and objective, which need not be hashable.

    :param inference: an inference.
    """

    def __init__(self, inference: ChainSVI):
        self.inference = inference

    def __eq__(self, other):
        return isinstance(other, Source) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self):
        return id(self.inference.model), id(self.inference.guide), id(self.inference.loss)

    def sample(self, rng_key: jax.Array, posterior: SmoothedPosterior, sample_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Draw trajectories, and global sites afresh for each; see :meth:`ChainSVI.sample_posterior`.

        :param rng_key: random key.
        :param posterior: a posterior that was made by this.
        :param sample_shape: how many to draw.
        :return: ``{site: (*sample_shape, ...)}``.
        :raises ValueError: if a density is not a number, or a series is impossible whose sites are integers.
        """
        given = posterior.params, posterior.arguments, posterior.choices.kwargs
        return self.inference._drawn(rng_key, *given, sample_shape)
