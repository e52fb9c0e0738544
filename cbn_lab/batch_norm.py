"""Batch normalisation of real input: functional form, hand-derived backward, modules.

Ioffe and Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift*, ICML 2015, Algorithm 1:

    y = γ·(x − μ)/√(σ² + ε) + β

with mean μ and **biased** variance σ² of each channel over batch and space. The running variance
stores the **unbiased** one. Conventions, names and ``state_dict`` are those of ``torch.nn``.
"""

import operator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbn_lab import checks
from cbn_lab.running_stats import average_factor, bessel, update_
from cbn_lab.shapes import per_channel, reduced_dims


def batch_norm(
    input: Float[Tensor, "N C *spatial"],
    running_mean: Float[Tensor, "C"] | None,
    running_var: Float[Tensor, "C"] | None,
    weight: Float[Tensor, "C"] | None = None,
    bias: Float[Tensor, "C"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "N C *spatial"]:
    """``torch.nn.functional.batch_norm`` in plain torch; autograd derives the backward.

    Args:
        input: (N, C, ...), real. Half precision is computed in float32.
        running_mean, running_var: (C,) each, or None; updated in place when training.
        weight, bias: (C,) each: γ and β, or None for 1 and 0.
        training: normalise with the batch's statistics rather than the running ones.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance, inside the root; in units of the input squared.

    Raises:
        ValueError: wrong shapes, one value per channel in training, no statistics in evaluation.
        TypeError: input that is not real.
    """
    check_arguments(input, running_mean, running_var, weight, bias, training)
    checks.check_settings(eps, momentum, training)
    x = input.to(working_dtype(input.dtype))
    if training:
        mean, var = moments(x)
    else:
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    output = normalise(x, mean, var, weight, bias, eps).to(input.dtype)
    if training:  # last of all: what fails above leaves the statistics as they were
        update_running(input, mean, var, running_mean, running_var, momentum)
    return output


def moments(
    x: Float[Tensor, "N C *spatial"],
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """Mean and biased variance of each channel, in one numerically stable pass (Welford)."""
    var, mean = torch.var_mean(x, reduced_dims(x), correction=0)
    return mean, var


def normalise(
    x: Float[Tensor, "N C *spatial"],
    mean: Float[Tensor, "C"],
    var: Float[Tensor, "C"],
    weight: Float[Tensor, "C"] | None,
    bias: Float[Tensor, "C"] | None,
    eps: float,
) -> Float[Tensor, "N C *spatial"]:
    """γ·(x − μ)/√(σ² + ε) + β: eps stands inside the root."""
    output = (x - per_channel(mean, x)) * per_channel(torch.rsqrt(var + eps), x)
    if weight is not None:
        output = output * per_channel(weight.to(x.dtype), x)
    if bias is not None:
        output = output + per_channel(bias.to(x.dtype), x)
    return output


class BatchNormFunction(torch.autograd.Function):
    """:func:`batch_norm` with its backward derived by hand; only the input is saved.

    ``BatchNormFunction.apply`` takes the arguments of :func:`batch_norm`, all eight of them.
    With x̂ = (x − μ)/σ, σ = √(var + ε) and ḡ = γ·g (Ioffe and Szegedy 2015, section 3):

        β̄ = Σ g        γ̄ = Σ g·x̂        x̄ = (ḡ − mean(ḡ) − x̂·mean(ḡ·x̂)) / σ

    The two means are what flows back through μ and σ. In evaluation these are constants, and
    x̄ = ḡ/σ. The backward is made of torch operations, so it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Float[Tensor, "N C *spatial"],
        running_mean: Float[Tensor, "C"] | None,
        running_var: Float[Tensor, "C"] | None,
        weight: Float[Tensor, "C"] | None,
        bias: Float[Tensor, "C"] | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Float[Tensor, "N C *spatial"]:
        # In evaluation the statistics are constants of this call, which a later update must not
        # change under the backward's feet.
        constants = (None, None) if training else (running_mean.clone(), running_var.clone())
        ctx.save_for_backward(input, weight, *constants)
        ctx.training, ctx.eps, ctx.has_bias = training, eps, bias is not None
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        x, g, dims = input.to(working_dtype(input.dtype)), grad, reduced_dims(input)
        if ctx.training:
            mean, var = moments(x)
        inv_std = per_channel(torch.rsqrt(var + ctx.eps), x)
        x_hat = (x - per_channel(mean, x)) * inv_std
        grad_weight = (g * x_hat).sum(dims) if weight is not None else None
        grad_bias = g.sum(dims) if ctx.has_bias else None
        grad_input = g if weight is None else g * per_channel(weight, x)
        if ctx.training:
            grad_input = (
                grad_input
                - grad_input.mean(dims, keepdim=True)
                - x_hat * (grad_input * x_hat).mean(dims, keepdim=True)
            )
        grad_input = (grad_input * inv_std).to(input.dtype)
        return grad_input, None, None, grad_weight, grad_bias, None, None, None


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half-precision input are computed in float32, as in ATen."""
    return torch.promote_types(dtype, torch.float32)


def check_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    checks.check_real(input)
    given = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    # No next(..., default): torch.compile of the oldest supported torch does not know it.
    lengths = [tensor.shape[0] for tensor in given.values() if tensor is not None]
    checks.check_channels(input, lengths[0] if lengths else input.shape[1:2].numel())
    for name, tensor in given.items():
        checks.check_shape(name, tensor, (input.shape[1],), input.device)
    if training:
        checks.check_enough_values(input)
    else:
        checks.check_statistics_given(running_mean=running_mean, running_var=running_var)


def update_running(
    input: Tensor,
    mean: Float[Tensor, "C"],
    var: Float[Tensor, "C"],
    running_mean: Float[Tensor, "C"] | None,
    running_var: Float[Tensor, "C"] | None,
    factor: float,
) -> None:
    """The running variance stores the unbiased estimate, n/(n − 1) times the one normalised by."""
    if running_mean is not None:
        update_(running_mean, mean, factor)
    if running_var is not None:
        unbiased = bessel(checks.check_enough_values(input)) * var.detach()
        update_(running_var, unbiased, factor)


class NormBase(nn.Module):
    """What all batch norms here share: constructor, parameters, statistics, choice of mode.

    Subclasses name what a channel needs, ``weight`` and ``bias`` and two statistics, each with the
    value it starts from: a number (shape (C,)) or a tuple of k numbers (shape (C, k)).
    """

    _version = 2  # as torch's: version 1 had no num_batches_tracked
    ranks: tuple[int, ...]
    initial_parameters: dict[str, float | tuple[float, ...]]
    initial_statistics: dict[str, float | tuple[float, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        dtype = checks.check_construction(num_features, self.parameter_dtype(dtype))
        self.num_features = operator.index(num_features)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        for name, initial in self.initial_parameters.items():
            present = affine and (bias or name != "bias")
            value = self._filled(initial, device, dtype) if present else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        for name, initial in self.initial_statistics.items():
            kept = self.statistics_dtype(dtype)
            value = self._filled(initial, device, kept) if track_running_stats else None
            self.register_buffer(name, value)
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)

    def parameter_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        return dtype

    def statistics_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _filled(self, initial: Any, device: Any, dtype: torch.dtype | None) -> Tensor:
        row = torch.tensor(initial, device=device, dtype=dtype)
        return row.expand(self.num_features, *row.shape).clone()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            for name, initial in self.initial_statistics.items():
                getattr(self, name).copy_(torch.tensor(initial))
            self.num_batches_tracked.zero_()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            for name, initial in self.initial_parameters.items():
                if getattr(self, name) is not None:
                    getattr(self, name).copy_(torch.tensor(initial))

    def check_input(self, input: Tensor) -> None:
        checks.check_rank(input, self.ranks)
        checks.check_channels(input, self.num_features)

    def run(self, function: Any, input: Any) -> Any:
        """Call the functional form; the batch is counted only once that has succeeded."""
        *state, count, training, momentum = self.arguments()
        output = function(input, *state, training=training, momentum=momentum, eps=self.eps)
        if count is not None:
            count.add_(1)
        return output

    def arguments(self) -> tuple[Any, ...]:
        """What a functional form is told of the mode that this module is in.

        Returns:
            statistics, weight, bias, the counter if the batch counts, ``training``, ``momentum``.
        """
        mean, spread, weight, bias = self.state()
        if self.training and self.track_running_stats:
            own, name = self._buffers, "num_batches_tracked"
            count = own[name] if name in own else getattr(self, name)
            return mean, spread, weight, bias, count, True, self.average_factor()
        if self.training:  # statistics, if there are any, are neither used nor moved
            return None, None, weight, bias, None, True, 0.0
        return mean, spread, weight, bias, None, mean is None and spread is None, 0.0

    def state(self) -> tuple[Tensor | None, ...]:
        """Statistics, weight and bias; as attributes they would be looked for elsewhere first."""
        buffers, parameters = self._buffers, self._parameters
        mean, spread = self.initial_statistics
        try:
            return buffers[mean], buffers[spread], parameters["weight"], parameters["bias"]
        except KeyError:  # one of them is computed by torch.nn.utils.parametrize
            return tuple([getattr(self, name) for name in (mean, spread, "weight", "bias")])

    def average_factor(self) -> float | Tensor:
        """The weight of the batch at hand, which has not been counted yet."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:  # nothing to count with, as in torch
            return 0.0
        return average_factor(None, self.num_batches_tracked + 1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        key = prefix + "num_batches_tracked"
        if (local_metadata.get("version") or 1) < 2 and self.track_running_stats:
            state_dict.setdefault(key, self.num_batches_tracked)
        for name in (*self.initial_parameters, *self.initial_statistics):
            value, own = state_dict.get(prefix + name), getattr(self, name)
            # Copying complex numbers into real ones would drop the imaginary part with a warning.
            if own is not None and value is not None and value.is_complex():
                errors.append(
                    f"{prefix}{name}: expected real numbers of shape {tuple(own.shape)}, "
                    f"got {value.dtype} of shape {tuple(value.shape)}"
                )
                del state_dict[prefix + name]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )


class _BatchNorm(NormBase):
    initial_parameters = {"weight": 1.0, "bias": 0.0}
    initial_statistics = {"running_mean": 0.0, "running_var": 1.0}

    def forward(self, input: Float[Tensor, "N C *spatial"]) -> Float[Tensor, "N C *spatial"]:
        checks.check_real(input)
        self.check_input(input)
        return self.run(batch_norm, input)


class BatchNorm1d(_BatchNorm):
    """``torch.nn.BatchNorm1d`` from scratch: (N, C) or (N, C, L) in, the same shape out."""

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """``torch.nn.BatchNorm2d`` from scratch: (N, C, H, W) in, the same shape out."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """``torch.nn.BatchNorm3d`` from scratch: (N, C, D, H, W) in, the same shape out."""

    ranks = (5,)
