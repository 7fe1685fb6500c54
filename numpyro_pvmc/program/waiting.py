"""Tell a person who waits what for."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_PATIENCE, _PAUSE = 2.0, 1.0  # seconds before there is something to read, and between two looks at the clock
_open: list[threading.Event] = []
_silent = [False]


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Show a line on a terminal, or in a notebook, while something takes more than two seconds; it is gone afterwards.

    Of several, one within another, the innermost is shown.

    :param what: what takes time, in a few words.
    """
    if _silent[-1] or not _is_watched():
        yield
        return
    over = threading.Event()
    _open.append(over)
    line = threading.Thread(target=_show, args=(what, over), daemon=True)
    line.start()
    try:
        yield
    finally:
        _open.remove(over)
        over.set()
        line.join()


@contextlib.contextmanager
def unannounced(silent: bool = True) -> Iterator[None]:
    """Show none of these lines.

    :param silent: whether that is so.
    """
    _silent.append(silent or _silent[-1])
    try:
        yield
    finally:
        _silent.pop()


def _is_watched():
    """Whether someone may be reading: at a terminal, or in a notebook, whose streams are no terminals."""
    stream = sys.stderr
    return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel"))


def _show(what, over):
    start, width = time.perf_counter(), 0
    if over.wait(_PATIENCE):
        return
    while not over.is_set():
        if _open and _open[-1] is over:
            text = f"{what}: {time.perf_counter() - start:.0f} s"
            width = max(width, len(text))
            print(f"\r{text:{width}}", end="", file=sys.stderr, flush=True)
        over.wait(_PAUSE)
    if width:
        print(f"\r{'':{width}}\r", end="", file=sys.stderr, flush=True)
