"""Exercises of notebook 8."""

import math

import torch

from cbn_lab.exercises.checking import Wrong, exercise


@exercise("traffic bound")
def traffic_bound(bound) -> str:
    got = bound(2_000_000, 10)
    if not isinstance(got, (int, float)) or not math.isfinite(got):
        raise Wrong(f"Expected a number of milliseconds, got {got!r}.")
    want = 12.8  # 16 MB, eight times, at 10 GB/s
    mistakes = {
        want / 1000: "That is in seconds.",
        want / 8: "Either the eight sweeps or the 8 bytes of a value are missing.",
        want * 5 / 8: "Five sweeps are the least; here it is to be eight.",
        want / 2: "complex64 is two float32 numbers: 8 bytes a value.",
        want / 1.073741824: "Here a gigabyte is 10⁹ bytes, not 2³⁰.",
    }
    for value, message in mistakes.items():
        if math.isclose(got, value, rel_tol=1e-3):
            raise Wrong(message)
    if math.isclose(got, want, rel_tol=1e-3) and not math.isclose(bound(2_000_000, 20), want / 2):
        raise Wrong("With twice the bandwidth it should take half as long.")
    if not math.isclose(got, want, rel_tol=1e-3):
        raise Wrong(f"2 million values at 10 GB/s: expected {want} ms, got {got:.4g}.")
    return "2 million values at 10 GB/s: 12.8 ms."


@exercise("fold")
def fold(fold) -> str:
    generator = torch.Generator().manual_seed(0)
    gamma, r = torch.randn(2, 3, 2, 2, generator=generator)
    mean, bias, x = torch.randn(3, 3, 2, generator=generator)
    got = fold(gamma.clone(), r.clone(), mean.clone(), bias.clone())
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong(f"Expected two tensors, a and b. Got: {type(got).__name__}")
    a, b = got
    for name, tensor, shape in (("a", a, (3, 2, 2)), ("b", b, (3, 2))):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            found = tuple(getattr(tensor, "shape", ())) or type(tensor).__name__
            raise Wrong(f"Expected {name} of shape {shape}, got {found}.")
    if torch.allclose(a, r @ gamma):
        raise Wrong("R acts on x first, so it stands on the right: a is gamma @ r.")
    if torch.allclose(a, gamma * r):
        raise Wrong("* multiplies entry by entry; the product of matrices is @.")
    if not torch.allclose(a, gamma @ r, atol=1e-5):
        raise Wrong("a is not what takes x to Γ·R·x.")
    wrong = {
        "The mean passes through a as well: b is bias - a·mean.": bias - mean,
        "Mind the sign of the mean: it is subtracted from x.": bias + apply(a, mean),
        "In b, the mean passes through R and then through Γ.": bias - apply(r, mean),
    }
    for message, value in wrong.items():
        if torch.allclose(b, value, atol=1e-5):
            raise Wrong(message)
    want = apply(gamma @ r, x - mean) + bias
    if not torch.allclose(apply(a, x) + b, want, atol=1e-4):
        raise Wrong("a is right; but a·x + b differs from Γ·R·(x - μ) + β.")
    return "One map for each channel."


@exercise("one sweep")
def one_sweep(covariance) -> str:
    generator = torch.Generator().manual_seed(0)
    re, im = torch.randn(2, 4096, generator=generator)
    re, im = 2 * re + 1, 0.5 * im + 0.3 * re - 2
    want = torch.cov(torch.stack([re, im]).double(), correction=0)
    want = torch.stack([want[0, 0], want[1, 1], want[0, 1]])
    got = three(covariance(re.clone(), im.clone()))
    if torch.allclose(got, want * 4096 / 4095, rtol=1e-5, atol=0):
        raise Wrong("That is the unbiased form: here divide by n, as for normalising.")
    if not torch.allclose(got[:2], want[:2], rtol=1e-3):
        moved = three(covariance(re + 1, im))
        if abs(moved[0] - got[0]) > 0.5:
            raise Wrong("A shift of all values changes your variance: the squared mean is missing.")
        raise Wrong(
            f"Variances near {want[0]:.2f} and {want[1]:.2f} expected, got {show(got[:2])}."
        )
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
        raise Wrong(f"The variances are right; the third, ri, should be near {want[2]:.2f}.")
    far = three(covariance(re + 1e4, im - 1e4))
    want = torch.cov(torch.stack([re + 1e4, im - 1e4]).double(), correction=0)
    want = torch.stack([want[0, 0], want[1, 1], want[0, 1]])
    if not torch.allclose(far, want, rtol=1e-2, atol=1e-2):
        raise Wrong(
            f"Right near 0; but at a mean of 10⁴ it gives {show(far)} in place of "
            f"{show(want)}: two large numbers cancel. What could you subtract first?"
        )
    return "Right, and still right at a mean of 10⁴."


def apply(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (a @ x[..., None])[..., 0]


def three(values) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        values = values.reshape(-1).tolist()
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        raise Wrong(f"Expected three numbers, rr, ii and ri. Got: {values!r}")
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def show(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())
