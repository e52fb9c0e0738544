"""The sweeps where the channels lie side by side, as in channels_last and in (N, C).

A task has so many channels at most that their sums and maps stay in the nearest cache, in a tile
on the stack. There all that a vector of channels needs stands together: group by group, each with
real and imaginary parts as the data have them, alternating or one vector after the other.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cbn_lab.kernels.cpu import cells, lanes
from cbn_lab.kernels.cpu.cells import BACKWARD, FORWARD, GRAM, MOMENTS
from cbn_lab.kernels.cpu.job import TILE
from cbn_lab.kernels.cpu.tools import (
    access,
    ahead,
    doubles,
    fast,
    places,
    plain,
    pointer,
    table,
    tiny,
)

GROUPS = {MOMENTS: 4, GRAM: 4, FORWARD: 4, BACKWARD: 6}  # centre and sums, or the map
ROWS = 256  # summed in the working precision before they go to float64
AHEAD = 2048  # bytes: between several streams and a tile the processor's prefetching falls behind;
# of 1, 2, 3, 4 and 8 KiB the best on a processor with AVX2, others were not tried
NARROW = 256  # channels: with fewer, a tile stays in the nearest cache while rows run by it


@intrinsic
def tile_on_stack(typing, dtype):
    """Room for six groups that needs no allocation: 48 KB, in float64 96 KB.

    Threads have at least 512 KB of stack everywhere, unless OMP_STACKSIZE asks for less.
    """
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        number = context.get_value_type(dtype.dtype)
        with builder.goto_entry_block():  # numba's own function fills it with zeros
            room = builder.alloca(ir.ArrayType(number, 12 * TILE))
        room.align = 64  # a cache line: no vector lies across two
        return builder.bitcast(room, number.as_pointer())

    return kind(dtype), generate


def homes(dtype, step, which):
    """Where a tile keeps the pair of numbers that ``group`` has for channel i."""
    wide = cells.vectors(dtype, step).count
    pitch = 2 * wide * GROUPS[which]

    @tiny
    def home(tile, group, i):
        re = ahead(tile, i // wide * pitch + 2 * wide * group)
        return re, (re if step == 2 else ahead(re, wide)), i % wide

    return home


def moving(dtype, step, which):
    """Between a group of a tile and two rows of a float64 table, whose rows are ``pitch`` long."""
    re_at, im_at, put_re, put_im = access(step)
    home = homes(dtype, step, which)

    @plain
    def fill(tile, group, address, pitch, row, n):
        a = pointer(address + 8 * pitch * row, np.float64)
        b = pointer(address + 8 * pitch * (row + 1), np.float64)
        for i in range(n):
            re, im, k = home(tile, group, i)
            put_re(re, k, dtype(a[i]))
            put_im(im, k, dtype(b[i]))

    @plain
    def clear(tile, group, n):
        for i in range(n):
            re, im, k = home(tile, group, i)
            put_re(re, k, dtype(0))
            put_im(im, k, dtype(0))

    @plain
    def add_to(address, pitch, row, tile, group, n):
        a = pointer(address + 8 * pitch * row, np.float64)
        b = pointer(address + 8 * pitch * (row + 1), np.float64)
        for i in range(n):
            re, im, k = home(tile, group, i)
            a[i] += re_at(re, k)
            b[i] += im_at(im, k)

    return fill, clear, add_to


@tiny
def below(at, j, pitch):
    """The pointers of row j; ``pitch`` is the way from row to row, in numbers."""
    x, g, y = j * pitch[0], j * pitch[1], j * pitch[2]
    return (
        ahead(at[0], x), ahead(at[1], x), ahead(at[2], g), ahead(at[3], g), ahead(at[4], y),
        ahead(at[5], y),
    )  # fmt: skip


def strip(form, dtype, step, which):
    """Do the channels start … n of so many rows, as far as they fill whole cells; say how far."""
    formula, home = cells.formulas(form)[which], homes(dtype, step, which)
    count, get, put = form.count, form.get, form.put

    @tiny
    def stored(tile, group, i):
        re, im, k = home(tile, group, i)
        return get(re, im, k)

    @tiny
    def store(tile, group, i, cell):
        re, im, k = home(tile, group, i)
        put(re, im, k, cell)

    @fast
    def sums(at, rows, pitch, start, n, tile):
        last = start + (n - start) // count * count
        for i in range(start, last, count):
            k, t = stored(tile, 0, i), (stored(tile, 1, i), stored(tile, 2, i), stored(tile, 3, i))
            for j in range(rows):
                t = formula(t, below(at, j, pitch), i, k)
            store(tile, 1, i, t[0])
            store(tile, 2, i, t[1])
            store(tile, 3, i, t[2])
        return last

    @fast
    def maps(at, rows, pitch, start, n, tile):
        last = start + (n - start) // count * count
        for i in range(start, last, count):
            row = (
                stored(tile, 0, i), stored(tile, 1, i), stored(tile, 2, i), stored(tile, 3, i),
                stored(tile, 4, i), stored(tile, 5, i),
            )  # fmt: skip
            for j in range(rows):
                formula(below(at, j, pitch), i, row)
        return last

    return maps if which in (FORWARD, BACKWARD) else sums


def all_rows(dtype, step, which):
    """Do n channels from c on of the rows top … bottom.

    Two rows share a visit to the tile, for moments of more than NARROW channels four. They lie far
    apart: each then goes on where it was, as the processor's prefetching expects. Neighbouring ones
    took half as long again. Past the cache goes one row at a time: memory is slow to be written in
    several places, with 512 channels two to four times as slow (all this on one with AVX2).
    """
    many, writes = 4 if which == MOMENTS else 2, which in (FORWARD, BACKWARD)
    whole = streamed = strip(cells.vectors(dtype, step, ahead=AHEAD), dtype, step, which)
    if writes:
        form = cells.vectors(dtype, step, lanes.stream, AHEAD)
        streamed = strip(form, dtype, step, which)
    rest, at = strip(cells.single(dtype, dtype, step), dtype, step, which), places(dtype, step)

    @plain
    def run(job, tile, c, n, top, bottom):
        while top < bottom:
            together = 2 if n <= NARROW else many
            if writes and job.stream != 0:
                together = 1
            count = min(together, bottom - top)
            share = (bottom - top) // count
            pitch = job.x_sample * share, job.g_sample * share, job.y_sample * share
            for r in range(top, top + share):
                where = at(job, r, c, 0)
                if job.stream != 0:
                    done = streamed(where, count, pitch, 0, n, tile)
                else:
                    done = whole(where, count, pitch, 0, n, tile)
                if done < n:
                    rest(where, count, pitch, done, n, tile)
            top += count * share

    return run


def one_channel(dtype, step, which):
    """A wide channel of a task: in float64, one number after the other."""
    form, at = cells.single(np.float64, dtype, step), places(dtype, step)
    formula, fill, read = cells.formulas(form)[which], form.fill, cells.map_reader(form)

    @plain
    def sums(job, part, c, start, end):
        shift = table(job.shift, 2, job.channels)
        partial = table(job.partial + 48 * part * job.channels, 6, job.channels)
        k, zero = fill(shift[0, c], shift[1, c]), fill(0, 0)
        t = (zero, zero, zero)
        for r in range(start, end):
            t = formula(t, at(job, r, c, 0), 0, k)
        partial[0, c], partial[1, c] = t[0]
        partial[2, c], partial[3, c] = t[1]
        partial[4, c], partial[5, c] = t[2]

    @plain
    def maps(job, part, c, start, end):
        row = read(table(job.map, 12, job.channels), c)
        for r in range(start, end):
            formula(at(job, r, c, 0), 0, row)

    return maps if which in (FORWARD, BACKWARD) else sums


def blocks(dtype, step):
    """What to do with one task of each sweep: all channels fast, then the wide ones again."""
    at, (re_at, im_at, _, _) = places(dtype, step), access(step)

    @plain
    def guess(job, shift):
        few = min(job.length, 16)
        for c in range(job.channels):
            shift[0, c] = shift[1, c] = 0.0
        for r in range(few):
            where = at(job, r, 0, 0)
            for c in range(job.channels):
                shift[0, c] += re_at(where[0], c) / few
                shift[1, c] += im_at(where[1], c) / few

    def sums(which):
        run, run_wide = all_rows(dtype, step, which), one_channel(dtype, step, which)
        fill, clear, add_to = moving(dtype, step, which)

        @plain
        def narrow(job, partial, c0, c1, start, end):
            tile, pitch, n = tile_on_stack(dtype), job.channels, c1 - c0
            sums_here = table(partial, 6, job.channels)
            for k in range(6):
                for c in range(c0, c1):
                    sums_here[k, c] = 0.0
            fill(tile, 0, job.shift + 8 * c0, pitch, 0, n)
            for top in range(start, end, ROWS):
                clear(tile, 1, n), clear(tile, 2, n), clear(tile, 3, n)
                run(job, tile, c0, n, top, min(top + ROWS, end))
                add_to(partial + 8 * c0, pitch, 0, tile, 1, n)
                add_to(partial + 8 * c0, pitch, 2, tile, 2, n)
                add_to(partial + 8 * c0, pitch, 4, tile, 3, n)

        @plain
        def block(job, part, _, __, c0, c1, start, end):
            if job.only_wide == 0:
                narrow(job, job.partial + 48 * part * job.channels, c0, c1, start, end)
            wide = doubles(job.wide, job.channels)
            for c in range(c0, c1):
                if wide[c] != 0.0:
                    run_wide(job, part, c, start, end)

        return block

    def maps(which):
        run, run_wide = all_rows(dtype, step, which), one_channel(dtype, step, which)
        fill, _, _ = moving(dtype, step, which)
        groups = GROUPS[which]

        @plain
        def block(job, part, _, __, c0, c1, start, end):
            tile, n = tile_on_stack(dtype), c1 - c0
            wide = doubles(job.wide, job.channels)
            for group in range(groups):
                fill(tile, group, job.map + 8 * c0, job.channels, 2 * group, n)
            run(job, tile, c0, n, start, end)
            for c in range(c0, c1):
                if wide[c] != 0.0:
                    run_wide(job, part, c, start, end)

        return block

    return guess, sums(MOMENTS), maps(FORWARD), sums(GRAM), maps(BACKWARD)
