"""What the kernels share: which part of the data a program has, and how it reads and writes it.

A program walks a slice of the data in tiles of A by B. Where a channel's values lie side by side
("planes", see :mod:`cbn_lab.kernels.layout`), A counts samples and B values, and each program has
one channel. In "rows" A counts rows and B channels, and each program has a block of them.

P programs side by side do all C channels, S = programs / P slices all values. A tile's place is
counted along B first, LB tiles to a turn; ``per`` tiles make a slice. Strides count real numbers:
sP from program to program, sA along A. The imaginary pointer is None where the numbers alternate.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def shared(function):
    """Plain arithmetic from elsewhere, for kernels; Triton's interpreter takes it as it is."""
    return function if INTERPRETED else triton.jit(function)


@triton.jit
def share(P, per, tiles, ROWS: tl.constexpr, BB: tl.constexpr, BACKWARDS: tl.constexpr):
    """This program's place among the P, its slice, its channels, its first and last tile."""
    number = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    p, s = number % P, number // P
    c = p * BB + tl.arange(0, BB) if ROWS else p + tl.arange(0, 1)
    return p, s, c, s * per, tl.minimum(s * per + per, tiles)


@triton.jit
def corner(t, p, LB, ROWS: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr):
    """Where tile t begins along A, and along B; either may be beyond 32 bits."""
    a0 = (t // LB).to(tl.int64) * BA
    b0 = (p if ROWS else t % LB).to(tl.int64) * BB
    return a0, b0


@triton.jit
def inside(a0, b0, A, B, BA: tl.constexpr, BB: tl.constexpr, EACH: tl.constexpr):
    """Which numbers of the tile exist, where a value has ``EACH`` of them side by side."""
    a, b = tl.minimum(A - a0, BA).to(tl.int32), EACH * tl.minimum(B - b0, BB).to(tl.int32)
    return (tl.arange(0, BA) < a)[:, None] & (tl.arange(0, EACH * BB) < b)[None, :]


@triton.jit
def places(a0, b0, sA, BA: tl.constexpr, BB: tl.constexpr, EACH: tl.constexpr):
    """How far from this program's first number those of the tile lie."""
    a = (a0 + tl.arange(0, BA)) * sA
    return a[:, None] + (EACH * b0 + tl.arange(0, EACH * BB))[None, :]


@triton.jit
def read(re, im, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    """Real and imaginary parts of a tile, 0 outside."""
    if im is None:
        mask = inside(a0, b0, A, B, BA, BB, 2)
        both = tl.load(re + places(a0, b0, sA, BA, BB, 2), mask=mask, other=0)
        u, v = tl.split(tl.reshape(both, [BA, BB, 2]))
    else:
        at, mask = places(a0, b0, sA, BA, BB, 1), inside(a0, b0, A, B, BA, BB, 1)
        u, v = tl.load(re + at, mask=mask, other=0), tl.load(im + at, mask=mask, other=0)
    return u, v


@triton.jit
def write(re, im, u, v, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    if im is None:
        mask = inside(a0, b0, A, B, BA, BB, 2)
        both = tl.reshape(tl.join(u, v), [BA, 2 * BB])
        tl.store(re + places(a0, b0, sA, BA, BB, 2), both, mask=mask)
    else:
        at, mask = places(a0, b0, sA, BA, BB, 1), inside(a0, b0, A, B, BA, BB, 1)
        tl.store(re + at, u, mask=mask)
        tl.store(im + at, v, mask=mask)


@triton.jit
def total(x, ROWS: tl.constexpr):
    """Of each of this program's channels, in float64."""
    if ROWS:
        out = tl.sum(x.to(tl.float64), 0)
    else:
        out = tl.sum(tl.sum(x.to(tl.float64), 1), 0) + tl.zeros([1], tl.float64)
    return out


@triton.jit
def load_symmetric(matrix, c, C):
    """rr, ii, ri of the symmetric matrices of channels c; the identity for None."""
    if matrix is None:
        rr = tl.full(c.shape, 1, tl.float64)
        ii = rr
        ri = rr - rr
    else:
        rr = tl.load(matrix + 3 * c, mask=c < C, other=1).to(tl.float64)
        ii = tl.load(matrix + 3 * c + 1, mask=c < C, other=1).to(tl.float64)
        ri = tl.load(matrix + 3 * c + 2, mask=c < C, other=0).to(tl.float64)
    return rr, ii, ri


@triton.jit
def load_vector(vector, c, C):
    """The two numbers of channels c; 0 for None."""
    if vector is None:
        re = tl.zeros(c.shape, tl.float64)
        im = re
    else:
        re = tl.load(vector + 2 * c, mask=c < C, other=0).to(tl.float64)
        im = tl.load(vector + 2 * c + 1, mask=c < C, other=0).to(tl.float64)
    return re, im


@triton.jit
def centre(m_re, m_im, DOUBLE: tl.constexpr):
    """A point near the mean that the data's precision has, and what is left of the mean."""
    k_re, k_im = m_re, m_im
    if not DOUBLE:  # what float32 cannot hold is left to the channels done in float64
        r, i = m_re.to(tl.float32).to(tl.float64), m_im.to(tl.float32).to(tl.float64)
        k_re, k_im = tl.where(r - r == 0, r, m_re), tl.where(i - i == 0, i, m_im)
    return k_re, k_im, m_re - k_re, m_im - k_im
