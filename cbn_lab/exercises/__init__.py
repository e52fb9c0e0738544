"""Predictions and exercises: what the notebooks ask, and how an answer is judged.

A learner's code runs here under guard: whatever it does, the learner gets a message about that
code, and the rest of the notebook goes on.
"""

from cbn_lab.exercises.checking import TODO, Outcome, check
from cbn_lab.exercises.predictions import Prediction, predict

__all__ = ["TODO", "Outcome", "Prediction", "check", "predict"]
