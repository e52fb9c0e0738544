"""The CPU engine: four sweeps over the data in compiled loops, in memory order.

Forward: moments, then y = A·x + b, the second sweep backwards so that it begins with what the
first has left in the cache. Backward: Σ g and Σ g·xᵀ, then x̄ = Aᵀ·g + P·x + c. What stands
between two sweeps is a few numbers per channel, in float64.

Results do not depend on the number of threads: the work is cut the same way for any of them.
"""

import ctypes
import functools
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cbn_lab.kernels import reference
from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import LOOPS, TILE, Job, ceil_divide, ceil_to
from cbn_lab.kernels.layout import (
    Layout,
    can_be_written,
    in_and_out,
    in_step,
    is_simple,
    likes,
    outputs_like,
    put_back,
    walkable,
)
from cbn_lab.running_stats import Running

TASK_BYTES = 1 << 18  # one task reads this much: enough to forget its start, little enough to share
TASKS = 256  # at most about so many parts: each costs a row of sums
SERIAL_BYTES = 1 << 17  # below this a second thread costs more than it does
TASK_ROWS = 512  # a task costs something by itself, which grows with the channels as its rows do
FEW_TASKS = 8  # that many there may be all the same, or few rows would be left to one thread
LINE = 64  # bytes, of a cache line and of a vector
ROOM, IDLE = 1 << 16, 64  # bytes of scratch memory kept for the next call, and for how many plans
_idle: OrderedDict["Plan", "Workspace"] = OrderedDict()
JOB_BYTES = ctypes.sizeof(Job)


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


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a sweep that depends only on shapes and strides; made once and kept."""

    layout: Layout
    loops: dict[str, native.Loop]
    job: bytes  # a Job with counts, blocks and strides filled in
    interleaved: bool
    size: int  # bytes of a real number
    room: int  # bytes of scratch memory
    places: dict[str, int]  # where in it what begins
    threads: int  # that are worth starting
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
        layout=found,
        loops=code,
        job=bytes(job),
        interleaved=dtype.is_complex,
        size=size,
        room=room,
        places=places,
        threads=job.threads,
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


def forget() -> None:
    """Let go of what is kept between calls, but not of the loops."""
    plan.cache_clear()
    likes.cache_clear()
    _idle.clear()


class Workspace(NamedTuple):
    """A job and its scratch memory; another call gets them once this one is done."""

    job: Job
    address: int
    fresh: bytes  # the job as a call finds it
    room: Tensor


def take(found: Plan) -> Workspace:
    """A workspace that no other call has."""
    work = _idle.pop(found, None)
    if work is None:
        job = Job.from_buffer_copy(found.job)
        room = torch.empty(found.room, dtype=torch.uint8, device="cpu")
        for name, place in found.places.items():
            setattr(job, name, room.data_ptr() + place)
        return Workspace(job, ctypes.addressof(job), bytes(job), room)
    ctypes.memmove(work.address, work.fresh, JOB_BYTES)
    return work


class Sweep(reference.Sweep):
    """One call's data, described to the loops."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        """``parts``: one complex tensor, or the real and the imaginary one."""
        first, threads, self.like, self.keep = parts[0], torch.get_num_threads(), None, []
        found = plan(first.shape, first.stride(), first.dtype, threads)
        if found is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            found = plan(first.shape, first.stride(), first.dtype, threads)
        self.parts = (first,) if found.interleaved else (first, in_step(parts[1], first))
        self.plan, self.work = found, take(found)
        self.job = self.work.job
        self.job.eps = eps
        self.job.x_re, self.job.x_im = self._addresses(self.parts)

    def _addresses(self, parts: tuple[Tensor, ...]) -> tuple[int, int]:
        """Of the first real and of the first imaginary number."""
        start = parts[0].data_ptr()
        return start, start + self.plan.size if self.plan.interleaved else parts[1].data_ptr()

    def _small(self, tensor: Tensor | None, single: bool = False) -> int:
        """The address of a small tensor, which is copied if it is not contiguous float64."""
        if tensor is None:
            return 0
        dtype = torch.float32 if single else torch.float64
        if tensor.dtype is not dtype or not is_simple(tensor):
            tensor = tensor.detach().resolve_neg().to(dtype).contiguous()
            self.keep.append(tensor)
        return tensor.data_ptr()

    def _new(self, columns: int, single: bool = False) -> tuple[Tensor, int]:
        """A small tensor with so many columns, and its address."""
        tensor = torch.empty_like(self.plan.like[columns, single])
        return tensor, tensor.data_ptr()

    def _run(self, name: str) -> None:
        self.plan.loops[name](self.work.address)

    def _sweep(self, name: str) -> None:
        self.job.counter = 0
        native.parallel(self.plan.loops[name], self.work.address, self.plan.threads, self)

    def _done(self) -> None:
        """Leave the workspace to others; not if something was raised before."""
        if self.plan.room <= ROOM:
            _idle[self.plan] = self.work
            while len(_idle) > IDLE:
                _idle.popitem(last=False)  # the one that has waited longest
        del self.job, self.work

    def _make(self, name: str) -> tuple[Tensor, ...]:
        """Room for what the sweep called ``name`` writes, with the memory format of the input."""
        out = outputs_like(self.parts)
        self.keep.extend(out)
        if out[0].nbytes > native.HUGE:
            for part in out:
                native.ask_for_huge_pages(part)
        self.job.y_re, self.job.y_im = self._addresses(out)
        if name in self.plan.streams:
            self.job.stream = not any(part.data_ptr() % LINE for part in out)
        return out

    def forward(self, mean, covar, weight, bias):
        """The steps below in one call; one by one where threads can only be had from Python."""
        job = self.job
        if job.threads > 1 and not job.parallel:
            return super().forward(mean, covar, weight, bias)
        if mean is None:
            job.training = 1
            mean, job.mean = self._new(2)
            covar, job.covar = self._new(3)
        else:
            self._take_statistics(mean, covar)
        self._take_parameters(weight, bias)
        out = self._make("apply")
        self._run("whole_forward")
        return put_back(out, self.like), mean, covar

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        if running is not None and not self._moved(running):
            super().finish(running, mean, covar)
        self._done()

    def _moved(self, running: Running) -> bool:
        """Move the running statistics, if they are such that a loop can do it."""
        mean, covar, batches, factor, unbiased = running
        one = covar if mean is None else mean
        single = one is not None and one.dtype is torch.float32
        real, given = torch.float32 if single else torch.float64, []
        for tensor, dtype in ((mean, real), (covar, real), (batches, torch.int64)):
            if tensor is not None:
                if tensor.dtype is not dtype or not (tensor.is_cpu and can_be_written(tensor)):
                    return False
                given.append(tensor)
        if isinstance(factor, Tensor):
            return False
        job = self.job
        job.running_mean = 0 if mean is None else mean.data_ptr()
        job.running_covar = 0 if covar is None else covar.data_ptr()
        job.batches = 0 if batches is None else batches.data_ptr()
        job.running_single, job.factor, job.unbiased = single, factor, unbiased
        self._run("move_running")
        increment_version(given)  # or autograd would not see that they have changed
        return True

    def backward(self, grads, mean, covar, weight, count, need_input):
        if self.job.threads > 1 and not self.job.parallel:
            return super().backward(grads, mean, covar, weight, count, need_input)
        self._take_gradient(grads, mean, covar)
        gradients = self._gradients(weight, count)
        out = self._make("apply_backward") if need_input else ()
        self._run("whole_backward")
        self._done()
        return put_back(out, self.like) if need_input else (), *gradients

    def _take_statistics(self, mean: Tensor, covar: Tensor) -> None:
        single = mean.dtype is torch.float32 is covar.dtype
        self.job.mean, self.job.covar = self._small(mean, single), self._small(covar, single)
        self.job.statistics_single = single

    def _take_parameters(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Says whether they are handed over in float32: if all that are there have it."""
        one, other = bias if weight is None else weight, weight if bias is None else bias
        single = one is not None and one.dtype is torch.float32 is other.dtype
        self.job.weight, self.job.bias = self._small(weight, single), self._small(bias, single)
        self.job.single = single
        return single

    def _take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.grads = tuple([in_step(grad, self.parts[0]) for grad in grads])
        self.job.g_re, self.job.g_im = self._addresses(self.grads)
        self.job.mean, self.job.covar = self._small(mean), self._small(covar)

    def _gradients(self, weight: Tensor | None, count: int | None) -> tuple[Tensor, Tensor]:
        """Room for the gradients of weight and bias; ``count`` None: the statistics were given."""
        job, single = self.job, self._take_parameters(weight, None)
        job.training, job.count = (0, 1) if count is None else (1, count)
        weight_grad, job.weight_grad = self._new(3, single)
        bias_grad, job.bias_grad = self._new(2, single)
        return weight_grad, bias_grad

    # The steps one by one, for who must have what stands between them.

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, self.job.mean = self._new(2)
        covar, self.job.covar = self._new(3)
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
        self._take_statistics(mean, covar)
        self._take_parameters(weight, bias)
        out = self._make("apply")
        self._run("map_forward")
        self._sweep("apply")
        return put_back(out, self.like)

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self._take_gradient(grads, mean, covar)
        self._run("shift_to_mean")

    def gram(self) -> tuple[Tensor, Tensor]:
        total, self.job.total = self._new(2)
        product, self.job.product = self._new(4)
        self._sweep("gram")
        self._run("finish_gram")
        return total, product.unflatten(1, (2, 2))

    def apply_backward(
        self,
        weight: Tensor | None,
        total: Tensor,
        product: Tensor,
        count: int | None,
        need_input: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of input, weight and bias; ``count`` None: the statistics were given."""
        self.job.total, self.job.product = self._small(total), self._small(product)
        gradients = self._gradients(weight, count)
        self._run("map_backward")
        out = self._make("apply_backward") if need_input else ()
        if need_input:
            self._sweep("apply_backward")
        self._done()
        return put_back(out, self.like) if need_input else (), *gradients
