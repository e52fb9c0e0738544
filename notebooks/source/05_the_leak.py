# %% [markdown]
# # 5. The leak
#
# > *My network trains, and the loss goes down. But each step takes a little more memory than the one
# > before, until the run is killed. Nothing in my code keeps anything. Or does it?*
#
# **Afterwards you can** see what a buffer drags along, count it, tell nodes from bytes, and say why
# the first attempt to reproduce such a leak usually fails.
#
# **Time** 35 minutes. **Needs** notebooks 1 and 4.

# %%
import copy
import inspect

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

from cbn_lab import (
    LeakExplorer,
    LeakyComplexBatchNorm2d,
    MemoryTrace,
    datasets,
    inspect_buffers,
    plots,
)
from cbn_lab.exercises import TODO, check, predict
from cbn_lab.specimens import UPDATES

# %% [markdown]
# ## The network
#
# This is the network of the question: two complex convolutions with a whitening batch norm between
# them, pooling, two linear layers. It reads handwritten digits, resized to 28×28 pixels.


# %%
def apart(function, z):
    """Apply a real function to real and imaginary part."""
    return torch.complex(function(z.real), function(z.imag))


class Net(nn.Module):
    def __init__(self, update):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, dtype=torch.cfloat)
        self.bn = LeakyComplexBatchNorm2d(20, update=update)
        self.conv2 = nn.Conv2d(20, 50, 5, dtype=torch.cfloat)
        self.fc1 = nn.Linear(800, 500, dtype=torch.cfloat)
        self.fc2 = nn.Linear(500, 10, dtype=torch.cfloat)

    def forward(self, z):
        z = apart(relu, self.bn(self.conv1(z)))
        z = apart(lambda part: max_pool2d(part, 2), z)
        z = apart(relu, self.conv2(z))
        z = apart(lambda part: max_pool2d(part, 2), z)
        z = apart(relu, self.fc1(z.flatten(1)))
        return self.fc2(z).abs()


# %% [markdown]
# The only thing that we shall change is `update`: how the batch norm brings its running statistics up
# to date. Each form is a function of one or two lines. This is the one of the question:

# %%
print(inspect.getsource(UPDATES["rebind"]))

# %% [markdown]
# which for `running_mean` reads
#
# ```python
# self.running_mean = f * mean + (1 - f) * self.running_mean
# ```
#
# Does anything look wrong with it? The numbers it computes are right.
#
# ## Train, and watch
#
# `inspect_buffers` looks at every buffer of a model and counts the autograd graph behind it: its
# *nodes*, one for each operation that autograd remembers. `MemoryTrace` records memory: the GPU's
# where there is one, otherwise that of this process.

# %%
images, labels = datasets.digits(28)
images = images.to(torch.cfloat)


def train(update, steps=30):
    torch.manual_seed(0)
    net = Net(update)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    nodes, losses = [], []
    with MemoryTrace() as trace:
        for step in range(steps):
            batch = slice(32 * step, 32 * step + 32)
            loss = cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            nodes.append(max(row.nodes for row in inspect_buffers(net).rows))
            trace.step(f"step {step + 1}")
    return net, nodes, trace, losses


# %%
guess_nodes = predict(
    "Nodes behind a running statistic after 30 steps:", ["none", "about 30", "more than 500"]
)
guess_nodes

# %%
net, leaking, leaking_trace, losses = train("rebind")
print(f"loss: {losses[0]:.1f} at first, {losses[-1]:.1f} after {len(losses)} steps")

# %% [markdown]
# The loss goes down, as the question says. Now the buffers:

# %%
inspect_buffers(net)

# %% tags=["nbval-check-output"]
print("nodes behind the largest graph:", leaking[:4], "...", leaking[-1])
print("nodes per step:", set(b - a for a, b in zip(leaking, leaking[1:], strict=False)))
guess_nodes.compare("more than 500" if leaking[-1] > 500 else "about 30")

