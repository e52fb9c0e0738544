"""How a tensor (N, C, ...) lies in memory, reduced to what a sweep needs to know.

A sweep does not care in which order it meets a channel's values, so the spatial dimensions may
stand in any order; what counts is whether they can be walked as one.
"""

from typing import NamedTuple

import torch


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
    order: tuple[int, ...]  # dimensions that are walked as one, the outermost in memory first


def layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    """The layout of a tensor, or None if it is neither planes nor rows, or overlaps itself."""
    n, c = shape[0], shape[1]
    if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
        return None
    spatial = sorted(range(2, len(shape)), key=lambda d: (-strides[d], d))
    length, pitch = _walk(shape, strides, spatial)
    long = tuple(dim for dim in spatial if shape[dim] > 1)
    if pitch == 1 and length > 1:
        return Layout(False, n, c, length, strides[0], strides[1], long)
    if strides[1] == 1 or c == 1:
        everything = sorted([0, *spatial], key=lambda d: (-strides[d], d))
        length, pitch = _walk(shape, strides, everything)
        if pitch is not None and (pitch >= c or length == 1):
            long = tuple(dim for dim in everything if shape[dim] > 1)
            return Layout(True, 1, c, length, pitch, 1, long)
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
