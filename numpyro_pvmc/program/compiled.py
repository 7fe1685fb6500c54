"""Compile functions of a model once for each model, and forget what was compiled when the model is gone."""

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import jax


def for_each_model(static_argnum: int) -> Callable[[Callable], Callable]:
    """A decorator like `jax.jit`, of a function whose first argument is a model.

    As a static argument of `jax.jit` a model would stay alive for good, with all data that it closes over. Here it is freed as
    if it had never been given away, if the function returns nothing that holds it: what is compiled keeps the structure of
    its result. Two models are the same if they are one object, or one method of it; that they may be unhashable follows. One
    that Python cannot refer to weakly is kept.

    :param static_argnum: which argument is static, counted from the model, which is 0.
    """

    def decorate(function):
        compiled = {}

        @functools.wraps(function)
        def of_model(model, *args):
            # A bound method is a new object whenever it is looked up; what lives is the object that it is bound to.
            owner, method = (model.__self__, model.__func__) if isinstance(model, MethodType) else (model, None)
            key = id(owner), id(method)
            if key not in compiled:
                reference = _reference(owner, lambda _: compiled.pop(key, None))

                def of_rest(*args: Any):
                    model = reference()
                    return function(model if method is None else MethodType(method, model), *args)

                compiled[key] = jax.jit(of_rest, static_argnums=static_argnum - 1)
            return compiled[key](*args)

        return of_model

    return decorate


def _reference(owner, when_gone):
    try:
        return weakref.ref(owner, when_gone)
    except TypeError:
        return lambda: owner
