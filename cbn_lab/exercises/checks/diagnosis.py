"""Exercises of notebook 7."""

import torch
from torch import nn

from cbn_lab.diagnostics.diagnose import diagnose
from cbn_lab.exercises.checking import TODO, StillToDo, Wrong, exercise

VERDICTS = {  # what is kept: its verdict, and why
    "total": ("growing", "it is one tensor, but the sum has every earlier loss in its history"),
    "item": ("clean", "`.item()` is a plain number, which has no history"),
    "hook": ("growing", "each output is added to the list, and none goes"),
    "output": ("bounded", "the new output replaces the old one, whose graph is freed"),
}


@exercise("verdicts")
def verdicts(answers) -> str:
    if not isinstance(answers, dict) or set(answers) != set(VERDICTS):
        raise Wrong(f"Expected a dict with the keys {', '.join(VERDICTS)}. Got {answers!r:.60}.")
    if any(answer is TODO for answer in answers.values()):
        raise StillToDo
    for name, (verdict, why) in VERDICTS.items():
        if answers[name] not in ("growing", "bounded", "clean"):
            raise Wrong(f'{name}: expected "growing", "bounded" or "clean", got {answers[name]!r}.')
        if answers[name] != verdict:
            raise Wrong(f"{name} is not {answers[name]}: {why}.")
    return "All four."


@exercise("healthy loop")
def healthy_loop(make_step) -> str:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 1))
    losses = []
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    average = {name: torch.zeros_like(value) for name, value in start.items()}
    step = make_step(net, losses, average)
    if not callable(step):
        raise Wrong(f"make_step returns the step, a function. Got {step!r:.60}.")
    if step() is TODO:
        raise StillToDo
    if len(losses) != 1:
        raise Wrong(f"After one step `losses` should hold one loss. It holds {len(losses)}.")
    for name, value in start.items():
        if not torch.allclose(average[name].detach(), 0.1 * value, atol=1e-6):
            raise Wrong(f"The average of {name} is not 0.9 of the old and 0.1 of the new value.")
    growing = [f for f in diagnose(step, steps=6).findings if f.verdict == "growing"]
    if growing:
        paths = ", ".join(finding.path for finding in growing)
        raise Wrong(f"It leaks. What grows: {paths}.\n{growing[0].advice}")
    if any(isinstance(loss, torch.Tensor) and loss.requires_grad for loss in losses):
        raise Wrong("`losses` still holds tensors with a history.")
    return "Losses and average are kept, and no graph."
