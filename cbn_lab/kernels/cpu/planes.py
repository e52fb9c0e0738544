"""The sweeps where a channel's values lie side by side, as in contiguous NCHW."""

import numpy as np

from cbn_lab.kernels.cpu import lanes
from cbn_lab.kernels.cpu.tools import access, doubles, fast, make_parts, plain

STRETCH = 1024  # values summed in the working precision before they go to float64


def stretches_apart(work, step):
    """The arithmetic on one stretch of one channel, in precision ``work``."""
    re_at, im_at, put_re, put_im = access(step)

    @fast
    def sums(re, im, n, k_re, k_im):
        a0 = a1 = a2 = a3 = a4 = 0.0
        for start in range(0, n, STRETCH):
            b0 = b1 = b2 = b3 = b4 = work(0)
            for i in range(start, min(start + STRETCH, n)):
                u, v = work(re_at(re, i)) - k_re, work(im_at(im, i)) - k_im
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
            for i in range(start, min(start + STRETCH, n)):
                u, v = work(re_at(re, i)) - k_re, work(im_at(im, i)) - k_im
                g, h = work(re_at(g_re, i)), work(im_at(g_im, i))
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
            u, v = work(re_at(re, i)) - k_re, work(im_at(im, i)) - k_im
            put_re(out_re, i, work(rr * u + ri * v + b_re))
            put_im(out_im, i, work(ir * u + ii * v + b_im))

    @fast
    def affine_of_both(
        re, im, g_re, g_im, out_re, out_im, n,
        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
    ):  # fmt: skip
        for i in range(n):
            u, v = work(re_at(re, i)) - k_re, work(im_at(im, i)) - k_im
            g, h = work(re_at(g_re, i)), work(im_at(g_im, i))
            put_re(out_re, i, work(rr * g + ri * h + p_rr * u + p_ri * v + b_re))
            put_im(out_im, i, work(ir * g + ii * h + p_ri * u + p_ii * v + b_im))

    return sums, products, affine, affine_of_both


def stretches_interleaved(work):
    """The same on complex numbers as they lie in memory, a vector at a time."""
    re_at, im_at, put_re, put_im = access(2)
    width = lanes.BYTES // work(0).itemsize
    half = width // 2

    @fast
    def sums(x, _, n, k_re, k_im):
        a0 = a1 = a2 = a3 = a4 = 0.0
        k = lanes.pairs(k_re, k_im)
        zero = lanes.pairs(work(0), work(0))
        vectors = n // width * width  # two vectors hold ``width`` complex numbers
        for start in range(0, vectors, STRETCH):
            t = s = q = r = c = d = zero
            for i in range(2 * start, 2 * min(start + STRETCH, vectors), 2 * width):
                u, v = lanes.load(x, i) - k, lanes.load(x, i + width) - k
                t, s = t + u, s + v
                q, r = q + u * u, r + v * v
                c, d = c + u * lanes.swap(u), d + v * lanes.swap(v)
            t, q, c = lanes.totals(t + s), lanes.totals(q + r), lanes.totals(c + d)
            a0, a1, a2, a3, a4 = a0 + t[0], a1 + t[1], a2 + q[0], a3 + q[1], a4 + c[0]
        for i in range(vectors, n):
            u, v = re_at(x, i) - k_re, im_at(x, i) - k_im
            a0, a1, a2, a3, a4 = a0 + u, a1 + v, a2 + u * u, a3 + v * v, a4 + u * v
        return a0, a1, a2, a3, a4

    @fast
    def products(x, _, g, __, n, k_re, k_im):
        a0 = a1 = a2 = a3 = a4 = a5 = 0.0
        k = lanes.pairs(k_re, k_im)
        zero = lanes.pairs(work(0), work(0))
        vectors = n // width * width
        for start in range(0, vectors, STRETCH):
            t = s = q = r = c = d = zero
            for i in range(2 * start, 2 * min(start + STRETCH, vectors), 2 * width):
                u, v = lanes.load(x, i) - k, lanes.load(x, i + width) - k
                p, o = lanes.load(g, i), lanes.load(g, i + width)
                t, s = t + p, s + o
                q, r = q + p * u, r + o * v
                c, d = c + p * lanes.swap(u), d + o * lanes.swap(v)
            t, q, c = lanes.totals(t + s), lanes.totals(q + r), lanes.totals(c + d)
            a0, a1, a2, a5 = a0 + t[0], a1 + t[1], a2 + q[0], a5 + q[1]
            a3, a4 = a3 + c[0], a4 + c[1]
        for i in range(vectors, n):
            u, v = re_at(x, i) - k_re, im_at(x, i) - k_im
            p, q_ = re_at(g, i), im_at(g, i)
            a0, a1, a2, a3 = a0 + p, a1 + q_, a2 + p * u, a3 + p * v
            a4, a5 = a4 + q_ * u, a5 + q_ * v
        return a0, a1, a2, a3, a4, a5

    @fast
    def affine(x, _, out, __, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im):
        k, b = lanes.pairs(k_re, k_im), lanes.pairs(b_re, b_im)
        same, other = lanes.pairs(rr, ii), lanes.pairs(ri, ir)
        vectors = n // half * half
        for i in range(0, 2 * vectors, width):
            u = lanes.load(x, i) - k
            lanes.store(out, i, same * u + (other * lanes.swap(u) + b))
        for i in range(vectors, n):
            u, v = re_at(x, i) - k_re, im_at(x, i) - k_im
            put_re(out, i, rr * u + ri * v + b_re)
            put_im(out, i, ir * u + ii * v + b_im)

    @fast
    def affine_of_both(
        x, _, g, __, out, ___, n,
        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
    ):  # fmt: skip
        k, b = lanes.pairs(k_re, k_im), lanes.pairs(b_re, b_im)
        same, other = lanes.pairs(rr, ii), lanes.pairs(ri, ir)
        p_same, p_other = lanes.pairs(p_rr, p_ii), lanes.pairs(p_ri, p_ri)
        vectors = n // half * half
        for i in range(0, 2 * vectors, width):
            u, p = lanes.load(x, i) - k, lanes.load(g, i)
            through_covar = p_same * u + (p_other * lanes.swap(u) + b)
            lanes.store(out, i, same * p + (other * lanes.swap(p) + through_covar))
        for i in range(vectors, n):
            u, v = re_at(x, i) - k_re, im_at(x, i) - k_im
            p, q = re_at(g, i), im_at(g, i)
            put_re(out, i, rr * p + ri * q + p_rr * u + p_ri * v + b_re)
            put_im(out, i, ir * p + ii * q + p_ri * u + p_ii * v + b_im)

    return sums, products, affine, affine_of_both


