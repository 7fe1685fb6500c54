"""Pickle an inference by value, or say what to pickle instead."""

import copyreg
from typing import Any

try:
    import cloudpickle
except ImportError:
    cloudpickle = None


def by_value(inference: Any) -> tuple[Any, ...]:
    """What `pickle` keeps of an inference, whose optimiser is made of closures.

    :param inference: an object with ``__getstate__`` and ``__setstate__``.
    :return: what ``__reduce_ex__`` returns.
    :raises TypeError: if the package `cloudpickle`, which can write closures, is not installed.
    """
    name = type(inference).__name__
    if cloudpickle is None:
        raise TypeError(
            f"A `{name}` is not pickled, since its optimiser is made of closures. Pickle `result.state` and `result.params` of "
            f"`run`, and in the other process make the same `{name}` again and go on with `run(..., init_state=state)`. (With "
            "the package `cloudpickle` installed it can be pickled as it is.)"
        )
    return _made_again, (type(inference), cloudpickle.dumps(inference.__getstate__()))


def _made_again(kind, state):
    inference = copyreg.__newobj__(kind)
    inference.__setstate__(cloudpickle.loads(state))
    return inference
