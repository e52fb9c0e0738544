"""Putting everything back as it was: what a trial run of a training step has changed."""

import collections
import contextlib
import random
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbn_lab.diagnostics.graph import has_history
from cbn_lab.diagnostics.holders import Held, Survey

LARGEST_LOOSE_TENSOR = 16 * 2**20  # bytes; a larger one outside any module is data, most likely


class Snapshot:
    """The state of all that a survey has reached, and of the random number generators.

    Containers, instance attributes, closure variables and the global variables that a step names
    get their contents back; tensors their values. Iterators, files and the like cannot be put
    back.
    """

    def __init__(self, survey: Survey) -> None:
        self._contents = [(thing, _contents(thing)) for thing in _distinct(survey.mutable)]
        self._globals = [(space, name, space[name]) for space, name in survey.globals]
        self._tensors = [
            (tensor, tensor.detach().clone(), tensor.requires_grad)
            for tensor in (held.thing for held in survey.held if _is_worth_keeping(held))
        ]
        self._grads = [
            (held.thing, held.thing.grad)
            for held in survey.held
            if isinstance(held.thing, Tensor) and held.thing.is_leaf
        ]
        self._generators = [(one, one.get_state()) for one in survey.generators]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if cuda else None

    @torch.no_grad()
    def restore(self) -> None:
        for thing, contents in self._contents:
            _refill(thing, contents)
        for space, name, value in self._globals:
            space[name] = value
        for tensor, grad in self._grads:
            tensor.grad = grad
        for tensor, value, requires_grad in self._tensors:
            if has_history(tensor):  # given by an in-place operation since
                _detach(tensor)
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
            tensor.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


def _detach(tensor: Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # a view cannot be detached in place
        tensor.detach_()


def _distinct(things: list) -> list:
    return list({id(thing): thing for thing in things}.values())


def _is_worth_keeping(held: Held) -> bool:
    """What belongs to a model or an optimizer always; loose tensors if of a moderate size."""
    tensor = held.thing
    if not isinstance(tensor, Tensor) or has_history(tensor) or tensor.is_inference():
        return False
    if tensor.layout is not torch.strided:
        return False
    return held.belongs or tensor.nbytes <= LARGEST_LOOSE_TENSOR


def _contents(thing: Any) -> Any:
    if isinstance(thing, types.CellType):
        return [] if _is_empty(thing) else [thing.cell_contents]
    return dict(thing) if isinstance(thing, dict) else list(thing)


def _refill(thing: Any, contents: Any) -> None:
    """Give a container its contents back, keeping its identity; untouched if nothing changed."""
    now = _contents(thing)
    if len(now) == len(contents) and all(
        a is b for a, b in zip(_flat(now), _flat(contents), strict=True)
    ):
        return
    if isinstance(thing, types.CellType):
        if contents:
            thing.cell_contents = contents[0]
        else:
            del thing.cell_contents
    elif isinstance(thing, list):
        thing[:] = contents
    else:
        thing.clear()
        thing.extend(contents) if isinstance(thing, collections.deque) else thing.update(contents)


def _flat(contents: Any) -> list:
    return [*contents, *contents.values()] if isinstance(contents, dict) else contents


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (reading it is the only way to ask)
    except ValueError:
        return True
    return False
