# %% [markdown]
# # 7. Diagnose your own model
#
# > *My model is not this one. It has a training loop, a running average of its weights, a few lists
# > for plotting, hooks that somebody else wrote. Memory grows. Where do I begin?*
#
# **Afterwards you can** find what holds on to a graph in any model, tell growing from bounded, read
# memory over a run, on a GPU too, and write a test that keeps the leak from coming back.
#
# **Time** 35 minutes. **Needs** notebooks 5 and 6.

# %%
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from cbn_lab import LeakyBatchNorm2d, MemoryTrace, diagnose, inspect_buffers, plots
from cbn_lab.exercises import TODO, check, predict

_ = torch.manual_seed(0)

# %% [markdown]
# ## First question: the buffers
#
# A model, and one line. It costs next to nothing, so it may stand in any training script.


# %%
def small_net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(64, 1))


def train_step(net):
    loss = net(torch.randn(8, 1, 6, 6)).square().mean()
    net.zero_grad()
    loss.backward()
    return loss


# %%
net = small_net(LeakyBatchNorm2d(4, update="lerp"))
for _ in range(10):
    train_step(net)
inspect_buffers(net)

# %% [markdown]
# ## Second question: everything else
#
# Buffers are one place of many. `diagnose` takes a **training step**, a function without arguments,
# runs it a few times, and follows all that is reachable from it: attributes, lists, dicts, closures,
# hooks, optimizer state. Then it puts everything back as it was.
#
# Here are three training loops. Each keeps something from step to step.


# %%
def loop_with_a_list():
    net, losses = small_net(nn.BatchNorm2d(4)), []

    def step():
        losses.append(train_step(net))

    return step


def loop_with_the_last_loss():
    net, kept = small_net(nn.BatchNorm2d(4)), {}

    def step():
        kept["last"] = train_step(net)

    return step


# %%
def loop_with_an_average_of_weights():
    net = small_net(nn.BatchNorm2d(4))
    average = {name: p.detach().clone() for name, p in net.named_parameters()}

    def step():
        train_step(net)
        for name, p in net.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * p

    return step


# %%
guess_list = predict(
    "losses.append(loss): the graphs of ...", ["no step", "the last step", "all steps"]
)
guess_list

# %%
guess_last = predict(
    "kept['last'] = loss: the graphs of ...", ["no step", "the last step", "all steps"]
)
guess_last


# %% tags=["nbval-check-output"]
def report(step):
    diagnosis = diagnose(step)
    print(f"verdict: {diagnosis.verdict}")
    for finding in diagnosis.findings:
        print(
            f"   {finding.path:24} {finding.verdict:8} {finding.nodes_per_step:+.0f} nodes a step"
        )
    return diagnosis


kept = {"growing": "all steps", "bounded": "the last step", "clean": "no step"}
guess_list.compare(kept[report(loop_with_a_list()).verdict])
guess_last.compare(kept[report(loop_with_the_last_loss()).verdict])
_ = report(loop_with_an_average_of_weights())

# %% [markdown]
# - The **list** keeps every loss, and each loss its graph. It *grows*.
# - The **last** loss is overwritten each time: the graph of one step is alive, never two. It is
#   *bounded*. Report it, and do not be alarmed.
# - The **average of the weights** is the leak of this course in another dress: no `no_grad`, and each
#   average has the last one in its history. Real libraries have had it.
#
# A diagnosis says where it was made and what to write instead:

# %% tags=["nbval-check-output"]
finding = diagnose(loop_with_an_average_of_weights()).findings[0]
print("path:  ", finding.path)
print(textwrap.fill(f"advice: {finding.advice}", plots.LINE, break_long_words=False))

# %% [markdown]
# ### Exercise: growing, bounded, clean? (★★☆, 10 minutes)
#
# Four more things that training scripts keep. Say for each what it is, in your head first; then put
# `"growing"`, `"bounded"` or `"clean"` in the place of TODO.
#
# | name | the line |
# |---|---|
# | total | `total = total + loss` |
# | item | `losses.append(loss.item())` |
# | hook | a forward hook that does `seen.append(output)` |
# | output | `net.last_output = output` |

# %% exercise="verdicts"
verdicts = {"total": TODO, "item": TODO, "hook": TODO, "output": TODO}

