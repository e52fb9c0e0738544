"""Exercises of notebook 1."""

import math

import torch
from torch import nn

from cbn_lab.exercises.checking import Wrong, exercise


@exercise("update rule")
def update_rule(update) -> str:
    running, batch = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])
    got = update(running.clone(), batch.clone(), 0.1)
    if not isinstance(got, torch.Tensor) or got.shape != running.shape:
        raise Wrong(f"Expected a tensor of shape (2,), the new running value. Got: {got!r}")
    want = torch.tensor([2.2, -0.6])
    if torch.allclose(got, 0.1 * running + 0.9 * batch):
        raise Wrong("The momentum weighs the old value here. In PyTorch it weighs the new one.")
    if torch.allclose(got, running + 0.1 * batch):
        raise Wrong("The weights must add up to 1, or the average grows without bound.")
    if not torch.allclose(got, want):
        raise Wrong(f"For running = [2, -1], batch = [4, 3], momentum 0.1: got {got.tolist()}.")
    layer, running = nn.BatchNorm1d(2), torch.zeros(2)
    for x in torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0)):
        layer(x)
        running = update(running, x.mean(0), 0.1)
    if not torch.allclose(running, layer.running_mean, atol=1e-6):
        raise Wrong("One step is right, but after five it differs from nn.BatchNorm1d.")
    return "Five steps agree with nn.BatchNorm1d."


@exercise("cumulative average")
def cumulative_average(factor) -> str:
    if factor(0.1, 7) != 0.1:
        raise Wrong(f"factor(0.1, 7): a given momentum is the factor. Got {factor(0.1, 7)!r}.")
    values, running = [3.0, 5.0, 10.0, 2.0], 0.0
    for count, value in enumerate(values, start=1):
        f = factor(None, count)
        if not isinstance(f, (int, float)):
            raise Wrong(f"factor(None, {count}): expected a number, got {f!r}.")
        if count == 1 and f != 1:
            raise Wrong(f"The first batch is the whole average: factor(None, 1) is 1. Got {f!r}.")
        running = (1 - f) * running + f * value
    if not math.isclose(running, 5.0):
        raise Wrong(f"The average of {values} is 5; with your factors it comes to {running:.4g}.")
    return "The average of 3, 5, 10, 2 comes to 5."


@exercise("half-life")
def half_life(half_life) -> str:
    for momentum, want in ((0.1, 6.5788), (0.5, 1.0), (0.01, 68.9676)):
        got = half_life(momentum)
        if not isinstance(got, (int, float)) or not math.isfinite(got):
            raise Wrong(f"half_life({momentum}): expected a number, got {got!r}.")
        if got < 0:
            raise Wrong("A half-life is positive: mind the signs of the logarithms.")
        if math.isclose(got, 1 / momentum, rel_tol=1e-3):
            raise Wrong("1/momentum is the memory, where the weight is down to 1/e, not to 1/2.")
        if not math.isclose(got, want, rel_tol=1e-3):
            raise Wrong(f"half_life({momentum}) is about {want:.2f}, got {got:.4g}.")
    return "With momentum 0.1 half of the memory is less than 7 batches long."
