"""The sweeps where a channel's values lie side by side, as in contiguous NCHW."""

import numpy as np

from cbn_lab.kernels.cpu import cells, lanes
from cbn_lab.kernels.cpu.cells import BACKWARD, FORWARD, GRAM, MOMENTS
from cbn_lab.kernels.cpu.tools import doubles, fast, places, plain, table

STRETCH = 1024  # values summed in the working precision before they go to float64


def summing(form, which):
    """Add what fills whole cells of the values start … end to six sums; say where that ended."""
    formula = cells.formulas(form)[which]
    count, fill, totals = form.count, form.fill, form.totals

    @fast
    def run(six, at, start, end, k_re, k_im):
        k, zero, last = fill(k_re, k_im), fill(0, 0), start + (end - start) // count * count
        a, b, c, d, e, f = six
        while start < last:
            stop, sums = min(start + STRETCH, last), (zero, zero, zero)
            for i in range(start, stop, count):
                sums = formula(sums, at, i, k)
            t, s, r = totals(sums[0]), totals(sums[1]), totals(sums[2])
            a, b, c, d, e, f = a + t[0], b + t[1], c + s[0], d + s[1], e + r[0], f + r[1]
            start = stop
        return (a, b, c, d, e, f), last

    return run


def mapping(form, which):
    """Map what fills whole cells of the values start … end by column c of the map; say likewise."""
    formula = cells.formulas(form)[which]
    count, read = form.count, cells.map_reader(form)

    @fast
    def run(at, start, end, table, c):
        row, last = read(table, c), start + (end - start) // count * count
        for i in range(start, last, count):
            formula(at, i, row)
        return last

    return run


def blocks(dtype, step):
    """What to do with one task of each sweep."""
    at = places(dtype, step)
    vector, one = cells.vectors(dtype, step), cells.single(dtype, dtype, step)
    double = cells.single(np.float64, dtype, step)
    first_guess = summing(double, MOMENTS)

    @plain
    def guess(job, shift):
        few = min(job.length, 16)
        for c in range(job.channels):
            six, _ = first_guess((0.0,) * 6, at(job, 0, c, 0), 0, few, 0.0, 0.0)
            shift[0, c], shift[1, c] = six[0] / few, six[1] / few

    def sums(which):
        whole, rest, wide_all = (summing(form, which) for form in (vector, one, double))

        @plain
        def block(job, part, n0, n1, c0, c1, start, end):
            shift, wide = table(job.shift, 2, job.channels), doubles(job.wide, job.channels)
            partial = table(job.partial + 48 * part * job.channels, 6, job.channels)
            for c in range(c0, c1):
                six, k_re, k_im = (0.0,) * 6, shift[0, c], shift[1, c]
                for n in range(n0, n1):
                    where, length = at(job, n, c, start), end - start
                    if wide[c] != 0.0:
                        six, _ = wide_all(six, where, 0, length, k_re, k_im)
                    elif job.only_wide == 0:
                        six, done = whole(six, where, 0, length, k_re, k_im)
                        six, _ = rest(six, where, done, length, k_re, k_im)
                partial[0, c], partial[1, c], partial[2, c] = six[0], six[1], six[2]
                partial[3, c], partial[4, c], partial[5, c] = six[3], six[4], six[5]

        return block

    def maps(which):
        whole, rest, wide_all = (mapping(form, which) for form in (vector, one, double))
        whole_streamed = mapping(cells.vectors(dtype, step, lanes.stream), which)

        @plain
        def block(job, part, n0, n1, c0, c1, start, end):
            row, wide = table(job.map, 12, job.channels), doubles(job.wide, job.channels)
            for n in range(n0, n1):
                for c in range(c0, c1):
                    where, length = at(job, n, c, start), end - start
                    if wide[c] != 0.0:
                        wide_all(where, 0, length, row, c)
                    else:
                        if job.stream != 0:
                            done = whole_streamed(where, 0, length, row, c)
                        else:
                            done = whole(where, 0, length, row, c)
                        rest(where, done, length, row, c)

        return block

    return guess, sums(MOMENTS), maps(FORWARD), sums(GRAM), maps(BACKWARD)
