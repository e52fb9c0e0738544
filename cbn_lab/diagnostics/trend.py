"""Whether a short series of measurements grows, stays, or comes back."""

from collections.abc import Sequence

import numpy as np


def grows(values: Sequence[float]) -> bool:
    """Whether each third of the series reaches higher than the third before it, without a fall.

    Warming up ends in the first third, and then nothing grows any more; what is emptied now and
    then falls.
    """
    peaks = [max(part) for part in np.array_split(np.asarray(values, dtype=float), 3)]
    return peaks[0] < peaks[1] < peaks[2] and not falls(values)


def falls(values: Sequence[float]) -> bool:
    """Whether the series has once lost more than half of what it had gained."""
    highest = lowest = values[0]
    for value in values:
        highest = max(highest, value)
        lowest = min(lowest, value)
        if highest - value > (highest - lowest) / 2 > 0:
            return True
    return False


def per_step(values: Sequence[float]) -> float:
    """Mean growth per step over the second half, when any warming up is over."""
    half = len(values) // 2
    slope = (values[-1] - values[half]) / (len(values) - 1 - half)
    return int(slope) if slope == int(slope) else float(slope)


def climbs_steadily(values: Sequence[float], least: float) -> bool:
    """Whether every step of the second half adds about the same, ``least`` or more.

    For a noisy measure: four steps at least are asked for, none of which may add less than a
    quarter or more than four times what the median step adds. The allocator rounds and keeps
    room, so that an even leak of 4 KiB shows as 1 to 8 KiB a step.
    """
    steps = np.diff(values[len(values) // 2 :])
    if len(steps) < 4:
        return False
    typical = np.median(steps)
    even = steps.min() >= typical / 4 and steps.max() <= 4 * typical
    return bool(typical >= least and even)
