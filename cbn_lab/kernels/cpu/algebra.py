"""What stands between two sweeps: a few numbers per channel, in float64."""

import math

import numpy as np
from numba import carray

from cbn_lab import running_stats, whitening
from cbn_lab.kernels.cpu.tools import (
    ceil_divide,
    doubles,
    number,
    plain,
    pointer,
    set_number,
    table,
)

roots = plain(whitening.roots)
inverse_root = plain(whitening.inverse_root)
congruence = plain(whitening.congruence)
matmul = plain(whitening.matmul)
adjoint = plain(whitening.adjoint)
is_wide = plain(whitening.is_wide)
moved = plain(running_stats.moved)


@plain
def rounded(value):
    """To float32, if it has the value."""
    near = float(np.float32(value))
    return near if math.isfinite(near) else value


@plain
def add_up(job):
    """The sums of all parts, in the place of the first: six rows of C numbers."""
    parts = ceil_divide(job.samples, job.sample_block) * ceil_divide(job.length, job.length_block)
    size = 6 * job.channels
    partial = table(job.partial, parts, size)
    for part in range(1, parts):
        for i in range(size):
            partial[0, i] += partial[part, i]
    return table(job.partial, 6, job.channels)


def finish_moments(pointer_to_job):
    """Mean and covariance from the sums; marks the channels whose sums float32 could not hold.

    These are the ones whose parts are nearly proportional, so that the determinant cancels, and the
    ones whose mean lies far from the point about which the sums were taken.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all, count = job.channels, job.count
    sums, shift, wide = add_up(job), table(job.shift, 2, c_all), doubles(job.wide, c_all)
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    for c in range(c_all):
        if job.only_wide and wide[c] == 0.0:
            continue
        m_re, m_im = sums[0, c] / count, sums[1, c] / count
        rr, ii = sums[2, c] / count - m_re * m_re, sums[3, c] / count - m_im * m_im
        ri = sums[4, c] / count - m_re * m_im
        rr, ii = 0.0 if rr < 0 else rr, 0.0 if ii < 0 else ii
        mean[2 * c], mean[2 * c + 1] = shift[0, c] + m_re, shift[1, c] + m_im
        covar[3 * c], covar[3 * c + 1], covar[3 * c + 2] = rr, ii, ri
        if not job.only_wide:
            far = m_re * m_re > 16 * rr or m_im * m_im > 16 * ii
            wide[c] = 1.0 if far or is_wide(rr, ii, ri, job.eps) else 0.0
            if wide[c] != 0.0:
                job.wide_found += 1
                if math.isfinite(m_re) and math.isfinite(m_im):
                    shift[0, c], shift[1, c] = mean[2 * c], mean[2 * c + 1]


@plain
def weight_of(job, c):
    """Γ of channel c as rr, ii, ri."""
    if job.weight == 0:
        return 1.0, 1.0, 0.0
    weight, single = job.weight, job.single
    return (
        number(weight, 3 * c, single),
        number(weight, 3 * c + 1, single),
        number(weight, 3 * c + 2, single),
    )


def map_forward(pointer_to_job):
    """y = A·(x − centre) + b with A = Γ·R; what the centre leaves of the mean is in b.

    The rows of the map: centre re, im; A rr, ii, ri, ir; b re, im; others unused.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all, single = job.channels, job.statistics_single
    row, wide = table(job.map, 12, c_all), doubles(job.wide, c_all)
    for c in range(c_all):
        m_re, m_im = number(job.mean, 2 * c, single), number(job.mean, 2 * c + 1, single)
        rr, ii = number(job.covar, 3 * c, single), number(job.covar, 3 * c + 1, single)
        ri = number(job.covar, 3 * c + 2, single)
        s, t = roots(rr, ii, ri, job.eps, math.sqrt)
        r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, job.eps, s, t)
        w_rr, w_ii, w_ri = weight_of(job, c)
        b_re = b_im = 0.0
        if job.bias != 0:
            b_re = number(job.bias, 2 * c, job.single)
            b_im = number(job.bias, 2 * c + 1, job.single)
        wide[c] = 1.0 if is_wide(rr, ii, ri, job.eps) else 0.0
        k_re, k_im = m_re, m_im
        if wide[c] == 0.0:
            k_re, k_im = rounded(k_re), rounded(k_im)
        a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
        d_re, d_im = m_re - k_re, m_im - k_im
        row[0, c], row[1, c] = k_re, k_im
        row[2, c], row[3, c], row[4, c], row[5, c] = a_rr, a_ii, a_ri, a_ir
        row[6, c] = b_re - (a_rr * d_re + a_ri * d_im)
        row[7, c] = b_im - (a_ir * d_re + a_ii * d_im)


def move_running(pointer_to_job):
    """The running statistics, moved towards those of this batch, which is counted."""
    job = carray(pointer_to_job, (1,))[0]
    c_all, single, factor = job.channels, job.running_single, job.factor
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    if job.running_mean != 0:
        for i in range(2 * c_all):
            old = number(job.running_mean, i, single)
            set_number(job.running_mean, i, single, moved(old, mean[i], factor))
    if job.running_covar != 0:
        for i in range(3 * c_all):
            old = number(job.running_covar, i, single)
            new = moved(old, job.unbiased * covar[i], factor)
            set_number(job.running_covar, i, single, new)
    if job.batches != 0:
        pointer(job.batches, np.int64)[0] += 1


