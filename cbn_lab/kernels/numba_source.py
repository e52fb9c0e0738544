"""The loops of the CPU engine, in numba. Imported only when they must be compiled.

Every loop takes a :class:`cbn_lab.kernels.job.Job`. Data come in one of two layouts:

* planes: (N, C, L) with a channel's L values side by side, as in contiguous NCHW;
* rows: (L, C) with the channels side by side, as in channels_last or (N, C).

Real and imaginary parts lie ``step`` numbers apart: interleaved (2), or in two tensors (1).
Single precision is summed in float32 over short stretches and in float64 from there on. A channel
that float32 cannot serve is "wide": done again in float64, see :func:`finish_moments`.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cbn_lab import whitening
from cbn_lab.kernels.job import INTEGERS, NUMBERS

# No nnan and no ninf: NaN and infinity in the input must show in the output.
FAST = {"reassoc", "contract", "nsz", "arcp"}
STRETCH = 1024  # values summed in the working precision before they go to float64
TILE = 256  # channels whose sums stay in the first-level cache
ROWS = 64  # rows summed in the working precision

plain = njit(forceinline=True, error_model="numpy")
fast = njit(forceinline=True, error_model="numpy", fastmath=FAST)
roots = plain(whitening.roots)
inverse_root = plain(whitening.inverse_root)
congruence = plain(whitening.congruence)

JOB = types.Record.make_c_struct(
    [(name, types.int64) for name in INTEGERS] + [(name, types.float64) for name in NUMBERS]
)
SIGNATURE = types.void(types.CPointer(JOB))


@intrinsic
def pointer(typing, address, dtype):
    """The address as a pointer to numbers of ``dtype``."""
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address, dtype), generate


@intrinsic
def next_task(typing, job):
    """Take the next number from the counter at the head of the job, atomically."""

    def generate(context, builder, signature, args):
        integer = ir.IntType(64)
        counter = builder.bitcast(args[0], integer.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(integer, 1), "seq_cst")

    return types.int64(job), generate


@intrinsic
def tile_on_stack(typing, dtype):
    """Room for ``TILE`` numbers that needs no allocation."""
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        number = context.get_value_type(dtype.dtype)
        room = cgutils.alloca_once(builder, ir.ArrayType(number, TILE))
        return builder.bitcast(room, number.as_pointer())

    return kind(dtype), generate


@plain
def doubles(address, count):
    return carray(pointer(address, numba.float64), (count,))


@plain
def ceil_divide(a, b):
    return (a + b - 1) // b


@plain
def tasks(job):
    """How many tasks the job has: blocks of samples, of length and of channels."""
    return (
        ceil_divide(job.samples, job.sample_block)
        * ceil_divide(job.length, job.length_block)
        * ceil_divide(job.channels, job.channel_block)
    )


@plain
def bounds(job, task):
    """Where a task begins and ends; neighbours in memory follow each other."""
    by_channel = ceil_divide(job.channels, job.channel_block)
    by_length = ceil_divide(job.length, job.length_block)
    c = task % by_channel * job.channel_block
    part = task // by_channel
    start = part % by_length * job.length_block
    n = part // by_length * job.sample_block
    return (
        part,
        n,
        min(n + job.sample_block, job.samples),
        c,
        min(c + job.channel_block, job.channels),
        start,
        min(start + job.length_block, job.length),
    )


# --- the small algebra, per channel and in float64 ---------------------------------------------


@plain
def is_wide(rr, ii, ri, eps):
    """Whether float32 would lose more than two digits to cancellation: correlation above 0.995."""
    product = (rr + eps) * (ii + eps)
    return product - ri * ri < 0.01 * product


def finish_moments(pointer_to_job):
    """Mean and covariance from the sums; marks the channels whose sums float32 could not hold.

    These are the ones whose parts are nearly proportional, so that the determinant cancels, and the
    ones whose mean lies far from the point about which the sums were taken.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all, count = job.channels, job.count
    parts = ceil_divide(job.samples, job.sample_block) * ceil_divide(job.length, job.length_block)
    partial = doubles(job.partial, parts * c_all * 6)
    shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    for c in range(c_all):
        if job.only_wide and wide[c] == 0.0:
            continue
        m_re = m_im = rr = ii = ri = 0.0
        for p in range(parts):
            at = 6 * (p * c_all + c)
            m_re += partial[at]
            m_im += partial[at + 1]
            rr += partial[at + 2]
            ii += partial[at + 3]
            ri += partial[at + 4]
        m_re, m_im = m_re / count, m_im / count
        rr, ii = rr / count - m_re * m_re, ii / count - m_im * m_im
        ri = ri / count - m_re * m_im
        rr, ii = 0.0 if rr < 0 else rr, 0.0 if ii < 0 else ii
        mean[2 * c], mean[2 * c + 1] = shift[c] + m_re, shift[c_all + c] + m_im
        covar[3 * c], covar[3 * c + 1], covar[3 * c + 2] = rr, ii, ri
        if not job.only_wide:
            far = m_re * m_re > 16 * rr or m_im * m_im > 16 * ii
            wide[c] = 1.0 if far or is_wide(rr, ii, ri, job.eps) else 0.0
            if wide[c] != 0.0:
                shift[c], shift[c_all + c] = mean[2 * c], mean[2 * c + 1]
                job.wide_found += 1


