"""Exercises of notebook 4."""

import torch
from torch import Tensor

from cbn_lab.exercises.checking import Wrong, exercise
from cbn_lab.whitening import symmetric, whitening_matrix

COVARIANCES = torch.tensor(
    [[2.0, 0.5, 0.3], [0.5, 2.0, -0.8], [1.0, 1.0, 0.6]], dtype=torch.float64
)


def _cloud(size: int = 40) -> Tensor:
    re, im = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.complex(2 * re + 3, 0.7 * re + 0.5 * im - 1)


def _covariance(z: Tensor) -> Tensor:
    z = z - z.mean()
    return torch.stack(
        [(z.real * z.real).mean(), (z.imag * z.imag).mean(), (z.real * z.imag).mean()]
    )


@exercise("covariance")
def covariance(function) -> str:
    z = _cloud()
    got, want = function(z.clone()), _covariance(z)
    if isinstance(got, (tuple, list)) and len(got) == 3:
        raise Wrong("Three values, but not one tensor of shape (3,): put torch.stack around them.")
    if not isinstance(got, Tensor) or got.is_complex() or got.shape != (3,):
        shape = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise Wrong(f"Expected a real tensor of shape (3,): rr, ii, ri. Got: {shape}")
    raw = torch.stack(
        [(z.real * z.real).mean(), (z.imag * z.imag).mean(), (z.real * z.imag).mean()]
    )
    mistakes = {
        "The mean has not been subtracted: these are the mean squares about 0.": raw,
        "Divided by n - 1. Batch norm normalises with the biased covariance, divided by n.": (
            want * len(z) / (len(z) - 1)
        ),
        "Sums, not means: divide by the number of values.": want * len(z),
        "The right three numbers in another order: rr, ii, ri.": want[[0, 2, 1]],
        "ri twice: the covariance of the parts is the mean of re·im.": want
        * torch.tensor([1, 1, 2]),
        "The last number is the correlation: the covariance, divided by both roots.": torch.stack(
            [want[0], want[1], want[2] / (want[0] * want[1]).sqrt()]
        ),
    }
    for message, value in mistakes.items():
        if torch.allclose(got.double(), value):
            raise Wrong(message)
    if not torch.allclose(got.double(), want):
        raise Wrong(f"Got {_text(got)}, expected {_text(want)}.")
    return "rr, ii and ri of a cloud that is off centre."


def _text(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values.flatten().tolist()) + "]"


@exercise("inverse root")
def inverse_root(function) -> str:
    for covar in COVARIANCES:
        got, want, v = function(covar.clone()), whitening_matrix(covar, 0.0), symmetric(covar)
        if not isinstance(got, Tensor) or got.shape != (2, 2):
            shape = tuple(got.shape) if isinstance(got, Tensor) else repr(got)
            raise Wrong(f"Expected a tensor of shape (2, 2), got: {shape}")
        _judge_root(got.double(), want, v)
    return "R·V·R is the identity, for three ellipses."


def _judge_root(got: Tensor, want: Tensor, v: Tensor) -> None:
    s = torch.linalg.det(v).sqrt()
    t = (v.trace() + 2 * s).sqrt()
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=v.dtype)
    mistakes = {
        "This is the root itself. It must be inverted: swap the diagonal, change the other sign.": (
            torch.linalg.inv(want)
        ),
        "The inverse of V, not of its root: it divides by the variance.": torch.linalg.inv(v),
        "The diagonal must be swapped: Vii + s stands where Vrr is.": swapped @ want @ swapped,
        "The sign of the off-diagonal: the inverse of a 2×2 matrix changes it.": want
        * (2 * torch.eye(2) - 1),
        "Not divided by t.": want * t,
        "Not divided by s.": want * s,
        "s is the root of the determinant; the determinant itself stands here.": _with_s(v, s * s),
        "The entries along the diagonal lack the + s.": (want * s * t - s * torch.eye(2)) / (s * t),
    }
    for message, value in mistakes.items():
        if torch.allclose(got, value) and not torch.allclose(got, want):
            raise Wrong(message)
    if torch.allclose(got, want):
        return
    if torch.allclose(got @ v @ got.T, torch.eye(2, dtype=v.dtype)):
        raise Wrong("It whitens, but it is not symmetric: it turns the cloud as well.")
    raise Wrong(f"For V = {_text(v)}: got {_text(got)}, and R·V·R is not the identity.")


