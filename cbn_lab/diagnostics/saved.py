"""What an autograd node has saved for its backward, read without running any of the user's code.

Each tensor is a ``SavedTensor`` under ``_raw_saved_*``, whose ``data`` is the tensor, or what a
saved-tensor hook packed it into, or None once backward has freed it. Older versions of torch (2.6
is one) have no ``data``; there is then only ``_saved_*``, which unpacks: it would compute a
checkpointed part of the model once more. So the call of the unpacking hook is refused, and what
it was called with is the packed thing. Three things stay out of sight there, and make the bytes
a lower bound: a tensor that was changed in place after it was saved (torch refuses to show it),
all but the first of a list where hooks packed them, and everything while a profiler runs.
"""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch

SHOWS_DATA = hasattr(torch._C._autograd.SavedTensor, "data")


def names(kind: type) -> tuple[str, ...]:
    """The attributes to read from a type of node."""
    raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    if SHOWS_DATA:
        return tuple(raw)
    shown = [name.removeprefix("_raw") for name in raw]
    # The node of a custom Function has saved_tensors instead.
    return tuple(name if hasattr(kind, name) else name[1:] for name in shown)


def data(node: Any, names: Iterable[str]) -> list[Any]:
    """What is behind those attributes: tensors, None where freed, and whatever hooks made."""
    kept = []
    for name in names:
        try:
            value = _read(node, name)
        except RuntimeError:  # backward has freed it: of a list torch does not even give that
            continue
        for one in value if isinstance(value, list) else (value,):
            kept += one if isinstance(one, tuple) else (one,)  # what save_on_cpu packs is a pair
    return kept


def _data_of(node: Any, name: str) -> Any:
    saved = getattr(node, name)
    if isinstance(saved, (tuple, list)):
        return [one.data for one in saved]  # from a custom Function, or an operator's list
    return None if saved is None else saved.data


def _unpacked(node: Any, name: str) -> Any:
    """For want of ``data``: what the node shows, or what its hook was about to unpack."""
    if sys.getprofile() is not None:  # some cannot be put back, and hooks must not run
        return None
    try:
        # A mode, a census say, would have its own Python code called, which is no hook.
        with torch._C._DisableTorchDispatch():
            sys.setprofile(_refuse)
            try:
                return getattr(node, name)
            finally:
                sys.setprofile(None)
    except _Refused as refused:
        return refused.packed


class _Refused(Exception):
    def __init__(self, packed: list[Any]) -> None:
        super().__init__()
        self.packed = packed


def _refuse(frame: FrameType, event: str, arg: Any) -> None:
    """A profile function that keeps any Python function from starting."""
    if event == "call":
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount]
        raise _Refused([frame.f_locals[name] for name in arguments])


_read: Callable[[Any, str], Any] = _data_of if SHOWS_DATA else _unpacked
