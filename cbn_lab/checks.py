"""Bad input: one place that names what came and what was expected.

Every check runs before anything is computed, so a call that fails leaves the running statistics
as they were.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbn_lab.shapes import values_per_channel


def check_construction(num_features: int, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of parameters and statistics, which is real."""
    try:
        count = operator.index(num_features)
    except TypeError:
        raise TypeError(f"expected num_features to be an int, got {num_features!r}") from None
    if count < 0:
        raise ValueError(f"expected num_features to be 0 or more, got {num_features}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"expected dtype to be a real floating-point type, got {dtype}")
    return dtype


def check_settings(eps: float, momentum: float | Tensor | None, training: bool) -> None:
    if eps < 0 or (training and eps == 0):
        least = "more than 0 in training" if training else "0 or more"
        raise ValueError(f"expected eps to be {least}, got {eps}")
    if momentum is None:
        raise TypeError(
            "expected momentum to be a number, got None; "
            "only layers keep count of the batches, as a cumulative average needs"
        )


def check_rank(input: Tensor, ranks: Sequence[int]) -> None:
    if input.dim() not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(
            f"expected {expected} input, got {input.dim()}D input of shape {tuple(input.shape)}"
        )


def check_real(input: Tensor) -> None:
    check_tensor(input)
    if not input.is_floating_point():
        hint = "; for complex input see ComplexBatchNorm" if input.is_complex() else ""
        raise TypeError(f"expected a real floating-point tensor, got {input.dtype}{hint}")


def check_tensor(input: Any) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"expected a tensor, got {type(input).__name__}")


def check_complex(input: Tensor) -> None:
    check_tensor(input)
    if not input.is_complex():
        raise TypeError(
            f"expected a complex tensor, got {input.dtype}; "
            "for separate real and imaginary parts pass both: bn(re, im)"
        )


def check_pair(parts: Sequence[Any]) -> None:
    if len(parts) != 2:
        raise TypeError(f"expected two real tensors as a pair, got {len(parts)} values")
    real, imag = parts
    for part in (real, imag):
        check_tensor(part)
        if not part.is_floating_point():
            hint = "; one complex tensor goes alone: bn(z)" if part.is_complex() else ""
            raise TypeError(f"expected two real tensors as a pair, got {part.dtype}{hint}")
    if real.shape != imag.shape or real.dtype != imag.dtype or real.device != imag.device:
        raise ValueError(
            "expected real and imaginary parts of one shape, dtype and device, got "
            f"{tuple(real.shape)} {real.dtype} on {real.device} and "
            f"{tuple(imag.shape)} {imag.dtype} on {imag.device}"
        )


def check_channels(input: Tensor, num_features: int) -> None:
    if input.dim() < 2:
        raise ValueError(
            f"expected input of shape (N, C, ...), got {input.dim()}D input of shape "
            f"{tuple(input.shape)}"
        )
    if input.shape[1] != num_features:
        raise ValueError(
            f"expected {num_features} channels in dimension 1, got {input.shape[1]} "
            f"(input of shape {tuple(input.shape)})"
        )


def check_shape(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """An absent (None) weight, bias or statistic is allowed; one of another shape or device, not.

    The device matters most: a compiled engine is handed addresses.
    """
    if tensor is None:
        return
    if tensor.device != device:
        raise ValueError(f"expected {name} on {device}, as the input, got {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"expected {name} of a real floating-point type, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")


def check_counter(counter: Tensor | None) -> None:
    if counter is None:
        return
    check_tensor(counter)
    if counter.dtype in (torch.bool, torch.uint8) or counter.is_floating_point():
        raise TypeError(f"expected num_batches_tracked to be an integer, got {counter.dtype}")
    if counter.numel() != 1:
        raise ValueError(
            f"expected num_batches_tracked to be one number, got shape {tuple(counter.shape)}"
        )


def check_statistics_given(**statistics: Tensor | None) -> None:
    missing = [name for name, value in statistics.items() if value is None]
    if missing:
        raise ValueError(f"expected {' and '.join(missing)} when training=False, got None")


def check_enough_values(input: Tensor) -> int:
    """The number of values per channel, which in training must be two or more.

    One value has no spread: its biased variance is 0 and the unbiased one 0/0.
    """
    count = values_per_channel(input)
    if count < 2:
        raise ValueError(
            "expected more than 1 value per channel when training, got "
            f"{count} (input of shape {tuple(input.shape)})"
        )
    return count