def finish_gram(pointer_to_job):
    """Σ g and G = Σ g·(x − μ)ᵀ from the sums about the shift."""
    job = carray(pointer_to_job, (1,))[0]
    c_all = job.channels
    sums, shift, mean = add_up(job), table(job.shift, 2, c_all), doubles(job.mean, 2 * c_all)
    total, product = doubles(job.total, 2 * c_all), doubles(job.product, 4 * c_all)
    for c in range(c_all):
        t_re, t_im = sums[0, c], sums[1, c]
        rr, ii, ri, ir = sums[2, c], sums[3, c], sums[4, c], sums[5, c]
        d_re, d_im = mean[2 * c] - shift[0, c], mean[2 * c + 1] - shift[1, c]
        total[2 * c], total[2 * c + 1] = t_re, t_im
        product[4 * c], product[4 * c + 1] = rr - t_re * d_re, ri - t_re * d_im
        product[4 * c + 2], product[4 * c + 3] = ir - t_im * d_re, ii - t_im * d_im


def shift_to_mean(pointer_to_job):
    """For the backward: sums are taken about the mean, as near as the working precision has it."""
    job = carray(pointer_to_job, (1,))[0]
    c_all = job.channels
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    shift, wide = table(job.shift, 2, c_all), doubles(job.wide, c_all)
    for c in range(c_all):
        wide[c] = 1.0 if is_wide(covar[3 * c], covar[3 * c + 1], covar[3 * c + 2], job.eps) else 0.0
        for k in range(2):
            at = mean[2 * c + k]
            shift[k, c] = rounded(at) if wide[c] == 0.0 else at


def map_backward(pointer_to_job):
    """x̄ = Aᵀ·g + P·(x − shift) + c with P = (2/M)·V̄, and the gradients of Γ and β.

    The rows of the map: shift re, im; Aᵀ rr, ii, ri, ir; c re, im; P rr, ii, ri, ri.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all, m = job.channels, job.count
    covar, row = doubles(job.covar, 3 * c_all), table(job.map, 12, c_all)
    total, product = doubles(job.total, 2 * c_all), doubles(job.product, 4 * c_all)
    mean, shift = doubles(job.mean, 2 * c_all), table(job.shift, 2, c_all)
    for c in range(c_all):
        rr, ii, ri = covar[3 * c], covar[3 * c + 1], covar[3 * c + 2]
        s, t = roots(rr, ii, ri, job.eps, math.sqrt)
        r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, job.eps, s, t)
        w_rr, w_ii, w_ri = weight_of(job, c)
        g_rr, g_ri = product[4 * c], product[4 * c + 1]
        g_ir, g_ii = product[4 * c + 2], product[4 * c + 3]
        to, single = job.weight_grad, job.single
        set_number(to, 3 * c, single, g_rr * r_rr + g_ri * r_ri)
        set_number(to, 3 * c + 1, single, g_ir * r_ri + g_ii * r_ii)
        both = g_rr * r_ri + g_ri * r_ii + g_ir * r_rr + g_ii * r_ri
        set_number(to, 3 * c + 2, single, both)
        set_number(job.bias_grad, 2 * c, single, total[2 * c])
        set_number(job.bias_grad, 2 * c + 1, single, total[2 * c + 1])
        a_rr, a_ri, a_ir, a_ii = matmul(w_rr, w_ii, w_ri, r_rr, r_ri, r_ri, r_ii)
        p_rr = p_ii = p_ri = c_re = c_im = 0.0
        if job.training != 0:
            # R̄ = sym(Γᵀ·G), W = R·R̄·R
            b_rr, b_ri, b_ir, b_ii = matmul(w_rr, w_ii, w_ri, g_rr, g_ri, g_ir, g_ii)
            u_rr, u_ii, u_ri = congruence(r_rr, r_ii, r_ri, b_rr, b_ii, 0.5 * (b_ri + b_ir))
            v_rr, v_ii, v_ri = congruence(r_rr, r_ii, r_ri, u_rr, u_ii, u_ri)
            p_rr, p_ii = 2 / m * adjoint(u_rr, v_rr, s, t), 2 / m * adjoint(u_ii, v_ii, s, t)
            p_ri = 2 / m * adjoint(u_ri, v_ri, s, t)
            d_re, d_im = mean[2 * c] - shift[0, c], mean[2 * c + 1] - shift[1, c]
            t_re, t_im = total[2 * c] / m, total[2 * c + 1] / m
            c_re = -(a_rr * t_re + a_ir * t_im) - (p_rr * d_re + p_ri * d_im)
            c_im = -(a_ri * t_re + a_ii * t_im) - (p_ri * d_re + p_ii * d_im)
        row[0, c], row[1, c] = shift[0, c], shift[1, c]
        row[2, c], row[3, c], row[4, c], row[5, c] = a_rr, a_ii, a_ir, a_ri
        row[6, c], row[7, c] = c_re, c_im
        row[8, c], row[9, c], row[10, c], row[11, c] = p_rr, p_ii, p_ri, p_ri


SMALL = (finish_moments, map_forward, move_running, finish_gram, shift_to_mean, map_backward)
