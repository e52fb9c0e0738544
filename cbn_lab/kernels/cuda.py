"""The CUDA engine: four sweeps over the data in Triton, and two small kernels that add up.

Forward: moments of each slice of the data, merged; then y = A·(x − μ) + β. Backward: Σ g and
Σ g·xᵀ of each slice, merged; then x̄. The few numbers per channel that a map needs are computed
in float64 by every program that applies it, which is cheaper than one more launch. Python is not
told what they are: nothing waits for the device.

A program walks a slice of the data in tiles of A by B. Where a channel's values lie side by side
("planes", see :mod:`cbn_lab.kernels.layout`), A counts samples and B values, and each program has
one channel. In "rows" A counts rows and B channels, and each program has a block of them.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from cbn_lab import running_stats, whitening
from cbn_lab.kernels import reference
from cbn_lab.kernels.cpu.job import ceil_divide, ceil_to
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
TILES = tl.constexpr(64)  # that float32 sums run over before they go to float64
MERGED, MERGED_CHANNELS = 256, 4  # slices and channels that are added up at a time
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def shared(function):
    """Plain arithmetic from elsewhere, as kernels call it; Triton's interpreter takes it as it is."""
    return function if INTERPRETED else triton.jit(function)


roots = shared(whitening.roots)
inverse_root = shared(whitening.inverse_root)
congruence = shared(whitening.congruence)
matmul = shared(whitening.matmul)
adjoint = shared(whitening.adjoint)
is_wide = shared(whitening.is_wide)
moved = shared(running_stats.moved)


def check_available() -> None:
    """Raise where Triton's kernels can run on nothing."""
    if not torch.cuda.is_available() and not INTERPRETED:
        raise RuntimeError("no CUDA device")


# --- parts of kernels ------------------------------------------------------------------------
# C channels; P programs side by side do all of them, S = programs / P slices. A tile's place is
# counted along B first, LB tiles to a turn; `per` tiles make a slice. All strides count real
# numbers, sP from program to program and sA along A. The imaginary pointer is None where the
# numbers alternate.


@triton.jit
def share(P, per, tiles, ROWS: tl.constexpr, BB: tl.constexpr, BACKWARDS: tl.constexpr):
    """This program's place among the P, its slice, its channels, its first and last tile."""
    number = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    p, s = number % P, number // P
    c = p * BB + tl.arange(0, BB) if ROWS else p + tl.arange(0, 1)
    return p, s, c, s * per, tl.minimum(s * per + per, tiles)


@triton.jit
def corner(t, p, LB, ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr):
    """Where tile t begins along A, and along B."""
    return t // LB * BA, p * BB if ROWS else t % LB * BB


@triton.jit
def inside(a0, b0, A, B, BA: tl.constexpr, BB: tl.constexpr):
    return (a0 + tl.arange(0, BA) < A)[:, None] & (b0 + tl.arange(0, BB) < B)[None, :]


