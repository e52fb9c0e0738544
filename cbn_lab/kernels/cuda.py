"""The CUDA engine: the four sweeps in Triton, the few numbers per channel in torch.

A program does a tile of channels by values, so that neighbours in memory are read together in
either layout (see :mod:`cbn_lab.kernels.layout`). Every sweep is launched for the channels that
float32 serves and once more, in float64, for those that are "wide": their parts are nearly
proportional and float32 would lose what tells them apart. Programs without such a channel end at
once; nobody waits for the device to say which they are.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbn_lab.kernels import reference
from cbn_lab.kernels.layout import in_step, layout, outputs_like, walkable
from cbn_lab.whitening import symmetric, whitening_matrix, whitening_matrix_adjoint

BLOCK = 1024  # values in a tile
PROGRAMS = 2048  # at most about so many per launch


def check_available() -> None:
    """Raise where Triton's kernels can run on nothing."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("no CUDA device")


@triton.jit
def tile(N, L, per, sN, sC, sL, C, wide, WIDE: tl.constexpr, BC: tl.constexpr):
    """This program's channels, which of them are its own, and its first and last value."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mine = (tl.load(wide + c, mask=c < C, other=1 - WIDE) == WIDE) & (c < C)
    start = tl.program_id(1).to(tl.int64) * per
    return c, mine, start, tl.minimum(start + per, N * L)


@triton.jit
def offsets(m, c, L, sN, sC, sL):
    n = m // L
    return (c.to(tl.int64) * sC)[:, None] + (n * sN + (m - n * L) * sL)[None, :]


@triton.jit
def moments_kernel(
    x_re, x_im, shift, wide, partial, N, C, L, sN, sC, sL, per,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    c, mine, start, end = tile(N, L, per, sN, sC, sL, C, wide, WIDE, BC)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    k_re = tl.load(shift + 2 * c, mask=mine, other=0).to(DTYPE)[:, None]
    k_im = tl.load(shift + 2 * c + 1, mask=mine, other=0).to(DTYPE)[:, None]
    a0 = tl.zeros([BC], tl.float64)
    a1, a2, a3, a4 = a0, a0, a0, a0
    for at in range(start, end, BM):
        m = at + tl.arange(0, BM)
        mask = mine[:, None] & (m < end)[None, :]
        o = offsets(m, c, L, sN, sC, sL)
        u = tl.where(mask, tl.load(x_re + o, mask=mask, other=0).to(DTYPE) - k_re, 0)
        v = tl.where(mask, tl.load(x_im + o, mask=mask, other=0).to(DTYPE) - k_im, 0)
        a0 += tl.sum(u, 1).to(tl.float64)
        a1 += tl.sum(v, 1).to(tl.float64)
        a2 += tl.sum(u * u, 1).to(tl.float64)
        a3 += tl.sum(v * v, 1).to(tl.float64)
        a4 += tl.sum(u * v, 1).to(tl.float64)
    out = partial + (tl.program_id(1) * C + c) * 6
    tl.store(out, a0, mask=mine)
    tl.store(out + 1, a1, mask=mine)
    tl.store(out + 2, a2, mask=mine)
    tl.store(out + 3, a3, mask=mine)
    tl.store(out + 4, a4, mask=mine)


@triton.jit
def gram_kernel(
    x_re, x_im, g_re, g_im, shift, wide, partial, N, C, L, sN, sC, sL, gN, gC, gL, per,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    c, mine, start, end = tile(N, L, per, sN, sC, sL, C, wide, WIDE, BC)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    k_re = tl.load(shift + 2 * c, mask=mine, other=0).to(DTYPE)[:, None]
    k_im = tl.load(shift + 2 * c + 1, mask=mine, other=0).to(DTYPE)[:, None]
    a0 = tl.zeros([BC], tl.float64)
    a1, a2, a3, a4, a5 = a0, a0, a0, a0, a0
    for at in range(start, end, BM):
        m = at + tl.arange(0, BM)
        mask = mine[:, None] & (m < end)[None, :]
        o = offsets(m, c, L, sN, sC, sL)
        u = tl.load(x_re + o, mask=mask, other=0).to(DTYPE) - k_re
        v = tl.load(x_im + o, mask=mask, other=0).to(DTYPE) - k_im
        o = offsets(m, c, L, gN, gC, gL)
        g = tl.load(g_re + o, mask=mask, other=0).to(DTYPE)
        h = tl.load(g_im + o, mask=mask, other=0).to(DTYPE)
        a0 += tl.sum(g, 1).to(tl.float64)
        a1 += tl.sum(h, 1).to(tl.float64)
        a2 += tl.sum(g * u, 1).to(tl.float64)
        a3 += tl.sum(g * v, 1).to(tl.float64)
        a4 += tl.sum(h * u, 1).to(tl.float64)
        a5 += tl.sum(h * v, 1).to(tl.float64)
    out = partial + (tl.program_id(1) * C + c) * 6
    tl.store(out, a0, mask=mine)
    tl.store(out + 1, a1, mask=mine)
    tl.store(out + 2, a2, mask=mine)
    tl.store(out + 3, a3, mask=mine)
    tl.store(out + 4, a4, mask=mine)
    tl.store(out + 5, a5, mask=mine)


@triton.jit
def column(table, c, k: tl.constexpr, mine, DTYPE: tl.constexpr):
    return tl.load(table + 12 * c + k, mask=mine, other=0).to(DTYPE)[:, None]


@triton.jit
def map_kernel(
    x_re, x_im, g_re, g_im, y_re, y_im, table, wide, N, C, L,
    sN, sC, sL, gN, gC, gL, yN, yC, yL, per,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
    BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y = A·(x − k) + b, or in the backward Aᵀ·g + P·(x − k) + c. The table's columns: A rr, ri,
    ir, ii; b re, im; k re, im; P rr, ri, ir, ii."""
    c, mine, start, end = tile(N, L, per, sN, sC, sL, C, wide, WIDE, BC)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    rr, ri = column(table, c, 0, mine, DTYPE), column(table, c, 1, mine, DTYPE)
    ir, ii = column(table, c, 2, mine, DTYPE), column(table, c, 3, mine, DTYPE)
    b_re, b_im = column(table, c, 4, mine, DTYPE), column(table, c, 5, mine, DTYPE)
    k_re, k_im = column(table, c, 6, mine, DTYPE), column(table, c, 7, mine, DTYPE)
    p_rr, p_ri = column(table, c, 8, mine, DTYPE), column(table, c, 9, mine, DTYPE)
    p_ir, p_ii = column(table, c, 10, mine, DTYPE), column(table, c, 11, mine, DTYPE)
    for at in range(start, end, BM):
        m = at + tl.arange(0, BM)
        mask = mine[:, None] & (m < end)[None, :]
        o = offsets(m, c, L, sN, sC, sL)
        u = tl.load(x_re + o, mask=mask, other=0).to(DTYPE) - k_re
        v = tl.load(x_im + o, mask=mask, other=0).to(DTYPE) - k_im
        if BACKWARD:
            o = offsets(m, c, L, gN, gC, gL)
            g = tl.load(g_re + o, mask=mask, other=0).to(DTYPE)
            h = tl.load(g_im + o, mask=mask, other=0).to(DTYPE)
            s = rr * g + ri * h + p_rr * u + p_ri * v + b_re
            t = ir * g + ii * h + p_ir * u + p_ii * v + b_im
        else:
            s = rr * u + ri * v + b_re
            t = ir * u + ii * v + b_im
        o = offsets(m, c, L, yN, yC, yL)
        tl.store(y_re + o, s, mask=mask)
        tl.store(y_im + o, t, mask=mask)


