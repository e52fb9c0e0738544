"""The CPU engine: four sweeps over the data in compiled loops, in memory order.

Forward: moments, then y = A·x + b, the second sweep backwards so that it begins with what the
first has left in the cache. Backward: Σ g and Σ g·xᵀ, then x̄ = Aᵀ·g + P·x + c. What stands
between two sweeps is a few numbers per channel, in float64.

Results do not depend on the number of threads: the work is cut the same way for any of them.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.cpu.job import Job
from cbn_lab.kernels.layout import Layout, like, walkable

TASK_BYTES = 1 << 18  # one task reads this much: enough to forget its start, little enough to share
TASKS = 256  # at most about so many parts: each costs a row of sums
SERIAL_BYTES = 1 << 17  # below this a second thread costs more than it does


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
    texts = [*sorted(folder.glob("*.py")), folder.parents[1] / "whitening.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in texts)
    names = [f"{label}.{name}" for name in small + sweeps]
    found = native.load(names, build, source)
    return {name.split(".")[1]: loop for name, loop in found.items()}


def check_available() -> None:
    """Raise where the loops can be neither loaded nor compiled here."""
    loops(torch.float32, True, False)


class Sweep:
    """One call's data, described to the loops."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        """``parts``: one complex tensor, or the real and the imaginary one."""
        first, self.layout = walkable(parts[0])
        rest = tuple(like(part, self.layout, first)[0] for part in parts[1:])
        self.parts = (first, *rest)
        if len(parts) == 2 and rest[0].stride() != first.stride():
            rest = (
                torch.empty_strided(first.shape, first.stride(), dtype=first.dtype).copy_(rest[0]),
            )
            self.parts = (first, *rest)
        self.interleaved = first.is_complex()
        self.step = 2 if self.interleaved else 1
        self.dtype = first.dtype.to_real() if self.interleaved else first.dtype
        self.size = self.dtype.itemsize
        self.loops = loops(self.dtype, self.interleaved, self.layout.rows)
        self.keep: list[Tensor] = []
        self.job = Job(eps=eps)
        self.threads = self._cut()
        self._describe("x", self.parts, self.layout)

    def _cut(self) -> int:
        """Set the blocks; the number of threads worth starting."""
        job, (rows, n, c, length, *_) = self.job, self.layout
        job.samples, job.channels, job.length = n, c, length
        job.count = n * length
        job.channel_block = c
        element = 2 * self.size
        if rows:
            parts = min(TASKS, max(1, length * c * element // TASK_BYTES))
            job.sample_block, job.length_block = 1, -(-length // parts)
        else:
            job.sample_block = min(n, max(1, TASK_BYTES // (c * length * element), n // TASKS))
            plane = length * element
            if plane > 4 * TASK_BYTES:
                job.length_block = max(TASK_BYTES // element, length * n // (16 * TASKS))
                job.channel_block = 1
            else:
                job.length_block = length
                job.channel_block = min(c, max(1, TASK_BYTES // plane))
        self.slices = -(-n // job.sample_block) * -(-length // job.length_block)
        tasks = self.slices * -(-c // job.channel_block)
        enough = n * c * length * element > SERIAL_BYTES
        return min(tasks, torch.get_num_threads()) if enough else 1

    def _describe(self, name: str, parts: tuple[Tensor, ...], layout: Layout) -> None:
        start = parts[0].data_ptr()
        other = start + self.size if self.interleaved else parts[1].data_ptr()
        job = self.job
        setattr(job, name + "_re", start)
        setattr(job, name + "_im", other)
        setattr(job, name + "_sample", self.step * layout.sample)
        setattr(job, name + "_channel", self.step * layout.channel)
        self.keep.extend(parts)

    def _small(self, name: str, tensor: Tensor | None) -> None:
        """Hand over a small tensor as contiguous float64."""
        if tensor is not None:
            tensor = tensor.detach().to(torch.float64).contiguous()
            self.keep.append(tensor)
            setattr(self.job, name, tensor.data_ptr())

    def _room(self, *names_and_columns: tuple[str, int]) -> None:
        """Scratch memory, C float64 numbers a column, all of it from one allocation."""
        c = self.layout.channels
        room = torch.empty(c * sum(k for _, k in names_and_columns), dtype=torch.float64)
        self.keep.append(room)
        at = room.data_ptr()
        for name, columns in names_and_columns:
            setattr(self.job, name, at)
            at += 8 * c * columns

    def _run(self, name: str) -> None:
        self.loops[name](ctypes.addressof(self.job))

    def _sweep(self, name: str) -> None:
        self.job.counter = 0
        native.parallel(self.loops[name], ctypes.addressof(self.job), self.threads)

    def outputs(self) -> tuple[Tensor, ...]:
        out = tuple(torch.empty_like(part) for part in self.parts)
        for part in out:
            native.ask_for_huge_pages(part)
        return out

    def moments(self) -> tuple[Tensor, Tensor]:
        c = self.layout.channels
        mean = torch.empty(c, 2, dtype=torch.float64)
        covar = torch.empty(c, 3, dtype=torch.float64)
        self._room(("partial", 6 * self.slices), ("shift", 2), ("wide", 1))
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
        for name, value in dict(mean=mean, covar=covar, weight=weight, bias=bias).items():
            self._small(name, value)
        self._room(("map", 12), ("wide", 1))
        self._run("map_forward")
        out = self.outputs()
        self._describe("y", out, walkable(out[0])[1])
        self._sweep("apply")
        return out

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        first, layout = like(grads[0], self.layout, self.parts[0])
        rest = tuple(like(grad, self.layout, self.parts[0])[0] for grad in grads[1:])
        if rest and rest[0].stride() != first.stride():
            first, rest = first.contiguous(), (rest[0].contiguous(),)
            first, layout = like(first, self.layout, self.parts[0])
            rest = (like(rest[0], self.layout, self.parts[0])[0],)
        self._describe("g", (first, *rest), layout)
        self._small("mean", mean)
        self._small("covar", covar)
        self._room(("partial", 6 * self.slices), ("shift", 2), ("wide", 1), ("map", 12))
        self._run("shift_to_mean")

    def gram(self) -> tuple[Tensor, Tensor]:
        c = self.layout.channels
        total = torch.empty(c, 2, dtype=torch.float64)
        product = torch.empty(c, 2, 2, dtype=torch.float64)
        self._small("total", total)
        self._small("product", product)
        self._sweep("gram")
        self._run("finish_gram")
        return total, product

    def apply_backward(
        self,
        weight: Tensor | None,
        total: Tensor,
        product: Tensor,
        count: int | None,
        need_input: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        weight_grad = torch.empty(self.layout.channels, 3, dtype=torch.float64)
        given = dict(weight=weight, total=total, product=product, weight_grad=weight_grad)
        for name, value in given.items():
            self._small(name, value)
        self.job.training, self.job.count = (0, 1) if count is None else (1, count)
        self._run("map_backward")
        if not need_input:
            return (), weight_grad
        out = self.outputs()
        self._describe("y", out, walkable(out[0])[1])
        self._sweep("apply_backward")
        return out, weight_grad
