"""Sums over the data: each program's own, and all of them together.

A slice gives six numbers a channel, float64. Few slices are added up by who needs the sum, which
spares a launch; many by a kernel of their own.
"""

import triton
import triton.language as tl

from cbn_lab import whitening
from cbn_lab.kernels.cuda.parts import (
    centre,
    corner,
    inside,
    load_symmetric,
    load_vector,
    read,
    share,
    shared,
    total,
)

TILES = tl.constexpr(64)  # that float32 sums run over before they go to float64
is_wide = shared(whitening.is_wide)


@triton.jit
def any_wide(rr, ii, ri, eps):
    """Whether one of this program's channels needs float64."""
    return tl.max(is_wide(rr, ii, ri, eps).to(tl.int32), 0) != 0


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
    count = tl.maximum(total(inside(a0, b0, A, B, BA, BB, 1), ROWS), 1)
    k_re, k_im = total(k_re, ROWS) / count, total(k_im, ROWS) / count
    k_re, k_im = tl.where(k_re - k_re == 0, k_re, 0), tl.where(k_im - k_im == 0, k_im, 0)
    for t in range(start, end):
        a0, b0 = corner(t, p, LB, ROWS, BA, BB)
        u, v = read(x_re, x_im, a0, b0, A, B, sA, BA, BB)
        there = inside(a0, b0, A, B, BA, BB, 1)
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
def load_slices(partial, s, c, C, S):
    """Six numbers of slices s and channels c, 0 where there is none."""
    at = partial + s[:, None] * 6 * C + c[None, :]
    mask = (s < S)[:, None] & (c < C)[None, :]
    n, r = tl.load(at, mask=mask, other=0), tl.load(at + C, mask=mask, other=0)
    i, rr = tl.load(at + 2 * C, mask=mask, other=0), tl.load(at + 3 * C, mask=mask, other=0)
    ii, ri = tl.load(at + 4 * C, mask=mask, other=0), tl.load(at + 5 * C, mask=mask, other=0)
    return n, r, i, rr, ii, ri


@triton.jit
def merged_moments(partial, c, C, S, BS: tl.constexpr):
    """Mean and biased covariance of all slices (Chan, Golub and LeVeque 1979)."""
    zero = tl.zeros([BS, c.shape[0]], tl.float64)
    count, m_re, m_im = zero, zero, zero
    for s in range(0, S, BS):
        n, r, i, _, _, _ = load_slices(partial, s + tl.arange(0, BS), c, C, S)
        count += n
        m_re += n * r
        m_im += n * i
    count = tl.maximum(tl.sum(count, 0), 1)
    m_re, m_im = tl.sum(m_re, 0) / count, tl.sum(m_im, 0) / count
    v_rr, v_ii, v_ri = zero, zero, zero
    for s in range(0, S, BS):
        n, r, i, rr, ii, ri = load_slices(partial, s + tl.arange(0, BS), c, C, S)
        r, i = tl.where(n > 0, r - m_re[None, :], 0), tl.where(n > 0, i - m_im[None, :], 0)
        v_rr += rr + n * r * r
        v_ii += ii + n * i * i
        v_ri += ri + n * r * i
    v_rr, v_ii, v_ri = tl.sum(v_rr, 0) / count, tl.sum(v_ii, 0) / count, tl.sum(v_ri, 0) / count
    # Not maximum(): a NaN stays one.
    return m_re, m_im, tl.where(v_rr < 0, 0, v_rr), tl.where(v_ii < 0, 0, v_ii), v_ri


@triton.jit
def store_moments(mean, covar, m_re, m_im, rr, ii, ri, c, C):
    tl.store(mean + 2 * c, m_re, mask=c < C)
    tl.store(mean + 2 * c + 1, m_im, mask=c < C)
    tl.store(covar + 3 * c, rr, mask=c < C)
    tl.store(covar + 3 * c + 1, ii, mask=c < C)
    tl.store(covar + 3 * c + 2, ri, mask=c < C)


@triton.jit(do_not_specialize=["C", "S"])
def merge_moments_kernel(partial, mean, covar, C, S, BS: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_re, m_im, rr, ii, ri = merged_moments(partial, c, C, S, BS)
    store_moments(mean, covar, m_re, m_im, rr, ii, ri, c, C)


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
    m_re, m_im = load_vector(mean, c, C)
    k_re, k_im, _, _ = centre(m_re, m_im, DOUBLE)
    x_re += p.to(tl.int64) * sP
    g_re += p.to(tl.int64) * sP
    if x_im is not None:
        x_im += p.to(tl.int64) * sP
        g_im += p.to(tl.int64) * sP
    rr, ii, ri = load_symmetric(covar, c, C)
    if DOUBLE or any_wide(rr, ii, ri, eps):
        r, i, g_rr, g_ri, g_ir, g_ii = gram_sums(
            x_re, x_im, g_re, g_im, k_re, k_im, start, end, p, A, B, LB, sA,
            ROWS, BA, BB, tl.float64,
        )  # fmt: skip
    else:
        r, i, g_rr, g_ri, g_ir, g_ii = gram_sums(
            x_re, x_im, g_re, g_im, k_re, k_im, start, end, p, A, B, LB, sA,
            ROWS, BA, BB, tl.float32,
        )  # fmt: skip
    out, mine = partial + s * 6 * C + c, c < C
    tl.store(out, r, mask=mine)
    tl.store(out + C, i, mask=mine)
    tl.store(out + 2 * C, g_rr, mask=mine)
    tl.store(out + 3 * C, g_ri, mask=mine)
    tl.store(out + 4 * C, g_ir, mask=mine)
    tl.store(out + 5 * C, g_ii, mask=mine)


@triton.jit
def merged_gram(partial, m_re, m_im, c, C, S, BS: tl.constexpr, DOUBLE: tl.constexpr):
    """Σ g and G = Σ g·(x − μ)ᵀ of all slices, whose sums are about the centre."""
    zero = tl.zeros([BS, c.shape[0]], tl.float64)
    r, i, rr, ri, ir, ii = zero, zero, zero, zero, zero, zero
    for s in range(0, S, BS):
        n_r, n_i, n_rr, n_ri, n_ir, n_ii = load_slices(partial, s + tl.arange(0, BS), c, C, S)
        r += n_r
        i += n_i
        rr += n_rr
        ri += n_ri
        ir += n_ir
        ii += n_ii
    _, _, d_re, d_im = centre(m_re, m_im, DOUBLE)
    t_re, t_im = tl.sum(r, 0), tl.sum(i, 0)
    g_rr, g_ri = tl.sum(rr, 0) - t_re * d_re, tl.sum(ri, 0) - t_re * d_im
    return t_re, t_im, g_rr, g_ri, tl.sum(ir, 0) - t_im * d_re, tl.sum(ii, 0) - t_im * d_im


@triton.jit(do_not_specialize=["C", "S"])
def merge_gram_kernel(
    partial, mean, total_out, product, C, S, BS: tl.constexpr, BC: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_re, m_im = load_vector(mean, c, C)
    t_re, t_im, g_rr, g_ri, g_ir, g_ii = merged_gram(partial, m_re, m_im, c, C, S, BS, DOUBLE)
    tl.store(total_out + 2 * c, t_re, mask=c < C)
    tl.store(total_out + 2 * c + 1, t_im, mask=c < C)
    tl.store(product + 4 * c, g_rr, mask=c < C)
    tl.store(product + 4 * c + 1, g_ri, mask=c < C)
    tl.store(product + 4 * c + 2, g_ir, mask=c < C)
    tl.store(product + 4 * c + 3, g_ii, mask=c < C)
