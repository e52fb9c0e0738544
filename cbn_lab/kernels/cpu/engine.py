"""The CPU engine: four sweeps over the data in compiled loops, in memory order.

Forward: moments, then y = A·x + b, the second sweep backwards so that it begins with what the
first has left in the cache. Backward: Σ g and Σ g·xᵀ, then x̄ = Aᵀ·g + P·x + c. What stands
between two sweeps is a few numbers per channel, in float64.

Results do not depend on the number of threads: the work is cut the same way for any of them.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cbn_lab.kernels import reference
from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import Job
from cbn_lab.kernels.cpu.plan import LINE, Plan, loops, plan
from cbn_lab.kernels.layout import (
    can_be_written,
    in_step,
    is_simple,
    likes,
    outputs_like,
    put_back,
    walkable,
)
from cbn_lab.running_stats import Running

ROOM, IDLE = 1 << 16, 64  # bytes of scratch memory kept for the next call, and for how many plans
_idle: OrderedDict[Plan, "Workspace"] = OrderedDict()
SMALL = {torch.float32, torch.float64}  # dtypes of statistics and parameters that the loops read


def check_available() -> None:
    """Raise where the loops can be neither loaded nor compiled here."""
    loops(torch.float32, True, False)


def warm() -> None:
    """Load or compile the loops for every kind of data; about a minute where none is on disk."""
    for dtype in (torch.float32, torch.float64):
        for interleaved in (True, False):
            for rows in (False, True):
                loops(dtype, interleaved, rows)


def forget() -> None:
    """Let go of what is kept between calls, but not of the loops."""
    plan.cache_clear()
    likes.cache_clear()
    _idle.clear()


class Workspace:
    """A job and its scratch memory; another call gets them once this one is done.

    What it is given must be as the loops read it, see :func:`direct`. It does a forward or backward
    in one call of theirs: Python between the steps would take longer than they do.
    """

    def __init__(self, found: Plan) -> None:
        self.plan = found
        self.room = torch.empty(found.room, dtype=torch.uint8, device="cpu")
        self.job = Job.from_buffer_copy(found.job)
        for name, place in found.places.items():
            setattr(self.job, name, self.room.data_ptr() + place)
        self.address = ctypes.addressof(self.job)
        self.bytes = memoryview(self.job).cast("B")
        self.fresh = bytes(self.job)  # as a call finds it

    def run(self, name: str) -> None:
        self.plan.loops[name](self.address)

    # Each read tells the loops where something is.

    def read(self, parts: tuple[Tensor, ...], eps: float) -> None:
        job = self.job
        job.eps = eps
        job.x_re, job.x_im = parts[0].data_ptr(), parts[-1].data_ptr() + self.plan.beside

    def read_statistics(self, mean: Tensor, covar: Tensor) -> None:
        job = self.job
        job.mean, job.covar = mean.data_ptr(), covar.data_ptr()
        job.statistics_single = mean.dtype is torch.float32

    def read_parameters(self, weight: Tensor | None, bias: Tensor | None = None) -> None:
        job = self.job
        if bias is not None:
            job.bias, job.single = bias.data_ptr(), bias.dtype is torch.float32
        if weight is not None:
            job.weight, job.single = weight.data_ptr(), weight.dtype is torch.float32

    def read_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        job = self.job
        job.g_re, job.g_im = grads[0].data_ptr(), grads[-1].data_ptr() + self.plan.beside
        job.mean, job.covar = mean.data_ptr(), covar.data_ptr()

    def new(self, columns: int, single: bool = False) -> tuple[Tensor, int]:
        """A small tensor with so many columns, and its address."""
        tensor = torch.empty_like(self.plan.like[columns, single])
        return tensor, tensor.data_ptr()

    def outputs(self, parts: tuple[Tensor, ...], sweep: str) -> tuple[Tensor, ...]:
        """Room for what the sweep writes, with the memory format of the input."""
        out, job, found = outputs_like(parts), self.job, self.plan
        job.y_re, job.y_im = out[0].data_ptr(), out[-1].data_ptr() + found.beside
        if found.large:
            for part in out:
                native.ask_for_huge_pages(part)
        if sweep in found.streams:
            job.stream = not any(part.data_ptr() % LINE for part in out)
        return out

    def gradients(self, weight: Tensor | None, count: int | None) -> tuple[Tensor, Tensor]:
        """Room for the gradients of weight and bias; ``count`` None: the statistics were given."""
        self.read_parameters(weight)
        job = self.job
        job.training, job.count = (0, 1) if count is None else (1, count)
        weight_grad, job.weight_grad = self.new(3, job.single)
        bias_grad, job.bias_grad = self.new(2, job.single)
        return weight_grad, bias_grad

    def forward(self, parts, mean, covar, weight, bias, eps):
        """The output, and the statistics that it was made with: those of the batch for None."""
        job = self.job
        self.read(parts, eps)
        if mean is None:
            job.training = 1
            mean, job.mean = self.new(2)
            covar, job.covar = self.new(3)
        else:
            self.read_statistics(mean, covar)
        self.read_parameters(weight, bias)
        out = self.outputs(parts, "apply")
        self.run("whole_forward")
        return out, mean, covar

    def backward(self, parts, grads, mean, covar, weight, eps, count, need_input):
        """Gradients of input (if needed), weight and bias."""
        self.read(parts, eps)
        self.read_gradient(grads, mean, covar)
        gradients = self.gradients(weight, count)
        out = self.outputs(parts, "apply_backward") if need_input else ()
        self.run("whole_backward")
        self.done()
        return out, *gradients

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        if running is not None:
            moved = running.moved()
            if isinstance(running.factor, Tensor):
                running.update_(mean, covar)
            else:
                self.move(running)
                increment_version(moved)  # or autograd would not see that they have changed
        self.done()

    def move(self, running: Running) -> None:
        mean, covar, batches, factor, unbiased = running
        job, one = self.job, covar if mean is None else mean
        job.running_single = one is not None and one.dtype is torch.float32
        job.running_mean, job.running_covar = address(mean), address(covar)
        job.batches, job.factor, job.unbiased = address(batches), factor, unbiased
        self.run("move_running")

    def done(self) -> None:
        """Leave the workspace to others; not called if something was raised before."""
        if self.plan.room <= ROOM:
            _idle[self.plan] = self
            if len(_idle) > IDLE:
                _idle.popitem(last=False)  # the one that has waited longest


def take(found: Plan) -> Workspace:
    """A workspace that no other call has."""
    work = _idle.pop(found, None)
    if work is None:
        return Workspace(found)
    work.bytes[:] = work.fresh
    return work


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- any tensors -------------------------------------------------------------------------------


class Sweep(reference.Sweep):
    """One call, whose tensors are copied where the loops do not read them as they are."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        """``parts``: one complex tensor, or the real and the imaginary one."""
        first, threads, self.like, self.keep = parts[0], torch.get_num_threads(), None, []
        found = plan(first.shape, first.stride(), first.dtype, threads)
        if found is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            found = plan(first.shape, first.stride(), first.dtype, threads)
        self.parts = (first,) if found.interleaved else (first, in_step(parts[1], first))
        self.plan, self.work, self.eps = found, take(found), eps
        self.work.read(self.parts, eps)
        # Whether steps can only be had one by one, as the threads are Python's.
        self.stepwise = found.threads > 1 and native.openmp() is None

    def forward(self, mean, covar, weight, bias):
        if self.stepwise:
            return super().forward(mean, covar, weight, bias)
        state = *self.simple(mean, covar), *self.simple(weight, bias)
        out, mean, covar = self.work.forward(self.parts, *state, self.eps)
        return put_back(out, self.like), mean, covar

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        if running is not None and movable(*running[:3]):
            self.work.finish(running, mean, covar)
        else:
            super().finish(running, mean, covar)
            self.work.done()
        del self.work

    def backward(self, grads, mean, covar, weight, count, need_input):
        if self.stepwise:
            return super().backward(grads, mean, covar, weight, count, need_input)
        grads, mean, covar = self.in_step(grads, mean, covar)
        state = grads, mean, covar, *self.simple(weight), self.eps, count, need_input
        out, *gradients = self.work.backward(self.parts, *state)
        del self.work
        return put_back(out, self.like) if need_input else (), *gradients

    def simple(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Statistics or parameters of one dtype, their numbers one after the other."""
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        dtype = torch.float32 if dtypes == {torch.float32} else torch.float64
        return self.kept([as_simple(tensor, dtype) for tensor in tensors])

    def in_step(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> tuple:
        """The gradient as the input lies in memory, and the statistics."""
        grads = tuple([in_step(grad, self.parts[0]) for grad in grads])
        return self.kept((grads, as_simple(mean, torch.float64), as_simple(covar, torch.float64)))

    def kept(self, tensors):
        """The loops have only their addresses: they must live as long as the sweep.

        Longer than the call even, where Python's threads go on with it after Ctrl-C.
        """
        self.keep += tensors
        return tensors

    # The steps one by one, for who must have what stands between them.

    def _sweep(self, name: str) -> None:
        self.work.job.counter = 0
        native.parallel(self.plan.loops[name], self.work.address, self.plan.threads, self)

    def moments(self) -> tuple[Tensor, Tensor]:
        job = self.work.job
        mean, job.mean = self.work.new(2)
        covar, job.covar = self.work.new(3)
        self.work.run("guess")
        self._sweep("moments")
        self.work.run("finish_moments")
        if job.wide_found:
            job.only_wide = 1
            self._sweep("moments")
            self.work.run("finish_moments")
        return self.kept((mean, covar))

    def apply(
        self, mean: Tensor, covar: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        self.work.read_statistics(*self.simple(mean, covar))
        self.work.read_parameters(*self.simple(weight, bias))
        out = self.kept(self.work.outputs(self.parts, "apply"))
        self.work.run("map_forward")
        self._sweep("apply")
        return put_back(out, self.like)

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.work.read_gradient(*self.in_step(grads, mean, covar))
        self.work.run("shift_to_mean")

    def gram(self) -> tuple[Tensor, Tensor]:
        job = self.work.job
        total, job.total = self.work.new(2)
        product, job.product = self.work.new(4)
        self.kept((total, product))
        self._sweep("gram")
        self.work.run("finish_gram")
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
        job = self.work.job
        sums = self.kept([as_simple(tensor, torch.float64) for tensor in (total, product)])
        job.total, job.product = [tensor.data_ptr() for tensor in sums]
        gradients = self.work.gradients(*self.simple(weight), count)
        self.work.run("map_backward")
        out = self.kept(self.work.outputs(self.parts, "apply_backward")) if need_input else ()
        if need_input:
            self._sweep("apply_backward")
        self.work.done()
        del self.work
        return put_back(out, self.like) if need_input else (), *gradients


def as_simple(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small tensor, copied if its numbers are not of that dtype and one after the other."""
    if tensor is None or (tensor.dtype is dtype and is_simple(tensor)):
        return tensor
    return tensor.detach().resolve_neg().to(dtype).contiguous()


def movable(mean: Tensor | None, covar: Tensor | None, batches: Tensor | None) -> bool:
    """Whether a loop can move such running statistics."""
    one = covar if mean is None else mean
    real = torch.float32 if one is not None and one.dtype is torch.float32 else torch.float64
    return all(
        tensor is None or (tensor.dtype is dtype and tensor.is_cpu and can_be_written(tensor))
        for tensor, dtype in ((mean, real), (covar, real), (batches, torch.int64))
    )


# --- tensors that are taken as they are --------------------------------------------------------


class Direct(NamedTuple):
    """A forward or backward where nothing is to be copied, or looked at."""

    plan: Plan

    def forward(self, input, imag, mean, covar, weight, bias, eps, engine):
        work = take(self.plan)
        parts = (input,) if imag is None else (input, imag)
        return *work.forward(parts, mean, covar, weight, bias, eps), work

    def backward(self, input, imag, grad, grad_imag, mean, covar, weight, eps, training, need):
        parts, grads = ((input,), (grad,)) if imag is None else ((input, imag), (grad, grad_imag))
        count = self.plan.count if training else None
        return take(self.plan).backward(parts, grads, mean, covar, weight, eps, count, need)


def direct(
    parts: Sequence[Tensor],
    small: Sequence[tuple[Tensor | None, ...]],
    moved: tuple[Tensor | None, ...] | None,
) -> Direct | None:
    """The way for tensors that the loops take as they are; None where some must be copied.

    It serves all calls with tensors that differ from these in nothing but their numbers.

    Args:
        parts: of the input, and of the gradient in a backward.
        small: groups of statistics or parameters which are read together.
        moved: running mean, running covariance and number of batches, if they are to be moved.
    """
    first = parts[0]
    found = plan(first.shape, first.stride(), first.dtype, torch.get_num_threads())
    if found is None or (found.threads > 1 and native.openmp() is None):
        return None
    together = all(t.shape == first.shape and in_step(t, first) is t for t in parts)
    if together and all(map(is_uniform, small)) and (moved is None or movable(*moved)):
        return Direct(found)
    return None


def is_uniform(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether all are of one dtype, float32 or float64, and simple."""
    there = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in there}
    return len(dtypes) <= 1 and dtypes <= SMALL and all(t.is_cpu and is_simple(t) for t in there)
