"""The pictures. Each function takes and returns an ``Axes`` and never calls ``show``.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; no two lines
differ by colour alone. Every picture says in words what it shows: ``ax.get_label()`` is its text
alternative, and :func:`described` sets it in lines.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Complex, Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cbn_lab.complex_batch_norm import complex_batch_norm, naive_complex_batch_norm
from cbn_lab.kernels.reference import moments
from cbn_lab.whitening import symmetric

PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "grey": "#6E6E6E",
    "ink": "#222222",
}
STAGES = {  # stage of a whitening: its colour and its line
    "input": (PALETTE["ink"], "--"),
    "naive": (PALETTE["vermilion"], "-."),
    "whitened": (PALETTE["blue"], "-"),
}
SERIES = [  # colour, line and marker of the first, second, ... series
    (PALETTE["blue"], "-", "o"),
    (PALETTE["vermilion"], "--", "s"),
    (PALETTE["green"], "-.", "^"),
    (PALETTE["purple"], ":", "D"),
    (PALETTE["orange"], (0, (5, 1)), "v"),
    (PALETTE["grey"], (0, (1, 1)), "x"),
]

TRUE = PALETTE["green"]  # what a statistic should reach; no series of that picture has it
BEND = 0.25  # of the arrows of a computation, as a part of their length
LINE = 88  # characters of text that a notebook shows unbroken in a window 1000 pixels wide


def described(ax: Axes, name: str = "") -> str:
    """The text alternative of a picture, in lines that fit a page: what is long becomes a list.

    Args:
        ax: drawn by a function of this module.
        name: which picture it is, where there are several; put in front.
    """
    text = f"{name}: {ax.get_label()}" if name else ax.get_label()
    if len(text) <= LINE:
        return text
    lines: list[str] = []
    for sentence in re.split(r"(?<=\.) (?=[^\W\d])", ax.get_label()):
        head, _, items = sentence.partition(": ")
        if len(sentence) > LINE and "; " in items:
            lines += [f"{head}:", *(f"  {item}" for item in items.split("; "))]
        else:
            lines.append(sentence)
    text = "\n".join(_wrapped(line) for line in lines)
    return f"{name}:\n{textwrap.indent(text, '  ')}" if name else text


def _wrapped(line: str) -> str:
    """A line broken after commas only, so that a number stays with what it counts."""
    indent = " " * (len(line) - len(line.lstrip()))
    kept = re.sub(r"(?<!,) ", "\xa0", line.strip())
    broken = textwrap.fill(
        kept, LINE - 2, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return broken.replace("\xa0", " ")


def _axes(ax: Axes | None) -> Axes:
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend(ax: Axes) -> None:
    """Above the picture, where it hides no data."""
    ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _steps(ax: Axes, ylabel: str) -> None:
    ax.set(xlabel="training step", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def normalised(
    z: Complex[Tensor, "M"], stage: str, weight: Float[Tensor, "3"] | None = None
) -> Complex[Tensor, "M"]:
    """One channel of data as it comes, normalised part by part, or whitened.

    What is whitened is multiplied by Γ where a ``weight`` (rr, ii, ri) is given; β = 0.
    """
    if stage == "input":
        return z
    if stage == "naive":
        return naive_complex_batch_norm(z[:, None], None, None, training=True)[:, 0]
    weight = None if weight is None else weight[None]
    return complex_batch_norm(z[:, None], None, None, weight, training=True)[:, 0]


def ellipse(z: Complex[Tensor, "M"], sigma: float = 1.0) -> Float[np.ndarray, "2 181"]:
    """The ellipse of ``sigma`` standard deviations: the image of a circle under V^(1/2)."""
    mean, covar = _moments(z)
    variances, axes = torch.linalg.eigh(covar)
    angle = torch.linspace(0, 2 * torch.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    curve = axes @ (variances.clamp(min=0).sqrt()[:, None] * circle)
    return (mean[:, None] + sigma * curve).numpy()


def axis_ratio(z: Complex[Tensor, "M"]) -> float:
    """Long axis over short axis of the 1σ ellipse; 1 for a circle."""
    short, long = torch.linalg.eigvalsh(_moments(z)[1]).clamp(min=0)
    return float((long / short).sqrt())


def _moments(z: Complex[Tensor, "M"]) -> tuple[Float[Tensor, "2"], Float[Tensor, "2 2"]]:
    mean, covar = moments(z.real[:, None].double(), z.imag[:, None].double())
    return mean[0], symmetric(covar)[0]


def whitening(
    z: Complex[Tensor, "*shape"],
    ax: Axes | None = None,
    *,
    stages: Sequence[str] = tuple(STAGES),
    points: str | None = "input",
    weight: Float[Tensor, "3"] | None = None,
) -> Axes:
    """Complex data as a cloud with its 1σ and 2σ ellipses: before, naive, whitened.

    Args:
        z: the values of one channel, in any shape.
        ax: where to draw; a new figure where None.
        stages: which ellipses to draw, of ``"input"``, ``"naive"``, ``"whitened"``.
        points: the stage whose values are drawn as points, or None.
        weight: Γ as rr, ii, ri, for the whitened stage; None for the identity.

    Raises:
        ValueError: an unknown stage, or fewer than two values.
        TypeError: data that is not complex.
    """
    z = torch.as_tensor(z).detach().cpu().flatten()
    if not z.is_complex():
        raise TypeError(f"expected complex values, got {z.dtype}")
    if len(z) < 2:
        raise ValueError(f"expected at least 2 values, got {len(z)}")
    unknown = [stage for stage in (*stages, points) if stage not in (*STAGES, None)]
    if unknown:
        raise ValueError(f"expected stages among {', '.join(STAGES)}, got {unknown[0]!r}")
    ax, said = _axes(ax), []
    if points is not None:
        shown = normalised(z, points, weight)[:: max(1, len(z) // 1000)]  # more would only be ink
        colour = PALETTE["grey"] if points == "input" else STAGES[points][0]
        ax.plot(
            shown.real.numpy(), shown.imag.numpy(), ".", ms=3, alpha=0.35, color=colour, zorder=1
        )
    for stage in stages:
        values = normalised(z, stage, weight)
        colour, line = STAGES[stage]
        for sigma, width in ((1, 2.2), (2, 1.2)):
            label = stage if sigma == 1 else None
            ax.plot(*ellipse(values, sigma), line, color=colour, lw=width, label=label)
        said.append(f"{stage} {axis_ratio(values):.2f}")
    ax.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    ax.axhline(0, color=PALETTE["grey"], lw=0.5, zorder=0)
    ax.axvline(0, color=PALETTE["grey"], lw=0.5, zorder=0)
    _legend(ax)
    ax.set_label(f"Long axis over short axis: {', '.join(said)}. Thick lines 1σ, thin lines 2σ.")
    return ax


def channels(x: Float[Tensor, "N C *spatial"], ax: Axes | None = None) -> Axes:
    """The values of each channel as a column of points, with mean and standard deviation.

    Args:
        x: (N, C, ...), real.
        ax: where to draw; a new figure where None.
    """
    ax, said = _axes(ax), []
    values = torch.as_tensor(x).detach().cpu().transpose(0, 1).flatten(1)
    offsets = np.linspace(-0.25, 0.25, 17)  # side by side, so that equal values can be told apart
    for channel, column in enumerate(values):
        places = channel + np.resize(offsets, len(column))
        colour, _, marker = SERIES[channel % len(SERIES)]
        ax.plot(places, column, marker, ms=3, alpha=0.6, color=colour)
        var, mean = torch.var_mean(column, correction=0)
        ax.errorbar(
            channel, mean, var.sqrt(), fmt="_", ms=24, mew=2, capsize=8, color=PALETTE["ink"]
        )
        # + 0.0: no -0.00
        said.append(f"{channel}: {round(float(mean), 2) + 0.0:.2f} ± {float(var.sqrt()):.2f}")
    ax.set(xlabel="channel", ylabel="value", xticks=range(len(values)))
    ax.set_label(f"Mean ± standard deviation of channel {', '.join(said)}.")
    return ax


def deviation(
    x: Sequence[float],
    errors: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    floor: float | Sequence[float] | None = None,
) -> Axes:
    """Errors against what they depend on, both logarithmic; what is not finite is marked on top.

    Args:
        x: the abscissa, positive.
        errors: {form: its error at each x}. An error of exactly 0 is left out.
        ax: where to draw; a new figure where None.
        xlabel, ylabel: what the axes say.
        floor: the error that rounding alone makes, constant or per x.
    """
    ax, said, broken = _axes(ax), [], []
    order = np.argsort(x)
    x = np.asarray(x, dtype=float)[order]
    for (label, values), (colour, line, marker) in zip(errors.items(), SERIES, strict=False):
        values = np.asarray(values, dtype=float)[order]
        finite = np.isfinite(values)
        shown = np.where(finite & (values > 0), values, np.nan)
        ax.plot(x, shown, ls=line, marker=marker, ms=5, color=colour, label=label)
        broken.append((x[~finite], colour, marker))
        first, last = (
            (f"{value:.0e}" for value in values[finite][[0, -1]]) if finite.any() else "--"
        )
        where = ", ".join(f"{value:g}" for value in x[~finite])
        if len(where) > 12 and finite[: finite.sum()].all():
            where = f"{x[finite.sum()]:g} and more"
        end = f", not finite at {where}" if where else ""
        said.append(f"{label} {first} to {last}{end}")
    if floor is not None:
        values = np.broadcast_to(floor, len(x))[order]
        ax.plot(x, values, ls=(0, (1, 2)), color=PALETTE["grey"], label="rounding of the input")
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    top = ax.get_ylim()[1] * 10
    for level, (places, colour, marker) in enumerate(b for b in broken if len(b[0])):
        height = top * 10**level
        ax.plot(places, np.full(len(places), height), marker, mfc="none", ms=8, color=colour)
        ax.annotate(
            "not finite", (places[0], height), (-8, 0), textcoords="offset points", ha="right",
            va="center", fontsize="small", color=colour,
        )  # fmt: skip
        ax.set_ylim(top=height * 10)
    _legend(ax)
    ax.set_label(f"{ylabel}, from left to right: {'; '.join(said)}.")
    return ax


def computation(
    nodes: Mapping[str, tuple[float, float]],
    forward: Iterable[tuple[str, str]],
    backward: Mapping[tuple[str, str], str],
    ax: Axes | None = None,
) -> Axes:
    """A formula as a graph: what is computed from what, and what flows back along each arrow.

    Args:
        nodes: {name: (x, y)}, where to draw it; matplotlib's mathematics is allowed.
        forward: pairs (from, to).
        backward: {(from, to): what the gradient is multiplied by}, against the forward arrows.
        ax: where to draw; a new figure where None.

    Raises:
        ValueError: an arrow from or to something that is no node.
    """
    forward = list(forward)
    for name in {name for arrow in (*forward, *backward) for name in arrow}:
        if name not in nodes:
            raise ValueError(f"expected an arrow between nodes, got {name!r}")
    ax = _axes(ax)
    ax.axis("off")
    ax.set_aspect("equal")
    styles = {
        "forward": dict(color=PALETTE["ink"], ls="-"),
        "backward": dict(color=PALETTE["vermilion"], ls="--"),
    }
    for name, arrows in (("forward", forward), ("backward", list(backward))):
        for start, end in arrows:
            arrow = dict(arrowstyle="-|>", lw=1.6, shrinkA=20, shrinkB=20, **styles[name])
            arrow["connectionstyle"] = f"arc3,rad={BEND}"
            ax.annotate("", nodes[end], nodes[start], arrowprops=arrow)
        ax.plot([], [], **styles[name], label=name)
    for (start, end), factor in backward.items():
        a, b = np.array(nodes[start]), np.array(nodes[end])
        middle = (a + b) / 2 + BEND / 2 * np.array([b[1] - a[1], a[0] - b[0]])  # of the arc
        white = dict(boxstyle="round,pad=0.15", fc="white", ec="none")
        ax.text(*middle, factor, bbox=white, color=PALETTE["vermilion"], ha="center", va="center")
    box = dict(boxstyle="round,pad=0.45", fc="white", ec=PALETTE["blue"], lw=1.6)
    for name, place in nodes.items():
        ax.text(*place, name, bbox=box, ha="center", va="center", color=PALETTE["ink"], size=13)
    places = np.array(list(nodes.values()))
    low, high = places.min(0) - 0.6, places.max(0) + 0.6
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _legend(ax)
    there = ", ".join(f"{start} → {end}" for start, end in forward)
    back = ", ".join(f"{start} → {end} times {text}" for (start, end), text in backward.items())
    said = f"Forward: {there}. Backward: {back}."
    ax.set_label(said.replace("$", "").replace(r"\hat{x}", "x̂").replace(r"\,", " "))
    return ax


def running_statistics(
    running: Float[np.ndarray, "steps"] | Mapping[str, Sequence[float]],
    batch: Float[np.ndarray, "steps"] | Sequence[float] | None = None,
    true: float | Sequence[float] | None = None,
    ax: Axes | None = None,
    *,
    name: str = "running_mean",
    memory: float | None = None,
) -> Axes:
    """A running statistic converging, over the batches it averages.

    Args:
        running: the statistic after each step, or several of them as {label: values}.
        batch: the same statistic of each batch alone, drawn as points.
        true: the value it should reach, constant or per step.
        ax: where to draw; a new figure where None.
        name: what the statistic is called, for the axis and the legend.
        memory: batches that count in the last value, shaded; 1/momentum, say.
    """
    ax = _axes(ax)
    series = running if isinstance(running, Mapping) else {name: running}
    if batch is not None:
        steps = np.arange(1, len(batch) + 1)
        ax.plot(steps, batch, ".", ms=4, color=PALETTE["grey"], alpha=0.7, label="batch")
    styles = [style for style in SERIES if style[0] != TRUE]
    for (label, values), (colour, line, _) in zip(series.items(), styles, strict=False):
        ax.plot(np.arange(1, len(values) + 1), values, ls=line, lw=2, color=colour, label=label)
    if true is not None:
        steps = max(len(values) for values in series.values())
        ax.plot(
            np.arange(1, steps + 1),
            np.broadcast_to(true, steps),
            color=TRUE,
            lw=1,
            ls=(0, (4, 3)),
            label="true value",
        )
    if memory is not None:
        last = max(len(values) for values in series.values()) + 0.5
        label = f"memory, {memory:.0f} batches"
        first = max(last - memory, 0.5)
        ax.axvspan(first, last, color=PALETTE["orange"], alpha=0.25, lw=0, label=label)
    _steps(ax, name)
    _legend(ax)
    ends = "; ".join(f"{label} {float(values[-1]):.3f}" for label, values in series.items())
    aim = "" if true is None else f"; true value {float(np.ravel(true)[-1]):.3f}"
    ax.set_label(f"{name} after the last step: {ends}{aim}.")
    return ax


def graph_growth(
    nodes: Mapping[str, Sequence[int]],
    ax: Axes | None = None,
    *,
    unit: str = "graph nodes behind the buffer",
) -> Axes:
    """The autograd graph behind a buffer, step by step: leaks rise, cures stay at 0.

    Args:
        nodes: {form of update: nodes (or bytes) reachable from the buffer after each step}.
        ax: where to draw; a new figure where None.
        unit: what is counted, for the axis.
    """
    ax, said = _axes(ax), []
    for (label, counts), (colour, line, marker) in zip(nodes.items(), SERIES, strict=False):
        steps = np.arange(1, len(counts) + 1)
        every = max(1, len(counts) // 10)
        ax.plot(
            steps, counts, ls=line, marker=marker, markevery=every, ms=5, color=colour, label=label
        )
        slope = (counts[-1] - counts[0]) / max(len(counts) - 1, 1)
        said.append(f"{label} {round(counts[-1]):,} ({slope:+.3g} a step)")
    _steps(ax, unit)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    _legend(ax)
    ax.set_label(f"{unit} after the last step: {'; '.join(said)}.")
    return ax


def memory(trace: Any, ax: Axes | None = None) -> Axes:
    """What a :class:`cbn_lab.MemoryTrace` recorded, relative to its first step, in MiB.

    Args:
        trace: a ``MemoryTrace``, or its ``rows``.
        ax: where to draw; a new figure where None.
    """
    rows = list(getattr(trace, "rows", trace))
    if not rows:
        raise ValueError("expected a trace with at least one step, got none")
    ax, said = _axes(ax), []
    for (field, label), (colour, line, marker) in zip(_recorded(rows[0]), SERIES, strict=False):
        mib = np.array([getattr(row, field) for row in rows]) / 2**20
        mib = mib - mib[0]
        every = max(1, len(mib) // 10)
        ax.plot(mib, ls=line, marker=marker, markevery=every, ms=5, color=colour, label=label)
        slope = np.polyfit(range(len(mib)), mib, 1)[0] * 1024 if len(mib) > 1 else 0.0
        said.append(f"{label} {mib[-1]:+.2f} MiB ({slope:+.1f} KiB a step)")
    _steps(ax, "growth since the first step (MiB)")
    _legend(ax)
    ax.set_label(f"Memory after the last step: {'; '.join(said)}.")
    return ax


def _recorded(row: Any) -> Iterable[tuple[str, str]]:
    """The quantities that a row of a trace holds: CUDA's, or those of the host."""
    fields = {
        "allocated": "CUDA allocated",
        "peak": "CUDA peak",
        "tensor_bytes": "live tensors",
        "heap_bytes": "host heap",
    }
    return [(name, text) for name, text in fields.items() if getattr(row, name, None) is not None]


