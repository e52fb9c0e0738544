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
from torch.autograd.graph import increment_version

from cbn_lab.kernels import reference
from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import LOOPS, TILE, Job, ceil_divide, ceil_to
from cbn_lab.kernels.layout import Layout, in_and_out, in_step, outputs_like, walkable
from cbn_lab.running_stats import Running

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
    room: int  # bytes of scratch memory
    places: dict[str, int]  # where in it what begins
    threads: int  # that are worth starting
    streams: tuple[str, ...]  # the sweeps that write past the cache
    like: dict[tuple[int, ...], Tensor]  # (C, ...) in float64: to make others like them is quick


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
    fixed = bytes(job), dtype.is_complex, step, size, *scratch(found.channels, slices)
    like = {
        shape: torch.empty(found.channels, *shape, dtype=torch.float64, device="cpu")
        for shape in ((2,), (3,), (2, 2))
    }
    past = streams(fresh, step * size, 2 * size)
    return Plan(found, code, *fixed, min(tasks, threads), past, like)


def scratch(channels: int, slices: int) -> tuple[int, dict[str, int]]:
    """Size and division of the scratch memory: so many float64 numbers per channel for each use."""
    columns = {"partial": 6 * slices, "shift": 2, "wide": 1, "map": 12}
    places, end = {}, 0
    for name, count in columns.items():
        places[name] = end
        end += 8 * channels * count
    return end, places


