"""Every exercise: untouched it is "to do", solved it passes, and a wrong answer is told why."""

import importlib
import time

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cbn_lab.exercises import checking, predictions

from . import course

NOTEBOOKS = {source.stem: course.builder().read(source) for source in course.SOURCES}
EXERCISES = [(stem, name) for stem, nb in NOTEBOOKS.items() for name in course.stubs(nb)]
WRONG = [
    (stem, name, code, message)
    for stem in NOTEBOOKS
    for name, answers in importlib.import_module(f"course.wrong_{stem[:2]}").WRONG.items()
    for code, message in answers
]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_notebook_asks_for_predictions_and_has_two_exercises_or_more(stem):
    notebook = NOTEBOOKS[stem]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert code.count("predict(") >= 2
    assert code.count(".compare(") == code.count("predict(")
    assert len(course.stubs(notebook)) >= 2
    assert set(course.stubs(notebook)) == set(course.solutions(notebook))
    assert set(course.stubs(notebook)) == set(course.checked(notebook))


def test_every_check_belongs_to_an_exercise():
    assert sorted(name for _, name in EXERCISES) == checking.names()


@pytest.mark.parametrize("stem, name", EXERCISES)
def test_an_untouched_exercise_says_to_do(stem, name):
    namespace = start(stem)
    course.run_code(course.stubs(NOTEBOOKS[stem])[name], namespace, name)
    assert judge(stem, name, namespace).state == "to do"


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_solved_notebook_passes_every_check(stem, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(predictions, "_made", {})
    monkeypatch.chdir(course.NOTEBOOKS)
    outcomes = []

    def inspect_check(name, answer):
        outcomes.append(checking.check(name, answer))
        return outcomes[-1]

    notebook = course.solved(course.builder().read(course.NOTEBOOKS / "source" / f"{stem}.py"))
    course.run_in_process(notebook, inspect_check)
    assert {outcome.exercise for outcome in outcomes} == set(course.stubs(notebook))
    assert [outcome for outcome in outcomes if outcome.state != "passed"] == []


@pytest.mark.parametrize(
    "stem, name, code, message", WRONG, ids=[f"{stem[:2]}-{name}" for stem, name, *_ in WRONG]
)
def test_a_typical_wrong_answer_fails_with_its_own_message(stem, name, code, message, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 3.0)  # an endless loop need not be waited for
    namespace = start(stem)
    course.run_code(code, namespace, name)
    outcome = judge(stem, name, namespace)
    assert outcome.state == "not yet"
    assert message in outcome.message


@pytest.mark.parametrize("stem, name", EXERCISES)
def test_every_exercise_has_two_wrong_answers_or_more(stem, name):
    assert len({message for _, other, _, message in WRONG if other == name}) >= 2


def test_what_a_check_needs_first_is_off_the_learners_clock(monkeypatch):
    monkeypatch.setattr(checking, "_checks", dict(checking._checks))
    monkeypatch.setattr(checking, "_before", dict(checking._before))
    monkeypatch.setattr(checking, "SECONDS", 0.2)
    called = []

    @checking.exercise("slow to load", before=lambda: (time.sleep(0.4), called.append(1)))
    def _(answer):
        return "loaded" if called else None

    assert checking.check("slow to load", 1).message == "loaded"


def start(stem: str) -> dict:
    """A namespace after the imports of the notebook."""
    first = next(cell for cell in NOTEBOOKS[stem].cells if cell.cell_type == "code")
    namespace = {}
    course.run_code(first.source, namespace, "imports")
    return namespace


def judge(stem: str, name: str, namespace: dict) -> checking.Outcome:
    return checking.check(name, namespace[course.checked(NOTEBOOKS[stem])[name]])
