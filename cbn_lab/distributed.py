"""Whitening by the statistics of all ranks of a ``torch.distributed`` group.

Each rank sends its count, mean and covariance in one all-reduce, in a row of its own: merging
them afterwards (Chan, Golub and LeVeque 1979) does not cancel where the mean is large, as sums of
squares would. The backward sends Σ g and Σ g·(x − μ)ᵀ in one all-reduce.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cbn_lab import checks
from cbn_lab.complex_batch_norm import (
    Pair,
    _ComplexBatchNorm,
    check_arguments,
    complex_batch_norm,
    part_of,
)
from cbn_lab.kernels import operator, reference
from cbn_lab.running_stats import Running, bessel
from cbn_lab.shapes import values_per_channel


def sync_complex_batch_norm(
    input: Complex[Tensor, "N C *spatial"] | Pair,
    running_mean: Float[Tensor, "C 2"] | None,
    running_covar: Float[Tensor, "C 3"] | None,
    weight: Float[Tensor, "C 3"] | None = None,
    bias: Float[Tensor, "C 2"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    num_batches_tracked: Int[Tensor, ""] | None = None,
) -> Complex[Tensor, "N C *spatial"] | Pair:
    """:func:`cbn_lab.functional.complex_batch_norm` over all ranks of ``process_group``.

    Batches may differ in size, and be empty on some ranks. All ranks must call it together.

    Raises:
        ValueError: as there; one value per channel means over all ranks.
    """
    given = (input, running_mean, running_covar, weight, bias)
    if not training or world_size(process_group) == 1:
        mode = dict(training=training, momentum=momentum, eps=eps)
        return complex_batch_norm(*given, **mode, num_batches_tracked=num_batches_tracked)
    check_arguments(*given, training)
    checks.check_settings(eps, momentum, training)
    checks.check_counter(num_batches_tracked)
    re, imag = (input, None) if isinstance(input, Tensor) else input
    y, y_imag, mean, covar, count = SyncWhiten.apply(re, imag, weight, bias, eps, process_group)
    state = running_mean, running_covar, num_batches_tracked
    Running(*state, momentum, bessel(int(count))).update_(mean, covar)
    return y if imag is None else (y, y_imag)


def world_size(group: Any) -> int:
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if ready else 1


def reduced_moments(
    mean: Float[Tensor, "C 2"], covar: Float[Tensor, "C 3"], count: int, group: Any
) -> tuple[Float[Tensor, "C 2"], Float[Tensor, "C 3"], int]:
    """Mean, biased covariance and count over all ranks; in one all-reduce."""
    rows = mean.new_zeros(world_size(group), mean.shape[0], 6)
    own = torch.cat([mean, covar, mean.new_full((mean.shape[0], 1), count)], 1)
    rows[dist.get_rank(group)] = own
    dist.all_reduce(rows, group=group)
    means, covars, counts = rows[..., :2], rows[..., 2:5], rows[..., 5:]
    total = int(counts[:, 0].sum()) if mean.shape[0] else 0
    if total < 2:
        raise ValueError(
            "expected more than 1 value per channel over all ranks when training, "
            f"got {total} (here {count})"
        )
    share = counts / total
    mean = (share * means).sum(0)
    d = means - mean
    between = torch.stack([d[..., 0] ** 2, d[..., 1] ** 2, d[..., 0] * d[..., 1]], -1)
    return mean, (share * (covars + between)).sum(0), total


class SyncWhiten(torch.autograd.Function):
    """Forward and backward of the sweeps, with an all-reduce in the middle of each."""

    @staticmethod
    def forward(ctx: Any, input, imag, weight, bias, eps, group):
        parts = operator.widened(input, imag)
        sweep = operator.start(parts, eps, "auto")
        count = values_per_channel(input)
        c = input.shape[1]
        empty = (parts[0].real.new_zeros(c, k, dtype=torch.float64) for k in (2, 3))
        mean, covar = sweep.moments() if count else empty
        mean, covar, total = reduced_moments(mean, covar, count, group)
        y = operator.as_dtype(sweep.apply(mean, covar, weight, bias), input.dtype)
        sweep.finish(None, mean, covar)
        ctx.save_for_backward(input, imag, weight, mean, covar)
        ctx.eps, ctx.group, ctx.total = eps, group, total
        ctx.bias_dtype = None if bias is None else bias.dtype
        counted = torch.tensor(total, device="cpu")
        second = y[1] if imag is not None else input.new_empty(0)
        ctx.mark_non_differentiable(mean, covar, counted, *([second] if imag is None else []))
        return y[0], second, mean, covar, counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad, grad_imag, *_):
        input, imag, weight, mean, covar = ctx.saved_tensors
        sweep = operator.start(operator.widened(input, imag), ctx.eps, "auto")
        grad_imag = None if imag is None else grad_imag
        sweep.take_gradient(operator.widened(grad, grad_imag), mean, covar)
        total, product = sweep.gram()
        # The parameters' gradients stay each rank's own: DDP averages them.
        weight_grad, bias_grad = reference.parameter_gradients(covar, ctx.eps, total, product)
        x = (None, None)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            sums = torch.cat([total, product.flatten(1)], 1)
            dist.all_reduce(sums, group=ctx.group)
            total, product = sums[:, :2].contiguous(), sums[:, 2:].unflatten(1, (2, 2))
            x, *_ = sweep.apply_backward(weight, total, product.contiguous(), ctx.total, True)
            x = (*operator.as_dtype(x, input.dtype), None)
        return (
            x[0],
            x[1],
            None if weight is None else weight_grad.to(weight.dtype),
            None if ctx.bias_dtype is None else bias_grad.to(ctx.bias_dtype),
            None,
            None,
        )


class SyncComplexBatchNorm(_ComplexBatchNorm):
    """``ComplexBatchNorm`` with the statistics of all ranks: (N, C, ...) with any spatial shape.

    Args:
        process_group: the ranks that share statistics; None for all.

    All other arguments are those of :class:`cbn_lab.ComplexBatchNorm2d`, and so are parameters,
    buffers and ``state_dict``. Without an initialised ``torch.distributed`` it is that layer.
    """

    ranks = tuple(range(2, 9))

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def normalise(self, value: Tensor | Pair) -> Tensor | Pair:
        self.check_input(part_of(value))
        *state, count, training, momentum = self.arguments()
        mode = dict(training=training, momentum=momentum, eps=self.eps)
        more = dict(num_batches_tracked=count, process_group=self.process_group)
        return sync_complex_batch_norm(value, *state, **mode, **more)


def convert_sync_complex_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """``module`` with every ``ComplexBatchNorm*d`` in it replaced by a ``SyncComplexBatchNorm``.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: parameters and buffers are the same
    objects, so an optimiser made before stays valid.
    """
    result = module
    if isinstance(module, _ComplexBatchNorm) and not isinstance(module, SyncComplexBatchNorm):
        result = SyncComplexBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            device="meta",
            process_group=process_group,
        )
        result._parameters.update(module._parameters)
        result._buffers.update(module._buffers)
        result.training = module.training
    for name, child in module.named_children():
        setattr(result, name, convert_sync_complex_batchnorm(child, process_group))
    return result
