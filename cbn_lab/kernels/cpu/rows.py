"""The sweeps where the channels lie side by side, as in channels_last and in (N, C).

A task is done in tiles of so many channels that their sums and maps stay in the first-level cache,
on the stack.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cbn_lab.kernels.cpu import lanes
from cbn_lab.kernels.cpu.tools import access, doubles, fast, make_parts, plain

TILE = 256  # channels
ROWS = 64  # rows summed in the working precision before they go to float64
TOGETHER = 8  # rows summed at a time


@intrinsic
def tile_on_stack(typing, dtype):
    """Room for a tile of complex numbers that needs no allocation."""
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        number = context.get_value_type(dtype.dtype)
        room = cgutils.alloca_once(builder, ir.ArrayType(number, 2 * TILE))
        return builder.bitcast(room, number.as_pointer())

    return kind(dtype), generate


def vectors(work):
    """The arithmetic on rows of ``m`` real numbers, re im re im ... of the channels.

    Sums are taken over ``count`` rows, ``pitch`` apart, so that each is loaded once for them all.
    Tiles hold their numbers in the same order; ``same`` is (rr, ii) and ``other`` (ri, ir) of each
    channel, see :mod:`lanes`.
    """
    load, store, swap = lanes.load, lanes.store, lanes.swap
    width = lanes.BYTES // work(0).itemsize

    @fast
    def sums(x, pitch, count, m, k, total, square, cross):
        end = m // width * width
        for i in range(0, end, width):
            t, s, c, centre = load(total, i), load(square, i), load(cross, i), load(k, i)
            for j in range(count):
                u = load(x, j * pitch + i) - centre
                t, s, c = t + u, s + u * u, c + u * swap(u)
            store(total, i, t), store(square, i, s), store(cross, i, c)
        for i in range(end, m, 2):
            for j in range(count):
                u, v = x[j * pitch + i] - k[i], x[j * pitch + i + 1] - k[i + 1]
                total[i] += u
                total[i + 1] += v
                square[i] += u * u
                square[i + 1] += v * v
                cross[i] += u * v

    @fast
    def products(x, x_pitch, g, g_pitch, count, m, k, total, straight, cross):
        end = m // width * width
        for i in range(0, end, width):
            t, s, c, centre = load(total, i), load(straight, i), load(cross, i), load(k, i)
            for j in range(count):
                u, p = load(x, j * x_pitch + i) - centre, load(g, j * g_pitch + i)
                t, s, c = t + p, s + p * u, c + p * swap(u)
            store(total, i, t), store(straight, i, s), store(cross, i, c)
        for i in range(end, m, 2):
            for j in range(count):
                u, v = x[j * x_pitch + i] - k[i], x[j * x_pitch + i + 1] - k[i + 1]
                p, q = g[j * g_pitch + i], g[j * g_pitch + i + 1]
                total[i] += p
                total[i + 1] += q
                straight[i] += p * u
                straight[i + 1] += q * v
                cross[i] += p * v
                cross[i + 1] += q * u

    @fast
    def affine(x, out, m, k, same, other, b):
        end = m // width * width
        for i in range(0, end, width):
            u = load(x, i) - load(k, i)
            store(out, i, load(same, i) * u + (load(other, i) * swap(u) + load(b, i)))
        for i in range(end, m, 2):
            u, v = x[i] - k[i], x[i + 1] - k[i + 1]
            out[i] = same[i] * u + other[i] * v + b[i]
            out[i + 1] = other[i + 1] * u + same[i + 1] * v + b[i + 1]

    @fast
    def affine_of_both(x, g, out, m, k, same, other, b, p_same, p_other):
        end = m // width * width
        for i in range(0, end, width):
            u, p = load(x, i) - load(k, i), load(g, i)
            y = load(p_same, i) * u + (load(p_other, i) * swap(u) + load(b, i))
            store(out, i, load(same, i) * p + (load(other, i) * swap(p) + y))
        for i in range(end, m, 2):
            u, v = x[i] - k[i], x[i + 1] - k[i + 1]
            p, q = g[i], g[i + 1]
            y, z = p_same[i] * u + p_other[i] * v, p_other[i + 1] * u + p_same[i + 1] * v
            out[i] = same[i] * p + other[i] * q + (y + b[i])
            out[i + 1] = other[i + 1] * p + same[i + 1] * q + (z + b[i + 1])

    return sums, products, affine, affine_of_both


def one_channel(dtype, step):
    """A wide channel of a task: in float64, one number after the other."""
    parts = make_parts(dtype, step)
    re_at, im_at, put_re, put_im = access(step)

    @plain
    def moments(job, at, c, k_re, k_im, start, end):
        at[:] = 0.0
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c)
            u, v = float(re_at(x, 0)) - k_re, float(im_at(y, 0)) - k_im
            at[0] += u
            at[1] += v
            at[2] += u * u
            at[3] += v * v
            at[4] += u * v

    @plain
    def gram(job, at, c, k_re, k_im, start, end):
        at[:] = 0.0
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c)
            g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c)
            u, v = float(re_at(x, 0)) - k_re, float(im_at(y, 0)) - k_im
            p, q = float(re_at(g, 0)), float(im_at(h, 0))
            at[0] += p
            at[1] += q
            at[2] += p * u
            at[3] += p * v
            at[4] += q * u
            at[5] += q * v

    @plain
    def apply(job, m, c, start, end):
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c)
            out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c)
            u, v = float(re_at(x, 0)) - m[6], float(im_at(y, 0)) - m[7]
            put_re(out, 0, dtype(m[0] * u + m[1] * v + m[4]))
            put_im(out_im, 0, dtype(m[2] * u + m[3] * v + m[5]))

    @plain
    def apply_backward(job, m, c, start, end):
        for r in range(start, end):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample + step * c)
            g, h = parts(job.g_re, job.g_im, r * job.g_sample + step * c)
            out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + step * c)
            u, v = float(re_at(x, 0)) - m[6], float(im_at(y, 0)) - m[7]
            p, q = float(re_at(g, 0)), float(im_at(h, 0))
            put_re(out, 0, dtype(m[0] * p + m[1] * q + m[8] * u + m[10] * v + m[4]))
            put_im(out_im, 0, dtype(m[2] * p + m[3] * q + m[10] * u + m[9] * v + m[5]))

    return moments, apply, gram, apply_backward


def blocks_interleaved(dtype):
    """What to do with one task of each sweep, for complex numbers."""
    parts = make_parts(dtype, 2)
    sums, products, affine, affine_of_both = vectors(dtype)

    @plain
    def zero(tile):
        for i in range(2 * TILE):
            tile[i] = dtype(0)

    @plain
    def fill(table, columns, first, second, c, n, tile):
        """Two columns of a table, as the real and imaginary numbers of a tile."""
        for i in range(n):
            tile[2 * i] = dtype(table[columns * (c + i) + first])
            tile[2 * i + 1] = dtype(table[columns * (c + i) + second])

    @plain
    def flush(partial, first, second, c, n, tile):
        """A tile's sums to two of the float64 columns, and the tile back to zero."""
        for i in range(n):
            partial[6 * (c + i) + first] += tile[2 * i]
            partial[6 * (c + i) + second] += tile[2 * i + 1]
            tile[2 * i] = tile[2 * i + 1] = dtype(0)

    @plain
    def moments(job, partial, c0, c1, start, end):
        shift, pitch = doubles(job.shift, 2 * job.channels), job.x_sample
        k, total = tile_on_stack(dtype), tile_on_stack(dtype)
        square, cross = tile_on_stack(dtype), tile_on_stack(dtype)
        zero(total), zero(square), zero(cross)
        for top in range(start, end, ROWS):
            bottom = min(top + ROWS, end)
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                fill(shift, 2, 0, 1, c, n, k)
                for r in range(top, bottom, TOGETHER):
                    x, _ = parts(job.x_re, job.x_im, r * pitch + 2 * c)
                    count = min(TOGETHER, bottom - r)
                    sums(x, pitch, count, 2 * n, k, total, square, cross)
                flush(partial, 0, 1, c, n, total)
                flush(partial, 2, 3, c, n, square)
                flush(partial, 4, 5, c, n, cross)

    @plain
    def gram(job, partial, c0, c1, start, end):
        shift, pitch, g_pitch = doubles(job.shift, 2 * job.channels), job.x_sample, job.g_sample
        k, total = tile_on_stack(dtype), tile_on_stack(dtype)
        straight, cross = tile_on_stack(dtype), tile_on_stack(dtype)
        zero(total), zero(straight), zero(cross)
        for top in range(start, end, ROWS):
            bottom = min(top + ROWS, end)
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                fill(shift, 2, 0, 1, c, n, k)
                for r in range(top, bottom, TOGETHER):
                    x, _ = parts(job.x_re, job.x_im, r * pitch + 2 * c)
                    g, _ = parts(job.g_re, job.g_im, r * g_pitch + 2 * c)
                    count = min(TOGETHER, bottom - r)
                    products(x, pitch, g, g_pitch, count, 2 * n, k, total, straight, cross)
                flush(partial, 0, 1, c, n, total)
                flush(partial, 2, 5, c, n, straight)
                flush(partial, 3, 4, c, n, cross)

    @plain
    def apply(job, table, c0, c1, start, end):
        pitch, y_pitch = job.x_sample, job.y_sample
        k, same = tile_on_stack(dtype), tile_on_stack(dtype)
        other, b = tile_on_stack(dtype), tile_on_stack(dtype)
        for c in range(c0, c1, TILE):
            n = min(TILE, c1 - c)
            fill(table, 12, 0, 3, c, n, same)
            fill(table, 12, 1, 2, c, n, other)
            fill(table, 12, 4, 5, c, n, b)
            fill(table, 12, 6, 7, c, n, k)
            for r in range(start, end):
                x, _ = parts(job.x_re, job.x_im, r * pitch + 2 * c)
                out, _ = parts(job.y_re, job.y_im, r * y_pitch + 2 * c)
                affine(x, out, 2 * n, k, same, other, b)

    @plain
    def apply_backward(job, table, c0, c1, start, end):
        pitch, g_pitch, y_pitch = job.x_sample, job.g_sample, job.y_sample
        k, same, other = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        b, p_same, p_other = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        for c in range(c0, c1, TILE):
            n = min(TILE, c1 - c)
            fill(table, 12, 0, 3, c, n, same)
            fill(table, 12, 1, 2, c, n, other)
            fill(table, 12, 4, 5, c, n, b)
            fill(table, 12, 6, 7, c, n, k)
            fill(table, 12, 8, 9, c, n, p_same)
            fill(table, 12, 10, 10, c, n, p_other)
            for r in range(start, end):
                x, _ = parts(job.x_re, job.x_im, r * pitch + 2 * c)
                g, _ = parts(job.g_re, job.g_im, r * g_pitch + 2 * c)
                out, _ = parts(job.y_re, job.y_im, r * y_pitch + 2 * c)
                affine_of_both(x, g, out, 2 * n, k, same, other, b, p_same, p_other)

    return moments, apply, gram, apply_backward