def _with_s(v: Tensor, s: Tensor) -> Tensor:
    t = (v.trace() + 2 * s).sqrt()
    rows = [v[1, 1] + s, -v[0, 1], -v[0, 1], v[0, 0] + s]
    return torch.stack(rows).view(2, 2) / (s * t)


@exercise("undo the whitening")
def undo(function) -> str:
    for covar in COVARIANCES:
        got = function(covar.clone())
        if not isinstance(got, Tensor) or got.shape != (3,):
            shape = tuple(got.shape) if isinstance(got, Tensor) else repr(got)
            raise Wrong(f"Expected a tensor of shape (3,): rr, ii, ri of Γ. Got: {shape}")
        root = torch.linalg.inv(whitening_matrix(covar, 0.0))
        want = torch.stack([root[0, 0], root[1, 1], root[0, 1]])
        inverse = torch.linalg.inv(root)
        mistakes = {
            "This Γ is the covariance itself. Whitening has divided by its root only.": covar,
            "This is the whitening matrix: applied twice it does not undo, it whitens again.": (
                torch.stack([inverse[0, 0], inverse[1, 1], inverse[0, 1]])
            ),
            "The root of each number is not the root of the matrix.": torch.stack(
                [covar[0].sqrt(), covar[1].sqrt(), covar[2].abs().sqrt() * covar[2].sign()]
            ),
            "Both standard deviations, without the tilt: ri is missing.": torch.stack(
                [covar[0].sqrt(), covar[1].sqrt(), torch.zeros_like(covar[2])]
            ),
            "The diagonal is swapped: here nothing is inverted.": want[[1, 0, 2]],
        }
        for message, value in mistakes.items():
            if torch.allclose(got.double(), value) and not torch.allclose(value, want):
                raise Wrong(message)
        if not torch.allclose(got.double(), want):
            gave = symmetric(got.double()) @ inverse
            raise Wrong(f"Γ·V^(-1/2) must be the identity, and is {_text(gave)}.")
    return "Γ = V^(1/2) gives back the ellipse."


@exercise("stay finite")
def stay_finite(function) -> str:
    for scale in (1.0, 30.0, 300.0, 3000.0):
        z = _line(scale)
        got, want = function(z.clone()), _whitened(z.to(torch.complex128))
        if not isinstance(got, Tensor) or got.shape != z.shape or not got.is_complex():
            shape = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise Wrong(f"Expected a complex tensor of shape {tuple(z.shape)}, got: {shape}")
        bad = int((~torch.isfinite(torch.view_as_real(got))).any(-1).any(0).sum())
        if bad:
            raise Wrong(
                f"At scale {scale:g}, {bad} of {z.shape[1]} channels are not finite. What is the "
                "first number that loses digits: the determinant, or already the sums?"
            )
        error = float((got.to(torch.complex128) - want).abs().max() / want.abs().max())
        if error > 1e-3:
            raise Wrong(
                f"Finite at scale {scale:g}, but off by {error:.0%} of the largest value: a number "
                "is not right because it is finite."
            )
        if got.dtype != z.dtype:
            raise Wrong(f"The values are right, but complex64 came in and {got.dtype} comes out.")
    return "Right to three digits and better at scales 1, 30, 300 and 3000."


def _line(scale: float) -> Tensor:
    re = scale * torch.randn(512, 8, generator=torch.Generator().manual_seed(3))
    return torch.complex(re, 0.7 * re)


def _whitened(z: Tensor, eps: float = 1e-5) -> Tensor:
    z = z - z.mean(0)
    covar = [(z.real * z.real).mean(0), (z.imag * z.imag).mean(0), (z.real * z.imag).mean(0)]
    r = whitening_matrix(torch.stack(covar, -1), eps)
    real = r[:, 0, 0] * z.real + r[:, 0, 1] * z.imag
    return torch.complex(real, r[:, 1, 0] * z.real + r[:, 1, 1] * z.imag)
