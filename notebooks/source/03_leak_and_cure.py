# %% [markdown]
# # 3. The leak and its cure
#
# > *My network trains, and the loss goes down. But each step takes a little more memory than the one
# > before, until the run is killed. Nothing in my code keeps anything. Or does it?*
#
# **Afterwards you can** see what a buffer drags along, name the line that does it, cure it in three
# ways, and tell why the first attempt to reproduce such a leak usually fails.
#
# **Time** 20 minutes. **Needs** notebooks 1 and 2.

# %%
import copy
import inspect

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, IntSlider, interact
from torch import nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

from cbn_lab import LeakyComplexBatchNorm2d, MemoryTrace, datasets, inspect_buffers, plots
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
# **Before you go on:** does anything look wrong with it? The numbers it computes are right.
#
# ## Train, and watch
#
# `inspect_buffers` looks at every buffer of a model and counts the autograd graph behind it.
# `MemoryTrace` records memory: the GPU's where there is one, otherwise that of this process.

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
net, leaking, leaking_trace, losses = train("rebind")
print(f"loss: {losses[0]:.1f} at first, {losses[-1]:.1f} after {len(losses)} steps")

# %% [markdown]
# The loss goes down, as the question says. Now the buffers:

# %%
inspect_buffers(net)

# %% [markdown]
# Two of the three buffers have a `grad_fn`, and behind it hundreds of nodes: **the graph of all 30
# steps.** A healthy buffer has none. (*retained* is 0: `backward()` has freed the tensors that the
# graph had saved. The nodes themselves stay.) Step by step:

# %% tags=["nbval-check-output"]
print("nodes behind the largest graph:", leaking[:4], "...", leaking[-1])
print("nodes per step:", set(b - a for a, b in zip(leaking, leaking[1:], strict=False)))

# %% [markdown]
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
# `loss.backward()` frees the large tensors saved in each step's graph, but the nodes themselves live
# as long as something points to them, and the buffer does.
#
# ## Why the first attempt to reproduce it failed
#
# It was tried with the layer alone, on random input. Then nothing before the layer is trainable, `mean`
# has no history, and there is nothing to keep:

# %% tags=["nbval-check-output"]
layer = LeakyComplexBatchNorm2d(3, update="rebind")
for _ in range(30):
    layer(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
print("layer alone: ", max(row.nodes for row in inspect_buffers(layer).rows), "nodes")

net = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.cfloat), layer)
for _ in range(30):
    net(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
print("with a layer before it:", max(row.nodes for row in inspect_buffers(net).rows), "nodes")

# %% [markdown]
# So a test for this leak needs **something trainable in front**.
#
# ## Does writing in place help?
#
# The question's second version assigned column by column, `running_covar[:, 0] = ...`. The buffer
# stays the same tensor. Autograd tracks writing into a slice as well:

# %%
print(inspect.getsource(UPDATES["slice"]))

# %% tags=["nbval-check-output"]
_, sliced, _, _ = train("slice", steps=10)
print("nodes per step:", set(b - a for a, b in zip(sliced, sliced[1:], strict=False)))

# %% [markdown]
# It got worse: more operations a step, more nodes.
#
# ## The cure
#
# The running statistics need the *numbers* of this batch and not where they came from. Say so, in
# either of two ways:

# %%
print(inspect.getsource(UPDATES["no_grad"]))
print(inspect.getsource(UPDATES["detach"]))

# %%
cured_net, cured, cured_trace, cured_losses = train("no_grad")
_, detached, _, _ = train("detach", steps=10)

# %% tags=["nbval-check-output"]
print("nodes with no_grad:", sorted(set(cured)), "  with detach:", sorted(set(detached)))
print("the losses are the same, to the last bit:", cured_losses == losses)
print("every buffer is clean:", inspect_buffers(cured_net).ok)

# %% [markdown]
# **Not a bit of the training changes.** The history was never used for anything.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
forms = {"rebind": leaking, "slice": sliced, "no_grad": cured, "detach": detached}
plots.graph_growth(forms, left)
heap = {"rebind": leaking_trace, "no_grad": cured_trace}
growth = {
    form: [(row.heap_bytes - trace.rows[0].heap_bytes) / 2**10 for row in trace.rows]
    for form, trace in heap.items()
}
plots.graph_growth(growth, right, unit="growth of the host heap (KiB)")
plt.show()
print(left.get_label())
print(right.get_label())

# %% [markdown]
# Left, what is behind the buffer: it rises for both leaks and lies flat for both cures. Right, the
# memory of this process: what the leak costs with every step. A GPU's own counter would
# hardly see it, because after `backward()` only the nodes remain, and they live in the host's memory.
#
# ## Move it yourself
#
# Choose a form of update and a number of steps. A small network is trained afresh for each setting.


# %%
def show(update, steps):
    torch.manual_seed(0)
    layer = LeakyComplexBatchNorm2d(3, update=update)
    net = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.cfloat), layer)
    nodes = []
    for _ in range(steps):
        net(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
        nodes.append(max(row.nodes for row in inspect_buffers(net).rows))
    ax = plots.graph_growth(
        {update: nodes}, plt.subplots(figsize=(7, 3.5), layout="constrained")[1]
    )
    ax.set_ylim(0, max(2000, 1.05 * nodes[-1]))
    plt.show()
    print(ax.get_label())


form = Dropdown(options=[name for name in UPDATES if name != "over_detached"], description="update")
_ = interact(show, update=form, steps=IntSlider(20, 2, 60, description="steps"))

# %% [markdown]
# ## How it shows elsewhere
#
# Training is silent about it. Two other things are not, and are often what one sees first:

# %% tags=["nbval-check-output"]
net, *_ = train("rebind", steps=2)
try:
    copy.deepcopy(net)
except RuntimeError as error:
    print("deepcopy:", str(error).split(".")[0])

net.eval()
try:
    cross_entropy(net(images[:8]), labels[:8]).backward()
except RuntimeError as error:
    print("backward in eval mode:", str(error).split("(")[0])

# %% [markdown]
# ## Should `register_buffer` forbid it?
#
# The last question of the thread. *For*: a buffer with a history is nearly always a mistake, and the
# error message would come at the first step, not after a night. *Against*: PyTorch cannot know. A
# buffer may hold a differentiable state on purpose (a hidden state under truncated backpropagation,
# weights in meta-learning), and `register_buffer` runs before the first step: what would have to be
# forbidden is an assignment later on. So PyTorch leaves it to you, and you have a tool that looks.
#
# ## Summary
#
# - A running statistic updated outside `no_grad` takes the graph of every step along. The numbers stay
#   right, memory grows.
# - Writing in place is no cure. `torch.no_grad()` and `.detach()` are.
# - A test for it needs something trainable before the layer. `inspect_buffers(model).ok` is one line.
#
# **To think about.** Somebody cures the leak by computing the *batch* mean under `no_grad`, before it
# is used to normalise. The leak is gone. What else is?
#
# **Sources.** PyTorch notes, *Autograd mechanics* and *Frequently asked questions: my model reports
# "cuda runtime error(2): out of memory"*.
