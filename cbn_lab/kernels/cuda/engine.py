"""The CUDA engine: four sweeps over the data in Triton.

Forward: moments of each slice of the data, then y = A·(x − μ) + β. Backward: Σ g and Σ g·xᵀ of
each slice, then x̄. Python is not told what the sums are: nothing waits for the device.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from cbn_lab.kernels import reference
from cbn_lab.kernels.cpu.job import ceil_divide, ceil_to
from cbn_lab.kernels.cuda import maps, sums
from cbn_lab.kernels.cuda.parts import INTERPRETED
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

BLOCK = 512  # values in a tile: with more, the sums do not fit into the registers
ROW = 128  # channels in a tile of rows
FEW = 64  # slices that whoever needs their sum adds up
MERGED, MERGED_CHANNELS = 256, 4  # slices and channels that a kernel adds up at a time


def check_available() -> None:
    """Raise where Triton's kernels can run on nothing, or it is too old.

    Until 3.4 a kernel's numbers are float32, whatever it asks for.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        raise RuntimeError(f"expected Triton 3.4 or newer, got {triton.__version__}")
    if not torch.cuda.is_available() and not INTERPRETED:
        raise RuntimeError("no CUDA device")


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a sweep that depends only on shapes and strides; made once and kept."""

    programs: int
    merges: int  # programs that merge
    partial: tuple[int, int, int]  # shape: slices, six, channels
    few: bool  # whether the slices are so few that nobody merges them for others
    numbers: tuple[int, ...]  # C, P, A, B, LB, per, tiles, and of input and gradient sP, sA
    fresh: tuple[int, int]  # of the result: yP, yA
    tile: dict[str, int]
    apply: dict[str, int]
    merge: dict[str, int]
    like: dict[tuple[int, bool], Tensor] = field(repr=False)  # without memory: not to be shown
    ready: dict[tuple, Any]  # compiled kernels


@functools.lru_cache(1024)
def plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Plan | None:
    """How to sweep over such a tensor; None if it must be copied first."""
    both = in_and_out(shape, strides)
    if both is None:
        return None
    rows, samples, channels, length, *_ = both[0]
    a, b = (length, channels) if rows else (samples, length)
    block_b = tile_width(b, ROW if rows else BLOCK)
    block_a = BLOCK // block_b
    beside = ceil_divide(b, block_b) if rows else channels
    along_b = 1 if rows else ceil_divide(b, block_b)
    tiles = ceil_divide(a, block_a) * along_b
    per = tiles_per_program(rows, tiles, beside, processors(device))
    slices = ceil_divide(tiles, per)
    few = slices <= FEW and not rows
    step, real = (2, dtype.to_real()) if dtype.is_complex else (1, dtype)
    tile = dict(ROWS=rows, BA=block_a, BB=block_b)
    at_once = min(MERGED, triton.next_power_of_2(slices))
    return Plan(
        programs=beside * slices,
        merges=ceil_divide(channels, MERGED_CHANNELS),
        partial=(slices, 6, channels),
        few=few,
        numbers=(channels, beside, a, b, along_b, per, tiles, *pitches(both[0], step)),
        fresh=pitches(both[1], step),
        tile=tile,
        apply=tile | dict(DOUBLE=real is torch.float64, BS=at_once if few else 1),
        merge=dict(BS=at_once, BC=MERGED_CHANNELS),
        like=likes(channels, device),
        ready={},
    )


def tile_width(b: int, largest: int) -> int:
    """The widest tile that is hardly ever more than a quarter empty."""
    widths = [1 << k for k in range(largest.bit_length())]
    return max(widths, key=lambda width: (min(0.75, b / ceil_to(width, b)), width))


def tiles_per_program(rows: bool, tiles: int, beside: int, processors: int) -> int:
    """So many that a program's own start does not count, but that all processors have work.

    And few enough slices to merge, of which rows have many: there all programs run at once.
    """
    if rows:
        return ceil_divide(tiles * beside, 4 * processors)
    return max(min(16, tiles * beside // (8 * processors)), ceil_divide(tiles, 4096), 1)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter, which is to see several slices
    return torch.cuda.get_device_properties(device).multi_processor_count


def pitches(found: Layout, step: int) -> tuple[int, int]:
    """From program to program and from A to A, in real numbers; rows find their own way along B."""
    return (0 if found.rows else step * found.channel), step * found.sample


class Sweep(reference.Sweep):
    """The steps of a forward and a backward in Triton."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        first, self.like, self.eps = parts[0], None, float(eps)
        device = first.device
        found = plan(first.shape, first.stride(), first.dtype, device)
        if found is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            found = plan(first.shape, first.stride(), first.dtype, device)
        self.plan = found
        self.parts = (first,) if len(parts) == 1 else (first, in_step(parts[1], first))
        self.x = pair(self.parts)
        self.elsewhere = None
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            self.elsewhere = device

    def _run(self, *given) -> None:
        if self.elsewhere is None:
            launch(self.plan.ready, *given)
        else:
            with torch.cuda.device(self.elsewhere):
                launch(self.plan.ready, *given)

    def _new(self, columns: int, single: bool = False) -> Tensor:
        return torch.empty_like(self.plan.like[columns, single])

    # --- forward ---

    def forward(self, mean, covar, weight, bias):
        if mean is not None:
            return self.apply(mean, covar, weight, bias), mean, covar
        partial, mean, covar = self._slices(), self._new(2), self._new(3)
        if not self.plan.few:
            self._merge_moments(partial, mean, covar)
            partial = None
        return self._apply(partial, mean, covar, weight, bias), mean, covar

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, covar = self._new(2), self._new(3)
        self._merge_moments(self._slices(), mean, covar)
        return mean, covar

    def _slices(self) -> Tensor:
        """The moments of each slice."""
        found = self.plan
        partial = found.like[2, False].new_empty(found.partial)
        tensors = *self.x, partial
        self._run(sums.moments_kernel, found.programs, tensors, found.numbers, found.tile)
        return partial

    def _merge_moments(self, partial: Tensor, mean: Tensor, covar: Tensor) -> None:
        found, (slices, _, c) = self.plan, self.plan.partial
        tensors = partial, mean, covar
        self._run(sums.merge_moments_kernel, found.merges, tensors, (c, slices), found.merge)

    def apply(self, mean, covar, weight, bias) -> tuple[Tensor, ...]:
        return self._apply(None, small(mean), small(covar), weight, bias)

    def _apply(self, partial, mean, covar, weight, bias) -> tuple[Tensor, ...]:
        found, out = self.plan, outputs_like(self.parts)
        tensors = *self.x, *pair(out), mean, covar, small(weight), small(bias), partial
        numbers = self.eps, found.partial[0], *found.fresh, *found.numbers
        self._run(maps.apply_kernel, found.programs, tensors, numbers, found.apply)
        return put_back(out, self.like)

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        if running is None:
            return
        *given, factor, unbiased = running
        there = [t for t in given if t is not None]
        if not there:
            return
        simple = all(
            [can_be_written(t) and t.dtype.itemsize >= 4 and t.device == mean.device for t in there]
        )
        if isinstance(factor, Tensor) or not simple:
            super().finish(running, mean, covar)
            return
        c = self.plan.partial[2]
        numbers, programs = (float(factor), unbiased, c), ceil_divide(3 * c, BLOCK)
        tensors = mean, covar, *given
        self._run(maps.move_running_kernel, programs, tensors, numbers, dict(BC=BLOCK))
        increment_version(there)  # or autograd would not see that they have changed

    # --- backward ---

    def backward(self, grads, mean, covar, weight, count, need_input):
        if not need_input or not self.plan.few:
            return super().backward(grads, mean, covar, weight, count, need_input)
        self.take_gradient(grads, mean, covar)
        return self._apply_backward(self._gram_slices(), weight, None, None, count)

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.g = pair(tuple([in_step(grad, self.x[0]) for grad in grads]))
        self.mean, self.covar = small(mean), small(covar)

    def _gram_slices(self) -> Tensor:
        """Σ g and Σ g·(x − centre)ᵀ of each slice."""
        found = self.plan
        partial = found.like[2, False].new_empty(found.partial)
        tensors = *self.x, *self.g, self.mean, self.covar, partial
        constants = found.tile | dict(DOUBLE=found.apply["DOUBLE"])
        numbers = self.eps, *found.numbers
        self._run(sums.gram_kernel, found.programs, tensors, numbers, constants)
        return partial

    def gram(self) -> tuple[Tensor, Tensor]:
        found, (slices, _, c) = self.plan, self.plan.partial
        partial, total, product = self._gram_slices(), self._new(2), self._new(4)
        constants = found.merge | dict(DOUBLE=found.apply["DOUBLE"])
        tensors = partial, self.mean, total, product
        self._run(sums.merge_gram_kernel, found.merges, tensors, (c, slices), constants)
        return total, product.view(-1, 2, 2)

    def apply_backward(self, weight, total, product, count, need_input):
        if not need_input:
            return (), *reference.parameter_gradients(self.covar, self.eps, total, product)
        return self._apply_backward(None, weight, small(total), small(product), count)

    def _apply_backward(self, partial, weight, total, product, count):
        found, out = self.plan, outputs_like(self.parts)
        single = weight is not None and weight.dtype is torch.float32
        gradients = self._new(3, single), self._new(2, single)
        state = self.mean, self.covar, small(weight), total, product, partial
        tensors = *self.x, *self.g, *pair(out), *state, *gradients
        numbers = self.eps, float(count or 1), found.partial[0], *found.fresh, *found.numbers
        constants = found.apply | dict(TRAINING=count is not None)
        self._run(maps.apply_backward_kernel, found.programs, tensors, numbers, constants)
        return put_back(out, self.like), *gradients