# %% [markdown]
# Two of the three buffers have a `grad_fn`, and behind it stands **the graph of all 30 steps.** A
# healthy buffer has none. (`depth` is the longest chain of nodes, `retained` what they keep in memory,
# `origin` the line that made the history. A dash: it could not be told.)
#
# ## Why
#
# `mean` was computed from the output of `conv1`, which has trainable weights. So `mean` has a history,
# and the sum has it too. The assignment puts **a tensor with history** in the place of the buffer. The
# next step adds its own `mean` to that, with *its* history, and so on: a chain that begins at step 1.
#
# ```
# running_mean ── + ── f · mean (step 30)
#                 └── (1 − f) · ── + ── f · mean (step 29)
#                                  └── (1 − f) · ── + ── f · mean (step 28)
#                                                   └── ...
# ```
#
# Let it grow, one step at a time. Which forms of update grow, and which do not?

# %%
LeakExplorer()

# %% [markdown]
# The same as a plain picture, with the memory of this process beside it:

# %%
cured_net, cured, cured_trace, cured_losses = train("no_grad")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
plots.graph_growth({"rebind": leaking, "no_grad": cured}, left)
growth = {
    form: [(row.heap_bytes - trace.rows[0].heap_bytes) / 2**10 for row in trace.rows]
    for form, trace in {"rebind": leaking_trace, "no_grad": cured_trace}.items()
    if trace.rows[0].heap_bytes is not None  # where the system tells
}
if growth:
    plots.graph_growth(growth, right, unit="growth of the host heap (KiB)")
plt.show()
print(plots.described(left), plots.described(right), sep="\n")

# %% [markdown]
# ### Exercise: does it have a history? (★☆☆, 5 minutes)
#
# Write a function that says whether a tensor **holds on to a graph**. Careful: a trainable weight
# requires a gradient, and holds on to nothing.


# %% exercise="history"
def has_history(tensor):
    return TODO


# %%
check("history", has_history)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Autograd calls a tensor at the beginning of a graph a *leaf*. Weights are leaves; so is everything
# that was computed without a graph. Look at `tensor.is_leaf` and `tensor.grad_fn`.
#
# </details>

# %% [markdown] solution="history"
# <details><summary>Solution</summary>
#
# ```python
# def has_history(tensor):
#     return tensor.requires_grad and not tensor.is_leaf
# ```
#
# `tensor.grad_fn is not None` is right as well. It makes a Python object for the C++ node, though, and
# in PyTorch 2.13 a long chain of nodes that were looked at one by one crashes when it is freed.
#
# </details>

# %% [markdown]
# ### Exercise: count the nodes (★★★, 15 minutes)
#
# Count the nodes behind a tensor. Begin at `tensor.grad_fn`; each node has `next_functions`, pairs of
# which the first is the next node or `None`. One node may be reached in several ways and counts once.
# The chain may be thousands of nodes deep. (Not a hundred thousand: in PyTorch 2.13 a chain whose nodes
# Python has looked at one by one crashes when it is freed. `inspect_buffers` takes another way.)


# %% exercise="count nodes"
def count_nodes(tensor):
    return TODO


