"""Calls like earlier ones, whose tensors need not be examined again.

To examine the tensors of a small layer takes longer than its arithmetic. But from step to step
they differ in nothing but their numbers, and a comparison with those of an earlier call is quick.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALLS, VARIANTS = 1024, 8  # kept at most: kinds of calls, and examples of each


class Known(NamedTuple):
    """What is known of calls like one whose arguments have passed all checks."""

    alike: Callable[..., bool]  # whether other tensors are like those of that call
    tensors: Callable[[tuple], tuple]  # those among the arguments, which also may be None
    direct: Any  # the engine's way for tensors that it takes as they are, or None


_known: dict[tuple, list[Known]] = {}


def recall_call(given: tuple[Any, ...], settings: tuple) -> Known | None:
    """What is known of calls with such arguments: tensors or None."""
    for known in _known.get(_kind(given, settings), ()):
        if known.alike(*known.tensors(given)):
            return known
    return None


def learn(given: tuple[Tensor | None, ...], settings: tuple, direct: Any) -> Known:
    """Keep what was found out about a call."""
    kind = _kind(given, settings)
    if kind not in _known and len(_known) >= CALLS:
        _known.pop(list(_known)[0], None)  # the oldest, unless another thread was here first
    there = [place for place, value in enumerate(given) if value is not None]
    tensors = operator.itemgetter(*there) if len(there) > 1 else lambda given: (given[there[0]],)
    known = Known(alike(tensors(given)), tensors, direct)
    variants = _known.setdefault(kind, [])
    variants.insert(0, known)
    del variants[VARIANTS:]
    return known


def _kind(given: tuple[Any, ...], settings: tuple) -> tuple:
    shape = getattr(given[0], "shape", None)
    # In inference mode the guards do not look at all that they look at elsewhere.
    mode = torch.is_inference_mode_enabled()
    return *map(type, given), shape, torch.get_num_threads(), mode, settings


def forget() -> None:
    _known.clear()


def alike(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """A function that says whether so many tensors differ from these in their numbers alone."""
    check = _guards()(*tensors).check
    return check if check(*tensors) else Properties(*tensors).check  # if one is there twice


@functools.cache
def _guards() -> Callable[..., Any]:
    """The guards by which ``torch.compile`` knows its inputs again, in C++: no public name.

    Where this torch has none that work as expected, :class:`Properties`, which take longer.
    """
    one, turned = torch.empty(2, 3, device="cpu"), torch.empty(3, 2, device="cpu").T
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        make = functools.partial(guards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        found = [make(one).check(tensor) for tensor in (one, turned, one.int(), one.data)]
    except Exception:
        return Properties
    return make if found == [True, False, False, True] else Properties


class Properties:
    """Recognises tensors by the public properties of each."""

    def __init__(self, *tensors: Tensor) -> None:
        self.found = [properties(tensor) for tensor in tensors]

    def check(self, *tensors: Tensor) -> bool:
        return [properties(tensor) for tensor in tensors] == self.found


def properties(tensor: Tensor) -> tuple:
    """All but the numbers and where they are."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        return (object(),)  # like no other
    flags = tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_inference()
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), *flags
