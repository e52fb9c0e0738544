"""Say what you expect before you run the cell; the next cell holds it against the result."""

from collections.abc import Sequence

import ipywidgets

_made: dict[str, str | float] = {}  # by question, so that running the cell again forgets nothing


class Prediction(ipywidgets.VBox):
    """A question and a place for the answer: a choice, or a number where no options are given."""

    def __init__(self, question: str, options: Sequence[str] = ()) -> None:
        self.question = question
        self.options = tuple(options)
        value = _made.get(question)
        if self.options:
            self.control = ipywidgets.RadioButtons(
                options=self.options, value=value, layout={"width": "max-content"}
            )
        else:
            self.control = ipywidgets.Text(
                value="" if value is None else f"{value:g}",
                placeholder="a number, then Enter",
                continuous_update=False,
            )
        self.control.observe(self._store, "value")
        label = ipywidgets.HTML(f"<b>Your prediction.</b> {question}")
        super().__init__([label, self.control])

    def _store(self, change: dict) -> None:
        try:
            _made[self.question] = change["new"] if self.options else float(change["new"])
        except ValueError:  # not a number (yet): no prediction
            _made.pop(self.question, None)

    def compare(self, result: str | float, tolerance: float = 0.1) -> None:
        """Print the prediction against the result.

        Args:
            result: what came; one of the options where there are any.
            tolerance: relative difference up to which a number counts as right.
        """
        if self.options and result not in self.options:
            raise ValueError(f"expected one of {self.options}, got {result!r}")
        said = result if self.options else f"{result:.6g}"
        made = _made.get(self.question)
        if made is None:
            print(f"Result: {said}. (You made no prediction.)")
            return
        right = made == result if self.options else abs(made - result) <= tolerance * abs(result)
        shown = made if self.options else f"{made:.6g}"
        verdict = "as you predicted" if right else f"you predicted {shown}"
        print(f"Result: {said}, {verdict}." + ("" if right else " Worth a second look: why?"))


def predict(question: str, options: Sequence[str] = ()) -> Prediction:
    """Ask for a prediction; keep what this returns, and call ``.compare(result)`` on it later."""
    return Prediction(question, options)