def intervals(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    zero: bool = False,
) -> Axes:
    """Means with their intervals over one quantity, a little apart where series share a place.

    Args:
        series: {label: rows of (place, mean, half of the interval)}.
        ax: where to draw; a new figure where None.
        xlabel, ylabel: with units.
        zero: draw the line of no difference.
    """
    ax, said = _axes(ax), []
    places = sorted({row[0] for rows in series.values() for row in rows})
    gap = 0.012 * (places[-1] - places[0]) if len(places) > 1 else 0.02
    middle = (len(series) - 1) / 2
    for k, (label, rows) in enumerate(series.items()):
        (colour, line, marker), (at, mean, half) = SERIES[k % len(SERIES)], np.array(rows).T
        style = dict(color=colour, ls=line, marker=marker, lw=1.2, elinewidth=1.8, ms=6, capsize=3)
        ax.errorbar(at + (k - middle) * gap, mean, half, label=label, **style)
        points = ", ".join(f"{m:.2f} ± {h:.2f} at {x:g}" for x, m, h in rows)
        said.append(f"{label} {points}")
    if zero:
        ax.axhline(0, color=PALETTE["grey"], lw=1, zorder=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _legend(ax)
    ax.set_label(f"{ylabel}, mean and interval: {'; '.join(said)}.")
    return ax


def costs(
    values: Mapping[str, float],
    ax: Axes | None = None,
    *,
    xlabel: str,
    bounds: Mapping[str, float] | None = None,
    decimals: int = 2,
) -> Axes:
    """A bar for the cost of each candidate, beside the bounds that hold for all.

    Args:
        values: {candidate: cost}, drawn from the top in this order.
        ax: where to draw; a new figure where None.
        xlabel: what is counted, with units.
        bounds: {name: cost}, drawn as lines across all bars.
        decimals: of the numbers at the bars and in the text.
    """
    ax, places = _axes(ax), np.arange(len(values))
    bars = ax.barh(places, list(values.values()), height=0.6, color=PALETTE["blue"])
    labels = [f"{value:,.{decimals}f}" for value in values.values()]
    clear = dict(boxstyle="round,pad=0.15", fc="white", ec="none")  # of a bound's line behind it
    ax.bar_label(bars, labels, padding=4, fontsize="small", bbox=clear)
    ax.set_yticks(places, list(values))
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(xlabel=xlabel)
    said = "; ".join(f"{name} {label}" for name, label in zip(values, labels, strict=True))
    for (name, bound), (_, line, _) in zip((bounds or {}).items(), SERIES[1:], strict=False):
        name = f"{name} {bound:,.{decimals}f}"
        ax.axvline(bound, color=PALETTE["vermilion"], ls=line, lw=2, label=name)
        _legend(ax)
        said += f"; {name}"
    ax.set_label(f"{xlabel}: {said}.")
    return ax
