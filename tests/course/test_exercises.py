"""The judge and the predictions themselves."""

import gc
import time

import ipywidgets
import pytest
import torch

from cbn_lab.exercises import TODO, check, checking, predict, predictions


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(predictions, "_made", {})
    monkeypatch.setattr(checking, "_checks", dict(checking._checks))


@pytest.fixture
def judge():
    """Registers a check for the length of a test, and judges an answer by it."""

    def judge(function, answer):
        checking._checks.pop("probe", None)
        checking.exercise("probe")(function)
        return check("probe", answer)

    return judge


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="got 'no such exercise'"):
        check("no such exercise", 1)


def test_one_name_has_one_check(judge):
    judge(lambda answer: None, 1)
    with pytest.raises(ValueError, match="second for 'probe'"):
        checking.exercise("probe")(lambda answer: None)


def test_praise_and_reproof_are_shown_as_text_and_html(judge):
    passed = judge(lambda answer: "Well <done>.", 1)
    assert repr(passed) == "✓ probe: passed. Well <done>."
    assert "Well &lt;done&gt;." in passed._repr_html_()

    def reject(answer):
        raise checking.Wrong("Too large.")

    assert repr(judge(reject, 1)) == "✗ probe: not yet. Too large."


@pytest.mark.parametrize(
    "answer",
    [
        TODO,
        lambda x: TODO,
        lambda x: (x, TODO),
        lambda x: x + TODO,
        lambda x: TODO * x,
        lambda x: TODO(x),
        lambda x: TODO.shape,
        lambda x: torch.ones(2) * TODO,
    ],
    ids=range(8),  # TODO has no name to show: every look at it says "not begun"
)
def test_whatever_touches_todo_is_not_begun(judge, answer):
    assert judge(lambda answer: answer(1.0), answer).state == "to do"


def test_an_error_in_the_answer_names_its_line_and_not_the_kits(judge):
    def answer(x):
        return torch.ones(2) @ torch.ones(3)

    outcome = judge(lambda answer: answer(1.0), answer)
    assert outcome.state == "not yet"
    assert "RuntimeError in your line: return torch.ones(2) @ torch.ones(3)" in outcome.message
    assert "\n" in outcome.message  # and what torch says of it


@pytest.mark.parametrize("swallow", [False, True])
def test_an_endless_loop_is_stopped(judge, monkeypatch, swallow):
    monkeypatch.setattr(checking, "SECONDS", 0.3)

    def answer(x):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                if not swallow:
                    raise

    start = time.monotonic()
    outcome = judge(lambda answer: answer(1.0), answer)
    assert time.monotonic() - start < 5
    assert outcome.state == "not yet" and "Does its loop end?" in outcome.message


def test_no_garbage_is_collected_while_an_answer_is_judged(judge):
    assert judge(lambda answer: str(answer()), gc.isenabled).message == "False"
    assert gc.isenabled()


def test_the_time_limit_gives_an_alarm_back_to_its_owner():
    with checking.time_limit(5):
        with checking.time_limit(5):
            pass
        with pytest.raises(checking._TooLong), checking.time_limit(0.1):
            time.sleep(3)
    time.sleep(0.01)  # no alarm is left


def test_a_choice_is_stored_and_compared(capsys):
    guess = predict("Which?", ["a", "b"])
    guess.compare("b")
    guess.control.value = "a"
    guess.compare("b")
    guess.control.value = "b"
    guess.compare("b")
    none, wrong, right = capsys.readouterr().out.splitlines()
    assert none == "Result: b. (You made no prediction.)"
    assert wrong == "Result: b, you predicted a. Worth a second look: why?"
    assert right == "Result: b, as you predicted."


def test_a_number_is_compared_within_a_tolerance(capsys):
    guess = predict("How many?")
    guess.control.value = "105"
    guess.compare(100)
    guess.compare(100, tolerance=0.01)
    guess.control.value = "many"
    guess.compare(100)
    assert capsys.readouterr().out.splitlines() == [
        "Result: 100, as you predicted.",
        "Result: 100, you predicted 105. Worth a second look: why?",
        "Result: 100. (You made no prediction.)",
    ]


def test_running_the_cell_again_keeps_the_prediction(capsys):
    predict("Which?", ["a", "b"]).control.value = "a"
    again = predict("Which?", ["a", "b"])
    assert again.control.value == "a"
    assert isinstance(again, ipywidgets.VBox)


def test_a_result_that_was_no_option_is_refused():
    with pytest.raises(ValueError, match="got 'c'"):
        predict("Which?", ["a", "b"]).compare("c")
