"""The CPU engine: four sweeps over the data in compiled loops, in memory order.

Forward: moments, then y = A·x + b, the second sweep backwards so that it begins with what the
first has left in the cache. Backward: Σ g and Σ g·xᵀ, then x̄ = Aᵀ·g + P·x + c. What stands
between two sweeps is a few numbers per channel, in float64.

Results do not depend on the number of threads: the work is cut the same way for any of them.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import TILE, Job
from cbn_lab.kernels.layout import Layout, in_and_out, in_step, outputs_like, walkable

TASK_BYTES = 1 << 18  # one task reads this much: enough to forget its start, little enough to share
TASKS = 256  # at most about so many parts: each costs a row of sums
SERIAL_BYTES = 1 << 17  # below this a second thread costs more than it does
TASK_ROWS = 512  # a task costs something by itself, which grows with the channels as its rows do
FEW_TASKS = 8  # that many there may be all the same, or few rows would be left to one thread
LINE = 64  # bytes, of a cache line and of a vector
ROOM, ROOMS = 1 << 18, 8  # bytes of scratch memory kept for the next call, and how many times
_rooms: list[ctypes.Array] = []


@functools.cache
def loops(dtype: torch.dtype, interleaved: bool, rows: bool) -> dict[str, native.Loop]:
    """The loops for one kind of data: loaded, or compiled if that was never done here."""
    small = ["finish_moments", "map_forward", "finish_gram", "shift_to_mean", "map_backward"]
    sweeps = ["guess", "moments", "apply", "gram", "apply_backward"]
    kind = f"{'rows' if rows else 'planes'}_{'f8' if dtype is torch.float64 else 'f4'}"
    label = f"{kind}_{'interleaved' if interleaved else 'apart'}"

    def build() -> dict[str, tuple[str, bytes]]:
        from cbn_lab.kernels.cpu import compiled

        return compiled.compile_loops(label, dtype is torch.float64, interleaved, rows)

    folder = Path(__file__).parent
    names = ("job", "tools", "lanes", "cells", "algebra", "planes", "rows", "compiled")
    texts = [*(folder / f"{name}.py" for name in names), folder.parents[1] / "whitening.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in texts)
    found = native.load([f"{label}.{name}" for name in small + sweeps], build, source)
    return {name.split(".")[1]: loop for name, loop in found.items()}


def check_available() -> None:
    """Raise where the loops can be neither loaded nor compiled here."""
    loops(torch.float32, True, False)


def warm() -> None:
    """Load or compile the loops for every kind of data; about a minute where none is on disk."""
    for dtype in (torch.float32, torch.float64):
        for interleaved in (True, False):
            for rows in (False, True):
                loops(dtype, interleaved, rows)


class Plan(NamedTuple):
    """All of a sweep that depends only on shapes and strides; made once and kept."""

    layout: Layout
    loops: dict[str, native.Loop]
    job: bytes  # a Job with counts, blocks and strides filled in
    interleaved: bool
    step: int  # real numbers from one value to the next
    size: int  # bytes of a real number
    slices: int  # rows of partial sums
    threads: int  # that are worth starting
    streams: tuple[str, ...]  # the sweeps that write past the cache
    like: dict[int, Tensor]  # float64 tensors of shape (C, k): to make others like them is quick


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
    fixed = bytes(job), dtype.is_complex, step, size, slices, min(tasks, threads)
    like = {k: torch.empty(found.channels, k, dtype=torch.float64, device="cpu") for k in (2, 3, 4)}
    return Plan(found, code, *fixed, streams(fresh, step * size, 2 * size), like)


def streams(fresh: Layout, value: int, element: int) -> tuple[str, ...]:
    """The sweeps whose data do not fit the cache, so that the result would not stay there anyway.

    Only whole lines can be written past it: each row or plane of the result must begin with one.
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


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def ceil_to(unit: int, a: int) -> int:
    return ceil_divide(a, unit) * unit


