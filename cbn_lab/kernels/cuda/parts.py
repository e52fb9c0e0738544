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
    """Where tile t begins along A, and along B."""
    return t // LB * BA, p * BB if ROWS else t % LB * BB


@triton.jit
def inside(a0, b0, A, B, BA: tl.constexpr, BB: tl.constexpr):
    """Which values of the tile exist."""
    return (a0 + tl.arange(0, BA) < A)[:, None] & (tl.arange(0, BB) < B - b0)[None, :]


@triton.jit
def inside_pairs(a0, b0, A, B, BA: tl.constexpr, BB: tl.constexpr):
    """The same for real and imaginary parts in turn; 2·B may be more than 32 bits hold."""
    left = 2 * tl.minimum(B - b0, BB)
    return (a0 + tl.arange(0, BA) < A)[:, None] & (tl.arange(0, 2 * BB) < left)[None, :]


@triton.jit
def from_row(a0, sA, BA: tl.constexpr):
    return ((a0 + tl.arange(0, BA)).to(tl.int64) * sA)[:, None]


@triton.jit
def read(re, im, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    """Real and imaginary parts of a tile, 0 outside."""
    at = from_row(a0, sA, BA)
    if im is None:
        at += (2 * b0.to(tl.int64) + tl.arange(0, 2 * BB))[None, :]
        both = tl.load(re + at, mask=inside_pairs(a0, b0, A, B, BA, BB), other=0)
        u, v = tl.split(tl.reshape(both, [BA, BB, 2]))
    else:
        at += (b0 + tl.arange(0, BB))[None, :]
        mask = inside(a0, b0, A, B, BA, BB)
        u, v = tl.load(re + at, mask=mask, other=0), tl.load(im + at, mask=mask, other=0)
    return u, v


@triton.jit
def write(re, im, u, v, a0, b0, A, B, sA, BA: tl.constexpr, BB: tl.constexpr):
    at = from_row(a0, sA, BA)
    if im is None:
        at += (2 * b0.to(tl.int64) + tl.arange(0, 2 * BB))[None, :]
        both = tl.reshape(tl.join(u, v), [BA, 2 * BB])
        tl.store(re + at, both, mask=inside_pairs(a0, b0, A, B, BA, BB))
    else:
        at += (b0 + tl.arange(0, BB))[None, :]
        mask = inside(a0, b0, A, B, BA, BB)
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
def three(matrix, c, C):
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
def two(vector, c, C):
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
    if not DOUBLE:
        k_re, k_im = m_re.to(tl.float32).to(tl.float64), m_im.to(tl.float32).to(tl.float64)
    return k_re, k_im, m_re - k_re, m_im - k_im
