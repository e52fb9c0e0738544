"""The 2×2 mathematics of whitening: no layers, no batches.

A covariance of real and imaginary part is kept as three numbers (rr, ii, ri), a symmetric 2×2
matrix as three or as four. All of it is a few numbers per channel and costs nothing in float64,
which is what keeps strongly correlated parts finite.

:func:`roots`, :func:`inverse_root` and :func:`congruence` are plain arithmetic and take whatever
has ``+ - * /``: tensors here, single numbers in the compiled kernels. ``sqrt`` comes from the
caller.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def roots(rr: Any, ii: Any, ri: Any, eps: Any, sqrt: Callable) -> tuple[Any, Any]:
    """s = √det and t = √(trace + 2s) of V + eps·I.

    They are the determinant and the trace of its square root S = (V + (eps + s)·I)/t.
    """
    # A covariance has det ≥ 0. Rounding may say otherwise where the parts are proportional; what
    # eps adds is kept apart so that it is not lost beside two large products that cancel.
    det = rr * ii - ri * ri
    det = det * (det > 0) + eps * (rr + ii) + eps * eps
    s = sqrt(det)
    return s, sqrt(rr + ii + 2 * eps + 2 * s)


def inverse_root(rr: Any, ii: Any, ri: Any, eps: Any, s: Any, t: Any) -> tuple[Any, Any, Any]:
    """R = (V + eps·I)^(−1/2) as rr, ii, ri, from s and t of :func:`roots`."""
    return (ii + eps + s) / (s * t), (rr + eps + s) / (s * t), -ri / (s * t)


def congruence(
    m_rr: Any, m_ii: Any, m_ri: Any, x_rr: Any, x_ii: Any, x_ri: Any
) -> tuple[Any, Any, Any]:
    """M·X·M of two symmetric matrices, which is symmetric too."""
    rr = m_rr * m_rr * x_rr + 2 * m_rr * m_ri * x_ri + m_ri * m_ri * x_ii
    ii = m_ri * m_ri * x_rr + 2 * m_ri * m_ii * x_ri + m_ii * m_ii * x_ii
    ri = m_ri * (m_rr * x_rr + m_ii * x_ii) + (m_rr * m_ii + m_ri * m_ri) * x_ri
    return rr, ii, ri


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
    return -(w + s * (r @ w @ r)) / (2 * t)


def symmetric(values: Float[Tensor, "*C 3"]) -> Float[Tensor, "*C 2 2"]:
    """(rr, ii, ri) written out as a matrix."""
    rr, ii, ri = values.unbind(-1)
    return torch.stack([rr, ri, ri, ii], -1).unflatten(-1, (2, 2))
