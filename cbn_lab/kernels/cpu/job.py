"""What a compiled loop is told: one C structure, the same for ctypes and for numba."""

import ctypes

TILE = 1024  # channels that a task in rows has at most
LOOPS = (  # in the order of a forward and a backward
    *("guess", "moments", "finish_moments", "map_forward", "apply", "move_running"),
    *("shift_to_mean", "gram", "finish_gram", "map_backward", "apply_backward"),
)

INTEGERS = (
    "counter",  # the next task; comes first, the loops count at the address of the structure
    "samples",  # N; 1 where the layout is rows
    "channels",  # C
    "length",  # L; the number of rows where the layout is rows
    "sample_block",  # how much of N, C and L makes one task
    "channel_block",
    "length_block",
    "count",  # values per channel, over all ranks
    "training",  # 0: mean and covariance are given, and constants
    "only_wide",  # do only the channels marked as wide
    "wide_found",  # how many finish_moments has marked
    "stream",  # write the result past the cache
    # Addresses of the real and imaginary parts of input, output gradient and result; their strides
    # from sample to sample (row to row) and from channel to channel, in real numbers.
    *(f"{a}_{b}" for a in ("x", "g", "y") for b in ("re", "im", "sample", "channel")),
    # Addresses of small arrays, float64 unless a number here says that they are float32.
    "single",  # weight, bias and their gradients
    "statistics_single",  # mean and covariance, where they are given
    "running_single",  # both running statistics
    "partial",  # (parts, 6, C) sums
    "shift",  # (2, C) the point about which sums are taken
    "wide",  # (C,) whether the channel is done in float64
    "map",  # (12, C) the linear map of each channel
    "mean",  # (C, 2)
    "covar",  # (C, 3), biased
    "weight",  # (C, 3) or 0
    "bias",  # (C, 2) or 0
    "total",  # (C, 2): Σ g
    "product",  # (C, 4): Σ g·(x − μ)ᵀ
    "weight_grad",  # (C, 3)
    "bias_grad",  # (C, 2)
    "running_mean",  # (C, 2) or 0
    "running_covar",  # (C, 3) or 0
    "batches",  # int64: how many there were; or 0
    "parallel",  # address of GOMP_parallel
    "threads",  # how many it is to start
    *LOOPS,  # their addresses
)
NUMBERS = (
    "eps",
    "factor",  # weight of this batch in the running statistics
    "unbiased",  # what its covariance is multiplied by before
)


class Job(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [
        (name, ctypes.c_double) for name in NUMBERS
    ]


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def ceil_to(unit: int, a: int) -> int:
    return ceil_divide(a, unit) * unit
