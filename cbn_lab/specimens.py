"""The leaks and their cures, side by side. Never use one of the leaks in a model of yours.

Every layer here is a batch norm in plain torch, written as one writes it the first time, and
differs from the others in one thing only: how the running statistics are brought up to date. The
leaks keep the autograd graph of every step alive through the buffer; the cures do not;
``over_detached`` cuts too much, and computes a wrong gradient without a word.
"""

from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from cbn_lab import batch_norm, complex_batch_norm
from cbn_lab.checks import check_enough_values, check_real
from cbn_lab.kernels import reference
from cbn_lab.running_stats import bessel


def rebind(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    setattr(module, name, f * batch + (1 - f) * getattr(module, name))


def inplace(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    getattr(module, name).mul_(1 - f).add_(f * batch)


def slices(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    running = getattr(module, name)
    for k in range(running.shape[1]):
        running[:, k] = f * batch[:, k] + (1 - f) * running[:, k]


def lerp(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    getattr(module, name).lerp_(batch, f)


def copy(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    running = getattr(module, name)
    running.copy_(f * batch + (1 - f) * running)


def no_grad(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    with torch.no_grad():
        setattr(module, name, f * batch + (1 - f) * getattr(module, name))


def detach(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    setattr(module, name, f * batch.detach() + (1 - f) * getattr(module, name))


def data(module: nn.Module, name: str, batch: Tensor, f: float) -> None:
    setattr(module, name, f * batch.data + (1 - f) * getattr(module, name))


LEAKS: dict[str, Callable[[nn.Module, str, Tensor, float], None]] = {
    "rebind": rebind,
    "inplace": inplace,
    "slice": slices,
    "lerp": lerp,
    "copy": copy,
}
CURES = {"no_grad": no_grad, "detach": detach, "data": data}
# The batch statistics themselves are computed without a graph: no leak, and a wrong gradient.
OVER_CURES = {"over_detached": rebind}
UPDATES = {**LEAKS, **CURES, **OVER_CURES}


class _Specimen:
    """The ``update=`` argument, and the training step around it."""

    def __init__(self, *args, update: str = "rebind", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        allowed = [name for name in UPDATES if name != "slice" or self.slices_columns]
        if update not in allowed:
            raise ValueError(f"expected update to be one of {', '.join(allowed)}, got {update!r}")
        self.update = update

    slices_columns = False  # whether a statistic has columns to assign one by one

    def statistics(self, compute: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased (co)variance to normalise with; in training also updates the running."""
        names = list(self.initial_statistics)
        if not self.training and self.track_running_stats:
            return tuple(getattr(self, name) for name in names)
        count = check_enough_values(inputs[0])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.update not in OVER_CURES):
            mean, spread = compute(*inputs)
        if self.training and self.track_running_stats:
            f = self.average_factor()
            for name, batch in zip(names, (mean, spread * bessel(count)), strict=True):
                UPDATES[self.update](self, name, batch, f)
            self.num_batches_tracked.add_(1)
        return mean, spread

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, update={self.update!r}"


class LeakyBatchNorm2d(_Specimen, batch_norm.BatchNorm2d):
    """A real batch norm that leaks on purpose: (N, C, H, W) in, the same shape out.

    Args:
        update: ``"rebind"``, ``"inplace"``, ``"lerp"``, ``"copy"`` leak; ``"no_grad"``,
            ``"detach"``, ``"data"`` are the cures; ``"over_detached"`` computes the batch
            statistics without a graph, and so a wrong gradient.

    All other arguments are those of ``torch.nn.BatchNorm2d``.
    """

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        check_real(input)
        self.check_input(input)
        mean, var = self.statistics(batch_norm.moments, input)
        return batch_norm.normalise(input, mean, var, self.weight, self.bias, self.eps)


class LeakyComplexBatchNorm2d(_Specimen, complex_batch_norm.ComplexBatchNorm2d):
    """The thread's whitening layer, which leaks on purpose: complex (N, C, H, W).

    Args:
        update: as for :class:`LeakyBatchNorm2d`, and ``"slice"``, the thread's own form:
            ``running_covar[:, 0] = ...`` column by column.
    """

    slices_columns = True

    def forward(
        self,
        input: Complex[Tensor, "N C H W"] | Float[Tensor, "N C H W"],
        imag: Float[Tensor, "N C H W"] | None = None,
    ) -> Complex[Tensor, "N C H W"] | complex_batch_norm.Pair:
        parts = complex_batch_norm.split(input if imag is None else (input, imag))
        self.check_input(parts[0])
        mean, covar = self.statistics(reference.moments, *parts)
        out = reference.whiten(*parts, mean, covar, self.weight, self.bias, self.eps)
        return torch.complex(*out) if imag is None else out
