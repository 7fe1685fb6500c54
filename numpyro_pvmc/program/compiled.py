"""Keep what is compiled for a model, or known of it, as long as the model lives."""

import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from numpyro_pvmc.program.waiting import announced


def enable_compilation_cache(directory: str | os.PathLike | None = None) -> Path:
    """Keep what JAX compiles from one process to the next, small programs too.

    Most of the time to a first answer is spent by the compiler, on programs that a script compiles anew whenever it is started.
    To be called before anything is computed. It sets ``jax_compilation_cache_dir``, and the two options by which JAX keeps only
    programs that took long: what is compiled with it is that of all of this process, not of this library alone.

    :param directory: where to keep it, made if it does not exist; by default ``numpyro_pvmc`` in the cache directory of the
        user.
    :return: the directory.

    .. doctest::

        >>> import tempfile, numpyro_pvmc
        >>> path = numpyro_pvmc.enable_compilation_cache(tempfile.mkdtemp())
    """
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "numpyro_pvmc"
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


# What is run once or twice, on numbers that are only looked at, is not worth more time of the compiler than of its own.
BRIEFLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def for_each_model(static_argnum: int, name: str, options: dict[str, Any] | None = None) -> Callable[[Callable], Callable]:
    """A decorator like `jax.jit`, of a function whose first argument is a model.

    As a static argument of `jax.jit` a model would stay alive for good, with all data that it closes over. Here it is freed as
    if it had never been given away, if the function returns nothing that holds it: what is compiled keeps the structure of
    its result. Two models are the same if they are one object, or one method of it; that they may be unhashable follows. One
    that Python cannot refer to weakly is kept.

    :param static_argnum: which argument is static, counted from the model, which is 0.
    :param name: of what it computes, for who waits for the compiler.
    :param options: of the compiler, such as :data:`BRIEFLY`. With these it is for numbers: given tracers the function is not
        compiled by itself.
    """

    def decorate(function):
        compiled = ForEachModel()

        @functools.wraps(function)
        def of_model(model, *args):
            owner, method = _owner_and_method(model)

            def compile_it():
                reference = _reference(owner)

                def of_rest(*args: Any):
                    model = reference()
                    return function(model if method is None else MethodType(method, model), *args)

                return jax.jit(of_rest, static_argnums=static_argnum - 1, compiler_options=options)

            if options is None:
                with announced(f"compiling {name}"):
                    return compiled.get(model, compile_it)(*args)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
                return function(model, *args)  # options are for whole programs
            # Also while another function is compiled, which closes over these numbers. Not `jax.ensure_compile_time_eval`:
            # with that NumPyro validates numbers in distributions that it would not see when compiled.
            with jax.core.eval_context(), announced(f"compiling {name}"):
                return compiled.get(model, compile_it)(*args)

        return of_model

    return decorate


class ForEachModel:
    """Things that are known of models, each as long as its model lives."""

    def __init__(self):
        self._known: dict[Any, Any] = {}

    def get(self, model: Callable, make: Callable[[], Any]) -> Any:
        """What is known of a model.

        :param model: a function, a callable object, or a method of one.
        :param make: makes it when it is first asked for; must not hold the model.
        """
        owner, method = _owner_and_method(model)
        key = id(owner), id(method)
        if key not in self._known:
            # The reference is kept, or else it would not be told when the model goes.
            self._known[key] = make(), _reference(owner, lambda _: self._known.pop(key, None))
        return self._known[key][0]


class Compiled:
    """A function compiled as by `jax.jit`, but not again for a model if a program with the same operations has been.

    Inferences of one model have compiled functions of their own, since their guides and optimisers may be other ones. Where
    these turn out to do the same, as the default ones do, one program is kept, as long as the model lives.

    :param function: a function of pytrees; keyword arguments are static.
    :param model: the model of whose programs this is one.
    :param name: of what it computes, for who waits for the compiler.
    """

    def __init__(self, function: Callable, model: Callable, name: str):
        def of_leaves(treedef, static, *leaves):
            return function(*jax.tree.unflatten(treedef, leaves), **dict(static))

        of_leaves.__name__ = function.__name__
        self._jit = jax.jit(of_leaves, static_argnums=(0, 1))
        self._name = name
        self._of_model = _programs.get(model, dict)
        self._programs: dict[Any, Callable] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        asked = treedef, tuple(static.items())
        debugged = any(getattr(jax.config, name, False) for name in _DEBUGGING)
        if debugged or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._jit(*asked, *leaves)
        known_for = asked, tuple(map(_placed, leaves)), tuple(getattr(jax.config, name, None) for name in _TRACING)
        if known_for not in self._programs:
            with announced(f"compiling {self._name}"):
                self._programs[known_for] = self._compile(*asked, *leaves)
        return self._programs[known_for](*leaves)

    def _compile(self, *asked):
        traced = self._jit.trace(*asked)
        lowered = traced.lower()
        text = hashlib.blake2b(lowered.as_text().encode()).digest()
        # JAX may pass constants beside the text.
        same = text, digest(traced.jaxpr), jax.tree.structure(traced.out_info)
        program = self._of_model[same] = self._of_model.pop(same, None) or lowered.compile()
        if len(self._of_model) > _MOST_PROGRAMS:
            del self._of_model[next(iter(self._of_model))]
        return program


_programs = ForEachModel()
_MOST_PROGRAMS = 64  # of a model, kept for inferences to come: those used last

# What a function is traced for beside its arguments, and what JAX can only do as it traces.
_TRACING = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_device",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_rank_promotion",
    "jax_numpy_dtype_promotion",
)
_DEBUGGING = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")


def _placed(leaf):
    """The type of an array, and where it is."""
    return jax.typeof(leaf), getattr(leaf, "sharding", None), getattr(leaf, "committed", False)


def digest(closed: jax.extend.core.ClosedJaxpr) -> Hashable:
    """What two jaxprs have in common that have the same numbers from outside, those of the functions that they call, too.

    Of tracers, and of keys, it is what they look like.
    """
    return tuple(map(_of_array, _constants(closed)))


def _constants(found):
    jaxpr, constants = found, []
    if isinstance(found, jax.extend.core.ClosedJaxpr):
        jaxpr, constants = found.jaxpr, list(found.consts)
    for equation in jaxpr.eqns:
        constants += [operand.val for operand in equation.invars if isinstance(operand, jax.extend.core.Literal)]
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                constants += _constants(part)
    return constants


def _is_jaxpr(part):
    return isinstance(part, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


def _of_array(array):
    looks = jnp.shape(array), jnp.result_type(array)
    if isinstance(array, jax.core.Tracer) or jax.dtypes.issubdtype(looks[1], jax.dtypes.extended):
        return looks
    return looks, hashlib.blake2b(np.asarray(array).tobytes(), digest_size=16).digest()


def _owner_and_method(model):
    # A bound method is a new object whenever it is looked up; what lives is the object that it is bound to.
    return (model.__self__, model.__func__) if isinstance(model, MethodType) else (model, None)


def _reference(owner, when_gone=None):
    try:
        return weakref.ref(owner, when_gone)
    except TypeError:
        return lambda: owner