@triton.jit
def read(re, im, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    """Real and imaginary parts of a tile, 0 outside."""
    a = a0 + tl.arange(0, BA)
    at = (a.to(tl.int64) * sA)[:, None]
    if im is None:
        b = 2 * b0 + tl.arange(0, 2 * BB)
        mask = (a < A)[:, None] & (b < 2 * B)[None, :]
        both = tl.load(re + at + b[None, :], mask=mask, other=0)
        u, v = tl.split(tl.reshape(both, [BA, BB, 2]))
    else:
        at += (b0 + tl.arange(0, BB))[None, :]
        mask = inside(a0, b0, A, B, BA, BB)
        u, v = tl.load(re + at, mask=mask, other=0), tl.load(im + at, mask=mask, other=0)
    return u, v


@triton.jit
def write(re, im, u, v, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    a = a0 + tl.arange(0, BA)
    at = (a.to(tl.int64) * sA)[:, None]
    if im is None:
        b = 2 * b0 + tl.arange(0, 2 * BB)
        mask = (a < A)[:, None] & (b < 2 * B)[None, :]
        tl.store(re + at + b[None, :], tl.reshape(tl.join(u, v), [BA, 2 * BB]), mask=mask)
    else:
        at += (b0 + tl.arange(0, BB))[None, :]
        mask = inside(a0, b0, A, B, BA, BB)
        tl.store(re + at, u, mask=mask)
        tl.store(im + at, v, mask=mask)


@triton.jit
def total(x, ROWS: tl.constexpr):
    """Of each of this program's channels, in float64."""
    if ROWS:
        out = tl.sum(x.to(tl.float64), 0)
    else:
        out = tl.sum(tl.sum(x.to(tl.float64), 1), 0) + tl.zeros([1], tl.float64)
    return out


@triton.jit
def square_root(x):
    return tl.sqrt(x)


@triton.jit
def three(matrix, c, C):
    """rr, ii, ri of the symmetric matrices of channels c; the identity for None."""
    if matrix is None:
        rr = tl.full(c.shape, 1, tl.float64)
        ii = rr
        ri = rr - rr
    else:
        rr = tl.load(matrix + 3 * c, mask=c < C, other=1).to(tl.float64)
        ii = tl.load(matrix + 3 * c + 1, mask=c < C, other=1).to(tl.float64)
        ri = tl.load(matrix + 3 * c + 2, mask=c < C, other=0).to(tl.float64)
    return rr, ii, ri


@triton.jit
def two(vector, c, C):
    """The two numbers of channels c; 0 for None."""
    if vector is None:
        re = tl.zeros(c.shape, tl.float64)
        im = re
    else:
        re = tl.load(vector + 2 * c, mask=c < C, other=0).to(tl.float64)
        im = tl.load(vector + 2 * c + 1, mask=c < C, other=0).to(tl.float64)
    return re, im


@triton.jit
def centre(mean, c, C, DOUBLE: tl.constexpr):
    """A point near the mean that the data's precision has, and what is left of the mean."""
    m_re, m_im = two(mean, c, C)
    k_re, k_im = m_re, m_im
    if not DOUBLE:
        k_re, k_im = m_re.to(tl.float32).to(tl.float64), m_im.to(tl.float32).to(tl.float64)
    return k_re, k_im, m_re - k_re, m_im - k_im


@triton.jit
def any_wide(covar, eps, c, C):
    rr, ii, ri = three(covar, c, C)
    return tl.max(is_wide(rr, ii, ri, eps).to(tl.int32), 0) != 0


# --- sums ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["C", "P", "A", "LB", "per", "tiles"])
def moments_kernel(
    x_re, x_im, partial, C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Of each slice: how many values, their mean, and their products about it. In float64, for
    what is lost here cannot be told from the result."""
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, False)
    x_re += p.to(tl.int64) * sP
    if x_im is not None:
        x_im += p.to(tl.int64) * sP
    n = tl.zeros([BA, BB], tl.int32)
    zero = tl.zeros([BA, BB], tl.float64)
    r, i, rr, ii, ri = zero, zero, zero, zero, zero
    # About the mean of the first tile, which one far value does not spoil.
    a0, b0 = corner(start, p, LB, ROWS, BA, BB)
    k_re, k_im = read(x_re, x_im, a0, b0, A, B, sA, BA, BB)
    count = tl.maximum(total(inside(a0, b0, A, B, BA, BB), ROWS), 1)
    k_re, k_im = total(k_re, ROWS) / count, total(k_im, ROWS) / count
    k_re, k_im = tl.where(k_re - k_re == 0, k_re, 0), tl.where(k_im - k_im == 0, k_im, 0)
    for t in range(start, end):
        a0, b0 = corner(t, p, LB, ROWS, BA, BB)
        u, v = read(x_re, x_im, a0, b0, A, B, sA, BA, BB)
        there = inside(a0, b0, A, B, BA, BB)
        u = tl.where(there, u.to(tl.float64) - k_re[None, :], 0)
        v = tl.where(there, v.to(tl.float64) - k_im[None, :], 0)
        n += there.to(tl.int32)
        r += u
        i += v
        rr += u * u
        ii += v * v
        ri += u * v
    count = tl.maximum(total(n, ROWS), 1)
    m_re, m_im = total(r, ROWS) / count, total(i, ROWS) / count
    out, mine = partial + s * 6 * C + c, c < C
    tl.store(out, count, mask=mine)
    tl.store(out + C, k_re + m_re, mask=mine)
    tl.store(out + 2 * C, k_im + m_im, mask=mine)
    tl.store(out + 3 * C, total(rr, ROWS) - count * m_re * m_re, mask=mine)
    tl.store(out + 4 * C, total(ii, ROWS) - count * m_im * m_im, mask=mine)
    tl.store(out + 5 * C, total(ri, ROWS) - count * m_re * m_im, mask=mine)


@triton.jit
def six(partial, s, c, C, S):
    """Six numbers of slices s and channels c, 0 where there is none."""
    at = partial + s[:, None] * 6 * C + c[None, :]
    mask = (s < S)[:, None] & (c < C)[None, :]
    n, r = tl.load(at, mask=mask, other=0), tl.load(at + C, mask=mask, other=0)
    i, rr = tl.load(at + 2 * C, mask=mask, other=0), tl.load(at + 3 * C, mask=mask, other=0)
    ii, ri = tl.load(at + 4 * C, mask=mask, other=0), tl.load(at + 5 * C, mask=mask, other=0)
    return n, r, i, rr, ii, ri


@triton.jit(do_not_specialize=["C", "S"])
def merge_moments_kernel(partial, mean, covar, C, S, BS: tl.constexpr, BC: tl.constexpr):
    """Mean and biased covariance of all slices (Chan, Golub and LeVeque 1979)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    zero = tl.zeros([BS, BC], tl.float64)
    count, m_re, m_im = zero, zero, zero
    for s in range(0, S, BS):
        n, r, i, _, _, _ = six(partial, s + tl.arange(0, BS), c, C, S)
        count += n
        m_re += n * r
        m_im += n * i
    count = tl.maximum(tl.sum(count, 0), 1)
    m_re, m_im = tl.sum(m_re, 0) / count, tl.sum(m_im, 0) / count
    v_rr, v_ii, v_ri = zero, zero, zero
    for s in range(0, S, BS):
        n, r, i, rr, ii, ri = six(partial, s + tl.arange(0, BS), c, C, S)
        r, i = tl.where(n > 0, r - m_re[None, :], 0), tl.where(n > 0, i - m_im[None, :], 0)
        v_rr += rr + n * r * r
        v_ii += ii + n * i * i
        v_ri += ri + n * r * i
    v_rr, v_ii, v_ri = tl.sum(v_rr, 0) / count, tl.sum(v_ii, 0) / count, tl.sum(v_ri, 0) / count
    tl.store(mean + 2 * c, m_re, mask=c < C)
    tl.store(mean + 2 * c + 1, m_im, mask=c < C)
    tl.store(covar + 3 * c, tl.where(v_rr < 0, 0, v_rr), mask=c < C)  # a NaN stays one
    tl.store(covar + 3 * c + 1, tl.where(v_ii < 0, 0, v_ii), mask=c < C)
    tl.store(covar + 3 * c + 2, v_ri, mask=c < C)


@triton.jit
def gram_sums(
    x_re, x_im, g_re, g_im, k_re, k_im, start, end, p, A, B, LB, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros(k_re.shape, tl.float64)
    r, i, rr, ri, ir, ii = zero, zero, zero, zero, zero, zero
    k_re, k_im = k_re.to(DTYPE)[None, :], k_im.to(DTYPE)[None, :]
    for top in range(start, end, TILES):
        none = tl.zeros([BA, BB], DTYPE)
        s_r, s_i, s_rr, s_ri, s_ir, s_ii = none, none, none, none, none, none
        for t in range(top, tl.minimum(top + TILES, end)):
            a0, b0 = corner(t, p, LB, ROWS, BA, BB)
            u, v = read(x_re, x_im, a0, b0, A, B, sA, BA, BB)
            g, h = read(g_re, g_im, a0, b0, A, B, sA, BA, BB)  # 0 outside, and so the products
            u, v, g, h = u.to(DTYPE) - k_re, v.to(DTYPE) - k_im, g.to(DTYPE), h.to(DTYPE)
            s_r += g
            s_i += h
            s_rr += g * u
            s_ri += g * v
            s_ir += h * u
            s_ii += h * v
        r += total(s_r, ROWS)
        i += total(s_i, ROWS)
        rr += total(s_rr, ROWS)
        ri += total(s_ri, ROWS)
        ir += total(s_ir, ROWS)
        ii += total(s_ii, ROWS)
    return r, i, rr, ri, ir, ii


@triton.jit(do_not_specialize=["C", "P", "A", "LB", "per", "tiles"])
def gram_kernel(
    x_re, x_im, g_re, g_im, mean, covar, partial, eps: "fp64", C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Of each slice Σ g and Σ g·(x − centre)ᵀ."""
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, False)
    k_re, k_im, _, _ = centre(mean, c, C, DOUBLE)
    x_re += p.to(tl.int64) * sP
    g_re += p.to(tl.int64) * sP
    if x_im is not None:
        x_im += p.to(tl.int64) * sP
        g_im += p.to(tl.int64) * sP
    if DOUBLE or any_wide(covar, eps, c, C):
        r, i, rr, ri, ir, ii = gram_sums(
            x_re, x_im, g_re, g_im, k_re, k_im, start, end, p, A, B, LB, sA,
            ROWS, BA, BB, tl.float64,
        )  # fmt: skip
    else:
        r, i, rr, ri, ir, ii = gram_sums(
            x_re, x_im, g_re, g_im, k_re, k_im, start, end, p, A, B, LB, sA,
            ROWS, BA, BB, tl.float32,
        )  # fmt: skip
    out, mine = partial + s * 6 * C + c, c < C
    tl.store(out, r, mask=mine)
    tl.store(out + C, i, mask=mine)
    tl.store(out + 2 * C, rr, mask=mine)
    tl.store(out + 3 * C, ri, mask=mine)
    tl.store(out + 4 * C, ir, mask=mine)
    tl.store(out + 5 * C, ii, mask=mine)


@triton.jit(do_not_specialize=["C", "S"])
def merge_gram_kernel(
    partial, mean, total_out, product, C, S, BS: tl.constexpr, BC: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """Σ g and G = Σ g·(x − μ)ᵀ of all slices."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    zero = tl.zeros([BS, BC], tl.float64)
    r, i, rr, ri, ir, ii = zero, zero, zero, zero, zero, zero
    for s in range(0, S, BS):
        n_r, n_i, n_rr, n_ri, n_ir, n_ii = six(partial, s + tl.arange(0, BS), c, C, S)
        r += n_r
        i += n_i
        rr += n_rr
        ri += n_ri
        ir += n_ir
        ii += n_ii
    _, _, d_re, d_im = centre(mean, c, C, DOUBLE)
    t_re, t_im = tl.sum(r, 0), tl.sum(i, 0)
    tl.store(total_out + 2 * c, t_re, mask=c < C)
    tl.store(total_out + 2 * c + 1, t_im, mask=c < C)
    tl.store(product + 4 * c, tl.sum(rr, 0) - t_re * d_re, mask=c < C)
    tl.store(product + 4 * c + 1, tl.sum(ri, 0) - t_re * d_im, mask=c < C)
    tl.store(product + 4 * c + 2, tl.sum(ir, 0) - t_im * d_re, mask=c < C)
    tl.store(product + 4 * c + 3, tl.sum(ii, 0) - t_im * d_im, mask=c < C)


# --- maps ------------------------------------------------------------------------------------


@triton.jit
def map_tiles(
    x_re, x_im, g_re, g_im, y_re, y_im, k_re, k_im, p_rr, p_ri, p_ir, p_ii, m_rr, m_ri, m_ir, m_ii,
    c_re, c_im, start, end, p, A, B, LB, sA, yA, X: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y = P·(x − k) + M·g + c, without the first term if not X, without the second if not G."""
    k_re, k_im = k_re.to(DTYPE)[None, :], k_im.to(DTYPE)[None, :]
    p_rr, p_ri = p_rr.to(DTYPE)[None, :], p_ri.to(DTYPE)[None, :]
    p_ir, p_ii = p_ir.to(DTYPE)[None, :], p_ii.to(DTYPE)[None, :]
    m_rr, m_ri = m_rr.to(DTYPE)[None, :], m_ri.to(DTYPE)[None, :]
    m_ir, m_ii = m_ir.to(DTYPE)[None, :], m_ii.to(DTYPE)[None, :]
    c_re, c_im = c_re.to(DTYPE)[None, :], c_im.to(DTYPE)[None, :]
    for t in range(start, end):
        a0, b0 = corner(t, p, LB, ROWS, BA, BB)
        y, z = tl.broadcast_to(c_re, [BA, BB]), tl.broadcast_to(c_im, [BA, BB])
        if X:
            u, v = read(x_re, x_im, a0, b0, A, B, sA, BA, BB)
            u, v = u.to(DTYPE) - k_re, v.to(DTYPE) - k_im
            y, z = y + p_rr * u + p_ri * v, z + p_ir * u + p_ii * v
        if G:
            g, h = read(g_re, g_im, a0, b0, A, B, sA, BA, BB)
            g, h = g.to(DTYPE), h.to(DTYPE)
            y, z = y + m_rr * g + m_ri * h, z + m_ir * g + m_ii * h
        write(y_re, y_im, y, z, a0, b0, A, B, yA, BA, BB)


@triton.jit
def map_channels(
    x_re, x_im, g_re, g_im, y_re, y_im, k_re, k_im, p_rr, p_ri, p_ir, p_ii, m_rr, m_ri, m_ir, m_ii,
    c_re, c_im, start, end, p, A, B, LB, sP, sA, yP, yA, wide, X: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The same for this program's channels, in the precision that they need."""
    x_re += p.to(tl.int64) * sP
    y_re += p.to(tl.int64) * yP
    if x_im is not None:
        x_im += p.to(tl.int64) * sP
        y_im += p.to(tl.int64) * yP
    if G:
        g_re += p.to(tl.int64) * sP
        if x_im is not None:
            g_im += p.to(tl.int64) * sP
    if DOUBLE or wide:
        map_tiles(
            x_re, x_im, g_re, g_im, y_re, y_im, k_re, k_im, p_rr, p_ri, p_ir, p_ii,
            m_rr, m_ri, m_ir, m_ii, c_re, c_im, start, end, p, A, B, LB, sA, yA, X, G,
            ROWS, BA, BB, tl.float64,
        )  # fmt: skip
    else:
        map_tiles(
            x_re, x_im, g_re, g_im, y_re, y_im, k_re, k_im, p_rr, p_ri, p_ir, p_ii,
            m_rr, m_ri, m_ir, m_ii, c_re, c_im, start, end, p, A, B, LB, sA, yA, X, G,
            ROWS, BA, BB, tl.float32,
        )  # fmt: skip


@triton.jit(do_not_specialize=["C", "P", "A", "LB", "per", "tiles"])
def apply_kernel(
    x_re, x_im, y_re, y_im, mean, covar, weight, bias, eps: "fp64", yP, yA,
    C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """y = A·(x − μ) + β with A = Γ·R; what the centre leaves of μ joins the constant."""
    # The last slice first: the cache still has it.
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, True)
    rr, ii, ri = three(covar, c, C)
    root, t = roots(rr, ii, ri, eps, square_root)
    r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, eps, root, t)
    w_rr, w_ii, w_ri = three(weight, c, C)
    a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
    k_re, k_im, d_re, d_im = centre(mean, c, C, DOUBLE)
    b_re, b_im = two(bias, c, C)
    b_re, b_im = b_re - (a_rr * d_re + a_ri * d_im), b_im - (a_ir * d_re + a_ii * d_im)
    map_channels(
        x_re, x_im, None, None, y_re, y_im, k_re, k_im, a_rr, a_ri, a_ir, a_ii,
        a_rr, a_ri, a_ir, a_ii, b_re, b_im, start, end, p, A, B, LB, sP, sA, yP, yA,
        any_wide(covar, eps, c, C), True, False, ROWS, BA, BB, DOUBLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["C", "P", "A", "LB", "per", "tiles"])
def apply_backward_kernel(
    x_re, x_im, g_re, g_im, y_re, y_im, mean, covar, weight, total_in, product, weight_grad,
    bias_grad, eps: "fp64", M: "fp64", yP, yA, C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
    TRAINING: tl.constexpr,
):  # fmt: skip
    """x̄ = Aᵀ·(g − Σg/M) + P·(x − μ) with P = (2/M)·V̄; the first slice stores Γ̄ and β̄ as well."""
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, True)
    rr, ii, ri = three(covar, c, C)
    root, t = roots(rr, ii, ri, eps, square_root)
    r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, eps, root, t)
    w_rr, w_ii, w_ri = three(weight, c, C)
    a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
    g_rr, g_ri = two(product, 2 * c, 2 * C)
    g_ir, g_ii = two(product, 2 * c + 1, 2 * C)
    t_re, t_im = two(total_in, c, C)
    if s == 0:
        # Γ̄ = G·Rᵀ, of which the one off-diagonal number of Γ collects both entries.
        tl.store(weight_grad + 3 * c, g_rr * r_rr + g_ri * r_ri, mask=c < C)
        tl.store(weight_grad + 3 * c + 1, g_ir * r_ri + g_ii * r_ii, mask=c < C)
        both = g_rr * r_ri + g_ri * r_ii + g_ir * r_rr + g_ii * r_ri
        tl.store(weight_grad + 3 * c + 2, both, mask=c < C)
        tl.store(bias_grad + 2 * c, t_re, mask=c < C)
        tl.store(bias_grad + 2 * c + 1, t_im, mask=c < C)
    k_re, k_im, d_re, d_im = centre(mean, c, C, DOUBLE)
    p_rr = tl.zeros(c.shape, tl.float64)
    p_ii, p_ri, c_re, c_im = p_rr, p_rr, p_rr, p_rr
    if TRAINING:
        # R̄ = sym(Γᵀ·G), W = R·R̄·R
        h_rr, h_ri, h_ir, h_ii = matmul(w_rr, w_ii, w_ri, g_rr, g_ri, g_ir, g_ii)
        u_rr, u_ii, u_ri = congruence(r_rr, r_ii, r_ri, h_rr, h_ii, 0.5 * (h_ri + h_ir))
        v_rr, v_ii, v_ri = congruence(r_rr, r_ii, r_ri, u_rr, u_ii, u_ri)
        p_rr = 2 / M * adjoint(u_rr, v_rr, root, t)
        p_ii = 2 / M * adjoint(u_ii, v_ii, root, t)
        p_ri = 2 / M * adjoint(u_ri, v_ri, root, t)
        c_re = -(a_rr * t_re + a_ir * t_im) / M - (p_rr * d_re + p_ri * d_im)
        c_im = -(a_ri * t_re + a_ii * t_im) / M - (p_ri * d_re + p_ii * d_im)
    map_channels(
        x_re, x_im, g_re, g_im, y_re, y_im, k_re, k_im, p_rr, p_ri, p_ri, p_ii,
        a_rr, a_ir, a_ri, a_ii, c_re, c_im, start, end, p, A, B, LB, sP, sA, yP, yA,
        any_wide(covar, eps, c, C), TRAINING, True, ROWS, BA, BB, DOUBLE,
    )  # fmt: skip


@triton.jit
def move(running, batch, scale, factor, i, N):
    if running is not None:
        new = scale * tl.load(batch + i, mask=i < N, other=0)
        old = tl.load(running + i, mask=i < N, other=0).to(tl.float64)
        tl.store(running + i, moved(old, new, factor), mask=i < N)


@triton.jit(do_not_specialize=["C"])
def move_running_kernel(
    mean, covar, running_mean, running_covar, batches, factor: "fp64", unbiased: "fp64", C,
    BC: tl.constexpr,
):  # fmt: skip
    """The running statistics, moved towards those of this batch, which is counted."""
    i = tl.program_id(0) * BC + tl.arange(0, BC)
    move(running_mean, mean, 1.0, factor, i, 2 * C)
    move(running_covar, covar, unbiased, factor, i, 3 * C)
    if batches is not None:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


# --- the engine ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a sweep that depends only on shapes and strides; made once and kept."""

    programs: int
    merges: int  # programs that merge
    partial: tuple[int, int, int]  # shape: slices, six, channels
    sizes: tuple[int, ...]  # C, P, A, B, LB, per, tiles
    strides: tuple[int, int]  # of input and output gradient: sP, sA
    fresh: tuple[int, int]  # of the result
    tile: dict[str, int]
    merge: dict[str, int]
    double: dict[str, bool]
    like: dict[tuple[int, bool], Tensor]
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
    step, real = (2, dtype.to_real()) if dtype.is_complex else (1, dtype)
    return Plan(
        programs=beside * slices,
        merges=ceil_divide(channels, MERGED_CHANNELS),
        partial=(slices, 6, channels),
        sizes=(channels, beside, a, b, along_b, per, tiles),
        strides=pitches(both[0], step),
        fresh=pitches(both[1], step),
        tile=dict(ROWS=rows, BA=block_a, BB=block_b),
        merge=dict(BS=min(MERGED, triton.next_power_of_2(slices)), BC=MERGED_CHANNELS),
        double=dict(DOUBLE=real is torch.float64),
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
        first, self.like, self.eps = parts[0], None, eps
        found = plan(first.shape, first.stride(), first.dtype, first.device)
        if found is None:
            first, reordered = walkable(first)
            self.like = parts if reordered else None
            found = plan(first.shape, first.stride(), first.dtype, first.device)
        self.plan, self.device = found, first.device
        self.parts = (first,) if len(parts) == 1 else (first, in_step(parts[1], first))

    def _launch(self, kernel, programs, tensors, numbers, constants) -> None:
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                launch(self.plan.ready, kernel, programs, tensors, numbers, constants)
        else:
            launch(self.plan.ready, kernel, programs, tensors, numbers, constants)

    def _sweep(self, kernel, tensors, numbers, constants) -> None:
        found = self.plan
        constants = {**found.tile, **constants}
        self._launch(kernel, found.programs, tensors, (*numbers, *found.strides), constants)

    def _merge(self, kernel, tensors, constants) -> None:
        found = self.plan
        slices, _, channels = found.partial
        constants = {**found.merge, **constants}
        self._launch(kernel, found.merges, tensors, (channels, slices), constants)

    def _new(self, columns: int, single: bool = False) -> Tensor:
        return torch.empty_like(self.plan.like[columns, single])

    def _partial(self) -> Tensor:
        return self.plan.like[2, False].new_empty(self.plan.partial)

    def moments(self) -> tuple[Tensor, Tensor]:
        partial, mean, covar = self._partial(), self._new(2), self._new(3)
        self._sweep(moments_kernel, (*pair(self.parts), partial), self.plan.sizes, {})
        self._merge(merge_moments_kernel, (partial, mean, covar), {})
        return mean, covar

    def apply(self, mean, covar, weight, bias) -> tuple[Tensor, ...]:
        found, out = self.plan, outputs_like(self.parts)
        state = small(mean), small(covar), small(weight), small(bias)
        numbers = self.eps, *found.fresh, *found.sizes
        self._sweep(apply_kernel, (*pair(self.parts), *pair(out), *state), numbers, found.double)
        return put_back(out, self.like)

    def finish(self, running: Running | None, mean: Tensor, covar: Tensor) -> None:
        if running is None:
            return
        *given, factor, unbiased = running
        there = [t for t in given if t is not None]
        simple = all([can_be_written(t) and t.dtype.itemsize >= 4 for t in there])
        if isinstance(factor, Tensor) or not simple:
            super().finish(running, mean, covar)
            return
        c = self.plan.partial[2]
        programs, numbers = ceil_divide(3 * c, BLOCK), (factor, unbiased, c)
        self._launch(
            move_running_kernel, programs, (mean, covar, *given), numbers, dict(BC=BLOCK)
        )
        increment_version(there)  # or autograd would not see that they have changed

    def take_gradient(self, grads: tuple[Tensor, ...], mean: Tensor, covar: Tensor) -> None:
        self.grads = tuple([in_step(grad, self.parts[0]) for grad in grads])
        self.mean, self.covar = small(mean), small(covar)

    def gram(self) -> tuple[Tensor, Tensor]:
        found, partial = self.plan, self._partial()
        total, product = self._new(2), self._new(4)
        tensors = *pair(self.parts), *pair(self.grads), self.mean, self.covar, partial
        self._sweep(gram_kernel, tensors, (self.eps, *found.sizes), found.double)
        self._merge(merge_gram_kernel, (partial, self.mean, total, product), found.double)
        return total, product.view(-1, 2, 2)

    def apply_backward(self, weight, total, product, count, need_input):
        if not need_input:
            return (), *reference.parameter_gradients(self.covar, self.eps, total, product)
        found, out = self.plan, outputs_like(self.parts)
        single = weight is not None and weight.dtype is torch.float32
        gradients = self._new(3, single), self._new(2, single)
        data = *pair(self.parts), *pair(self.grads), *pair(out)
        state = self.mean, self.covar, small(weight), small(total), small(product), *gradients
        numbers = self.eps, float(count or 1), *found.fresh, *found.sizes
        constants = {**found.double, "TRAINING": count is not None}
        self._sweep(apply_backward_kernel, (*data, *state), numbers, constants)
        return put_back(out, self.like), *gradients


def launch(
    ready: dict[tuple, Any],
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, int],
) -> None:
    """Run so many programs of a kernel.

    Triton looks at each argument anew at every launch, which takes longer than the arithmetic of a
    small layer. What it has compiled is therefore kept in ``ready``, for tensors that begin where
    16 bytes can be loaded at a time, and started with their addresses.
    """
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    key = kernel, *constants.values(), *[None if t is None else t.dtype for t in tensors]
    compiled = ready.get(key)
    aligned = not any([address & 15 for address in addresses if address])
    if compiled is not None and aligned:
        compiled[programs, 1, 1](*addresses, *numbers, *constants.values())
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
