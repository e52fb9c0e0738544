"""What a correct layer computes, in float64, and what the usual mistakes compute instead."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cbn_lab import batch_norm, complex_batch_norm
from cbn_lab.running_stats import bessel

Statistics = dict[str, Tensor]


class Real:
    """Input, statistics and output of a real 2d layer."""

    spread = "running_var"
    initial = {"running_mean": 0.0, "running_var": 1.0}
    parameters = {"weight": (), "bias": ()}  # what a parameter holds for each channel

    def batch(self, seed: int, shape: tuple[int, ...] = (4, 3, 5, 6)) -> Tensor:
        """(N, C, H, W), with a mean and a spread of its own in every channel."""
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=source)
        scale = torch.rand(shape[1], generator=source) + 0.5
        shift = torch.randn(shape[1], generator=source)
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased spread of each channel."""
        return batch_norm.moments(x.double())

    def normalise(
        self, x: Tensor, mean: Tensor, spread: Tensor, layer: nn.Module, eps: float
    ) -> Tensor:
        weight, bias = (_parameter(layer, name) for name in ("weight", "bias"))
        return batch_norm.normalise(x.double(), mean, spread, weight, bias, eps)

    def eps_outside(self, x: Tensor, spread: Tensor, eps: float) -> Tensor:
        """The spread that, with eps inside the root, acts as this one does with eps outside."""
        return (spread.sqrt() + eps) ** 2 - eps


class Complex:
    """Input, statistics and output of a whitening complex 2d layer."""

    spread = "running_covar"
    initial = {"running_mean": 0.0, "running_covar": math.sqrt(0.5)}
    parameters = {"weight": (3,), "bias": (2,)}

    def batch(self, seed: int, shape: tuple[int, ...] = (4, 3, 5, 6)) -> Tensor:
        """Complex (N, C, H, W) whose real and imaginary parts are correlated."""
        x, y = (Real().batch(seed + k, shape) for k in (0, 1000))
        return torch.complex(x, 0.8 * x + 0.6 * y)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return complex_batch_norm.moments(x.real.double(), x.imag.double())

    def normalise(
        self, x: Tensor, mean: Tensor, spread: Tensor, layer: nn.Module, eps: float
    ) -> Tensor:
        weight, bias = (_parameter(layer, name) for name in ("weight", "bias"))
        parts = x.real.double(), x.imag.double()
        return torch.complex(*complex_batch_norm.whiten(*parts, mean, spread, weight, bias, eps))


KINDS = {"real": Real, "complex": Complex}


def _parameter(layer: nn.Module, name: str) -> Tensor | None:
    value = getattr(layer, name, None)
    if not isinstance(value, Tensor):
        return None
    return (torch.view_as_real(value) if value.is_complex() else value).double()


def as_real(value: Tensor) -> Tensor:
    """A complex statistic (C,) as (C, 2); float64, without history."""
    value = value.detach()
    return (torch.view_as_real(value) if value.is_complex() else value).double()


def running(
    reference: Real | Complex, batches: Iterable[Tensor], start: Statistics, momentum: float
) -> Statistics:
    """The running statistics after some batches: weight ``momentum`` for the new, unbiased."""
    mean, spread = start["running_mean"], start[reference.spread]
    for x in batches:
        batch_mean, batch_spread = reference.moments(x)
        unbiased = batch_spread * bessel(count(x))
        mean = (1 - momentum) * mean + momentum * batch_mean
        spread = (1 - momentum) * spread + momentum * unbiased
    return {"running_mean": mean, reference.spread: spread}


def mistaken_spreads(
    reference: Real | Complex, x: Tensor, start: Tensor, momentum: float
) -> dict[str, Tensor]:
    """The running spread after one batch, as each usual mistake has it."""
    biased = reference.moments(x)[1]
    n, samples = count(x), x.shape[0]
    mistakes = {
        "the biased variance (divided by n)": biased,
        "a variance corrected twice": biased * bessel(n) ** 2,
        "n counts the samples and forgets the pixels": biased * bessel(samples),
    }
    found = {text: (1 - momentum) * start + momentum * value for text, value in mistakes.items()}
    found["momentum is the weight of the old value, not of the new one"] = momentum * start + (
        1 - momentum
    ) * biased * bessel(n)
    return found


def count(x: Tensor) -> int:
    """Values per channel: samples times pixels."""
    return x.numel() // x.shape[1]