# %%
check("verdicts", verdicts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two questions: does it hold a tensor with a history? And does the new one replace the old one, or
# come in addition to it?
#
# </details>

# %% [markdown] solution="verdicts"
# <details><summary>Solution</summary>
#
# ```python
# verdicts = {"total": "growing", "item": "clean", "hook": "growing", "output": "bounded"}
# ```
#
# `total` is one tensor, but its history reaches back to the first loss.
#
# </details>

# %% [markdown]
# ### Exercise: a healthy loop (★★☆, 10 minutes)
#
# Write a training step that keeps **all losses** in the list `losses` and an **average of the
# weights** in the dict `average` (0.9 of the old, 0.1 of the new), and leaks nothing.


# %% exercise="healthy loop"
def make_step(net, losses, average):
    def step():
        return TODO  # begin with loss = train_step(net)

    return step


# %%
check("healthy loop", make_step)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `loss.item()` is a number. For the average there is `with torch.no_grad():`.
#
# </details>

# %% [markdown] solution="healthy loop"
# <details><summary>Solution</summary>
#
# ```python
# def make_step(net, losses, average):
#     def step():
#         losses.append(train_step(net).item())
#         with torch.no_grad():
#             for name, p in net.named_parameters():
#                 average[name].mul_(0.9).add_(p, alpha=0.1)
#
#     return step
# ```
#
# </details>

# %% [markdown]
# ## Memory over a run
#
# `MemoryTrace` is light enough to stay in a real run. On a GPU it records what is allocated, the peak
# and what is reserved, for each device; without one, the exact bytes of live tensors and the heap of
# this process.

# %%
traces = {}
for name, loop in (("list", loop_with_a_list), ("last", loop_with_the_last_loss)):
    step = loop()
    with MemoryTrace() as traces[name]:
        for k in range(12):
            step()
            traces[name].step(f"step {k + 1}")
traces["list"].table()

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
for ax, (name, trace) in zip(axes, traces.items(), strict=True):
    plots.memory(trace, ax)
    ax.set_xlabel(f"training step, {name}")
plt.show()
for ax, name in zip(axes, traces, strict=True):
    print(plots.described(ax, name))

# %% [markdown]
# On a machine with a GPU, one more line writes a file for PyTorch's memory viewer
# (<https://pytorch.org/memory_viz>), which shows every allocation with the lines that made it:
#
# ```python
# with MemoryTrace("cuda") as trace:
#     for batch in batches:
#         train(batch)
#         trace.step()
#     trace.snapshot("memory.pickle")
# ```
#
# But remember notebook 5: after `backward()` a leak of nodes lives on the host, and a GPU's counter
# may lie flat.
#
# ## From the command line
#
# `cbn-lab doctor` runs the same diagnosis on a file or a module: give it a function that returns a
# training step. Its exit status is 0 for clean or bounded, 1 for growing, 2 where it could not run.

# %% tags=["nbval-check-output"]
script = """
import torch
from torch import nn

def make_step():
    net, total = nn.Linear(4, 1), [torch.zeros(())]
    def step():
        loss = net(torch.randn(8, 4)).square().mean()
        loss.backward()
        total[0] = total[0] + loss
    return step
"""
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "training.py")
    path.write_text(script)
    command = [sys.executable, "-m", "cbn_lab.cli", "doctor", f"{path}:make_step"]
    done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout.splitlines()[0])
print("exit status", done.returncode)

# %% [markdown]
# ## A test that keeps it away
#
# Where the kit is installed, pytest has a fixture:
#
# ```python
# def test_training_keeps_no_graph(assert_no_graph_leak):
#     net = Net()
#     assert_no_graph_leak(net, lambda: train_one_batch(net))
# ```
#
# The step must be a real one: with something trainable in front of what you suspect (notebook 5).
#
# ## Summary
#
# - `inspect_buffers(model)`: one line, at no cost, for buffers.
# - `diagnose(step)`: whatever keeps a graph, and whether it grows. *Bounded* is no alarm.
# - `MemoryTrace`: how much, over a run. `cbn-lab doctor` and `assert_no_graph_leak`: for every day.
#
# **To think about.** A leak that no tensor leads to: an exception that was caught and kept holds on to
# the frame that raised it, and the frame to its tensors. How could a tool still see that memory grows?
#
# **Sources.** PyTorch documentation, *Understanding CUDA memory usage*. Requests for such a tool:
# [pytorch#42815](https://github.com/pytorch/pytorch/issues/42815),
# [#91692](https://github.com/pytorch/pytorch/issues/91692),
# [#82528](https://github.com/pytorch/pytorch/issues/82528).
#
# Next: [8. Make it fast](08_make_it_fast.ipynb)