def streams(fresh: Layout, value: int, element: int) -> tuple[str, ...]:
    """The sweeps whose data do not fit the cache, so that the result would not stay there anyway.

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


class Sweep(reference.Sweep):
    """One call's data, described to the loops."""

    room: ctypes.Array | None = None  # scratch memory that goes back when the call is done

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        """``parts``: one complex tensor, or the real and the imaginary one."""
        first, threads, self.like = parts[0], torch.get_num_threads(), None
        found = plan(first.shape, first.stride(), first.dtype, threads)
        if found is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            found = plan(first.shape, first.stride(), first.dtype, threads)
        self.plan, self.keep = found, []
        self.parts = (first, *[in_step(part, first) for part in parts[1:]])
        self.job = job = Job.from_buffer_copy(found.job)
        self.address = ctypes.addressof(job)
        job.eps = eps
        job.x_re, job.x_im = self._addresses(self.parts)
        start = self._room(found.room)
        for name, place in found.places.items():
            setattr(job, name, start + place)

    def _room(self, size: int) -> int:
        """The address of scratch memory; other calls get it once this one is done with it."""
        if size > ROOM:
            room = torch.empty(size, dtype=torch.uint8, device="cpu")
            self.keep.append(room)
            return room.data_ptr()
        try:
            self.room = _rooms.pop()
        except IndexError:
            self.room = ctypes.create_string_buffer(ROOM)
        return ctypes.addressof(self.room)

    def __del__(self) -> None:
        if self.room is not None and len(_rooms) < ROOMS:
            _rooms.append(self.room)

    def _addresses(self, parts: tuple[Tensor, ...]) -> tuple[int, int]:
        """Of the first real and of the first imaginary number."""
        start = parts[0].data_ptr()
        return start, start + self.plan.size if self.plan.interleaved else parts[1].data_ptr()

    def _small(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Hand over a small tensor, contiguous and of ``dtype``."""
        if not is_simple(tensor, dtype):
            tensor = tensor.detach().resolve_neg().to(dtype).contiguous()
        self._own(name, tensor)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """Hand over a small tensor that was made here."""
        self.keep.append(tensor)
        setattr(self.job, name, tensor.data_ptr())
        return tensor

    def _all_small(self, flag: str, **tensors: Tensor | None) -> bool:
        """Hand over small tensors: as they are if all are float32, else in float64."""
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor is not None}
        single = dtypes == {torch.float32}
        for name, tensor in tensors.items():
            if tensor is not None:
                self._small(name, tensor, torch.float32 if single else torch.float64)
        setattr(self.job, flag, single)
        return single

    def _run(self, name: str) -> None:
        self.plan.loops[name](self.address)

    def _sweep(self, name: str) -> None:
        self.job.counter = 0
        native.parallel(self.plan.loops[name], self.address, self.plan.threads)

    def _make(self, name: str) -> tuple[Tensor, ...]:
        """Room for what the sweep called ``name`` writes, with the memory format of the input."""
        out = outputs_like(self.parts)
        if out[0].nbytes > native.HUGE:
            for part in out:
                native.ask_for_huge_pages(part)
        self.job.y_re, self.job.y_im = self._addresses(out)
        past = name in self.plan.streams
        self.job.stream = past and not any(part.data_ptr() % LINE for part in out)
        return out

    def _finished(self, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In the caller's memory format, if that could not be walked."""
        if self.like is None:
            return out
        return tuple(
            torch.empty_like(old).copy_(new) for old, new in zip(self.like, out, strict=True)
        )

    def forward(self, mean, covar, weight, bias, running: Running | None):
        """The steps below in one call; one by one where threads can only be had from Python."""
        if self.plan.threads > 1 and native.openmp() is None:
            return super().forward(mean, covar, weight, bias, running)
        self.job.training = mean is None
        if mean is None:
            mean, covar = self._statistics()
        else:
            self._all_small("statistics_single", mean=mean, covar=covar)
        self._all_small("single", weight=weight, bias=bias)
        out, moved = self._make("apply"), self._take_running(running)
        self._run("whole_forward")
        for tensor in moved:
            increment_version(tensor)  # or autograd would not see that it has changed
        if running is not None and not moved:
            running.update_(mean, covar)
        return self._finished(out), mean, covar

    def backward(self, grads, mean, covar, weight, count, need_input):
        if self.plan.threads > 1 and native.openmp() is None:
            return super().backward(grads, mean, covar, weight, count, need_input)
        self._take_gradient(grads, mean, covar)
        total, _ = self._sums()
        gradients = self._gradients(weight, total, count)
        out = self._make("apply_backward") if need_input else ()
        self._run("whole_backward")
        return self._finished(out) if need_input else (), *gradients

    def _statistics(self) -> tuple[Tensor, Tensor]:
        like = self.plan.like
        mean = self._own("mean", torch.empty_like(like[2,]))
        return mean, self._own("covar", torch.empty_like(like[3,]))

    def _take_running(self, running: Running | None) -> list[Tensor]:
        """Hand over the running statistics, if they are such that a loop can move them."""
        if running is None or isinstance(running.factor, Tensor):
            return []
        given = [tensor for tensor in running[:2] if tensor is not None]
        single = bool(given) and given[0].dtype is torch.float32
        for tensor in given:
            if not is_simple(tensor, torch.float32 if single else torch.float64):
                return []
        self.job.running_mean, self.job.running_covar = map(address, running[:2])
        self.job.running_single = single
        self.job.factor, self.job.unbiased = running.factor, running.unbiased
        return given

    def _take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        grads = tuple([in_step(grad, self.parts[0]) for grad in grads])
        self.keep.extend(grads)
        self.job.g_re, self.job.g_im = self._addresses(grads)
        self._small("mean", mean)
        self._small("covar", covar)

    def _sums(self) -> tuple[Tensor, Tensor]:
        like = self.plan.like
        total = self._own("total", torch.empty_like(like[2,]))
        return total, self._own("product", torch.empty_like(like[2, 2]))

    def _gradients(
        self, weight: Tensor | None, total: Tensor, count: int | None
    ) -> tuple[Tensor, Tensor]:
        """Room for the gradients of weight and bias; ``count`` None: the statistics were given."""
        self.job.training, self.job.count = (0, 1) if count is None else (1, count)
        like = self.plan.like
        if not self._all_small("single", weight=weight):
            return self._own("weight_grad", torch.empty_like(like[3,])), total
        weight_grad = self._own("weight_grad", torch.empty_like(like[3,], dtype=torch.float32))
        return weight_grad, self._own("bias_grad", torch.empty_like(like[2,], dtype=torch.float32))

    # The steps one by one, for who must have what stands between them.

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, covar = self._statistics()
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
        self._all_small("statistics_single", mean=mean, covar=covar)
        self._all_small("single", weight=weight, bias=bias)
        out = self._make("apply")
        self._run("map_forward")
        self._sweep("apply")
        return self._finished(out)

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self._take_gradient(grads, mean, covar)
        self._run("shift_to_mean")

    def gram(self) -> tuple[Tensor, Tensor]:
        found = self._sums()
        self._sweep("gram")
        self._run("finish_gram")
        return found

    def apply_backward(
        self,
        weight: Tensor | None,
        total: Tensor,
        product: Tensor,
        count: int | None,
        need_input: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of input, weight and bias; ``count`` None: the statistics were given."""
        self._small("total", total)
        self._small("product", product)
        gradients = self._gradients(weight, total, count)
        self._run("map_backward")
        if not need_input:
            return (), *gradients
        out = self._make("apply_backward")
        self._sweep("apply_backward")
        return self._finished(out), *gradients


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def is_simple(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers stand in memory one after the other, as they are."""
    return tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg()
