"""The 2×2 mathematics of whitening: no layers, no batches.

A covariance of real and imaginary part is kept as three numbers (rr, ii, ri), a symmetric 2×2
matrix as three or as four. All of it is a few numbers per channel and costs nothing in float64,
which is what keeps strongly correlated parts finite.

The first functions are plain arithmetic and take whatever has ``+ - * /``: tensors here, single
numbers in the loops that numba compiles, vectors of channels in Triton's kernels. These two read
their source, so they have no annotations and call nothing; ``sqrt`` comes from the caller.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def roots(rr, ii, ri, eps, sqrt):
    """s = √det and t = √(trace + 2s) of V + eps·I.

    They are the determinant and the trace of its square root S = (V + (eps + s)·I)/t.
    """
    # A covariance has det ≥ 0. Rounding may say otherwise where the parts are proportional; what
    # eps adds is kept apart so that it is not lost beside two large products that cancel.
    det = rr * ii - ri * ri
    det = det * (det > 0) + eps * (rr + ii) + eps * eps
    s = sqrt(det)
    return s, sqrt(rr + ii + 2 * eps + 2 * s)


def inverse_root(rr, ii, ri, eps, s, t):
    """R = (V + eps·I)^(−1/2) as rr, ii, ri, from s and t of :func:`roots`."""
    return (ii + eps + s) / (s * t), (rr + eps + s) / (s * t), -ri / (s * t)


def congruence(m_rr, m_ii, m_ri, x_rr, x_ii, x_ri):
    """M·X·M of two symmetric matrices, which is symmetric too."""
    rr = m_rr * m_rr * x_rr + 2 * m_rr * m_ri * x_ri + m_ri * m_ri * x_ii
    ii = m_ri * m_ri * x_rr + 2 * m_ri * m_ii * x_ri + m_ii * m_ii * x_ii
    ri = m_ri * (m_rr * x_rr + m_ii * x_ii) + (m_rr * m_ii + m_ri * m_ri) * x_ri
    return rr, ii, ri


def matmul(m_rr, m_ii, m_ri, x_rr, x_ri, x_ir, x_ii):
    """M·X as rr, ri, ir, ii; M is symmetric."""
    rr, ri = m_rr * x_rr + m_ri * x_ir, m_rr * x_ri + m_ri * x_ii
    return rr, ri, m_ri * x_rr + m_ii * x_ir, m_ri * x_ri + m_ii * x_ii


def adjoint(w, rwr, s, t):
    """V̄ from W = R·R̄·R and R·W·R, all of it or one number: see whitening_matrix_adjoint."""
    return -(w + s * rwr) / (2 * t)


def is_wide(rr, ii, ri, eps):
    """Whether float32 would lose more than two digits to cancellation: correlation above 0.995.

    Or be short of exponents, as its square is from 1e19 on; that may have shown as inf or NaN.
    """
    both = (rr + eps) * (ii + eps)
    # As arithmetic: vectors have no `and` and no `not`. A NaN is wide.
    return ((rr + ii < 1e30) & (both - ri * ri >= 0.01 * both)) == 0


def whitening_matrix(covar: Float[Tensor, "*C 3"], eps: float) -> Float[Tensor, "*C 2 2"]:
    """R = (V + eps·I)^(−1/2), the symmetric inverse square root.

    Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5. With s = √det and
    t = √(trace + 2s) of V + eps·I, Cayley-Hamilton gives the root, and with it

        R = [[Vii + s, −Vri], [−Vri, Vrr + s]] / (s·t)

    Args:
        covar: (..., 3) covariances in the order rr, ii, ri; in units of the input squared.
        eps: added to both variances, as batch norm adds it to its one.

    Returns:
        (..., 2, 2) in the dtype of ``covar``; computed in float64.

    Raises:
        ValueError: the last dimension is not 3.
        TypeError: ``covar`` is not real.
    """
    if covar.shape[-1:] != (3,):
        raise ValueError(f"expected covar of shape (..., 3), got {tuple(covar.shape)}")
    if not covar.is_floating_point():
        raise TypeError(f"expected covar of a real floating-point type, got {covar.dtype}")
    v = covar.double().unbind(-1)
    root = inverse_root(*v, eps, *roots(*v, eps, torch.sqrt))
    return symmetric(torch.stack(root, -1)).to(covar.dtype)


def whitening_matrix_adjoint(
    covar: Float[Tensor, "*C 3"], eps: float, grad: Float[Tensor, "*C 2 2"]
) -> Float[Tensor, "*C 2 2"]:
    """The gradient of V where ``grad`` is the symmetric gradient of R = (V + eps·I)^(−1/2).

    With S = R⁻¹, it solves S·V̄ + V̄·S = −R·R̄·R =: −W. For 2×2 matrices the solution is
    V̄ = −(W + det S·R·W·R) / (2·tr S).
    """
    s, t = (value[..., None, None] for value in roots(*covar.unbind(-1), eps, torch.sqrt))
    r = whitening_matrix(covar, eps)
    w = r @ grad @ r
    return adjoint(w, r @ w @ r, s, t)


def symmetric(values: Float[Tensor, "*C 3"]) -> Float[Tensor, "*C 2 2"]:
    """(rr, ii, ri) written out as a matrix."""
    rr, ii, ri = values.unbind(-1)
    return torch.stack([rr, ri, ri, ii], -1).unflatten(-1, (2, 2))
