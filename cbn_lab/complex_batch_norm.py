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
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cbn_lab import checks, kernels
from cbn_lab.batch_norm import NormBase, batch_norm
from cbn_lab.kernels.reference import Pair
from cbn_lab.running_stats import Running, bessel
from cbn_lab.shapes import values_per_channel


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
    num_batches_tracked: Int[Tensor, ""] | None = None,
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
        num_batches_tracked: counted up by one in training, together with the statistics.

    Raises:
        ValueError: wrong shapes, one value per channel in training, no statistics in evaluation.
        TypeError: a real tensor where a complex one is due.
    """
    state = running_mean, running_covar, weight, bias, num_batches_tracked
    return whitened(input, *state, training, momentum, eps, engine)


def whitened(
    input: Tensor | Pair,
    running_mean: Tensor | None,
    running_covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batches: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    engine: str = "auto",
    layer: NormBase | None = None,
) -> Tensor | Pair:
    """:func:`complex_batch_norm`, also for a layer, which says by itself what input it takes."""
    parts = parts_of(input)
    given = *parts, running_mean, running_covar, weight, bias, batches
    kind = None if layer is None else (layer.num_features, *layer.ranks)
    settings = bool(training), str(engine), isinstance(input, Tensor), kind
    watched = kernels.is_watched(given)
    known = None if watched else kernels.recall_call(given, settings)
    if layer is not None and (known is None or type(layer).check_input is not NormBase.check_input):
        layer.check_input(part_of(input))
    if known is None:
        check_arguments(input, running_mean, running_covar, weight, bias, training)
    checks.check_settings(eps, momentum, training)
    if known is None:
        checks.check_counter(batches)
        if training:
            checks.check_enough_values(parts[0])
        kernels.check_engine(engine, parts[0].device.type)
        known = None if watched else kernels.learn_call(given, settings)
    mean, covar, running = running_mean, running_covar, None
    if training:
        mean = covar = None
        unbiased = bessel(values_per_channel(parts[0]))
        running = Running(running_mean, running_covar, batches, momentum, unbiased)
    output = kernels.whiten(parts, mean, covar, weight, bias, eps, engine, running, known)
    return output if len(output) == 2 else output[0]


def parts_of(input: Tensor | Pair) -> tuple[Tensor, ...]:
    """The complex tensor or the two real ones, or whatever came."""
    return tuple(input) if isinstance(input, (tuple, list)) else (input,)


def check_arguments(
    input: Tensor | Pair,
    running_mean: Tensor | None,
    running_covar: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    re = part_of(input)
    checks.check_channels(re, channels(re, running_mean, running_covar, weight, bias))
    c, device = re.shape[1], re.device
    checks.check_shape("running_mean", running_mean, (c, 2), device)
    checks.check_shape("running_covar", running_covar, (c, 3), device)
    checks.check_shape("weight", weight, (c, 3), device)
    checks.check_shape("bias", bias, (c, 2), device)
    if not training:
        checks.check_statistics_given(running_mean=running_mean, running_covar=running_covar)


def channels(re: Tensor, *given: Tensor | None) -> int:
    """The channel count that the first of the given per-channel tensors asks for."""
    for tensor in given:
        if tensor is not None:
            return tensor.shape[:1].numel()
    return re.shape[1:2].numel()


def part_of(input: Tensor | Pair) -> Tensor:
    """One tensor that has the shape and device of the whole, checked to be what it must be."""
    if isinstance(input, (tuple, list)):
        checks.check_pair(input)
        return input[0]
    checks.check_complex(input)
    return input


def split(input: Tensor | Pair) -> Pair:
    """Real and imaginary part."""
    part_of(input)
    return (input.real, input.imag) if isinstance(input, Tensor) else tuple(input)


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
        checks.check_shape(name, tensor, (parts[0].shape[1], 2), parts[0].device)
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
    def forward(
        self,
        input: Complex[Tensor, "N C *spatial"] | Float[Tensor, "N C *spatial"],
        imag: Float[Tensor, "N C *spatial"] | None = None,
    ) -> Complex[Tensor, "N C *spatial"] | Pair:
        """``bn(z)`` for complex z, or ``bn(re, im)``, which returns a pair."""
        return self.normalise(input if imag is None else (input, imag))

    def parameter_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """``dtype=torch.complex64`` asks for float32: parameters and statistics are real."""
        return dtype.to_real() if dtype is not None and dtype.is_complex else dtype

    def statistics_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32: in half precision a covariance overflows where the input is 256."""
        return torch.promote_types(dtype, torch.float32)

    def _apply(self, fn, recurse=True):
        """``.to(torch.complex64)`` keeps all real, ``.half()`` the statistics in float32."""

        def real(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_complex() and not tensor.is_complex():
                return tensor.to(moved.device, moved.dtype.to_real())
            return moved

        before = {name: self._buffers[name] for name in self.initial_statistics}
        super()._apply(real, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != self.statistics_dtype(new.dtype):
                self._buffers[name] = old.to(new.device, self.statistics_dtype(new.dtype))
        return self


class _NaiveComplexBatchNorm(_ComplexNormBase):
    initial_parameters = {"weight": (1.0, 1.0), "bias": (0.0, 0.0)}
    initial_statistics = {"running_mean": (0.0, 0.0), "running_var": (1.0, 1.0)}

    def normalise(self, value: Tensor | Pair) -> Tensor | Pair:
        self.check_input(part_of(value))
        return self.run(naive_complex_batch_norm, value)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Two real layers, complexPyTorch's ``bn_r`` and ``bn_i``, become our two columns."""
        for name in (*self.initial_parameters, *self.initial_statistics):
            keys = [f"{prefix}bn_{part}.{name}" for part in "ri"]
            if all(key in state_dict for key in keys):
                columns = [state_dict.pop(key) for key in keys]
                state_dict[prefix + name] = torch.stack(columns, -1)
        counts = [state_dict.pop(f"{prefix}bn_{p}.num_batches_tracked", None) for p in "ri"]
        if counts[0] is not None:
            state_dict[prefix + "num_batches_tracked"] = counts[0]
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ComplexBatchNorm(_ComplexNormBase):
    # 1/√2 twice: whitened parts have variance 1 each, so this Γ makes the total variance 1.
    initial_parameters = {"weight": (math.sqrt(0.5), math.sqrt(0.5), 0.0), "bias": (0.0, 0.0)}
    initial_statistics = {
        "running_mean": (0.0, 0.0),
        "running_covar": (math.sqrt(0.5), math.sqrt(0.5), 0.0),
    }

    def normalise(self, value: Tensor | Pair) -> Tensor | Pair:
        # The engine counts the batch with the statistics: an addition of its own would take as long
        # as the arithmetic of a small layer.
        return whitened(value, *self.arguments(), self.eps, layer=self)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """complexPyTorch keeps ``running_mean`` as C complex numbers: the same as (C, 2) reals."""
        mean = state_dict.get(prefix + "running_mean")
        if mean is not None and mean.is_complex() and mean.shape == (self.num_features,):
            state_dict[prefix + "running_mean"] = torch.view_as_real(mean.resolve_conj())
        super()._load_from_state_dict(state_dict, prefix, *args)


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
    """Whitening by the 2×2 covariance: complex (N, C) or (N, C, L).

    ``bn(z)`` takes and returns a complex tensor, ``bn(re, im)`` a pair of real ones. Arguments and
    behaviour are those of ``torch.nn.BatchNorm1d``; ``weight`` is (C, 3), the symmetric Γ as rr,
    ii, ri; ``bias`` (C, 2); ``running_mean`` (C, 2); ``running_covar`` (C, 3), unbiased, without
    eps. Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5.

    Checkpoints of complexPyTorch load. Its running covariance has eps in it already, and is taken
    as it is: evaluation adds eps as it does there, so that outputs agree; in further training that
    share fades. Its Γ starts at √2 rather than 1/√2, its momentum and order rr, ii, ri are ours.

    Raises:
        ValueError: wrong rank, shape or channel count, one value per channel in training.
        TypeError: a real tensor where a complex one is due.
    """

    ranks = (2, 3)


class ComplexBatchNorm2d(_ComplexBatchNorm):
    """Whitening by the 2×2 covariance: complex (N, C, H, W).

    ``bn(z)`` takes and returns a complex tensor, ``bn(re, im)`` a pair of real ones. Arguments and
    behaviour are those of ``torch.nn.BatchNorm2d``; ``weight`` is (C, 3), the symmetric Γ as rr,
    ii, ri; ``bias`` (C, 2); ``running_mean`` (C, 2); ``running_covar`` (C, 3), unbiased, without
    eps. Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5.

    Checkpoints of complexPyTorch load. Its running covariance has eps in it already, and is taken
    as it is: evaluation adds eps as it does there, so that outputs agree; in further training that
    share fades. Its Γ starts at √2 rather than 1/√2, its momentum and order rr, ii, ri are ours.

    Raises:
        ValueError: wrong rank, shape or channel count, one value per channel in training.
        TypeError: a real tensor where a complex one is due.
    """

    ranks = (4,)


class ComplexBatchNorm3d(_ComplexBatchNorm):
    """Whitening by the 2×2 covariance: complex (N, C, D, H, W).

    ``bn(z)`` takes and returns a complex tensor, ``bn(re, im)`` a pair of real ones. Arguments and
    behaviour are those of ``torch.nn.BatchNorm3d``; ``weight`` is (C, 3), the symmetric Γ as rr,
    ii, ri; ``bias`` (C, 2); ``running_mean`` (C, 2); ``running_covar`` (C, 3), unbiased, without
    eps. Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5.

    Checkpoints of complexPyTorch load. Its running covariance has eps in it already, and is taken
    as it is: evaluation adds eps as it does there, so that outputs agree; in further training that
    share fades. Its Γ starts at √2 rather than 1/√2, its momentum and order rr, ii, ri are ours.

    Raises:
        ValueError: wrong rank, shape or channel count, one value per channel in training.
        TypeError: a real tensor where a complex one is due.
    """

    ranks = (5,)