def blocks_apart(dtype):
    """The same for a pair of real tensors, a row at a time; the optimiser finds the vectors."""
    parts = make_parts(dtype, 1)

    @plain
    def fill(table, columns, column, c, n, tile):
        for i in range(n):
            tile[i] = dtype(table[columns * (c + i) + column])

    @plain
    def flush(partial, column, c, n, tile):
        for i in range(n):
            partial[6 * (c + i) + column] += tile[i]
            tile[i] = dtype(0)

    @fast
    def sums(x, y, n, k_re, k_im, b0, b1, b2, b3, b4):
        for i in range(n):
            u, v = x[i] - k_re[i], y[i] - k_im[i]
            b0[i] += u
            b1[i] += v
            b2[i] += u * u
            b3[i] += v * v
            b4[i] += u * v

    @fast
    def products(x, y, g, h, n, k_re, k_im, b0, b1, b2, b3, b4, b5):
        for i in range(n):
            u, v = x[i] - k_re[i], y[i] - k_im[i]
            b0[i] += g[i]
            b1[i] += h[i]
            b2[i] += g[i] * u
            b3[i] += g[i] * v
            b4[i] += h[i] * u
            b5[i] += h[i] * v

    @fast
    def affine(x, y, out, out_im, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im):
        for i in range(n):
            u, v = x[i] - k_re[i], y[i] - k_im[i]
            out[i] = rr[i] * u + ri[i] * v + b_re[i]
            out_im[i] = ir[i] * u + ii[i] * v + b_im[i]

    @fast
    def affine_of_both(
        x, y, g, h, out, out_im, n,
        rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
    ):  # fmt: skip
        for i in range(n):
            u, v = x[i] - k_re[i], y[i] - k_im[i]
            out[i] = rr[i] * g[i] + ri[i] * h[i] + p_rr[i] * u + p_ri[i] * v + b_re[i]
            out_im[i] = ir[i] * g[i] + ii[i] * h[i] + p_ri[i] * u + p_ii[i] * v + b_im[i]

    @plain
    def moments(job, partial, c0, c1, start, end):
        shift = doubles(job.shift, 2 * job.channels)
        k_re, k_im = tile_on_stack(dtype), tile_on_stack(dtype)
        b0, b1, b2 = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        b3, b4 = tile_on_stack(dtype), tile_on_stack(dtype)
        for i in range(TILE):
            b0[i] = b1[i] = b2[i] = b3[i] = b4[i] = dtype(0)
        for top in range(start, end, ROWS):
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                fill(shift, 2, 0, c, n, k_re), fill(shift, 2, 1, c, n, k_im)
                for r in range(top, min(top + ROWS, end)):
                    x, y = parts(job.x_re, job.x_im, r * job.x_sample + c)
                    sums(x, y, n, k_re, k_im, b0, b1, b2, b3, b4)
                flush(partial, 0, c, n, b0), flush(partial, 1, c, n, b1)
                flush(partial, 2, c, n, b2), flush(partial, 3, c, n, b3)
                flush(partial, 4, c, n, b4)

    @plain
    def gram(job, partial, c0, c1, start, end):
        shift = doubles(job.shift, 2 * job.channels)
        k_re, k_im = tile_on_stack(dtype), tile_on_stack(dtype)
        b0, b1, b2 = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        b3, b4, b5 = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        for i in range(TILE):
            b0[i] = b1[i] = b2[i] = b3[i] = b4[i] = b5[i] = dtype(0)
        for top in range(start, end, ROWS):
            for c in range(c0, c1, TILE):
                n = min(TILE, c1 - c)
                fill(shift, 2, 0, c, n, k_re), fill(shift, 2, 1, c, n, k_im)
                for r in range(top, min(top + ROWS, end)):
                    x, y = parts(job.x_re, job.x_im, r * job.x_sample + c)
                    g, h = parts(job.g_re, job.g_im, r * job.g_sample + c)
                    products(x, y, g, h, n, k_re, k_im, b0, b1, b2, b3, b4, b5)
                flush(partial, 0, c, n, b0), flush(partial, 1, c, n, b1)
                flush(partial, 2, c, n, b2), flush(partial, 3, c, n, b3)
                flush(partial, 4, c, n, b4), flush(partial, 5, c, n, b5)

    @plain
    def apply(job, table, c0, c1, start, end):
        rr, ri = tile_on_stack(dtype), tile_on_stack(dtype)
        ir, ii = tile_on_stack(dtype), tile_on_stack(dtype)
        b_re, b_im = tile_on_stack(dtype), tile_on_stack(dtype)
        k_re, k_im = tile_on_stack(dtype), tile_on_stack(dtype)
        for c in range(c0, c1, TILE):
            n = min(TILE, c1 - c)
            fill(table, 12, 0, c, n, rr), fill(table, 12, 1, c, n, ri)
            fill(table, 12, 2, c, n, ir), fill(table, 12, 3, c, n, ii)
            fill(table, 12, 4, c, n, b_re), fill(table, 12, 5, c, n, b_im)
            fill(table, 12, 6, c, n, k_re), fill(table, 12, 7, c, n, k_im)
            for r in range(start, end):
                x, y = parts(job.x_re, job.x_im, r * job.x_sample + c)
                out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + c)
                affine(x, y, out, out_im, n, rr, ri, ir, ii, b_re, b_im, k_re, k_im)

    @plain
    def apply_backward(job, table, c0, c1, start, end):
        rr, ri = tile_on_stack(dtype), tile_on_stack(dtype)
        ir, ii = tile_on_stack(dtype), tile_on_stack(dtype)
        b_re, b_im = tile_on_stack(dtype), tile_on_stack(dtype)
        k_re, k_im = tile_on_stack(dtype), tile_on_stack(dtype)
        p_rr, p_ii, p_ri = tile_on_stack(dtype), tile_on_stack(dtype), tile_on_stack(dtype)
        for c in range(c0, c1, TILE):
            n = min(TILE, c1 - c)
            fill(table, 12, 0, c, n, rr), fill(table, 12, 1, c, n, ri)
            fill(table, 12, 2, c, n, ir), fill(table, 12, 3, c, n, ii)
            fill(table, 12, 4, c, n, b_re), fill(table, 12, 5, c, n, b_im)
            fill(table, 12, 6, c, n, k_re), fill(table, 12, 7, c, n, k_im)
            fill(table, 12, 8, c, n, p_rr), fill(table, 12, 9, c, n, p_ii)
            fill(table, 12, 10, c, n, p_ri)
            for r in range(start, end):
                x, y = parts(job.x_re, job.x_im, r * job.x_sample + c)
                g, h = parts(job.g_re, job.g_im, r * job.g_sample + c)
                out, out_im = parts(job.y_re, job.y_im, r * job.y_sample + c)
                affine_of_both(
                    x, y, g, h, out, out_im, n,
                    rr, ri, ir, ii, b_re, b_im, k_re, k_im, p_rr, p_ii, p_ri,
                )  # fmt: skip

    return moments, apply, gram, apply_backward


