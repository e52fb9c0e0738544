"""The one update rule of every layer here: ``running = (1 - f)·running + f·batch``, in place.

``torch.nn.BatchNorm2d`` has the same rule, written in C++ (ATen's ``batch_norm``), which is why no
line of its Python assigns ``running_mean``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def average_factor(momentum: float | None, num_batches_tracked: int | Tensor) -> float | Tensor:
    """The weight f of the new batch.

    Args:
        momentum: weight of the **new** value (Keras calls 1 minus this number momentum). ``None``
            asks for the cumulative average of all batches.
        num_batches_tracked: batches seen so far, the current one included. A tensor is not read:
            that would wait for its device, and break a compiled graph.
    """
    if momentum is not None:
        return momentum
    if isinstance(num_batches_tracked, Tensor) and num_batches_tracked.device.type != "mps":
        num_batches_tracked = num_batches_tracked.double()  # not the default dtype, perhaps half
    return 1.0 / num_batches_tracked


def bessel(count: int) -> float:
    """n/(n − 1): turns a variance divided by n (biased) into one divided by n − 1."""
    return count / (count - 1)


def moved(running, batch, factor):
    """The rule itself, for tensors and, in the compiled kernels, for single numbers."""
    return (1 - factor) * running + factor * batch


@torch.no_grad()
def update_(running: Tensor, batch: Tensor, factor: float | Tensor) -> None:
    """Move ``running`` towards ``batch`` in place, and leave no history behind.

    ``no_grad`` is the whole cure of the leak: without it the buffer would take the graph of this
    step along into every later one.
    """
    running.copy_(moved(running, batch, factor))


class Running(NamedTuple):
    """The running statistics of a whitening layer, and how far one batch moves them."""

    mean: Tensor | None  # (C, 2)
    covar: Tensor | None  # (C, 3)
    batches: Tensor | None  # how many there were
    factor: float | Tensor
    unbiased: float  # what the batch's covariance is multiplied by

    def moved(self) -> list[Tensor]:
        """What an update moves.

        Raises:
            RuntimeError: where torch would refuse to write, which it does when it has written.
        """
        moved = [tensor for tensor in self[:3] if tensor is not None]
        if any(map(Tensor.is_inference, moved)) and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "expected running statistics that can be updated, got ones made in inference "
                "mode, which can only be updated there; clone() them outside"
            )
        return moved

    def update_(self, mean: Tensor, covar: Tensor) -> None:
        if self.mean is not None:
            update_(self.mean, mean, self.factor)
        if self.covar is not None:
            update_(self.covar, self.unbiased * covar, self.factor)
        if self.batches is not None:
            self.batches.add_(1)
