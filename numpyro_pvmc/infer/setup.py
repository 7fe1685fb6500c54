"""Set programs, guides and training states up, once they have been looked at, for inference that is compiled."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import random
from numpyro.infer import ELBO, SVI
from numpyro.infer.svi import SVIState
from numpyro.infer.util import transform_fn

from numpyro_pvmc.chain.minibatch import check_indices
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.chain.validation import DataCheck
from numpyro_pvmc.guides.checks import GuideKind, refuse_discrete
from numpyro_pvmc.infer import requests
from numpyro_pvmc.infer.endings import check_finite
from numpyro_pvmc.infer.objective import ChainELBO, StockObjective, objective_of
from numpyro_pvmc.infer.pickling import by_value
from numpyro_pvmc.infer.resume import Expected, check_state, expected, precision
from numpyro_pvmc.program.arguments import Arguments, Held, called, is_traced, signature
from numpyro_pvmc.program.compiled import Compiled
from numpyro_pvmc.program.handlers import run
from numpyro_pvmc.program.structure import Structure
from numpyro_pvmc.program.switches import of_the_library, where_nan_means_missing
from numpyro_pvmc.program.tracebacks import with_short_tracebacks
from numpyro_pvmc.program.waiting import announced


class CheckedSVI(SVI):
    """Stochastic variational inference that looks at what it is given before it compiles anything.

    :param model: a NumPyro program with a chain.
    :param guide: a NumPyro program that fits it.
    :param optim: an optimiser of NumPyro or Optax.
    :param loss: an objective.
    :param static_kwargs: keyword arguments of model and guide that stay the same.
    """

    def __init__(self, model: Callable, guide: Callable, optim: Any, loss: ELBO, **static_kwargs: Any):
        super().__init__(model, guide, optim, loss, **static_kwargs)
        self._form = GuideKind()
        self._expected: dict[str, list[Expected]] = {}
        self._forget()

    def __repr__(self):
        seen, kind = self._look_at_data.seen, type(self).__name__
        chain = "no data met yet" if seen is None else f"chain of {seen.summary}"
        return f"{kind} for {called(self.model)}\n  {chain}\n  objective: {self.loss!r}\n  guide: {_shown(self.guide)}"

    @property
    def objective(self) -> ChainELBO | StockObjective:
        """What is asked how a run goes, and for posteriors."""
        return objective_of(self.loss)

    def _forget(self):
        """Begin with nothing compiled, and no data known."""
        self._known: dict[Any, tuple[Structure, Callable]] = {}
        self._look_at_data = DataCheck(self.model, self.guide)
        self._compiled_init = Compiled(self._init, self.model, "the initial state")

    @with_short_tracebacks
    def init(self, rng_key: jax.Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> SVIState:
        """The initial state, once the program, the guide and the data have been checked.

        :param rng_key: random key.
        :param args: arguments of the model and the guide.
        :param init_params: initial values of parameters, by name.
        :param kwargs: keyword arguments of the model and the guide.
        :return: the state that :meth:`update` takes.
        :raises ValueError: if the program has no Markov chain that can be read, the guide does not fit it, or the data contain
            NaN; the message names the site and says what to do.
        """
        state = self._checked_init(rng_key, args, kwargs, init_params)
        of_precision = self._expected.setdefault(precision(), [])
        if (looks := expected(state, self.optim)) not in of_precision:
            of_precision.append(looks)
        return state

    @of_the_library
    def _checked_init(self, rng_key, args, kwargs, init_params):
        if not self.objective.reads_chains:
            return super().init(rng_key, *args, init_params=init_params, **kwargs)
        requests.check_key(rng_key)
        arguments, params = self._arguments(args, kwargs), init_params or {}
        known_for = signature((rng_key, arguments, params))
        structure, constrain_fn = self._known.get(known_for, (None, None))
        with where_nan_means_missing(), announced("reading the model and its data"):
            if structure is None:
                # Before NumPyro looks: what cannot be read has a name here.
                structure = read_structure(self.model, arguments, params)
                refuse_discrete(structure, self.model, self.guide)
            if not is_traced((arguments, params)):
                self._look_at_data(arguments, params, structure)
        if constrain_fn is None:
            state = self._first_init(structure, rng_key, args, kwargs, arguments, init_params)
            constrain_fn = self.constrain_fn
            if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(constrain_fn.args)):
                self._known[known_for] = structure, constrain_fn  # else they may be of these very data
            return state
        self.constrain_fn = constrain_fn
        state, _ = self._compiled_init(rng_key, self._passed(args, kwargs), init_params)
        return state

    def get_params(self, svi_state: SVIState) -> dict[str, Any]:
        """Values of parameters, and mutable state.

        :param svi_state: the state.
        :return: ``{name: value}``, as :meth:`posterior` and :class:`numpyro.infer.Predictive` take them.
        :raises ValueError: if the constraints of the parameters are not known, since no data have been given yet.
        """
        if self.constrain_fn is None:
            raise ValueError(
                "The constraints of the parameters are not known before the model has met data. Call "
                "`init(rng_key, *args)` with the data first, or keep `result.params` of `run` beside `result.state`."
            )
        check_state(svi_state, self.optim)
        return super().get_params(svi_state) | (svi_state.mutable_state or {})

    def _arguments(self, args, kwargs):
        arguments = Arguments(args, kwargs | self.static_kwargs)
        return self._look_at_data.held(arguments) if self.objective.reads_chains else arguments

    def _passed(self, args, kwargs):
        """Arguments as compiled functions take them: by value, where these bound a count."""
        return Held(Arguments(args, kwargs), getattr(self._arguments(args, kwargs), "held", ()))

    def _constraints(self, args, kwargs):
        """The constraints of the parameters as an argument of compiled functions: their bounds may be of the data."""
        if self.constrain_fn is None:  # a state of another process
            self.init(random.key(0), *args, **kwargs)
        return Arguments(self.constrain_fn.args)

    def _at(self, state, constraints):
        """This inference at a state, which fits it, and under constraints, which may be traced."""
        check_state(state, self.optim, self._expected)
        own = copy.copy(self)
        own.constrain_fn = functools.partial(transform_fn, *constraints.args)
        return own

    @of_the_library
    def _look_first(self, rng_key, arguments, params):
        """Look at what is given, unless something is being compiled."""
        requests.check_key(rng_key)
        requests.check_params(params)
        if is_traced((rng_key, arguments, params)):
            return
        check_finite(params)
        with where_nan_means_missing(), announced("reading the model and its data"):
            structure, is_new = self._look_at_data(arguments, params)
        check_indices(structure, params)
        if is_new and not self._known:
            self._set_up_guide(rng_key, arguments, params)

    def _set_up_guide(self, rng_key, arguments, params):
        """An automatic guide sets itself up when it is first run, and needs numbers for that."""
        with announced("setting up the guide"):
            run(getattr(self.guide, "set_up", self.guide), arguments, params, rng_key)

    def _first_init(self, structure, rng_key, args, kwargs, arguments, init_params):
        """Let NumPyro look at program, guide and data."""
        params = init_params or {}
        try:
            self._set_up_guide(rng_key, arguments, params)
            self._form = self.objective.check(structure, self.guide, arguments, params)
            state, constraints = self._compiled_init(rng_key, self._passed(args, kwargs), init_params)
        except Exception:
            # NumPyro runs the model at draws of the guide: see whether they, or the data, are why that failed.
            self.objective.check(structure, self.guide, arguments, params)
            self._look_at_data.explain_nan(np.nan, arguments)
            raise
        self.constrain_fn = functools.partial(transform_fn, *constraints.args)
        return state

    def _init(self, rng_key, arguments, init_params):
        own = copy.copy(self)
        state = SVI.init(own, rng_key, *arguments.args, init_params=init_params, **arguments.kwargs)
        return state, Arguments(own.constrain_fn.args)

    def __copy__(self):
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__)
        return own

    def __deepcopy__(self, memo):
        own = memo[id(self)] = object.__new__(type(self))
        own.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return own

    def __getstate__(self):
        """What is not compiled."""
        return {name: value for name, value in vars(self).items() if not name.startswith(("_compiled_", "_known", "_look"))}

    def __setstate__(self, state):
        vars(self).update(state)
        self._forget()

    def __reduce_ex__(self, protocol):
        return by_value(self)


def _shown(guide):
    own = type(guide).__module__.startswith("numpyro_pvmc.")
    return repr(guide).replace("\n", "\n  ") if own else called(guide)
