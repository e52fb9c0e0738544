"""The sweeps where a channel's values lie side by side, as in contiguous NCHW."""

import numpy as np

from cbn_lab.kernels.cpu import cells, lanes
from cbn_lab.kernels.cpu.cells import BACKWARD, FORWARD, GRAM, MOMENTS
from cbn_lab.kernels.cpu.tools import doubles, fast, places, plain, table

STRETCH = 1024  # values summed in the working precision before they go to float64


def summing(form, which):
    """Summing in cells, ``sums``, that are added to ``six`` numbers when ``held`` values,
    always whole cells, are enough.

    They are carried from sample to sample: to add up a vector takes as long as a plane of 8×8.
    """
    formula = cells.formulas(form)[which]
    count, fill, totals = form.count, form.fill, form.totals

    @fast
    def nothing():
        zero = fill(0, 0)
        return zero, zero, zero

    @fast
    def closed(six, sums):
        t, s, r = totals(sums[0]), totals(sums[1]), totals(sums[2])
        a, b, c, d, e, f = six
        return a + t[0], b + t[1], c + s[0], d + s[1], e + r[0], f + r[1]

    @fast
    def run(six, sums, held, at, start, end, k_re, k_im):
        """Add what fills whole cells of the values start … end; say where that ended."""
        k, last = fill(k_re, k_im), start + (end - start) // count * count
        while start < last:
            stop = min(start + STRETCH - held, last)
            for i in range(start, stop, count):
                sums = formula(sums, at, i, k)
            held += stop - start
            if held == STRETCH:
                six, sums, held = closed(six, sums), nothing(), 0
            start = stop
        return six, sums, held, last

    return nothing, run, closed


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
    none, first, first_sum = summing(double, MOMENTS)

    @plain
    def guess(job, shift):
        few = min(job.length, 16)
        for c in range(job.channels):
            six, sums, _, _ = first((0.0,) * 6, none(), 0, at(job, 0, c, 0), 0, few, 0.0, 0.0)
            six = first_sum(six, sums)
            shift[0, c], shift[1, c] = six[0] / few, six[1] / few

    def sums(which):
        none, whole, add = summing(vector, which)
        no_rest, rest, add_rest = summing(one, which)
        no_wide, wide_all, add_wide = summing(double, which)

        @plain
        def narrow(job, n0, n1, c, start, end, k_re, k_im):
            six, sums, held = (0.0,) * 6, none(), 0
            for n in range(n0, n1):
                where, length = at(job, n, c, start), end - start
                six, sums, held, done = whole(six, sums, held, where, 0, length, k_re, k_im)
                six, few, _, _ = rest(six, no_rest(), 0, where, done, length, k_re, k_im)
                six = add_rest(six, few)
            return add(six, sums)

        @plain
        def in_double(job, n0, n1, c, start, end, k_re, k_im):
            six, sums, held = (0.0,) * 6, no_wide(), 0
            for n in range(n0, n1):
                where = at(job, n, c, start)
                six, sums, held, _ = wide_all(six, sums, held, where, 0, end - start, k_re, k_im)
            return add_wide(six, sums)

        @plain
        def block(job, part, n0, n1, c0, c1, start, end):
            shift, wide = table(job.shift, 2, job.channels), doubles(job.wide, job.channels)
            partial = table(job.partial + 48 * part * job.channels, 6, job.channels)
            for c in range(c0, c1):
                six, k_re, k_im = (0.0,) * 6, shift[0, c], shift[1, c]
                if wide[c] != 0.0:
                    six = in_double(job, n0, n1, c, start, end, k_re, k_im)
                elif job.only_wide == 0:
                    six = narrow(job, n0, n1, c, start, end, k_re, k_im)
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
