"""The stored results of notebook 9, one circularity at a time."""

from collections.abc import Mapping
from html import escape

import ipywidgets

from cbn_lab.experiments import CIRCULARITIES, METHODS, Results, interval
from cbn_lab.plots import PALETTE

COLOURS = dict(zip(METHODS, (PALETTE["grey"], PALETTE["vermilion"], PALETTE["blue"]), strict=True))
WIDTH, ROW, LEFT = 520, 40, 100


class ResultsExplorer(ipywidgets.VBox):
    """A slider over circularity, and the accuracy of the three networks there.

    Attributes:
        control: the slider; its value is one of the circularities of the series.
        summary: what the picture shows, in words; also its text for screen readers.
    """

    def __init__(self, results: Results) -> None:
        self.rows = {
            c: {m: interval(results.accuracy("medium", c, m)) for m in METHODS}
            for c in CIRCULARITIES
        }
        flat = [row for rows in self.rows.values() for row in rows.values()]
        self.low = int(min(mean - half for mean, half in flat))
        self.high = int(max(mean + half for mean, half in flat)) + 1
        self.control = ipywidgets.SelectionSlider(
            options=[(f"{c:g}", c) for c in CIRCULARITIES], description="circularity"
        )
        self.picture = ipywidgets.HTML()
        self.control.observe(lambda _: self._draw(), "value")
        self._draw()
        super().__init__([self.control, self.picture])

    @property
    def summary(self) -> str:
        rows = self.rows[self.control.value]
        parts = (f"{m} {mean:.1f} ± {half:.1f} %" for m, (mean, half) in rows.items())
        return f"Test accuracy at circularity {self.control.value:g}: {', '.join(parts)}."

    def _draw(self) -> None:
        rows = self.rows[self.control.value]
        self.picture.value = drawing(rows, self.low, self.high, self.summary)


def drawing(rows: Mapping[str, tuple[float, float]], low: float, high: float, summary: str) -> str:
    """An SVG of one interval a row: as text it is sent and shown at once, with no figure made."""

    def place(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20)

    height, parts = ROW * len(rows) + 40, []
    for tick in range(int(low), int(high) + 1):
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} 0V{height - 35}" stroke="#8888" stroke-width="0.5"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{tick}</text>')
    middle = (LEFT + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">accuracy (%)</text>')
    for k, (name, (mean, half)) in enumerate(rows.items()):
        y, colour = ROW * k + ROW / 2, COLOURS[name]
        left, right = place(mean - half), place(mean + half)
        line = f"M{left:.1f} {y}H{right:.1f}M{left:.1f} {y - 6}v12M{right:.1f} {y - 6}v12"
        parts.append(f'<path d="{line}" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<circle cx="{place(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="0" y="{y + 4}">{escape(name)}</text>')
    style = "font: 12px sans-serif; fill: var(--jp-ui-font-color1, currentColor)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(summary)}" '
        f'width="{WIDTH}" height="{height}" style="{style}">{"".join(parts)}</svg>'
        f'<div aria-live="polite">{escape(summary)}</div>'
    )
