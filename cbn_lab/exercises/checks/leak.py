"""Exercises of notebook 5."""

import torch
from torch import nn

from cbn_lab.diagnostics.buffers import inspect_buffers
from cbn_lab.exercises.checking import Wrong, exercise
from cbn_lab.specimens import LeakyBatchNorm2d


@exercise("history")
def history(has_history) -> str:
    weight = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        updated = weight * 2
    cases = [
        (weight * 2, True, "weight * 2 was computed from a weight: it holds on to a graph."),
        (weight, False, "A weight requires a gradient, but it begins a graph and holds none."),
        (torch.ones(2), False, "Plain data has no history."),
        ((weight * 2).detach(), False, "A detached tensor has let go of its history."),
        (updated, False, "What was computed under no_grad has no history."),
    ]
    for tensor, want, message in cases:
        got = has_history(tensor)
        if not isinstance(got, bool):
            raise Wrong(f"Expected True or False, got {got!r}.")
        if got != want:
            raise Wrong(f"{message} Got {got}.")
    return "Leaves hold on to nothing."


@exercise("count nodes")
def count_nodes(count) -> str:
    weight = nn.Parameter(torch.ones(2))
    chain = weight * 2 + 1
    if (got := count(chain)) != 3:
        raise Wrong(
            "Behind weight * 2 + 1 stand 3 nodes: the sum, the product, and the accumulator of the "
            f"weight's gradient. Got {got!r}."
        )
    shared = weight * 2
    if (got := count(shared + shared)) != 3:
        raise Wrong(f"In s + s the node of s is reached twice and counts once: 3 nodes. Got {got}.")
    for _ in range(3000):
        chain = chain + 1
    if (got := count(chain)) != 3003:
        raise Wrong(f"Behind a chain of 3000 further sums stand 3003 nodes. Got {got}.")
    return "Deep chains and shared nodes included."


@exercise("reproduce")
def reproduce(model_around) -> str:
    leaky = LeakyBatchNorm2d(4, update="rebind")
    model = model_around(leaky)
    if not isinstance(model, nn.Module):
        raise Wrong(f"Expected a model, an nn.Module. Got {type(model).__name__}.")
    if leaky not in list(model.modules()):
        raise Wrong("The layer that was given is not in your model.")
    for _ in range(2):
        model(torch.randn(8, 4, 6, 6)).sum().backward()
    if not any(row.nodes for row in inspect_buffers(model).rows):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        where = "stands only behind it" if len(trained) > 2 else "is missing, or is frozen"
        raise Wrong(f"The leak does not show. Something trainable before the layer {where}.")
    return "The leak shows."
