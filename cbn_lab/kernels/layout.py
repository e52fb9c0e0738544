"""How a tensor (N, C, ...) lies in memory, reduced to what a sweep needs to know.

A sweep does not care in which order it meets a channel's values, so the spatial dimensions may
stand in any order; what counts is whether they can be walked as one.
"""

import functools
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
    order: tuple[int, ...]  # dimensions that are walked as one, the outermost in memory first


def layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    """The layout of a tensor, or None if it is neither planes nor rows, or overlaps itself."""
    n, c = shape[0], shape[1]
    if overlaps(shape, strides):
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


def overlaps(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether several values may share one place, as in an expanded or an unfolded tensor."""
    end = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end += stride * (size - 1)
    return False


def is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the values fill their memory without gaps and overlaps: ``empty_like`` keeps that."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def in_and_out(shape: torch.Size, strides: tuple[int, ...]) -> tuple[Layout, Layout] | None:
    """The layouts of such an input and of an output like it; None if they cannot be walked as one.

    ``empty_like`` packs a sliced input, which may turn rows with gaps into planes.
    """
    found = fresh = layout(shape, strides)
    if not is_dense(shape, strides):  # asked of a meta tensor, which imports sympy: 2 s
        given = torch.empty_strided(shape, strides, device="meta")
        fresh = layout(shape, torch.empty_like(given).stride())
    if found is None or fresh is None or (found.rows, found.order) != (fresh.rows, fresh.order):
        return None
    return found, fresh


def walkable(tensor: Tensor) -> tuple[Tensor, bool]:
    """``tensor`` such that :func:`in_and_out` has an answer, copied if need be.

    Also says whether its memory format had to be given up, so that outputs must be copied back.
    """
    if in_and_out(tensor.shape, tensor.stride()) is not None:
        return tensor, False
    dense = torch.empty_like(tensor).copy_(tensor)
    if in_and_out(dense.shape, dense.stride()) is not None:
        return dense, False
    return tensor.contiguous(memory_format=torch.contiguous_format), True


def in_step(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, copied if its values do not lie exactly as the model's."""
    if tensor.dtype is model.dtype and tensor.stride() == model.stride():
        return tensor
    return torch.empty_strided(
        model.shape, model.stride(), dtype=model.dtype, device=model.device
    ).copy_(tensor)


def outputs_like(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, parts))


def put_back(out: tuple[Tensor, ...], like: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """In the caller's memory format, if that could not be walked; None says that it could."""
    if like is None:
        return out
    return tuple(torch.empty_like(old).copy_(new) for old, new in zip(like, out, strict=True))


@functools.lru_cache(64)
def likes(channels: int, device: torch.device) -> dict[tuple[int, bool], Tensor]:
    """A small tensor by columns and whether it is float32: to make others like it is quick.

    They have no memory of their own. On CUDA it may come from the pool of a graph that is being
    captured, which nothing may hold on to.
    """
    made = {}
    for columns in (2, 3, 4):
        for single, dtype in ((True, torch.float32), (False, torch.float64)):
            made[columns, single] = torch.empty(channels, columns, dtype=dtype, device=device)
            made[columns, single].untyped_storage().resize_(0)
    return made


def is_simple(tensor: Tensor) -> bool:
    """Whether the numbers stand in memory one after the other, as they are."""
    return tensor.is_contiguous() and not tensor.is_neg()


def can_be_written(tensor: Tensor) -> bool:
    """Whether an engine may change it, where torch would."""
    return type(tensor) is Tensor and not tensor.is_inference() and is_simple(tensor)


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
