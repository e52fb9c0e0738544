"""What one turn of a loop works on, a cell, and the four formulas of whitening on cells.

A cell is one complex number or a vector of them, in whichever way it lies in memory. It only has
to be added and multiplied part by part, and to exchange its parts: with D = (rr, ii) and
O = (ri, ir), A·x is D·x + O·swap(x).
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cbn_lab.kernels.cpu import lanes
from cbn_lab.kernels.cpu.tools import access, prefetch, tiny

MOMENTS, GRAM, FORWARD, BACKWARD = range(4)  # the places of the formulas


class Form(NamedTuple):
    """How cells of one kind are read, written and computed with."""

    count: int  # complex numbers in a cell
    get: Callable  # (re, im, i): the cell whose first number is number i
    read: Callable  # the same, from the data
    put: Callable  # (re, im, i, cell)
    fill: Callable  # (re, im): a cell of one number
    totals: Callable  # (cell): the float64 sums of its real and of its imaginary parts
    add: Callable
    sub: Callable
    mul: Callable
    swap: Callable


def single(work: type, dtype: type, step: int) -> Form:
    """One number of type ``dtype``, computed with in ``work``."""
    re_at, im_at, put_re, put_im = access(step)

    @tiny
    def get(re, im, i):
        return work(re_at(re, i)), work(im_at(im, i))

    @tiny
    def put(re, im, i, cell):
        put_re(re, i, dtype(cell[0]))
        put_im(im, i, dtype(cell[1]))

    @tiny
    def fill(re, im):
        return work(re), work(im)

    @tiny
    def totals(cell):
        return np.float64(cell[0]), np.float64(cell[1])

    return Form(1, get, get, put, fill, totals, *in_pairs())


def interleaved(dtype: type, write: Callable, ahead: int) -> Form:
    """A vector that holds re, im, re, im, ... as they lie in memory."""
    size = dtype(0).itemsize

    @tiny
    def get(re, _, i):
        return lanes.load(re, 2 * i)

    @tiny
    def read(re, _, i):
        if ahead:
            prefetch(re, 2 * i + ahead // size)
        return lanes.load(re, 2 * i)

    @tiny
    def put(re, _, i, cell):
        write(re, 2 * i, cell)

    @tiny
    def fill(re, im):
        return lanes.pairs(dtype(re), dtype(im))

    count = lanes.BYTES // size // 2
    operations = operator.add, operator.sub, operator.mul, lanes.swap
    return Form(count, get, read, put, fill, lanes.totals, *operations)


def apart(dtype: type, write: Callable, ahead: int) -> Form:
    """A vector of real parts and one of imaginary parts."""
    size = dtype(0).itemsize

    @tiny
    def get(re, im, i):
        return lanes.load(re, i), lanes.load(im, i)

    @tiny
    def read(re, im, i):
        if ahead:
            prefetch(re, i + ahead // size)
            prefetch(im, i + ahead // size)
        return lanes.load(re, i), lanes.load(im, i)

    @tiny
    def put(re, im, i, cell):
        write(re, i, cell[0])
        write(im, i, cell[1])

    @tiny
    def fill(re, im):
        return lanes.pairs(dtype(re), dtype(re)), lanes.pairs(dtype(im), dtype(im))

    @tiny
    def totals(cell):
        re, im = lanes.totals(cell[0]), lanes.totals(cell[1])
        return re[0] + re[1], im[0] + im[1]

    return Form(lanes.BYTES // size, get, read, put, fill, totals, *in_pairs())


def vectors(dtype: type, step: int, write: Callable = lanes.store, ahead: int = 0) -> Form:
    """Cells of 64 bytes, or twice 64; data are asked for ``ahead`` bytes before they are read."""
    return interleaved(dtype, write, ahead) if step == 2 else apart(dtype, write, ahead)


def in_pairs():
    """The operations on cells (re, im)."""

    @tiny
    def add(a, b):
        return a[0] + b[0], a[1] + b[1]

    @tiny
    def sub(a, b):
        return a[0] - b[0], a[1] - b[1]

    @tiny
    def mul(a, b):
        return a[0] * b[0], a[1] * b[1]

    @tiny
    def swap(a):
        return a[1], a[0]

    return add, sub, mul, swap


def map_reader(form: Form) -> Callable:
    """Column c of the job's map, as the six cells that a formula takes."""
    fill = form.fill

    @tiny
    def read(table, c):
        return (
            fill(table[0, c], table[1, c]), fill(table[2, c], table[3, c]),
            fill(table[4, c], table[5, c]), fill(table[6, c], table[7, c]),
            fill(table[8, c], table[9, c]), fill(table[10, c], table[11, c]),
        )  # fmt: skip

    return read


def formulas(form: Form):
    """All that is computed from the data, on the cell that begins with number i of ``at``.

    ``at`` are six pointers: real and imaginary parts of input, output gradient and result. Sums are
    three cells, of u = x − centre: for the moments Σu, (Σu_re², Σu_im²) and Σu_re·u_im twice; for
    the gram matrix Σg, (Σg_re·u_re, Σg_im·u_im) and (Σg_re·u_im, Σg_im·u_re). A map is six cells:
    centre, D and O of A, the constant, D and O of P.
    """
    _, _, read, put, _, _, add, sub, mul, swap = form

    @tiny
    def moments(sums, at, i, centre):
        u = sub(read(at[0], at[1], i), centre)
        return add(sums[0], u), add(sums[1], mul(u, u)), add(sums[2], mul(u, swap(u)))

    @tiny
    def gram(sums, at, i, centre):
        u, g = sub(read(at[0], at[1], i), centre), read(at[2], at[3], i)
        return add(sums[0], g), add(sums[1], mul(g, u)), add(sums[2], mul(g, swap(u)))

    @tiny
    def forward(at, i, row):
        u = sub(read(at[0], at[1], i), row[0])
        put(at[4], at[5], i, add(mul(row[1], u), add(mul(row[2], swap(u)), row[3])))

    @tiny
    def backward(at, i, row):
        u, g = sub(read(at[0], at[1], i), row[0]), read(at[2], at[3], i)
        through_covar = add(mul(row[4], u), add(mul(row[5], swap(u)), row[3]))
        put(at[4], at[5], i, add(mul(row[1], g), add(mul(row[2], swap(g)), through_covar)))

    return moments, gram, forward, backward
