"""What is done to every value, and to the running statistics.

The few numbers per channel that a map needs are computed in float64 by every program that applies
it, which is cheaper than one more launch.
"""

import triton
import triton.language as tl

from cbn_lab import running_stats, whitening
from cbn_lab.kernels.cuda.parts import (
    centre,
    corner,
    load_symmetric,
    load_vector,
    read,
    share,
    shared,
    write,
)
from cbn_lab.kernels.cuda.sums import any_wide, merged_gram, merged_moments, store_moments

roots = shared(whitening.roots)
inverse_root = shared(whitening.inverse_root)
congruence = shared(whitening.congruence)
matmul = shared(whitening.matmul)
adjoint = shared(whitening.adjoint)
moved = shared(running_stats.moved)


@triton.jit
def square_root(x):
    return tl.sqrt(x)


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


@triton.jit(do_not_specialize=["S", "C", "P", "A", "LB", "per", "tiles"])
def apply_kernel(
    x_re, x_im, y_re, y_im, mean, covar, weight, bias, partial, eps: "fp64", S, yP, yA,
    C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """y = A·(x − μ) + β with A = Γ·R; what the centre leaves of μ joins the constant.

    Mean and covariance are given, or what they are made of, and then the first slice stores them.
    """
    # The last slice first: the cache still has it.
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, True)
    if partial is None:
        m_re, m_im = load_vector(mean, c, C)
        rr, ii, ri = load_symmetric(covar, c, C)
    else:
        m_re, m_im, rr, ii, ri = merged_moments(partial, c, C, S, BS)
        if s == 0:
            store_moments(mean, covar, m_re, m_im, rr, ii, ri, c, C)
    root, t = roots(rr, ii, ri, eps, square_root)
    r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, eps, root, t)
    w_rr, w_ii, w_ri = load_symmetric(weight, c, C)
    a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
    k_re, k_im, d_re, d_im = centre(m_re, m_im, DOUBLE)
    b_re, b_im = load_vector(bias, c, C)
    b_re, b_im = b_re - (a_rr * d_re + a_ri * d_im), b_im - (a_ir * d_re + a_ii * d_im)
    map_channels(
        x_re, x_im, None, None, y_re, y_im, k_re, k_im, a_rr, a_ri, a_ir, a_ii,
        a_rr, a_ri, a_ir, a_ii, b_re, b_im, start, end, p, A, B, LB, sP, sA, yP, yA,
        any_wide(rr, ii, ri, eps), True, False, ROWS, BA, BB, DOUBLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S", "C", "P", "A", "LB", "per", "tiles"])
def apply_backward_kernel(
    x_re, x_im, g_re, g_im, y_re, y_im, mean, covar, weight, total_in, product, partial,
    weight_grad, bias_grad, eps: "fp64", M: "fp64", S, yP, yA, C, P, A, B, LB, per, tiles, sP, sA,
    ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, DOUBLE: tl.constexpr,
    BS: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """x̄ = Aᵀ·(g − Σg/M) + P·(x − μ) with P = (2/M)·V̄; the first slice stores Γ̄ and β̄ as well.

    Σ g and G are given, or what they are made of.
    """
    p, s, c, start, end = share(P, per, tiles, ROWS, BB, True)
    rr, ii, ri = load_symmetric(covar, c, C)
    root, t = roots(rr, ii, ri, eps, square_root)
    r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, eps, root, t)
    w_rr, w_ii, w_ri = load_symmetric(weight, c, C)
    a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
    m_re, m_im = load_vector(mean, c, C)
    if partial is None:
        t_re, t_im = load_vector(total_in, c, C)
        g_rr, g_ri = load_vector(product, 2 * c, 2 * C)
        g_ir, g_ii = load_vector(product, 2 * c + 1, 2 * C)
    else:
        t_re, t_im, g_rr, g_ri, g_ir, g_ii = merged_gram(partial, m_re, m_im, c, C, S, BS, DOUBLE)
    if s == 0:
        # Γ̄ = G·Rᵀ, of which the one off-diagonal number of Γ collects both entries.
        tl.store(weight_grad + 3 * c, g_rr * r_rr + g_ri * r_ri, mask=c < C)
        tl.store(weight_grad + 3 * c + 1, g_ir * r_ri + g_ii * r_ii, mask=c < C)
        both = g_rr * r_ri + g_ri * r_ii + g_ir * r_rr + g_ii * r_ri
        tl.store(weight_grad + 3 * c + 2, both, mask=c < C)
        tl.store(bias_grad + 2 * c, t_re, mask=c < C)
        tl.store(bias_grad + 2 * c + 1, t_im, mask=c < C)
    k_re, k_im, d_re, d_im = centre(m_re, m_im, DOUBLE)
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
        any_wide(rr, ii, ri, eps), TRAINING, True, ROWS, BA, BB, DOUBLE,
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