class Sweep:
    """One call's data, described to the loops."""

    room: ctypes.Array | None = None  # scratch memory that goes back when the call is done

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        """``parts``: one complex tensor, or the real and the imaginary one."""
        first, threads, self.like = parts[0], torch.get_num_threads(), None
        self.plan = plan(first.shape, first.stride(), first.dtype, threads)
        if self.plan is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            self.plan = plan(first.shape, first.stride(), first.dtype, threads)
        self.parts = (first, *(in_step(part, first) for part in parts[1:]))
        self.job = Job.from_buffer_copy(self.plan.job)
        self.job.eps = eps
        self.address = ctypes.addressof(self.job)
        self.keep: list[Tensor] = []
        self._place("x", self.parts)

    def _place(self, name: str, parts: tuple[Tensor, ...]) -> None:
        start = parts[0].data_ptr()
        other = start + self.plan.size if self.plan.interleaved else parts[1].data_ptr()
        setattr(self.job, name + "_re", start)
        setattr(self.job, name + "_im", other)

    def _small(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Hand over a small tensor, contiguous and of ``dtype``."""
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.is_neg():
            tensor = tensor.detach().resolve_neg().to(dtype).contiguous()
        self.keep.append(tensor)
        setattr(self.job, name, tensor.data_ptr())

    def _parameters(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Hand over weight and bias: as they are if both are float32, else in float64."""
        given = {"weight": weight, "bias": bias}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        single = bool(given) and all(tensor.dtype is torch.float32 for tensor in given.values())
        self.job.single = single
        for name, tensor in given.items():
            self._small(name, tensor, torch.float32 if single else torch.float64)

    def _room(self, *names_and_columns: tuple[str, int]) -> None:
        """Scratch memory, C float64 numbers a column, all of it in one place."""
        c = self.plan.layout.channels
        size = 8 * c * sum(k for _, k in names_and_columns)
        at = self._borrow() if size <= ROOM else self._allocate(size)
        for name, columns in names_and_columns:
            setattr(self.job, name, at)
            at += 8 * c * columns

    def _borrow(self) -> int:
        """The address of ROOM bytes, which other calls get once this one is done with them."""
        try:
            self.room = _rooms.pop()
        except IndexError:
            self.room = ctypes.create_string_buffer(ROOM)
        return ctypes.addressof(self.room)

    def _allocate(self, size: int) -> int:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.keep.append(room)
        return room.data_ptr()

    def __del__(self) -> None:
        if self.room is not None and len(_rooms) < ROOMS:
            _rooms.append(self.room)

    def _run(self, name: str) -> None:
        self.plan.loops[name](self.address)

    def _sweep(self, name: str) -> None:
        self.job.counter = 0
        native.parallel(self.plan.loops[name], self.address, self.plan.threads)

    def _write(self, name: str) -> tuple[Tensor, ...]:
        """Run the sweep that writes, into fresh tensors with the memory format of what came in."""
        out = outputs_like(self.parts)
        if out[0].nbytes > native.HUGE:
            for part in out:
                native.ask_for_huge_pages(part)
        self._place("y", out)
        aligned = not any(part.data_ptr() % LINE for part in out)
        self.job.stream = name in self.plan.streams and aligned
        self._sweep(name)
        if self.like is None:
            return out
        return tuple(
            torch.empty_like(old).copy_(new) for old, new in zip(self.like, out, strict=True)
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, covar = (torch.empty_like(self.plan.like[k]) for k in (2, 3))
        self._room(("partial", 6 * self.plan.slices), ("shift", 2), ("wide", 1), ("map", 12))
        self._small("mean", mean)
        self._small("covar", covar)
        self._run("guess")
        self._sweep("moments")
        self._run("finish_moments")
        if self.job.wide_found:
            self.job.only_wide = 1
            self._sweep("moments")
            self._run("finish_moments")
        return mean, covar

    def apply(
        self, mean: Tensor, covar: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        self._small("mean", mean)
        self._small("covar", covar)
        self._parameters(weight, bias)
        if not self.job.map:
            self._room(("map", 12), ("wide", 1))
        self._run("map_forward")
        return self._write("apply")

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        grads = tuple(in_step(grad, self.parts[0]) for grad in grads)
        self.keep.extend(grads)
        self._place("g", grads)
        self._small("mean", mean)
        self._small("covar", covar)
        self._room(("partial", 6 * self.plan.slices), ("shift", 2), ("wide", 1), ("map", 12))
        self._run("shift_to_mean")

    def gram(self) -> tuple[Tensor, Tensor]:
        total, product = (torch.empty_like(self.plan.like[k]) for k in (2, 4))
        self._small("total", total)
        self._small("product", product)
        self._sweep("gram")
        self._run("finish_gram")
        return total, product.view(-1, 2, 2)

    def apply_backward(
        self,
        weight: Tensor | None,
        total: Tensor,
        product: Tensor,
        count: int | None,
        need_input: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of the input and of the weight; ``count`` None: the statistics were given."""
        self._parameters(weight, None)
        like = self.plan.like[3]
        weight_grad = torch.empty_like(like, dtype=torch.float32 if self.job.single else None)
        self._small("total", total)
        self._small("product", product)
        self.job.weight_grad = weight_grad.data_ptr()
        self.job.training, self.job.count = (0, 1) if count is None else (1, count)
        self._run("map_backward")
        if not need_input:
            return (), weight_grad
        return self._write("apply_backward"), weight_grad
