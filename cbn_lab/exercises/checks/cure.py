"""Exercises of notebook 6."""

import torch
from torch import nn
from torch.nn.functional import batch_norm

from cbn_lab.diagnostics.buffers import inspect_buffers
from cbn_lab.exercises.checking import Wrong, exercise


class Probe(nn.Module):
    """Updates one buffer from the batch mean, by the function given."""

    def __init__(self, update) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running", torch.zeros(3))
        self.update = update

    def forward(self, x):
        self.update(self, "running", (x * self.weight).mean(0), 0.1)


@exercise("cure")
def cure(update) -> str:
    probe, expected = Probe(update), torch.zeros(3)
    nodes, first, place = [], probe.running, probe.running.data_ptr()
    for x in torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0)):
        probe(x)
        expected = 0.9 * expected + 0.1 * x.mean(0)
        if "running" not in dict(probe.named_buffers()):
            raise Wrong("After your update `running` is no buffer any more.")
        nodes.append(inspect_buffers(probe).rows[0].nodes)
    if nodes[-1] > nodes[1]:
        raise Wrong(f"It still leaks: {nodes[-1]} nodes stand behind the buffer after 4 steps.")
    if nodes[-1]:
        raise Wrong(
            f"It does not grow, but it keeps the graph of the last step: {nodes[-1]} nodes. "
            "Which of the two terms still has a history?"
        )
    if torch.equal(probe.running, torch.zeros(3)):
        raise Wrong("The buffer has not changed at all. Is the new value stored in the module?")
    if not torch.allclose(probe.running, expected, atol=1e-6):
        raise Wrong("No leak, but the numbers are wrong: (1 - f)·running + f·batch is due.")
    if probe.running is not first or probe.running.data_ptr() != place:
        raise Wrong(
            "The right numbers and no history, but in another tensor: who holds the old one, "
            "a second module or a captured CUDA graph, never sees them. Write into the buffer."
        )
    return "The right numbers, no history, and still the same tensor."


@exercise("neither")
def neither(function) -> str:
    generator = torch.Generator().manual_seed(0)
    x = (2 + 3 * torch.randn(4, 3, 5, 5, generator=generator)).requires_grad_()
    want = [torch.zeros(3), torch.ones(3)]
    expected = batch_norm(x, *want, training=True, momentum=0.1, eps=0.1)
    got = [torch.zeros(3), torch.ones(3)]
    output = function(x, *got, 0.1, 0.1)
    if not isinstance(output, torch.Tensor) or output.shape != x.shape:
        raise Wrong(f"Expected an output of shape {tuple(x.shape)}, got {output!r:.60}.")
    if got[0].requires_grad or got[1].requires_grad:
        raise Wrong("It leaks: a running statistic has a history now.")
    if not torch.allclose(output, expected, atol=1e-4):
        raise Wrong("The output is wrong. Biased variance, and eps inside the root?")
    if torch.equal(got[0], torch.zeros(3)):
        raise Wrong("running_mean has not changed. Write into the tensor that is given.")
    if not torch.allclose(got[0], want[0], atol=1e-5):
        raise Wrong("running_mean is wrong: (1 - momentum)·running + momentum·mean.")
    if not torch.allclose(got[1], want[1], rtol=1e-4):
        raise Wrong("running_var is wrong: it stores the unbiased variance, n/(n - 1) times.")
    _demand_gradient(x, output, expected)
    return "Output, statistics and gradient are those of PyTorch, and nothing is kept."


def _demand_gradient(x, output, expected) -> None:
    wanted = torch.autograd.grad((expected**3).sum(), x)[0]
    if not output.requires_grad:
        raise Wrong("The output has no history at all: the layers in front would not learn.")
    found = torch.autograd.grad((output**3).sum(), x)[0]
    if not torch.allclose(found, wanted, atol=1e-3):
        error = ((found - wanted).norm() / wanted.norm()).item()
        raise Wrong(
            f"The gradient is off by {error:.0%}: a batch statistic is cut off from the graph. "
            "Only the update belongs under no_grad."
        )


@exercise("which buffer")
def which_buffer(name) -> str:
    if not isinstance(name, str):
        raise Wrong(f"Expected a name, a string. Got {name!r}.")
    if name == "5.running_var":
        raise Wrong("That one leaks as well. The guard stops at the first: which comes before it?")
    if name != "5.running_mean":
        raise Wrong(f"{name!r} keeps no history. Run a forward pass under guard_buffers.")
    return "The third batch norm, which updates by lerp_."