def blocks(dtype, step):
    """What to do with one task of each sweep: all channels fast, then the wide ones again."""
    narrow = blocks_interleaved(dtype) if step == 2 else blocks_apart(dtype)
    fast_moments, fast_apply, fast_gram, fast_backward = narrow
    wide_moments, wide_apply, wide_gram, wide_backward = one_channel(dtype, step)
    parts = make_parts(dtype, step)
    re_at, im_at, _, _ = access(step)

    @plain
    def guess(job, shift):
        few = min(job.length, 16)
        shift[:] = 0.0
        for r in range(few):
            x, y = parts(job.x_re, job.x_im, r * job.x_sample)
            for c in range(job.channels):
                shift[2 * c] += re_at(x, c) / few
                shift[2 * c + 1] += im_at(y, c) / few

    @plain
    def moments(job, part, _, __, c0, c1, start, end):
        shift, wide = doubles(job.shift, 2 * job.channels), doubles(job.wide, job.channels)
        partial = doubles(job.partial + 48 * part * job.channels, 6 * job.channels)
        if job.only_wide == 0:
            partial[6 * c0 : 6 * c1] = 0.0
            fast_moments(job, partial, c0, c1, start, end)
            return
        for c in range(c0, c1):
            if wide[c] != 0.0:
                at = partial[6 * c : 6 * c + 6]
                wide_moments(job, at, c, shift[2 * c], shift[2 * c + 1], start, end)

    @plain
    def apply(job, part, _, __, c0, c1, start, end):
        table, wide = doubles(job.map, 12 * job.channels), doubles(job.wide, job.channels)
        fast_apply(job, table, c0, c1, start, end)
        for c in range(c0, c1):
            if wide[c] != 0.0:
                wide_apply(job, table[12 * c : 12 * c + 12], c, start, end)

    @plain
    def gram(job, part, _, __, c0, c1, start, end):
        shift, wide = doubles(job.shift, 2 * job.channels), doubles(job.wide, job.channels)
        partial = doubles(job.partial + 48 * part * job.channels, 6 * job.channels)
        partial[6 * c0 : 6 * c1] = 0.0
        fast_gram(job, partial, c0, c1, start, end)
        for c in range(c0, c1):
            if wide[c] != 0.0:
                at = partial[6 * c : 6 * c + 6]
                wide_gram(job, at, c, shift[2 * c], shift[2 * c + 1], start, end)

    @plain
    def apply_backward(job, part, _, __, c0, c1, start, end):
        table, wide = doubles(job.map, 12 * job.channels), doubles(job.wide, job.channels)
        fast_backward(job, table, c0, c1, start, end)
        for c in range(c0, c1):
            if wide[c] != 0.0:
                wide_backward(job, table[12 * c : 12 * c + 12], c, start, end)

    return guess, moments, apply, gram, apply_backward