def blocks(dtype, step):
    """What to do with one task of each sweep."""
    narrow = stretches_interleaved(dtype) if step == 2 else stretches_apart(dtype, step)
    sums, products, affine, affine_of_both = narrow
    sums64, products64, affine64, affine_of_both64 = stretches_apart(np.float64, step)
    parts = make_parts(dtype, step)

    @plain
    def guess(job, shift):
        few = min(job.length, 16)
        for c in range(job.channels):
            x, y = parts(job.x_re, job.x_im, c * job.x_channel)
            total = sums64(x, y, few, 0.0, 0.0)
            shift[2 * c], shift[2 * c + 1] = total[0] / few, total[1] / few

    @plain
    def moments(job, part, n0, n1, c0, c1, start, end):
        c_all, length = job.channels, end - start
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
        partial[6 * c0 : 6 * c1] = 0.0
        for n in range(n0, n1):
            for c in range(c0, c1):
                if job.only_wide and wide[c] == 0.0:
                    continue
                offset = n * job.x_sample + c * job.x_channel + step * start
                x, y = parts(job.x_re, job.x_im, offset)
                k_re, k_im = shift[2 * c], shift[2 * c + 1]
                if job.only_wide:
                    row = sums64(x, y, length, k_re, k_im)
                else:
                    row = sums(x, y, length, dtype(k_re), dtype(k_im))
                for k in range(5):
                    partial[6 * c + k] += row[k]

    @plain
    def apply(job, part, n0, n1, c0, c1, start, end):
        c_all, length = job.channels, end - start
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        for n in range(n0, n1):
            for c in range(c0, c1):
                offset = n * job.x_sample + c * job.x_channel + step * start
                x, y = parts(job.x_re, job.x_im, offset)
                offset = n * job.y_sample + c * job.y_channel + step * start
                out, out_im = parts(job.y_re, job.y_im, offset)
                m = table[12 * c : 12 * c + 12]
                if wide[c] != 0.0:
                    affine64(
                        x, y, out, out_im, length,
                        m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7],
                    )  # fmt: skip
                else:
                    affine(
                        x, y, out, out_im, length,
                        dtype(m[0]), dtype(m[1]), dtype(m[2]), dtype(m[3]),
                        dtype(m[4]), dtype(m[5]), dtype(m[6]), dtype(m[7]),
                    )  # fmt: skip

    @plain
    def gram(job, part, n0, n1, c0, c1, start, end):
        c_all, length = job.channels, end - start
        shift, wide = doubles(job.shift, 2 * c_all), doubles(job.wide, c_all)
        partial = doubles(job.partial + 48 * part * c_all, 6 * c_all)
        partial[6 * c0 : 6 * c1] = 0.0
        for n in range(n0, n1):
            for c in range(c0, c1):
                offset = n * job.x_sample + c * job.x_channel + step * start
                x, y = parts(job.x_re, job.x_im, offset)
                offset = n * job.g_sample + c * job.g_channel + step * start
                g, h = parts(job.g_re, job.g_im, offset)
                k_re, k_im = shift[2 * c], shift[2 * c + 1]
                if wide[c] != 0.0:
                    row = products64(x, y, g, h, length, k_re, k_im)
                else:
                    row = products(x, y, g, h, length, dtype(k_re), dtype(k_im))
                for k in range(6):
                    partial[6 * c + k] += row[k]

    @plain
    def apply_backward(job, part, n0, n1, c0, c1, start, end):
        c_all, length = job.channels, end - start
        table, wide = doubles(job.map, 12 * c_all), doubles(job.wide, c_all)
        for n in range(n0, n1):
            for c in range(c0, c1):
                offset = n * job.x_sample + c * job.x_channel + step * start
                x, y = parts(job.x_re, job.x_im, offset)
                offset = n * job.g_sample + c * job.g_channel + step * start
                g, h = parts(job.g_re, job.g_im, offset)
                offset = n * job.y_sample + c * job.y_channel + step * start
                out, out_im = parts(job.y_re, job.y_im, offset)
                m = table[12 * c : 12 * c + 12]
                if wide[c] != 0.0:
                    affine_of_both64(
                        x, y, g, h, out, out_im, length,
                        m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[10],
                    )  # fmt: skip
                else:
                    affine_of_both(
                        x, y, g, h, out, out_im, length,
                        dtype(m[0]), dtype(m[1]), dtype(m[2]), dtype(m[3]), dtype(m[4]),
                        dtype(m[5]), dtype(m[6]), dtype(m[7]), dtype(m[8]), dtype(m[9]),
                        dtype(m[10]),
                    )  # fmt: skip

    return guess, moments, apply, gram, apply_backward
