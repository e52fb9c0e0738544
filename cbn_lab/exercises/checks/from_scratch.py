"""Exercises of notebook 2."""

import torch
from torch import nn

from cbn_lab import check_batch_norm
from cbn_lab.exercises.checking import TODO, StillToDo, Wrong, exercise


def _batch(*shape: int) -> torch.Tensor:
    """Channels of different mean; samples and pixels that differ in mean as well."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=source)
    for dim, step in enumerate((1.0, 3.0, 0.5, 0.7)[: len(shape)]):
        ramp = step * torch.arange(shape[dim])
        x = x + ramp.view([-1 if d == dim else 1 for d in range(len(shape))])
    return x


@exercise("batch statistics")
def batch_statistics(statistics) -> str:
    x = _batch(4, 3, 5, 2)
    got = statistics(x.clone())
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong("Return two tensors: return mean, var.")
    mean, var = got
    for name, value in (("mean", mean), ("var", var)):
        shape = tuple(getattr(value, "shape", ("not a tensor",)))
        if shape == ():
            raise Wrong(f"{name} is one number for all channels. Keep dimension 1.")
        if shape != (3,):
            raise Wrong(
                f"{name} has shape {shape}, expected (3,): one number per channel. Over which "
                "dimensions must be averaged so that only the channels are left?"
            )
    dims = (0, 2, 3)
    if not torch.allclose(mean, x.mean(dims), atol=1e-5):
        raise Wrong(f"The means are not right: got {mean.tolist()}.")
    if torch.allclose(var, x.var(dims), atol=1e-5):
        raise Wrong("This variance is divided by n - 1. To normalise, divide by n: correction=0.")
    parts = (x.var((2, 3), correction=c).mean(0) for c in (0, 1))
    pixels = (x.var(0, correction=c).mean((1, 2)) for c in (0, 1))
    if any(torch.allclose(var, value, atol=1e-5) for value in (*parts, *pixels)):
        raise Wrong(
            "An average of variances leaves out how the averages themselves vary. Give torch.var "
            "all dimensions at once."
        )
    if torch.allclose(var, x.std(dims, correction=0), atol=1e-5):
        raise Wrong("That is the standard deviation. The variance is its square.")
    if not torch.allclose(var, x.var(dims, correction=0), atol=1e-4):
        raise Wrong(f"The variances are not right: got {var.tolist()}.")
    for shape in ((6, 3), (4, 3, 5)):
        mean, var = _for_shape(statistics, _batch(*shape))
        dims = [dim for dim in range(len(shape)) if dim != 1]
        x = _batch(*shape)
        if not (
            torch.allclose(mean, x.mean(dims), atol=1e-5)
            and torch.allclose(var, x.var(dims, correction=0), atol=1e-4)
        ):
            raise Wrong(f"Right for (N, C, H, W), but not for an input of shape {shape}.")
    return "For two, three and four dimensions."


def _for_shape(statistics, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return statistics(x.clone())
    except (IndexError, RuntimeError) as error:
        raise Wrong(
            f"Right for (N, C, H, W), but an input of shape {tuple(x.shape)} raises "
            f"{type(error).__name__}: build the list of dimensions from x.dim()."
        ) from error


@exercise("variance to store")
def variance_to_store(to_store) -> str:
    x = _batch(4, 3, 5, 2)
    var = x.var((0, 2, 3), correction=0)
    got = to_store(var.clone(), x.clone())
    if not isinstance(got, torch.Tensor) or got.shape != var.shape:
        raise Wrong(f"Expected a tensor of shape (3,), one variance per channel. Got: {got!r}")
    n = 40
    mistakes = {
        "Unchanged: this is still the variance divided by n.": 1.0,
        "Your n counts the samples and forgets the pixels: here n is 40, not 4.": 4 / 3,
        "Your n counts all channels together: here n is 40, not 120.": 120 / 119,
        "The unbiased variance is the larger of the two: it is n/(n - 1), not (n - 1)/n.": (n - 1)
        / n,
    }
    for message, factor in mistakes.items():
        if torch.allclose(got, var * factor, rtol=1e-5, atol=0):
            raise Wrong(message)
    if not torch.allclose(got, var * n / (n - 1), rtol=1e-5, atol=0):
        factor = (got / var).mean()
        raise Wrong(f"With n = 40 the factor must be {n / (n - 1):.4f}, yours is {factor:.4f}.")
    return "With n = 40 the factor is 40/39."


@exercise("normalise")
def normalise(function) -> str:
    # C equals W, so that shapes which are lined up wrongly do not fail of themselves.
    x, (mean, weight, bias) = _batch(4, 3, 5, 3), torch.tensor([[1.0, 4, 7], [1, 2, 3], [0, 1, -1]])
    var, eps = torch.tensor([1.0, 4.0, 0.25]), 0.5

    def formula(shape, denominator):
        m, v, w, b = (value.view(shape) for value in (mean, denominator, weight, bias))
        return (x - m) / v * w + b

    right, last = (1, -1, 1, 1), (1, 1, 1, -1)
    root = (var + eps).sqrt()
    got = function(x.clone(), mean.clone(), var.clone(), weight.clone(), bias.clone(), eps)
    if not isinstance(got, torch.Tensor) or got.shape != x.shape:
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else repr(got)
        raise Wrong(f"Expected an output of the input's shape {tuple(x.shape)}, got {shape}.")
    mistakes = {
        "Shapes are lined up from the right: your statistics met the width, not the channels.": [
            formula(last, root),
            formula(last, var.sqrt() + eps),
        ],
        "eps stands outside the root here. It belongs under it: sqrt(var + eps).": [
            formula(right, var.sqrt() + eps)
        ],
        "eps is missing: a channel without spread would be divided by 0.": [
            formula(right, var.sqrt())
        ],
        "Divided by the variance. The standard deviation is its root.": [formula(right, var + eps)],
        "The bias is scaled too. It is added last.": [
            (formula(right, root) - bias.view(right)) + (weight * bias).view(right)
        ],
    }
    for message, values in mistakes.items():
        if any(torch.allclose(got, value, atol=1e-5) for value in values):
            raise Wrong(message)
    if not torch.allclose(got, formula(right, root), atol=1e-5):
        off = (got - formula(right, root)).abs().max()
        raise Wrong(f"The right shape, but the values are off by up to {off:.3g}.")
    return "Also where the width equals the number of channels."


@exercise("your own layer", before=lambda: check_batch_norm(nn.BatchNorm2d))
def your_own_layer(factory) -> str:
    if not isinstance(factory, type) or not issubclass(factory, nn.Module):
        raise Wrong(f"Expected the class itself, derived from nn.Module. Got: {factory!r}")
    try:
        begun = factory(3, eps=1e-5, momentum=0.1)(torch.randn(4, 3, 2, 2)) is not TODO
    except StillToDo:
        raise
    except Exception:  # the list below says it row by row
        begun = True
    if not begun:
        raise StillToDo
    checklist = check_batch_norm(factory)
    failed = checklist.failures
    if failed:
        rows = [f"{row.name}: expected {row.expected}; found: {row.found}." for row in failed[:3]]
        more = f"\n(and {len(failed) - 3} more)" if len(failed) > 3 else ""
        passed = len(checklist.rows) - len(failed)
        head = f"{passed} of {len(checklist.rows)} properties hold. First to mend:\n"
        raise Wrong(head + "\n".join(rows) + more)
    return f"All {len(checklist.rows)} properties hold. This is a batch norm."
