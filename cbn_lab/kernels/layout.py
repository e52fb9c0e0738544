"""How a tensor (N, C, ...) lies in memory, reduced to what a sweep needs to know.

A sweep does not care in which order it meets a channel's values, so the spatial dimensions may
stand in any order; what counts is whether they can be walked as one.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Counts, and strides in elements.

    planes: (samples, channels, length), the last with stride 1.
    rows: (1, channels, length), the channels with stride 1; ``sample`` is the stride of the rows.
    """

    rows: bool
    samples: int
    channels: int
    length: int
    sample: int
    channel: int
    order: tuple[int, ...]  # the other dimensions from the outermost in memory to the innermost


def layout(tensor: Tensor) -> Layout | None:
    """The layout of ``tensor``, or None if it is neither planes nor rows."""
    shape, strides = tensor.shape, tensor.stride()
    n, c = shape[0], shape[1]
    if tensor.is_contiguous():
        length = tensor.numel() // (n * c)
        order = tuple(range(2, len(shape)))
        if length == 1:
            return Layout(True, 1, c, n, c, 1, (0, *order))
        return Layout(False, n, c, length, c * length, length, order)
    spatial = sorted(range(2, len(shape)), key=lambda d: (-strides[d], d))
    length, pitch = _walk(shape, strides, spatial)
    if pitch == 1:
        return Layout(False, n, c, length, strides[0], strides[1], tuple(spatial))
    if strides[1] == 1 or c == 1:
        everything = sorted([0, *spatial], key=lambda d: (-strides[d], d))
        length, pitch = _walk(shape, strides, everything)
        if pitch is not None and pitch >= c:
            return Layout(True, 1, c, length, pitch, 1, tuple(everything))
    return None


def _walk(shape: torch.Size, strides: tuple[int, ...], dims: list[int]) -> tuple[int, int | None]:
    """The dimensions as one: its length and stride; stride None if it has no single one."""
    length, pitch = 1, None
    for dim in reversed(dims):
        if shape[dim] == 1:
            continue
        if pitch is None:
            pitch = strides[dim]
        elif strides[dim] != pitch * length:
            return length, None
        length *= shape[dim]
    return length, 1 if pitch is None else pitch


def like(tensor: Tensor, model: Layout, template: Tensor) -> tuple[Tensor, Layout]:
    """``tensor``, copied if need be, so that a sweep can walk it in step with ``model``."""
    found = layout(tensor)
    if found is None or found.rows != model.rows or not _same_order(found, model, tensor):
        tensor = torch.empty_like(template).copy_(tensor)
        found = layout(tensor)
    return tensor, found


def _same_order(a: Layout, b: Layout, tensor: Tensor) -> bool:
    def long(order):
        return [dim for dim in order if tensor.shape[dim] != 1]

    return a.order == b.order or long(a.order) == long(b.order)


def walkable(tensor: Tensor) -> tuple[Tensor, Layout]:
    """``tensor``, copied if it is neither planes nor rows, with its layout."""
    found = layout(tensor)
    if found is None:
        tensor = tensor.contiguous(memory_format=torch.contiguous_format)
        found = layout(tensor)
    return tensor, found
