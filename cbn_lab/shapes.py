"""Which dimension is what: (N, C, ...) has its channels in dimension 1."""

from jaxtyping import Float
from torch import Tensor


def reduced_dims(input: Tensor) -> list[int]:
    """All dimensions but the channels': n counts pixels as well as samples."""
    return [dim for dim in range(input.dim()) if dim != 1]


def values_per_channel(input: Tensor) -> int:
    return input.numel() // max(input.shape[1], 1)


def per_channel(values: Float[Tensor, "C"], input: Tensor) -> Float[Tensor, "1 C *ones"]:
    """Shape (C,) so that it broadcasts against (N, C, ...)."""
    return values.reshape(1, -1, *[1] * (input.dim() - 2))
