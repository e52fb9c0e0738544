"""What all explorers share: the files that the browser runs, the palette, the checks."""

from collections.abc import Sequence
from pathlib import Path

import anywidget
from matplotlib.axes import Axes
from traitlets import Dict, TraitError

from cbn_lab.plots import PALETTE

JS = Path(__file__).parent / "js"
# Of what a hand moves: an echo of an older value would put the slider back under it.
MOVED = {"sync": True, "echo_update": False}


def source(*names: str) -> str:
    """One module out of several files: a widget's code has no address to import others from."""
    return "\n".join((JS / name).read_text(encoding="utf-8") for name in names)


def check_between(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:  # also refuses nan
        raise TraitError(f"expected {name} from {least:g} to {most:g}, got {value!r}")
    return value


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise TraitError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")
    return value


def signed(value: float) -> str:
    """Two digits with a sign, and never minus zero."""
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text


class Explorer(anywidget.AnyWidget):
    """A picture with controls, drawn in the browser.

    Attributes:
        drawn: the numbers that a browser has last drawn; empty where none has.
        summary: what the picture shows, in words; also the text for screen readers.
    """

    _css = source("explorer.css")
    _palette = Dict(PALETTE).tag(sync=True)
    drawn = Dict().tag(sync=True)

    @property
    def summary(self) -> str:
        raise NotImplementedError

    def plot(self, ax: Axes | None = None) -> Axes:
        """The same picture without a browser, by :mod:`cbn_lab.plots`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary}"