def map_forward(pointer_to_job):
    """y = A·(x − centre) + b with A = Γ·R; what the centre leaves of the mean is in b.

    The map's columns: A rr, ri, ir, ii; b re, im; centre re, im.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all = job.channels
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    weight, bias = doubles(job.weight, 3 * c_all), doubles(job.bias, 2 * c_all)
    table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
    for c in range(c_all):
        rr, ii, ri = covar[3 * c], covar[3 * c + 1], covar[3 * c + 2]
        s, t = roots(rr, ii, ri, job.eps, math.sqrt)
        r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, job.eps, s, t)
        w_rr = w_ii = 1.0
        w_ri = b_re = b_im = 0.0
        if job.weight != 0:
            w_rr, w_ii, w_ri = weight[3 * c], weight[3 * c + 1], weight[3 * c + 2]
        if job.bias != 0:
            b_re, b_im = bias[2 * c], bias[2 * c + 1]
        wide[c] = 1.0 if is_wide(rr, ii, ri, job.eps) else 0.0
        k_re, k_im = mean[2 * c], mean[2 * c + 1]
        if wide[c] == 0.0:
            k_re, k_im = float(np.float32(k_re)), float(np.float32(k_im))
        a_rr, a_ri = w_rr * r_rr + w_ri * r_ri, w_rr * r_ri + w_ri * r_ii
        a_ir, a_ii = w_ri * r_rr + w_ii * r_ri, w_ri * r_ri + w_ii * r_ii
        d_re, d_im = mean[2 * c] - k_re, mean[2 * c + 1] - k_im
        table[c], table[c_all + c] = a_rr, a_ri
        table[2 * c_all + c], table[3 * c_all + c] = a_ir, a_ii
        table[4 * c_all + c] = b_re - (a_rr * d_re + a_ri * d_im)
        table[5 * c_all + c] = b_im - (a_ir * d_re + a_ii * d_im)
        table[6 * c_all + c], table[7 * c_all + c] = k_re, k_im


def finish_gram(pointer_to_job):
    """Σ g and G = Σ g·(x − μ)ᵀ from the sums about the shift."""
    job = carray(pointer_to_job, (1,))[0]
    c_all = job.channels
    parts = ceil_divide(job.samples, job.sample_block) * ceil_divide(job.length, job.length_block)
    partial, shift = doubles(job.partial, parts * c_all * 6), doubles(job.shift, 2 * c_all)
    mean = doubles(job.mean, 2 * c_all)
    total, product = doubles(job.total, 2 * c_all), doubles(job.product, 4 * c_all)
    for c in range(c_all):
        t_re = t_im = rr = ri = ir = ii = 0.0
        for p in range(parts):
            at = 6 * (p * c_all + c)
            t_re += partial[at]
            t_im += partial[at + 1]
            rr += partial[at + 2]
            ri += partial[at + 3]
            ir += partial[at + 4]
            ii += partial[at + 5]
        d_re, d_im = mean[2 * c] - shift[c], mean[2 * c + 1] - shift[c_all + c]
        total[2 * c], total[2 * c + 1] = t_re, t_im
        product[4 * c], product[4 * c + 1] = rr - t_re * d_re, ri - t_re * d_im
        product[4 * c + 2], product[4 * c + 3] = ir - t_im * d_re, ii - t_im * d_im


def shift_to_mean(pointer_to_job):
    """For the backward: sums are taken about the mean, as near as the working precision has it."""
    job = carray(pointer_to_job, (1,))[0]
    c_all = job.channels
    mean, covar = doubles(job.mean, 2 * c_all), doubles(job.covar, 3 * c_all)
    shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
    for c in range(c_all):
        wide[c] = 1.0 if is_wide(covar[3 * c], covar[3 * c + 1], covar[3 * c + 2], job.eps) else 0.0
        for k in range(2):
            at = mean[2 * c + k]
            shift[k * c_all + c] = float(np.float32(at)) if wide[c] == 0.0 else at


def map_backward(pointer_to_job):
    """x̄ = Aᵀ·g + P·(x − shift) + c with P = (2/M)·V̄, and Γ̄.

    The map's columns: Aᵀ rr, ri, ir, ii; c re, im; shift re, im; P rr, ii, ri.
    """
    job = carray(pointer_to_job, (1,))[0]
    c_all, m = job.channels, job.count
    covar, weight = doubles(job.covar, 3 * c_all), doubles(job.weight, 3 * c_all)
    total, product = doubles(job.total, 2 * c_all), doubles(job.product, 4 * c_all)
    mean, shift = doubles(job.mean, 2 * c_all), doubles(job.shift, 2 * c_all)
    table, weight_grad = doubles(job.map, 12 * c_all), doubles(job.weight_grad, 3 * c_all)
    for c in range(c_all):
        rr, ii, ri = covar[3 * c], covar[3 * c + 1], covar[3 * c + 2]
        s, t = roots(rr, ii, ri, job.eps, math.sqrt)
        r_rr, r_ii, r_ri = inverse_root(rr, ii, ri, job.eps, s, t)
        w_rr = w_ii = 1.0
        w_ri = 0.0
        if job.weight != 0:
            w_rr, w_ii, w_ri = weight[3 * c], weight[3 * c + 1], weight[3 * c + 2]
        g_rr, g_ri = product[4 * c], product[4 * c + 1]
        g_ir, g_ii = product[4 * c + 2], product[4 * c + 3]
        weight_grad[3 * c] = g_rr * r_rr + g_ri * r_ri
        weight_grad[3 * c + 1] = g_ir * r_ri + g_ii * r_ii
        weight_grad[3 * c + 2] = g_rr * r_ri + g_ri * r_ii + g_ir * r_rr + g_ii * r_ri
        a_rr, a_ri = w_rr * r_rr + w_ri * r_ri, w_rr * r_ri + w_ri * r_ii
        a_ir, a_ii = w_ri * r_rr + w_ii * r_ri, w_ri * r_ri + w_ii * r_ii
        p_rr = p_ii = p_ri = c_re = c_im = 0.0
        if job.training != 0:
            # R̄ = sym(Γᵀ·G), W = R·R̄·R, V̄ = −(W + s·R·W·R)/(2t): whitening_matrix_adjoint
            b_rr, b_ii = w_rr * g_rr + w_ri * g_ir, w_ri * g_ri + w_ii * g_ii
            b_ri = 0.5 * (w_rr * g_ri + w_ri * g_ii + w_ri * g_rr + w_ii * g_ir)
            u_rr, u_ii, u_ri = congruence(r_rr, r_ii, r_ri, b_rr, b_ii, b_ri)
            v_rr, v_ii, v_ri = congruence(r_rr, r_ii, r_ri, u_rr, u_ii, u_ri)
            p_rr, p_ii = -(u_rr + s * v_rr) / (t * m), -(u_ii + s * v_ii) / (t * m)
            p_ri = -(u_ri + s * v_ri) / (t * m)
            d_re, d_im = mean[2 * c] - shift[c], mean[2 * c + 1] - shift[c_all + c]
            t_re, t_im = total[2 * c] / m, total[2 * c + 1] / m
            c_re = -(a_rr * t_re + a_ir * t_im) - (p_rr * d_re + p_ri * d_im)
            c_im = -(a_ri * t_re + a_ii * t_im) - (p_ri * d_re + p_ii * d_im)
        table[c], table[c_all + c] = a_rr, a_ir
        table[2 * c_all + c], table[3 * c_all + c] = a_ri, a_ii
        table[4 * c_all + c], table[5 * c_all + c] = c_re, c_im
        table[6 * c_all + c], table[7 * c_all + c] = shift[c], shift[c_all + c]
        table[8 * c_all + c], table[9 * c_all + c] = p_rr, p_ii
        table[10 * c_all + c] = p_ri


SMALL = (finish_moments, map_forward, finish_gram, shift_to_mean, map_backward)


# --- the sweeps over the data --------------------------------------------------------------------


def make_parts(dtype, step):
    """Real and imaginary part of n values that begin ``offset`` numbers into a tensor."""
    size = dtype(0).itemsize

    @plain
    def parts(re, im, offset, n):
        x = carray(pointer(re + size * offset, dtype), (step * n,))
        if step == 2:
            return x, x[1:]
        return x, carray(pointer(im + size * offset, dtype), (n,))

    return parts


def stretches(work, step):
    """The arithmetic on one stretch of one channel, in precision ``work``."""

    @fast
    def sums(re, im, n, k_re, k_im):
        a0 = a1 = a2 = a3 = a4 = 0.0
        for start in range(0, n, STRETCH):
            b0 = b1 = b2 = b3 = b4 = work(0)
            x, y = re[step * start :], im[step * start :]
            for i in range(min(n - start, STRETCH)):
                u, v = work(x[step * i]) - k_re, work(y[step * i]) - k_im
                b0 += u
                b1 += v
                b2 += u * u
                b3 += v * v
                b4 += u * v
            a0, a1, a2, a3, a4 = a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4
        return a0, a1, a2, a3, a4

    @fast
    def products(re, im, g_re, g_im, n, k_re, k_im):
        a0 = a1 = a2 = a3 = a4 = a5 = 0.0
        for start in range(0, n, STRETCH):
            b0 = b1 = b2 = b3 = b4 = b5 = work(0)
            x, y, p, q = (
                re[step * start :],
                im[step * start :],
                g_re[step * start :],
                g_im[step * start :],
            )
            for i in range(min(n - start, STRETCH)):
                u, v = work(x[step * i]) - k_re, work(y[step * i]) - k_im
                g, h = work(p[step * i]), work(q[step * i])
                b0 += g
                b1 += h
                b2 += g * u
                b3 += g * v
                b4 += h * u
                b5 += h * v
            a0, a1, a2, a3, a4, a5 = a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5
        return a0, a1, a2, a3, a4, a5

    @fast
    def affine(re, im, out_re, out_im, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im):
        for i in range(n):
            u, v = work(re[step * i]) - k_re, work(im[step * i]) - k_im
            out_re[step * i] = rr * u + ri * v + b_re
            out_im[step * i] = ir * u + ii * v + b_im

    @fast
    def affine_of_both(
        re, im, g_re, g_im, out_re, out_im, n,
        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
    ):  # fmt: skip
        for i in range(n):
            u, v = work(re[step * i]) - k_re, work(im[step * i]) - k_im
            g, h = work(g_re[step * i]), work(g_im[step * i])
            out_re[step * i] = rr * g + ri * h + p_rr * u + p_ri * v + b_re
            out_im[step * i] = ir * g + ii * h + p_ri * u + p_ii * v + b_im

    return sums, products, affine, affine_of_both


def planes(dtype, step):
    """The sweeps where a channel's values lie side by side."""
    sums, products, affine, affine_of_both = stretches(dtype, step)
    sums64, products64, affine64, affine_of_both64 = stretches(np.float64, step)

    parts = make_parts(dtype, step)

    def guess(pointer_to_job):
        """A point near each channel's mean, exact in float32: the mean of its first few values."""
        job = carray(pointer_to_job, (1,))[0]
        shift, few = doubles(job.shift, 2 * job.channels), min(job.length, 16)
        for c in range(job.channels):
            x, y = parts(job.x_re, job.x_im, c * job.x_channel, few)
            m = sums64(x, y, few, 0.0, 0.0)
            shift[c] = float(np.float32(m[0] / few))
            shift[job.channels + c] = float(np.float32(m[1] / few))

    def moments(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        task = next_task(pointer_to_job)
        while task < last:
            part, n0, n1, c0, c1, start, end = bounds(job, task)
            partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
            partial[6 * c0 : 6 * c1] = 0.0
            for n in range(n0, n1):
                for c in range(c0, c1):
                    if job.only_wide and wide[c] == 0.0:
                        continue
                    offset = n * job.x_sample + c * job.x_channel + step * start
                    x, y = parts(job.x_re, job.x_im, offset, end - start)
                    k_re, k_im = shift[c], shift[c_all + c]
                    if job.only_wide:
                        row = sums64(x, y, end - start, k_re, k_im)
                    else:
                        row = sums(x, y, end - start, dtype(k_re), dtype(k_im))
                    at = partial[6 * c : 6 * c + 5]
                    at[0] += row[0]
                    at[1] += row[1]
                    at[2] += row[2]
                    at[3] += row[3]
                    at[4] += row[4]
            task = next_task(pointer_to_job)

    def apply(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        task = last - 1 - next_task(pointer_to_job)  # backwards: the end is still in the cache
        while task >= 0:
            part, n0, n1, c0, c1, start, end = bounds(job, task)
            length = end - start
            for n in range(n0, n1):
                for c in range(c0, c1):
                    offset = n * job.x_sample + c * job.x_channel + step * start
                    x, y = parts(job.x_re, job.x_im, offset, length)
                    offset = n * job.y_sample + c * job.y_channel + step * start
                    out, out_im = parts(job.y_re, job.y_im, offset, length)
                    m = table[c:]
                    if wide[c] != 0.0:
                        affine64(
                            x, y, out, out_im, length,
                            m[0], m[c_all], m[2 * c_all], m[3 * c_all],
                            m[4 * c_all], m[5 * c_all], m[6 * c_all], m[7 * c_all],
                        )  # fmt: skip
                    else:
                        affine(
                            x, y, out, out_im, length,
                            dtype(m[0]), dtype(m[c_all]), dtype(m[2 * c_all]), dtype(m[3 * c_all]),
                            dtype(m[4 * c_all]), dtype(m[5 * c_all]),
                            dtype(m[6 * c_all]), dtype(m[7 * c_all]),
                        )  # fmt: skip
            task = last - 1 - next_task(pointer_to_job)

    def gram(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        task = next_task(pointer_to_job)
        while task < last:
            part, n0, n1, c0, c1, start, end = bounds(job, task)
            partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
            partial[6 * c0 : 6 * c1] = 0.0
            length = end - start
            for n in range(n0, n1):
                for c in range(c0, c1):
                    offset = n * job.x_sample + c * job.x_channel + step * start
                    x, y = parts(job.x_re, job.x_im, offset, length)
                    offset = n * job.g_sample + c * job.g_channel + step * start
                    g, h = parts(job.g_re, job.g_im, offset, length)
                    k_re, k_im = shift[c], shift[c_all + c]
                    if wide[c] != 0.0:
                        row = products64(x, y, g, h, length, k_re, k_im)
                    else:
                        row = products(x, y, g, h, length, dtype(k_re), dtype(k_im))
                    at = partial[6 * c : 6 * c + 6]
                    at[0] += row[0]
                    at[1] += row[1]
                    at[2] += row[2]
                    at[3] += row[3]
                    at[4] += row[4]
                    at[5] += row[5]
            task = next_task(pointer_to_job)

    def apply_backward(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        task = last - 1 - next_task(pointer_to_job)
        while task >= 0:
            part, n0, n1, c0, c1, start, end = bounds(job, task)
            length = end - start
            for n in range(n0, n1):
                for c in range(c0, c1):
                    offset = n * job.x_sample + c * job.x_channel + step * start
                    x, y = parts(job.x_re, job.x_im, offset, length)
                    offset = n * job.g_sample + c * job.g_channel + step * start
                    g, h = parts(job.g_re, job.g_im, offset, length)
                    offset = n * job.y_sample + c * job.y_channel + step * start
                    out, out_im = parts(job.y_re, job.y_im, offset, length)
                    m = table[c:]
                    if wide[c] != 0.0:
                        affine_of_both64(
                            x, y, g, h, out, out_im, length,
                            m[0], m[c_all], m[2 * c_all], m[3 * c_all],
                            m[4 * c_all], m[5 * c_all], m[6 * c_all], m[7 * c_all],
                            m[8 * c_all], m[9 * c_all], m[10 * c_all],
                        )  # fmt: skip
                    else:
                        affine_of_both(
                            x, y, g, h, out, out_im, length,
                            dtype(m[0]), dtype(m[c_all]), dtype(m[2 * c_all]), dtype(m[3 * c_all]),
                            dtype(m[4 * c_all]), dtype(m[5 * c_all]),
                            dtype(m[6 * c_all]), dtype(m[7 * c_all]),
                            dtype(m[8 * c_all]), dtype(m[9 * c_all]), dtype(m[10 * c_all]),
                        )  # fmt: skip
            task = last - 1 - next_task(pointer_to_job)

    return guess, moments, apply, gram, apply_backward


def tiles(work, step):
    """The arithmetic on one row, channel by channel.

    Sums and maps lie on the stack, where the optimiser can tell that they overlap with nothing.
    """

    @fast
    def sums(x, y, n, k_re, k_im, b0, b1, b2, b3, b4):
        for i in range(n):
            u, v = x[step * i] - k_re[i], y[step * i] - k_im[i]
            b0[i] += u
            b1[i] += v
            b2[i] += u * u
            b3[i] += v * v
            b4[i] += u * v

    @fast
    def products(x, y, g, h, n, k_re, k_im, b0, b1, b2, b3, b4, b5):
        for i in range(n):
            u, v = x[step * i] - k_re[i], y[step * i] - k_im[i]
            p, q = g[step * i], h[step * i]
            b0[i] += p
            b1[i] += q
            b2[i] += p * u
            b3[i] += p * v
            b4[i] += q * u
            b5[i] += q * v

    @fast
    def affine(x, y, out, out_im, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im):
        for i in range(n):
            u, v = x[step * i] - k_re[i], y[step * i] - k_im[i]
            out[step * i] = rr[i] * u + ri[i] * v + b_re[i]
            out_im[step * i] = ir[i] * u + ii[i] * v + b_im[i]

    @fast
    def affine_of_both(
        x, y, g, h, out, out_im, n,
        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
    ):  # fmt: skip
        for i in range(n):
            u, v = x[step * i] - k_re[i], y[step * i] - k_im[i]
            p, q = g[step * i], h[step * i]
            out[step * i] = rr[i] * p + ri[i] * q + p_rr[i] * u + p_ri[i] * v + b_re[i]
            out_im[step * i] = ir[i] * p + ii[i] * q + p_ri[i] * u + p_ii[i] * v + b_im[i]

    return sums, products, affine, affine_of_both


def rows(dtype, step):
    """The sweeps where the channels lie side by side."""
    parts = make_parts(dtype, step)
    sums, products, affine, affine_of_both = tiles(dtype, step)

    @plain
    def tile():
        return carray(tile_on_stack(dtype), (TILE,))

    @plain
    def copy(table, row, c_all, c, n, into):
        for i in range(n):
            into[i] = dtype(table[row * c_all + c + i])

    @plain
    def flush(partial, column, c, n, tile):
        for i in range(n):
            partial[6 * (c + i) + column] += tile[i]
            tile[i] = 0

    def guess(pointer_to_job):
        """A point near each channel's mean, exact in float32: the mean of its first few values."""
        job = carray(pointer_to_job, (1,))[0]
        c_all = job.channels
        shift, few = doubles(job.shift, 2 * c_all), min(job.length, 16)
        shift[:] = 0.0
        for r in range(few):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample, c_all)
            for c in range(c_all):
                shift[c] += x[step * c] / few
                shift[c_all + c] += y[step * c] / few
        for i in range(2 * c_all):
            shift[i] = float(np.float32(shift[i]))

    @plain
    def wide_moments(job, part, c0, c1, start, end):
        c_all = job.channels
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
        for c in range(c0, c1):
            if wide[c] == 0.0:
                continue
            at = partial[6 * c : 6 * c + 6]
            at[:] = 0.0
            for r in range(start, end):
                x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, 1)
                u, v = float(x[0]) - shift[c], float(y[0]) - shift[c_all + c]
                at[0] += u
                at[1] += v
                at[2] += u * u
                at[3] += v * v
                at[4] += u * v

    @plain
    def narrow_moments(job, part, c0, c1, start, end):
        c_all = job.channels
        shift = doubles(job.shift, 2 * c_all)
        partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
        partial[6 * c0 : 6 * c1] = 0.0
        k_re, k_im, b0, b1, b2, b3, b4 = tile(), tile(), tile(), tile(), tile(), tile(), tile()
        for i in range(TILE):
            b0[i] = b1[i] = b2[i] = b3[i] = b4[i] = 0
        for top in range(start, end, ROWS):
            bottom = min(top + ROWS, end)
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                copy(shift, 0, c_all, c, n, k_re)
                copy(shift, 1, c_all, c, n, k_im)
                for r in range(top, bottom):
                    x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, n)
                    sums(x, y, n, k_re, k_im, b0, b1, b2, b3, b4)
                flush(partial, 0, c, n, b0)
                flush(partial, 1, c, n, b1)
                flush(partial, 2, c, n, b2)
                flush(partial, 3, c, n, b3)
                flush(partial, 4, c, n, b4)

    def moments(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        last, task = tasks(job), next_task(pointer_to_job)
        while task < last:
            part, _, _, c0, c1, start, end = bounds(job, task)
            if job.only_wide:
                wide_moments(job, part, c0, c1, start, end)
            else:
                narrow_moments(job, part, c0, c1, start, end)
            task = next_task(pointer_to_job)

    def apply(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        rr, ri, ir, ii = tile(), tile(), tile(), tile()
        b_re, b_im, k_re, k_im = tile(), tile(), tile(), tile()
        task = last - 1 - next_task(pointer_to_job)  # backwards: the end is still in the cache
        while task >= 0:
            _, _, _, c0, c1, start, end = bounds(job, task)
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                for k, into in enumerate((rr, ri, ir, ii, b_re, b_im, k_re, k_im)):
                    copy(table, k, c_all, c, n, into)
                for r in range(start, end):
                    x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, n)
                    out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c, n)
                    affine(x, y, out, out_im, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im)
            for c in range(c0, c1):
                if wide[c] != 0.0:
                    wide_apply(job, table[c:], c, start, end)
            task = last - 1 - next_task(pointer_to_job)

    @plain
    def wide_apply(job, m, c, start, end):
        c_all = job.channels
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, 1)
            out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c, 1)
            u, v = float(x[0]) - m[6 * c_all], float(y[0]) - m[7 * c_all]
            out[0] = m[0] * u + m[c_all] * v + m[4 * c_all]
            out_im[0] = m[2 * c_all] * u + m[3 * c_all] * v + m[5 * c_all]

    @plain
    def wide_gram(job, part, c, start, end):
        c_all = job.channels
        shift = doubles(job.shift, 2 * c_all)
        partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
        at = partial[6 * c : 6 * c + 6]
        at[:] = 0.0
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, 1)
            g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c, 1)
            u, v = float(x[0]) - shift[c], float(y[0]) - shift[c_all + c]
            at[0] += g[0]
            at[1] += h[0]
            at[2] += g[0] * u
            at[3] += g[0] * v
            at[4] += h[0] * u
            at[5] += h[0] * v

    def gram(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        k_re, k_im, b0, b1, b2 = tile(), tile(), tile(), tile(), tile()
        b3, b4, b5 = tile(), tile(), tile()
        for i in range(TILE):
            b0[i] = b1[i] = b2[i] = b3[i] = b4[i] = b5[i] = 0
        task = next_task(pointer_to_job)
        while task < last:
            part, _, _, c0, c1, start, end = bounds(job, task)
            partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
            partial[6 * c0 : 6 * c1] = 0.0
            for top in range(start, end, ROWS):
                for c in range(c0, c1, TILE):
                    n = min(TILE, c1 - c)
                    copy(shift, 0, c_all, c, n, k_re)
                    copy(shift, 1, c_all, c, n, k_im)
                    for r in range(top, min(top + ROWS, end)):
                        x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, n)
                        g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c, n)
                        products(x, y, g, h, n, k_re, k_im, b0, b1, b2, b3, b4, b5)
                    for k, tile_ in enumerate((b0, b1, b2, b3, b4, b5)):
                        flush(partial, k, c, n, tile_)
            for c in range(c0, c1):
                if wide[c] != 0.0:
                    wide_gram(job, part, c, start, end)
            task = next_task(pointer_to_job)

    def apply_backward(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        c_all, last = job.channels, tasks(job)
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        rr, ri, ir, ii = tile(), tile(), tile(), tile()
        b_re, b_im, k_re, k_im = tile(), tile(), tile(), tile()
        p_rr, p_ii, p_ri = tile(), tile(), tile()
        task = last - 1 - next_task(pointer_to_job)
        while task >= 0:
            _, _, _, c0, c1, start, end = bounds(job, task)
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                for k, into in enumerate(
                    (rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri)
                ):
                    copy(table, k, c_all, c, n, into)
                for r in range(start, end):
                    x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, n)
                    g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c, n)
                    out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c, n)
                    affine_of_both(
                        x, y, g, h, out, out_im, n,
                        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
                    )  # fmt: skip
            for c in range(c0, c1):
                if wide[c] != 0.0:
                    wide_apply_backward(job, table[c:], c, start, end)
            task = last - 1 - next_task(pointer_to_job)

    @plain
    def wide_apply_backward(job, m, c, start, end):
        k = job.channels
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c, 1)
            g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c, 1)
            out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c, 1)
            u, v = float(x[0]) - m[6 * k], float(y[0]) - m[7 * k]
            out[0] = m[0] * g[0] + m[k] * h[0] + m[8 * k] * u + m[10 * k] * v + m[4 * k]
            out_im[0] = m[2 * k] * g[0] + m[3 * k] * h[0] + m[10 * k] * u + m[9 * k] * v + m[5 * k]

    return guess, moments, apply, gram, apply_backward


SWEEPS = ("guess", "moments", "apply", "gram", "apply_backward")


def compile_loops(
    label: str, double: bool, interleaved: bool, in_rows: bool
) -> dict[str, tuple[str, bytes]]:
    """Symbol and object code of every loop for one kind of data."""
    make = rows if in_rows else planes
    sweeps = make(np.float64 if double else np.float32, 2 if interleaved else 1)
    compiled = {}
    for function in (*SMALL, *sweeps):
        loop = numba.cfunc(SIGNATURE, error_model="numpy")(function)
        code = loop._library._get_compiled_object()
        compiled[f"{label}.{function.__name__}"] = loop.native_name, code
    return compiled
