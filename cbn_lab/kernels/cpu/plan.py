"""How the loops go over a tensor: made once for its shape and strides, and kept."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import LOOPS, TILE, Job, ceil_divide, ceil_to
from cbn_lab.kernels.layout import Layout, in_and_out, likes

TASK_BYTES = 1 << 18  # one task reads this much: enough to forget its start, little enough to share
TASKS = 256  # at most about so many parts: each costs a row of sums
SERIAL_BYTES = 1 << 17  # below this a second thread costs more than it does
TASK_ROWS = 512  # a task costs something by itself, which grows with the channels as its rows do
FEW_TASKS = 8  # that many there may be all the same, or few rows would be left to one thread
LINE = 64  # bytes, of a cache line and of a vector


@functools.cache
def loops(dtype: torch.dtype, interleaved: bool, rows: bool) -> dict[str, native.Loop]:
    """The loops for one kind of data: loaded, or compiled if that was never done here."""
    kind = f"{'rows' if rows else 'planes'}_{'f8' if dtype is torch.float64 else 'f4'}"
    label = f"{kind}_{'interleaved' if interleaved else 'apart'}"

    def build() -> dict[str, tuple[str, bytes]]:
        from cbn_lab.kernels.cpu import compiled

        return compiled.compile_loops(label, dtype is torch.float64, interleaved, rows)

    folder = Path(__file__).parent
    texts = ("job", "tools", "lanes", "cells", "algebra", "planes", "rows", "compiled")
    texts = [folder / f"{name}.py" for name in texts]
    texts += [folder.parents[1] / f"{name}.py" for name in ("running_stats", "whitening")]
    source = "".join(path.read_text(encoding="utf-8") for path in texts)
    names = "whole_forward", "whole_backward", *LOOPS
    found = native.load([f"{label}.{name}" for name in names], build, source)
    return {name.split(".")[1]: loop for name, loop in found.items()}


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a sweep that depends only on shapes and strides; made once and kept."""

    loops: dict[str, native.Loop]
    job: bytes  # a Job with counts, blocks and strides filled in
    count: int  # values per channel
    interleaved: bool
    beside: int  # bytes from a real to its imaginary number, if they are in one tensor
    room: int  # bytes of scratch memory
    places: dict[str, int]  # where in it what begins
    threads: int  # that are worth starting
    large: bool  # a result is often fresh from the system
    streams: tuple[str, ...]  # the sweeps that write past the cache
    like: dict[tuple[int, bool], Tensor] = field(repr=False)  # without memory: not to be shown


@functools.lru_cache(1024)
def plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, threads: int
) -> Plan | None:
    """How to sweep over such a tensor; None if it must be copied first."""
    both = in_and_out(shape, strides)
    if both is None:
        return None
    found, fresh = both
    real = dtype.to_real() if dtype.is_complex else dtype
    step, size = 2 if dtype.is_complex else 1, real.itemsize
    job = Job(x_sample=step * found.sample, x_channel=step * found.channel)
    job.g_sample, job.g_channel = job.x_sample, job.x_channel
    job.y_sample, job.y_channel = step * fresh.sample, step * fresh.channel
    slices, tasks = cut(job, found, 2 * size)
    if found.samples * found.channels * found.length * 2 * size <= SERIAL_BYTES:
        threads = 1
    code = loops(real, dtype.is_complex, found.rows)
    for name in LOOPS:
        setattr(job, name, native.address(code[name]))
    job.parallel, job.threads = native.address(native.openmp()), min(tasks, threads)
    room, places = scratch(found.channels, slices)
    return Plan(
        loops=code,
        job=bytes(job),
        count=job.count,
        interleaved=dtype.is_complex,
        beside=size if dtype.is_complex else 0,
        room=room,
        places=places,
        threads=job.threads,
        large=found.samples * found.channels * found.length * step * size > native.HUGE,
        streams=streams(fresh, step * size, 2 * size),
        like=likes(found.channels, torch.device("cpu")),
    )


def scratch(channels: int, slices: int) -> tuple[int, dict[str, int]]:
    """Size and division of the scratch memory: so many float64 numbers per channel for each use."""
    columns = {"partial": 6 * slices, "shift": 2, "wide": 1, "map": 12, "total": 2, "product": 4}
    places, end = {}, 0
    for name, count in columns.items():
        places[name] = end
        end += 8 * channels * count
    return end, places


def streams(fresh: Layout, value: int, element: int) -> tuple[str, ...]:
    """The sweeps whose data fill the cache or more, so that the result would not stay there long.

    Only whole lines can be written past it: each row or plane of the result must begin with one.
    (Planes of 7×7 whose first and last values are written as usual took four times as long.)
    """
    pitches = (fresh.sample,) if fresh.rows else (fresh.sample, fresh.channel)
    if any(pitch * value % LINE for pitch in pitches):
        return ()
    size = fresh.samples * fresh.channels * fresh.length * element
    tensors = {"apply": 2, "apply_backward": 3}
    return tuple(name for name, count in tensors.items() if count * size >= native.cache_bytes())


def cut(job: Job, found: Layout, element: int) -> tuple[int, int]:
    """Set the blocks, the same for any number of threads; how many slices and tasks they make."""
    rows, n, c, length, *_ = found
    job.samples, job.channels, job.length, job.count = n, c, length, n * length
    job.sample_block, job.channel_block, job.length_block = 1, c, length
    if rows:
        job.channel_block = ceil_to(16, ceil_divide(c, ceil_divide(c, TILE)))
        size = length * job.channel_block * element
        parts = min(TASKS, size // (2 * TASK_BYTES), max(length // TASK_ROWS, FEW_TASKS))
        job.length_block = ceil_divide(length, max(1, parts))
    elif length * element > 4 * TASK_BYTES:  # one channel of one sample is long
        job.channel_block = 1
        job.length_block = ceil_to(LINE, max(TASK_BYTES // element, length * n // TASKS))
    else:
        job.sample_block = min(n, max(1, TASK_BYTES // (c * length * element), n // TASKS))
        job.channel_block = min(c, max(1, TASK_BYTES // (length * element)))
    slices = ceil_divide(n, job.sample_block) * ceil_divide(length, job.length_block)
    return slices, slices * ceil_divide(c, job.channel_block)
