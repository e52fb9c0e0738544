"""The judge: runs the check of an exercise on a learner's answer, and says what came of it."""

import contextlib
import functools
import html
import importlib
import inspect
import pkgutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbn_lab.diagnostics.graph import collection_paused
from cbn_lab.exercises import checks

KIT = str(Path(__file__).parents[1])
SECONDS = 10.0
_checks: dict[str, Callable[[Any], str | None]] = {}
_before: dict[str, Callable[[], Any]] = {}


class StillToDo(Exception):
    """Raised by whatever touches :data:`TODO`."""


class Wrong(Exception):
    """Raised by a check; its text tells the learner what is wrong, and what to look at."""


class _TooLong(BaseException):
    """Not an ``Exception``, so that no ``except Exception`` in a learner's loop swallows it."""


class _Todo:
    """Stands where the learner's code will stand. Every use of it means: not yet begun."""

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        raise StillToDo

    __call__ = __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _raise
    __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = __lt__ = __gt__ = _raise

    def __repr__(self) -> str:
        return "TODO"


TODO = _Todo()


@dataclass(frozen=True)
class Outcome:
    """What a check found: ``state`` is "passed", "not yet" or "to do"."""

    exercise: str
    state: str
    message: str

    _MARKS = {"passed": "✓", "not yet": "✗", "to do": "○"}
    _COLOURS = {"passed": "#009E73", "not yet": "#D55E00", "to do": "#6E6E6E"}

    def __repr__(self) -> str:
        return f"{self._MARKS[self.state]} {self.exercise}: {self.state}. {self.message}".rstrip()

    def _repr_html_(self) -> str:
        style = f"border-left: 4px solid {self._COLOURS[self.state]}; padding: 2px 10px"
        head = html.escape(f"{self._MARKS[self.state]} {self.exercise}: {self.state}.")
        body = html.escape(self.message).replace("\n", "<br>")
        return f'<div role="status" style="{style}"><b>{head}</b> {body}</div>'


def exercise(name: str, before: Callable[[], Any] | None = None) -> Callable:
    """Register the decorated function as the check of exercise ``name``.

    It takes the answer, raises :class:`Wrong` where that is wrong, and may return a word of praise.
    ``before`` is called first, off the learner's clock: for imports that take seconds.
    """

    def register(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        if name in _checks:
            raise ValueError(f"expected one check for each exercise, got a second for {name!r}")
        _checks[name] = function
        if before is not None:
            _before[name] = before
        return function

    return register


def names() -> list[str]:
    """All exercises there are."""
    for module in pkgutil.iter_modules(checks.__path__, f"{checks.__name__}."):
        importlib.import_module(module.name)
    return sorted(_checks)


def check(name: str, answer: Any) -> Outcome:
    """Judge ``answer`` to exercise ``name``. Never raises on account of the answer.

    Raises:
        ValueError: there is no exercise of that name.
    """
    if name not in names():
        raise ValueError(f"expected one of {', '.join(names())}, got {name!r}")
    _before.get(name, lambda: None)()
    try:
        # A finalizer of whatever was garbage before would run out of stack where the learner's code
        # recurses without end, and would say so in the midst of the page.
        with collection_paused(), time_limit(SECONDS):
            praise = _checks[name](_begun(answer))
    except StillToDo:
        return Outcome(
            name, "to do", "Put your code where TODO stands, run that cell, then this one."
        )
    except Wrong as wrong:
        return Outcome(name, "not yet", str(wrong))
    except _TooLong:
        text = f"Your code ran for more than {SECONDS:g} s and was stopped. Does its loop end?"
        return Outcome(name, "not yet", text)
    except Exception as error:
        return Outcome(name, "not yet", _describe(error))
    return Outcome(name, "passed", praise or "")


def _begun(answer: Any) -> Any:
    """The answer; if it is a function, one that owns up where it returns :data:`TODO`."""
    if answer is TODO:
        raise StillToDo
    if not inspect.isfunction(answer):
        return answer

    @functools.wraps(answer)
    def begun(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        parts = result if isinstance(result, (tuple, list)) else [result]
        if any(part is TODO for part in parts):
            raise StillToDo
        return result

    return begun


def _describe(error: Exception) -> str:
    """The error, and the learner's own line that raised it: no frame of the kit or of torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(KIT)
    ]
    where = f" in your line: {own[-1].line}" if own and own[-1].line else ""
    text = str(error).splitlines()[0] if str(error) else ""
    return f"Your code raised {type(error).__name__}{where}\n{text}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise in the main thread after ``seconds``.

    By a signal, which also wakes a sleep; where there is none (Windows, another thread) by the
    interrupt that a keyboard would send.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a thread cannot be interrupted; a notebook's cells run in the main one
    elif hasattr(signal, "setitimer"):
        with _alarm(signal.SIGALRM):
            others = signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, *others)  # a test runner's, say
    else:
        with _alarm(signal.SIGINT):
            timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
            timer.start()
            try:
                yield
            finally:
                timer.cancel()


@contextlib.contextmanager
def _alarm(number: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)