def launch(
    ready: dict[tuple, Any],
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, int],
) -> None:
    """Run so many programs of a kernel, whose parameters are tensors, numbers and constants.

    Triton looks at each argument anew at every launch, which takes longer than the arithmetic of a
    small layer. What it has compiled is therefore kept in ``ready``, for tensors that begin where
    16 bytes can be loaded at a time, and started with their addresses.
    """
    addresses, key, bits = [], [id(kernel), *constants.values()], 0
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            key.append(None)
        else:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
            key.append(tensor.dtype)
    key = tuple(key)
    aligned = not bits & 15
    if aligned and key in ready:
        ready[key][programs, 1, 1](*addresses, *numbers, *constants.values())
        return
    given = [torch.view_as_real(t) if t is not None and t.is_complex() else t for t in tensors]
    compiled = kernel[programs,](*given, *numbers, **constants)
    if aligned and not INTERPRETED:
        ready[key] = compiled


def pair(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Real and imaginary numbers, or both alternating and None."""
    return parts if len(parts) == 2 else (parts[0], None)


def small(tensor: Tensor | None) -> Tensor | None:
    """At least float32, one number after the other."""
    if tensor is None or (is_simple(tensor) and tensor.dtype.itemsize >= 4):
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().resolve_neg().to(wide).contiguous()


def forget() -> None:
    """Let go of what is kept between calls, but not of what Triton keeps."""
    plan.cache_clear()
    likes.cache_clear()
