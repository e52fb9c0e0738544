"""Batch normalisation of complex input: the naive form and the whitening one.

Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5. A complex value is a point in
the plane. The naive layers scale its two coordinates apart; the whitening layers turn the cloud
of all values of a channel into a round one:

    y = Γ·V^(−1/2)·(x − μ) + β,     x = (re, im)

A layer takes a complex tensor and returns one, or takes a pair of real ones and returns a pair.
Its statistics and parameters are real: DDP over NCCL cannot broadcast complex buffers.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cbn_lab import checks, kernels
from cbn_lab.batch_norm import NormBase, batch_norm
from cbn_lab.kernels.reference import Pair
from cbn_lab.running_stats import bessel, update_


def complex_batch_norm(
    input: Complex[Tensor, "N C *spatial"] | Pair,
    running_mean: Float[Tensor, "C 2"] | None,
    running_covar: Float[Tensor, "C 3"] | None,
    weight: Float[Tensor, "C 3"] | None = None,
    bias: Float[Tensor, "C 2"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    engine: str = "auto",
) -> Complex[Tensor, "N C *spatial"] | Pair:
    """Whiten each channel by the 2×2 covariance of its real and imaginary part.

    Args:
        input: (N, C, ...) complex, or a pair of real tensors of that shape.
        running_mean, running_covar: (C, 2) and (C, 3), or None; updated in place when training.
            The covariance is stored unbiased, in the order rr, ii, ri, and without eps.
        weight: (C, 3): the symmetric Γ as rr, ii, ri; None for the identity.
        bias: (C, 2): β; None for 0.
        training, momentum, eps: as in :func:`cbn_lab.functional.batch_norm`.
        engine: "auto" takes the fastest one for the device: "numba" on the CPU, "triton" on CUDA,
            else "reference", which is plain torch in float64.

    Raises:
        ValueError: wrong shapes, one value per channel in training, no statistics in evaluation.
        TypeError: a real tensor where a complex one is due.
    """
    parts = check_arguments(input, running_mean, running_covar, weight, bias, training)
    checks.check_eps(eps, training)
    statistics = (None, None) if training else (running_mean, running_covar)
    output, mean, covar = kernels.whiten(parts, *statistics, weight, bias, eps, engine)
    if training:
        if running_mean is not None:
            update_(running_mean, mean, momentum)
        if running_covar is not None:
            update_(running_covar, covar * bessel(checks.check_enough_values(parts[0])), momentum)
    return output if len(output) == 2 else output[0]


def check_arguments(
    input: Tensor | Pair,
    running_mean: Tensor | None,
    running_covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> tuple[Tensor, ...]:
    """The complex tensor or the two real ones, once everything has been found as it must be."""
    re, _ = split(input)
    checks.check_channels(re, channels(re, running_mean, running_covar, weight, bias))
    rows = dict(running_mean=2, running_covar=3, weight=3, bias=2)
    given = (running_mean, running_covar, weight, bias)
    for (name, length), tensor in zip(rows.items(), given, strict=True):
        checks.check_shape(name, tensor, (re.shape[1], length))
    checks.check_statistics_given(training, running_mean=running_mean, running_covar=running_covar)
    if training:
        checks.check_enough_values(re)
    return (input,) if isinstance(input, Tensor) else tuple(input)


def channels(re: Tensor, *given: Tensor | None) -> int:
    """The channel count that the first of the given per-channel tensors asks for."""
    return next((len(tensor) for tensor in given if tensor is not None), re.shape[1:2].numel())


def split(input: Tensor | Pair) -> Pair:
    if isinstance(input, (tuple, list)):
        checks.check_pair(*input)
        return tuple(input)
    checks.check_complex(input)
    return input.real, input.imag


def naive_complex_batch_norm(
    input: Complex[Tensor, "N C *spatial"] | Pair,
    running_mean: Float[Tensor, "C 2"] | None,
    running_var: Float[Tensor, "C 2"] | None,
    weight: Float[Tensor, "C 2"] | None = None,
    bias: Float[Tensor, "C 2"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Complex[Tensor, "N C *spatial"] | Pair:
    """Real batch norm of the real and of the imaginary part, each with its column of numbers."""
    parts = split(input)
    state = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    checks.check_channels(parts[0], channels(parts[0], *state.values()))
    for name, tensor in state.items():
        checks.check_shape(name, tensor, (parts[0].shape[1], 2))
    out = (
        batch_norm(
            part,
            *(None if tensor is None else tensor[:, column] for tensor in state.values()),
            training=training,
            momentum=momentum,
            eps=eps,
        )
        for column, part in enumerate(parts)
    )
    return tuple(out) if isinstance(input, (tuple, list)) else torch.complex(*out)


class _ComplexNormBase(NormBase):
    function = None  # the functional form that a subclass runs

    def forward(
        self,
        input: Complex[Tensor, "N C *spatial"] | Float[Tensor, "N C *spatial"],
        imag: Float[Tensor, "N C *spatial"] | None = None,
    ) -> Complex[Tensor, "N C *spatial"] | Pair:
        """``bn(z)`` for complex z, or ``bn(re, im)``, which returns a pair."""
        value = input if imag is None else (input, imag)
        self.check_input(split(value)[0])
        return self.run(type(self).function, value)


class _NaiveComplexBatchNorm(_ComplexNormBase):
    function = naive_complex_batch_norm
    initial_parameters = {"weight": (1.0, 1.0), "bias": (0.0, 0.0)}
    initial_statistics = {"running_mean": (0.0, 0.0), "running_var": (1.0, 1.0)}


class _ComplexBatchNorm(_ComplexNormBase):
    function = complex_batch_norm
    # 1/√2 twice: whitened parts have variance 1 each, so this Γ makes the total variance 1.
    initial_parameters = {"weight": (math.sqrt(0.5), math.sqrt(0.5), 0.0), "bias": (0.0, 0.0)}
    initial_statistics = {
        "running_mean": (0.0, 0.0),
        "running_covar": (math.sqrt(0.5), math.sqrt(0.5), 0.0),
    }


class NaiveComplexBatchNorm1d(_NaiveComplexBatchNorm):
    """Real and imaginary parts normalised apart: complex (N, C) or (N, C, L)."""

    ranks = (2, 3)


class NaiveComplexBatchNorm2d(_NaiveComplexBatchNorm):
    """Real and imaginary parts normalised apart: complex (N, C, H, W)."""

    ranks = (4,)


class NaiveComplexBatchNorm3d(_NaiveComplexBatchNorm):
    """Real and imaginary parts normalised apart: complex (N, C, D, H, W)."""

    ranks = (5,)


class ComplexBatchNorm1d(_ComplexBatchNorm):
    """Whitening by the 2×2 covariance: complex (N, C) or (N, C, L)."""

    ranks = (2, 3)


class ComplexBatchNorm2d(_ComplexBatchNorm):
    """Whitening by the 2×2 covariance: complex (N, C, H, W)."""

    ranks = (4,)


class ComplexBatchNorm3d(_ComplexBatchNorm):
    """Whitening by the 2×2 covariance: complex (N, C, D, H, W)."""

    ranks = (5,)
