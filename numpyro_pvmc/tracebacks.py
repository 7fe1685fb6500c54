"""Leave out of a traceback the frames between a person's call and the line of a person's program that is at fault."""

import functools
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpyro

_OWN = str(Path(__file__).parent)
_HIDDEN = (_OWN, str(Path(jax.__file__).parent), str(Path(numpyro.__file__).parent))
_STANDARD = str(Path(functools.__file__).parent)


def with_short_tracebacks(method: Callable) -> Callable:
    """A function that people call, whose errors show their own lines only, where these are at fault.

    That is so where this library refuses something, and where an error comes from a line of their program. An error of any
    other kind keeps all frames, and so do all errors under ``jax.config.update("jax_traceback_filtering", "off")``.

    :param method: the function.
    """

    @functools.wraps(method)
    def call(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if jax.config.jax_traceback_filtering != "off":
                _shorten(error)
            raise

    return call


def _shorten(error: BaseException) -> None:
    """Take frames out of an error, and of those that it came from."""
    while error is not None:
        frames = []
        traceback = error.__traceback__
        while traceback is not None:
            frames.append(traceback)
            traceback = traceback.tb_next
        if _is_of_program(frames):
            kept = [frame for frame in frames[1:] if not _file_of(frame).startswith((*_HIDDEN, _STANDARD, "<"))]
            shortened = None
            for frame in reversed(frames[:1] + kept):
                shortened = types.TracebackType(shortened, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
            error.__traceback__ = shortened
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_program(frames):
    """Whether the last frame is of this library, which has refused something, or a frame is of a person's program."""
    files = [_file_of(frame) for frame in frames[1:]]
    return bool(files) and (files[-1].startswith(_OWN) or any(not f.startswith((*_HIDDEN, _STANDARD, "<")) for f in files))


def _file_of(traceback):
    return traceback.tb_frame.f_code.co_filename
