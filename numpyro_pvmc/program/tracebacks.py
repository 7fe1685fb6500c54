"""Point errors and warnings to the lines of a person's program: leave out the frames between these."""

import contextlib
import functools
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpyro

_OWN = str(Path(__file__).parents[1])  # the whole library
_HIDDEN = (_OWN, *(str(Path(module.__file__).parent) for module in (jax, numpyro)), *(contextlib.__file__, functools.__file__))


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


def warn_caller(message: str) -> None:
    """Warn whoever has called this library, at the line of that call.

    :param message: what to say.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_hidden(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _shorten(error: BaseException) -> None:
    """Take frames out of an error, and of those that it came from."""
    while error is not None:
        frames = []
        traceback = error.__traceback__
        while traceback is not None:
            frames.append(traceback)
            traceback = traceback.tb_next
        if _is_of_program(frames):
            kept = [frame for frame in frames[1:] if not _is_hidden(_file_of(frame))]
            shortened = None
            for frame in reversed(frames[:1] + kept):
                shortened = types.TracebackType(shortened, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
            error.__traceback__ = shortened
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_program(frames):
    """Whether the last frame is of this library, which has refused something, or a frame is of a person's program."""
    files = [_file_of(frame) for frame in frames[1:]]
    return bool(files) and (files[-1].startswith(_OWN) or not all(map(_is_hidden, files)))


def _is_hidden(file):
    return file.startswith((*_HIDDEN, "<"))


def _file_of(traceback):
    return traceback.tb_frame.f_code.co_filename
