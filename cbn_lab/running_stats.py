"""The one update rule of every layer here: ``running = (1 - f)·running + f·batch``, in place.

``torch.nn.BatchNorm2d`` has the same rule, written in C++ (ATen's ``batch_norm``), which is why no
line of its Python assigns ``running_mean``.
"""

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
    return 1.0 / num_batches_tracked if momentum is None else momentum


def bessel(count: int) -> float:
    """n/(n − 1): turns a variance divided by n (biased) into one divided by n − 1."""
    return count / (count - 1)


@torch.no_grad()
def update_(running: Tensor, batch: Tensor, factor: float | Tensor, scale: float = 1.0) -> None:
    """Move ``running`` towards ``scale·batch`` in place, and leave no history behind.

    ``no_grad`` is the whole cure of the leak: without it the buffer would take the graph of this
    step along into every later one.
    """
    if isinstance(factor, Tensor):
        running.mul_(1 - factor).add_(batch * factor, alpha=scale)
    else:
        running.mul_(1 - factor).add_(batch, alpha=factor * scale)
