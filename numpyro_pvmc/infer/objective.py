"""Say what the frame asks of an objective: how a run goes, what is learnt at a step, and what posterior there is."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer import ELBO

from numpyro_pvmc.guides.checks import GuideKind, check_guide
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.structure import Structure


class Phase(NamedTuple):
    """A part of a run, which is compiled once.

    :param num_steps: number of updates.
    :param num_particles: K, if it is not the objective's own.
    :param model_rests: whether the parameters of the model get no gradient.
    :param warm_up: for how many updates at its start a refitted guide warms up alone.
    """

    num_steps: int
    num_particles: int | None = None
    model_rests: bool = False
    warm_up: int | None = None


class TrainingStep(NamedTuple):
    """What an update has of its place in a run.

    :param number: how many updates came before; ``None`` outside of a run.
    :param num_particles: K, if it is not the objective's own.
    :param frozen: parameters that get no gradient.
    :param power: transition densities are raised to it, while a guide warms up.
    :param resting: whether it still does, and parameters get no gradient.
    """

    number: jax.Array | None = None
    num_particles: int | None = None
    frozen: tuple[str, ...] = ()
    power: jax.Array | None = None
    resting: jax.Array | None = None


class ChainELBO(ELBO):
    """An objective of models with a Markov chain; the base of those of all engines.

    An engine has a subclass with ``loss_with_mutable_state``, and with :meth:`posterior` if it has one. With
    :class:`numpyro_pvmc.infer.svi.ChainSVI` that is enough for training, posteriors, draws and ArviZ.

    :param num_particles: K, the number of particles at each time step.
    :raises ValueError: if it is no positive integer.
    """

    can_infer_discrete = True  # those that the guide samples
    reported = "bound", -1.0  # what is shown of it while it is trained, and its sign
    reads_chains = True
    step = TrainingStep()

    def __init__(self, num_particles: int):
        # To `ELBO` the number of particles is that of independent bounds to average.
        super().__init__(num_particles=1)
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"`num_particles` must be an integer of at least 1, but got {num_particles!r}.")
        self.num_particles = num_particles

    def __repr__(self):
        choices = {name: value for name, value in vars(self).items() if type(value) in (int, float, str)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in choices.items())})"

    def check(self, structure: Structure, guide: Callable, arguments: Arguments, params: dict[str, Any]) -> GuideKind:
        """Refuse a guide that does not fit.

        :param params: values of parameters and mutable state.
        :return: what kind of guide it is.
        :raises ValueError: as :func:`numpyro_pvmc.guides.checks.check_guide`.
        """
        return check_guide(structure, guide, arguments, params)

    def schedule(self, num_steps: int, kind: GuideKind) -> list[Phase]:
        """How a run that starts cold goes.

        :param kind: what kind of guide it has.
        """
        return [Phase(num_steps)]

    def at(self, step: TrainingStep) -> "ChainELBO":
        """The objective of one update.

        :param step: its place in the run.
        """
        own = copy.copy(self)
        own.step = step
        return own

    def posterior(
        self,
        rng_key: jax.Array,
        model: Callable,
        guide: Callable,
        arguments: Arguments,
        params: dict[str, Any],
        **choices: Any,
    ) -> Any:
        """The posterior given one draw of the global sites.

        :param choices: of an engine's own.
        :return: weighted particles, a :class:`numpyro_pvmc.SmoothedPosterior`.
        :raises TypeError: if the objective has none.
        """
        raise TypeError(f"The objective `{type(self).__name__}` has no posterior.")

    def advice(self, **choices: Any) -> str:
        """What to do where a posterior rests on few particles.

        :param choices: those of :meth:`posterior`.
        """
        return "Train the guide for longer, or take more particles."


class StockObjective:
    """An objective of NumPyro, of which nothing is asked: it knows no chains.

    :param loss: the objective.
    """

    reported = "bound", -1.0
    reads_chains = False
    num_particles = None

    def __init__(self, loss: ELBO):
        self.loss = loss

    def schedule(self, num_steps: int, kind: GuideKind) -> list[Phase]:
        return [Phase(num_steps)]

    def at(self, step: TrainingStep) -> ELBO:
        return self.loss

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"The posterior needs the loss `ImportanceSmoothedELBO`, but here it is {type(self.loss).__name__}.")


def objective_of(loss: ELBO) -> ChainELBO | StockObjective:
    """What the frame asks of a loss.

    :param loss: an objective.
    """
    return loss if isinstance(loss, ChainELBO) else StockObjective(loss)


def progress(objective: ChainELBO | StockObjective, num_particles: int | None, losses: jax.Array) -> str:
    """What is shown of a run: the mean of what the objective reports, and the number of particles.

    :param num_particles: K, if it is not the objective's own.
    :param losses: its last values.
    """
    name, sign = objective.reported
    losses, number = np.asarray(losses), objective.num_particles if num_particles is None else num_particles
    known = losses[~np.isnan(losses)]
    return f"{name}: {sign * known.mean() if len(known) else np.nan:.4f}, K = {number}"