class Sweep(reference.Sweep):
    """The steps of a forward and a backward in Triton."""

    def __init__(self, parts: tuple[Tensor, ...], eps: float) -> None:
        first, reordered = walkable(parts[0])
        self.like, self.eps = parts if reordered else None, eps
        self.parts = (first, *(in_step(part, first) for part in parts[1:]))
        self.layout = layout(first.shape, first.stride())
        self.step = 2 if first.is_complex() else 1
        self.precision = first.real.dtype
        _, n, c, length, *_ = self.layout
        self.block_c = min(32, triton.next_power_of_2(c)) if self.layout.rows else 1
        self.block_m = BLOCK // self.block_c
        blocks_c = -(-c // self.block_c)
        slices = max(1, min(-(-n * length // self.block_m), PROGRAMS // blocks_c))
        self.per = -(-n * length // slices)
        self.per = -(-self.per // self.block_m) * self.block_m
        self.grid = blocks_c, -(-n * length // self.per)

    def _launch(self, kernel, wide: Tensor, *args, **constants) -> None:
        narrow = tl.float64 if self.precision is torch.float64 else tl.float32
        for flag, dtype in ((0, narrow), (1, tl.float64)):
            kernel[self.grid](
                *args,
                self.per,
                WIDE=flag,
                DTYPE=dtype,
                BC=self.block_c,
                BM=self.block_m,
                **constants,
            )

    def _strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """From sample to sample, channel to channel and value to value, in real numbers."""
        found = layout(tensor.shape, tensor.stride())
        return self.step * found.sample, self.step * found.channel, self.step

    def _counts(self) -> tuple[int, int, int]:
        rows, n, c, length, *_ = self.layout
        return (length, c, 1) if rows else (n, c, length)

    def _sums(self, kernel, tensors: tuple[Tensor, ...], shift: Tensor, wide: Tensor, into: Tensor):
        strides = [s for t in tensors for s in self._strides(t[0])]
        data = [p for t in tensors for p in real_parts(t)]
        self._launch(kernel, wide, *data, shift, wide, into, *self._counts(), *strides)
        return into.sum(0)

    def _scratch(self) -> tuple[Tensor, Tensor]:
        c, device = self.layout.channels, self.parts[0].device
        wide = torch.zeros(c, dtype=torch.int32, device=device)
        return wide, torch.zeros(self.grid[1], c, 6, dtype=torch.float64, device=device)

    def moments(self) -> tuple[Tensor, Tensor]:
        wide, partial = self._scratch()
        first = [p.select(0, 0).flatten(1)[:, 0] if p.dim() > 2 else p[0] for p in self.parts]
        pair = first if self.step == 1 else (first[0].real, first[0].imag)
        shift = torch.stack(tuple(pair), -1).float().double()
        count = self.parts[0].numel() // self.layout.channels
        sums = self._sums(moments_kernel, (self.parts,), shift, wide, partial)
        mean, covar, far = finished(sums, shift, count)
        wide = (far | self.ill(covar)).int()
        shift = torch.where(wide[:, None] == 1, mean, shift).contiguous()
        sums = self._sums(moments_kernel, (self.parts,), shift, wide, partial)
        mean, covar, _ = finished(sums, shift, count)
        return mean, covar

    def ill(self, covar: Tensor) -> Tensor:
        """Correlation above 0.995, where float32 would lose more than two digits."""
        rr, ii, ri = covar.unbind(-1)
        product = (rr + self.eps) * (ii + self.eps)
        return product - ri * ri < 0.01 * product

    def centre(self, mean: Tensor, covar: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.ill(covar)
        return wide.int(), torch.where(wide[:, None], mean, mean.float().double()).contiguous()

    def apply(self, mean, covar, weight, bias) -> tuple[Tensor, ...]:
        mean, covar = mean.double(), covar.double()
        a = whitening_matrix(covar, self.eps)
        if weight is not None:
            a = symmetric(weight.double()) @ a
        wide, centre = self.centre(mean, covar)
        b = -(a @ (mean - centre)[..., None])[..., 0]
        b = b if bias is None else b + bias.double()
        return self._map(a, b, centre, torch.zeros_like(a), wide, self.parts, backward=False)

    def _map(self, a, b, centre, p, wide, grads, backward: bool) -> tuple[Tensor, ...]:
        table = torch.cat([a.flatten(1), b, centre, p.flatten(1)], 1).contiguous()
        out = outputs_like(self.parts)
        data = [p for t in (self.parts, grads, out) for p in real_parts(t)]
        strides = [s for t in (self.parts, grads, out) for s in self._strides(t[0])]
        args = *data, table, wide, *self._counts(), *strides
        self._launch(map_kernel, wide, *args, BACKWARD=backward)
        if self.like is None:
            return out
        return tuple(
            torch.empty_like(old).copy_(new) for old, new in zip(self.like, out, strict=True)
        )

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.grads = tuple(in_step(grad, self.parts[0]) for grad in grads)
        self.mean, self.covar = mean, covar

    def gram(self) -> tuple[Tensor, Tensor]:
        _, partial = self._scratch()
        wide, centre = self.centre(self.mean, self.covar)
        sums = self._sums(gram_kernel, (self.parts, self.grads), centre, wide, partial)
        total, product = sums[:, :2].contiguous(), sums[:, 2:].unflatten(1, (2, 2))
        return total, product - total[:, :, None] * (self.mean - centre)[:, None, :]

    def apply_backward(self, weight, total, product, count, need_input):
        gradients = reference.parameter_gradients(self.covar, self.eps, total, product)
        if not need_input:
            return (), *gradients
        a = whitening_matrix(self.covar, self.eps)
        if weight is not None:
            w = symmetric(weight.double())
            a, product = w @ a, w @ product
        wide, centre = self.centre(self.mean, self.covar)
        p, b = torch.zeros_like(a), torch.zeros_like(total)
        if count is not None:
            both = (product + product.mT) / 2
            p = 2 / count * whitening_matrix_adjoint(self.covar, self.eps, both)
            b = a.mT @ (total / count)[..., None] + p @ (self.mean - centre)[..., None]
            b = -b[..., 0]
        return self._map(a.mT, b, centre, p, wide, self.grads, backward=True), *gradients


def finished(sums: Tensor, shift: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance, and whether the mean was too far from the point the sums are about."""
    m, second = sums[:, :2] / count, sums[:, 2:5] / count
    covar = second - torch.stack([m[:, 0] ** 2, m[:, 1] ** 2, m[:, 0] * m[:, 1]], -1)
    covar = torch.cat([covar[:, :2].clamp(min=0), covar[:, 2:]], 1)
    return shift + m, covar, (m**2 > 16 * covar[:, :2]).any(1)


def real_parts(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Two real tensors that begin at the first real and the first imaginary number."""
    if len(parts) == 2:
        return parts
    both = torch.view_as_real(parts[0])
    return both[..., 0], both[..., 1]
