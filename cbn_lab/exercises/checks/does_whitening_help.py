"""Exercises of notebook 9."""

import math

import torch

from cbn_lab import datasets
from cbn_lab.exercises.checking import Wrong, exercise

BEFORE = [90.1, 87.3, 91.0, 88.2, 89.4, 86.9]
AFTER = [90.9, 87.9, 91.4, 89.5, 89.9, 87.6]


@exercise("circularity quotient")
def circularity_quotient(quotient) -> str:
    generator = torch.Generator().manual_seed(0)
    z = datasets.speckle((4000,), 0.5, angle=0.4, generator=generator)
    got = number(quotient(z), "quotient(z)")
    centred = z - z.mean()
    power = centred.abs().square().mean()
    want = float(centred.square().mean().abs() / power)
    if math.isclose(got, 1.0, rel_tol=1e-6):
        raise Wrong("It is 1 for every z: take the mean of z² first, and its modulus afterwards.")
    if math.isclose(got, want * float(power), rel_tol=1e-4) and not math.isclose(got, want):
        raise Wrong("Divide by the mean of |z|²: the quotient must not depend on the unit of z.")
    moved = number(quotient(z + (3 - 1j)), "quotient(z + 3 - 1j)")
    if math.isclose(got, want, rel_tol=0.02) and not math.isclose(moved, want, rel_tol=1e-3):
        raise Wrong(
            f"Subtract the mean first: after a shift of z it is {moved:.2f}, not {got:.2f}."
        )
    if not math.isclose(number(quotient(5 * z), "quotient(5 * z)"), got, rel_tol=1e-4):
        raise Wrong("Five times the same field has another quotient: divide by the power of z.")
    if not math.isclose(got, want, rel_tol=1e-3):
        raise Wrong(f"For a field of circularity 0.5 it is about {want:.3f}, got {got:.3f}.")
    return f"At circularity 0.5 it is {got:.2f}, close to (1 - 0.5²)/(1 + 0.5²) = 0.60."


@exercise("paired interval")
def paired_interval(paired) -> str:
    a, b = torch.tensor(BEFORE, dtype=torch.float64), torch.tensor(AFTER, dtype=torch.float64)
    got = paired(b.clone(), a.clone())
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong(f"Expected two numbers, the mean and half of the interval. Got: {got!r}")
    mean, half = number(got[0], "the mean"), number(got[1], "the half-width")
    difference, n = b - a, len(a)
    spread, factor = difference.std(), 2.5706
    if math.isclose(mean, -float(difference.mean()), rel_tol=1e-6):
        raise Wrong("The sign: paired(a, b) is a minus b.")
    if not math.isclose(mean, float(difference.mean()), rel_tol=1e-6):
        raise Wrong(f"The mean of a - b is {difference.mean():.3f} here, got {mean:.3f}.")
    want = float(factor * spread / n**0.5)
    unpaired = float(factor * ((a.var() + b.var()) / n) ** 0.5)
    mistakes = {
        want * n**0.5: "That is the spread of one difference; the mean of n has it over √n.",
        unpaired: "The spreads of a and of b apart: most of that is the seed, which both share. "
        "Take the differences first, then their spread.",
        want * 1.96 / factor: "1.96 is for a spread known beforehand. From 6 values: Student's t.",
        want * ((n - 1) / n) ** 0.5: "Divide by n - 1 in the spread: the mean is estimated too.",
        float(spread / n**0.5): "That is one standard error; 95 % need a factor from Student's t.",
    }
    for value, message in mistakes.items():
        if math.isclose(half, value, rel_tol=2e-3):
            raise Wrong(message)
    if not math.isclose(half, want, rel_tol=2e-3):
        raise Wrong(
            f"For six pairs whose differences spread by {spread:.3f}: expected a "
            f"half-width of {want:.3f}, got {half:.3f}."
        )
    return f"{mean:.2f} ± {half:.2f}; without the pairing it would be ± {unpaired:.2f}."


@exercise("verdict")
def verdict(verdict) -> str:
    cases = {
        (0.8, 0.5): "helps",
        (-0.8, 0.5): "hurts",
        (0.3, 0.5): "cannot tell",
        (-0.3, 0.5): "cannot tell",
    }
    for (mean, half), want in cases.items():
        got = verdict(mean, half)
        if got not in set(cases.values()):
            raise Wrong(f"Expected 'helps', 'hurts' or 'cannot tell', got {got!r}.")
        if got == want:
            continue
        if want == "cannot tell":
            raise Wrong(f"{mean} ± {half} holds 0: such data come easily without any effect.")
        if want == "hurts":
            raise Wrong(f"{mean} ± {half} lies below 0 altogether. That is a result as well.")
        raise Wrong(f"{mean} ± {half} lies above 0 altogether, and you said {got!r}.")
    return "Below 0, above 0, or neither."


def number(value, what: str) -> float:
    """The value as a float, or a message that names what should have been one."""
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} should be one real number, got {value!r}.") from None
    if not math.isfinite(found):
        raise Wrong(f"{what} is {found}.")
    return found
