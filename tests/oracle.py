"""What the complex layers must return, computed another way: float64 and an eigendecomposition."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


class Expected(NamedTuple):
    output: Tensor  # complex128, the shape of the input
    mean: Tensor  # (C, 2)
    covar: Tensor  # (C, 3): rr, ii, ri, divided by n


def complex_batch_norm(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    covar: Tensor | None = None,
) -> Expected:
    """Γ·V^(−1/2)·(x − μ) + β channel by channel, with V^(−1/2) from ``numpy.linalg.eigh``.

    ``mean`` and ``covar`` stand in for the batch's own, as in evaluation.
    """
    values = z.detach().cpu().to(torch.complex128).movedim(1, 0).resolve_conj().numpy()
    output, means, covars = np.empty_like(values), [], []
    for c, channel in enumerate(values):
        x = np.stack([channel.real.ravel(), channel.imag.ravel()])
        mu = x.mean(1) if mean is None else mean[c].detach().double().numpy()
        x = x - mu[:, None]
        if covar is None:
            v = x @ x.T / x.shape[1]
        else:
            rr, ii, ri = covar[c].detach().double().tolist()
            v = np.array([[rr, ri], [ri, ii]])
        spread, axes = np.linalg.eigh(v)
        root = axes @ np.diag((np.maximum(spread, 0) + eps) ** -0.5) @ axes.T
        if weight is not None:
            rr, ii, ri = weight[c].detach().double().tolist()
            root = np.array([[rr, ri], [ri, ii]]) @ root
        y = root @ x
        if bias is not None:
            y = y + bias[c].detach().double().numpy()[:, None]
        output[c] = (y[0] + 1j * y[1]).reshape(channel.shape)
        means.append(mu)
        covars.append([v[0, 0], v[1, 1], v[0, 1]])
    return Expected(
        torch.from_numpy(output).movedim(0, 1),
        torch.tensor(np.array(means)),
        torch.tensor(np.array(covars)),
    )


def correlated(
    *shape: int, slope: float = 0.5, scale: float = 1.0, dtype: torch.dtype = torch.complex64
) -> Tensor:
    """Complex noise whose imaginary part is ``slope`` times the real one, plus its own noise."""
    re, im = torch.randn(2, *shape, dtype=torch.float64)
    return (scale * torch.complex(re, slope * re + 0.3 * im + 0.1)).to(dtype)


@st.composite
def batches(draw):
    """A complex input in some memory layout, contiguous or not."""
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    if n * torch.Size(spatial).numel() < 2:
        n += 1
    dtype = draw(st.sampled_from([torch.complex64, torch.complex128]))
    shape, kind = (
        (n, c, *spatial),
        draw(st.sampled_from(["plain", "permuted", "sliced", "expanded"])),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        z = correlated(*(shape[d] for d in order), dtype=dtype)
        z = z.permute([order.index(d) for d in range(len(shape))])
    elif kind == "sliced":
        z = correlated(*(s + 2 for s in shape), dtype=dtype)[tuple(slice(1, -1) for _ in shape)]
    elif kind == "expanded":
        z = correlated(n, c, *([1] * len(spatial)), dtype=dtype).expand(shape)
    else:
        z = correlated(*shape, dtype=dtype)
    return z.conj() if draw(st.booleans()) else z


RUNNING = {  # statistics in many forms
    "float32": lambda t: t.float(),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0].float(),
    "negative view": lambda t: torch._neg_view(-t.float()),
}
