"""The 2×2 mathematics of whitening: no layers, no batches.

A covariance of real and imaginary part is kept as three numbers (rr, ii, ri), a symmetric 2×2
matrix as three or as four. All of it is a few numbers per channel and costs nothing in float64,
which is what keeps strongly correlated parts finite.
"""

import torch
from jaxtyping import Float
from torch import Tensor


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
    """
    if covar.shape[-1:] != (3,):
        raise ValueError(f"expected covar of shape (..., 3), got {tuple(covar.shape)}")
    rr, ii, ri = covar.double().unbind(-1)
    # A covariance has det ≥ 0. Rounding may say otherwise where the parts are proportional; what
    # eps adds is kept apart so that it is not lost beside two large products that cancel.
    det = (rr * ii - ri * ri).clamp(min=0) + eps * (rr + ii) + eps * eps
    s = det.sqrt()
    t = (rr + ii + 2 * eps + 2 * s).sqrt()
    rows = [ii + eps + s, -ri, -ri, rr + eps + s]
    return (torch.stack(rows, -1) / (s * t).unsqueeze(-1)).unflatten(-1, (2, 2)).to(covar.dtype)


def symmetric(values: Float[Tensor, "*C 3"]) -> Float[Tensor, "*C 2 2"]:
    """(rr, ii, ri) written out as a matrix."""
    rr, ii, ri = values.unbind(-1)
    return torch.stack([rr, ri, ri, ii], -1).unflatten(-1, (2, 2))