# %%
check("count nodes", count_nodes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A list of nodes still to visit and a set of those already seen. A function that calls itself ends in
# a `RecursionError` on a deep chain.
#
# </details>

# %% [markdown] solution="count nodes"
# <details><summary>Solution</summary>
#
# ```python
# def count_nodes(tensor):
#     waiting, seen = [tensor.grad_fn], set()
#     while waiting:
#         node = waiting.pop()
#         if node is not None and node not in seen:
#             seen.add(node)
#             waiting.extend(following for following, _ in node.next_functions)
#     return len(seen)
# ```
#
# </details>

# %% [markdown]
# ## Why the first attempt to reproduce it failed
#
# It was tried with the layer alone, on random input: 30 steps, and no growth at all.

# %%
guess_alone = predict(
    "The same layer behind a convolution: which nodes stand behind the buffer after 30 steps?",
    ["none", "those of one step", "those of all 30 steps"],
)
guess_alone

# %% tags=["nbval-check-output"]
layer = LeakyComplexBatchNorm2d(3, update="rebind")
for _ in range(30):
    layer(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
print("layer alone:          ", max(row.nodes for row in inspect_buffers(layer).rows), "nodes")

net = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.cfloat), layer)
for _ in range(30):
    net(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
print("with a layer before it:", max(row.nodes for row in inspect_buffers(net).rows), "nodes")
nodes = max(row.nodes for row in inspect_buffers(net).rows)
guess_alone.compare(
    "none" if nodes == 0 else "those of one step" if nodes < 100 else "those of all 30 steps"
)

# %% [markdown]
# With nothing trainable before it, `mean` has no history: there is nothing to keep. So a test for this
# leak needs **something trainable in front**.
#
# ### Exercise: reproduce it (★★☆, 5 minutes)
#
# You are given a batch norm for 4 channels that you suspect, a real one. Put it into a model that takes
# real images with 4 channels, so that the leak, if there is one, must show.


# %% exercise="reproduce"
def model_around(layer):
    return TODO


# %%
check("reproduce", model_around)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `nn.Sequential` puts layers one after the other. The one in front must be trainable.
#
# </details>

# %% [markdown] solution="reproduce"
# <details><summary>Solution</summary>
#
# ```python
# def model_around(layer):
#     return nn.Sequential(nn.Conv2d(4, 4, 1), layer)
# ```
#
# </details>

# %% [markdown]
# ## Nodes against bytes
#
# `loss.backward()` frees the large tensors that each step's graph had saved. The nodes live on. In
# a loop that never calls `backward`, say one that only evaluates the loss, the tensors stay too:


# %% tags=["nbval-check-output"]
def retained(train_it, steps=5):
    torch.manual_seed(0)
    net = Net("rebind")
    for _ in range(steps):
        loss = cross_entropy(net(images[:32]), labels[:32])
        if train_it:
            loss.backward()
    return max(row.retained_bytes for row in inspect_buffers(net).rows)


print(f"training:     {retained(True) / 2**20:6.2f} MiB of tensors after 5 steps")
print(f"forward only: {retained(False) / 2**20:6.2f} MiB of tensors after 5 steps")

# %% [markdown]
# Training, the leak is a slow one: nodes, in the memory of the *host*. The counter of a GPU may lie
# flat while the process dies. Forward only, it is a fast one, and the GPU's own memory goes.
#
# ## How else it shows
#
# Training is silent about it. Two other things are not, and are often what one sees first:

# %% tags=["nbval-check-output"]
net, *_ = train("rebind", steps=2)
try:
    copy.deepcopy(net)
except RuntimeError as error:
    print("deepcopy:", str(error).split(" support")[0], "...")

net.eval()
try:
    cross_entropy(net(images[:8]), labels[:8]).backward()
except RuntimeError as error:
    print("backward in eval mode:", str(error).split("(")[0])

# %% [markdown]
# In evaluation the layer *uses* its running statistics, so the gradient flows into them, and on into
# the graph of a step long past, which has been freed.
#
# ## Summary
#
# - A running statistic that takes the batch's history in takes the graph of every step along. The numbers
#   stay right, memory grows.
# - After `backward()` it is nodes that grow, on the host; without it, tensors as well.
# - It shows only where something trainable stands before the layer.
#
# **To think about.** `state_dict()` and `torch.save` say nothing about the leak. What do they do with
# the history, and what does a pickled model bring back?
#
# **Sources.** PyTorch documentation, *Autograd mechanics*, and *Frequently asked questions*, on
# keeping the history of a loss.
#
# Next: [6. The cure, and its opposite](06_the_cure.ipynb)
