# %% [markdown]
# # 6. The cure, and its opposite
#
# > *So the buffer takes the graph along. How do I stop it? And why does PyTorch let me do this in the
# > first place: should `register_buffer` not forbid it?*
#
# **Afterwards you can** cure the leak in three ways, tell a cure from something that only looks like
# one, recognise the opposite mistake, which is silent, and put a guard on a model.
#
# **Time** 35 minutes. **Needs** notebook 5.

# %%
import inspect
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from cbn_lab import LeakyBatchNorm2d, LeakyComplexBatchNorm2d, guard_buffers, inspect_buffers, plots
from cbn_lab.diagnostics.guard import BufferGraphError
from cbn_lab.exercises import TODO, check, predict
from cbn_lab.specimens import CURES, LEAKS, UPDATES

_ = torch.manual_seed(0)

# %% [markdown]
# ## Five ways to write it
#
# A batch norm behind a small convolution, trained for some steps. What stands behind its running
# statistics afterwards?


# %%
def nodes_after(update, steps=20):
    """Nodes behind the largest graph of any buffer, after each step."""
    torch.manual_seed(0)
    layer = LeakyComplexBatchNorm2d(3, update=update)
    net = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.cfloat), layer)
    nodes = []
    for _ in range(steps):
        net(torch.randn(8, 3, 4, 4, dtype=torch.cfloat)).abs().sum().backward()
        nodes.append(max(row.nodes for row in inspect_buffers(net).rows))
    return nodes


# %% [markdown]
# The forms that one meets in the wild. `rebind` puts a new tensor in the buffer's place; the others
# write **into** the buffer, which stays the same tensor:

# %%
for name in ("rebind", "inplace", "slice", "lerp", "copy"):
    print(inspect.getsource(UPDATES[name]))

# %%
guess_inplace = predict(
    "Which of them leak?", ["only rebind", "all but copy", "all of them", "none of them"]
)
guess_inplace

# %% tags=["nbval-check-output"]
leaking = {name: nodes_after(name) for name in LEAKS}
for name, nodes in leaking.items():
    print(f"{name:8} {nodes[-1]:5} nodes after 20 steps, {nodes[-1] - nodes[-2]} more each step")
guess_inplace.compare(
    "all of them" if all(n[-1] > n[-2] for n in leaking.values()) else "only rebind"
)

# %% [markdown]
# **All of them.** Writing in place only *looks* like a cure. Autograd does not mind it: the buffer's
# `grad_fn` is replaced, and the old one becomes its predecessor. Writing slices is the worst, since each
# of them is an operation of its own.
#
# ## Three cures
#
# The running statistics need the *numbers* of this batch and not where they came from. Say so:

# %%
for name in CURES:
    print(inspect.getsource(UPDATES[name]))

# %% tags=["nbval-check-output"]
cured = {name: nodes_after(name) for name in CURES}
for name, nodes in cured.items():
    print(f"{name:8} {nodes[-1]} nodes after 20 steps")

# %%
fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
shown = {**{k: leaking[k] for k in ("rebind", "slice", "lerp")}, "no_grad": cured["no_grad"]}
plots.graph_growth(shown, ax)
plt.show()
print(plots.described(ax))

# %% [markdown]
# - `with torch.no_grad():` records nothing inside the block. Use it around the update.
# - `.detach()` gives a tensor with the same numbers and no history. Use it on what comes in.
# - `.data` is the old way. It also hides the write from autograd's checks, so prefer the other two.
#
# Does a cure change the training? Let us compare, bit by bit:


# %% tags=["nbval-check-output"]
def train(update, steps=5):
    torch.manual_seed(0)
    layer = LeakyBatchNorm2d(3, update=update)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.Flatten(), nn.Linear(48, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 2, 6, 6)).square().mean().backward()
        optimizer.step()
    return net.state_dict()


leaky, healthy = train("rebind"), train("no_grad")
same = [torch.equal(leaky[name], healthy[name]) for name in leaky]
print(f"{sum(same)} of {len(same)} tensors are the same to the last bit")

# %% [markdown]
# The history was never used for anything.
#
# ### Exercise: cure it (★☆☆, 5 minutes)
#
# Write the update of one statistic so that nothing is kept **and** the buffer stays the same tensor, as
# in `nn.BatchNorm2d`: whoever else holds it then sees the new value too. `module` is the layer, `name`
# the name of the buffer, `batch` the new value, `f` the factor. Read the buffer with
# `getattr(module, name)`.


# %% exercise="cure"
def cured_update(module, name, batch, f):
    return TODO


# %%
check("cure", cured_update)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two of the lines above, put together: one that writes in place, and one that records nothing.
#
# </details>

# %% [markdown] solution="cure"
# <details><summary>Solution</summary>
#
# ```python
# def cured_update(module, name, batch, f):
#     with torch.no_grad():
#         getattr(module, name).mul_(1 - f).add_(batch, alpha=f)
# ```
#
# </details>

# %% [markdown]
# ## The opposite mistake
#
# Somebody has learned the lesson and puts **everything** under `no_grad`: the batch statistics too,
# before the input is normalised with them.
#
# ```python
# with torch.no_grad():
#     mean = x.mean((0, 2, 3), keepdim=True)
#     var = x.var((0, 2, 3), correction=0, keepdim=True)
# y = (x - mean) / (var + eps).sqrt()
# ```
#
# The output is right. Nothing leaks.

# %%
guess_error = predict(
    "What becomes of the gradient of the layer in front?",
    ["it stays the same", "it is wrong by more than 1 %", "it vanishes"],
)
guess_error


# %% tags=["nbval-check-output"]
def gradient(update):
    torch.manual_seed(0)
    layer = LeakyBatchNorm2d(3, update=update)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(48, 1))
    output = net(torch.randn(16, 2, 6, 6))
    (output - 1).square().mean().backward()
    return net[0].weight.grad, output.detach()


right, output = gradient("no_grad")
wrong, output_wrong = gradient("over_detached")
error = ((wrong - right).norm() / right.norm()).item()
print("same output:", torch.equal(output, output_wrong))
print(f"the gradient is off by {error:.0%}")
guess_error.compare("it is wrong by more than 1 %" if error > 0.01 else "it stays the same")

# %% [markdown]
# `mean` and `var` depend on `x`, and the gradient no longer knows. **Nothing fails**: no error, no
# growth. A check for leaks alone would be content with this layer, so `cbn_lab.check_batch_norm` looks for both mistakes.
#
# How can one see that the right gradient has something to do with the statistics? Batch norm takes out
# the mean: adding a constant to a whole channel changes no output. So the right gradient of the input
# sums to zero over each channel. The wrong one need not:


# %% tags=["nbval-check-output"]
def input_gradient(update):
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    LeakyBatchNorm2d(3, update=update)(x).pow(3).sum().backward()
    return x.grad


for update in ("no_grad", "over_detached"):
    sums = input_gradient(update).sum((0, 2, 3)).abs().max().item()
    print(f"{update:14} largest sum of a channel's gradient: {sums:7.1f}")

# %% [markdown]
# ### Exercise: neither leak nor over-cure (★★☆, 10 minutes)
#
# Write the training step of a batch norm, whole. Return the output; update both running statistics in
# place (the variance unbiased); leave no history; get the gradient right.


# %% exercise="neither"
def batch_norm(x, running_mean, running_var, momentum, eps):
    return TODO


# %%
check("neither", batch_norm)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The batch statistics with a graph, for the output. The update under `no_grad`. Shapes: `mean` is
# (C,); `mean[:, None, None]` broadcasts against (N, C, H, W).
#
# </details>

# %% [markdown] solution="neither"
# <details><summary>Solution</summary>
#
# ```python
# def batch_norm(x, running_mean, running_var, momentum, eps):
#     mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
#     n = x.numel() // x.shape[1]
#     with torch.no_grad():
#         running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
#         running_var.mul_(1 - momentum).add_(var * n / (n - 1), alpha=momentum)
#     return (x - mean[:, None, None]) / (var + eps).sqrt()[:, None, None]
# ```
#
# </details>

# %% [markdown]
# ## Should `register_buffer` forbid it?
#
# **For** it speaks that a buffer with a history is nearly always a
# mistake, and that an error at the first step is better than a dead process in the morning.
#
# **Against** it: PyTorch cannot know. Some buffers hold a differentiable state on purpose: a hidden
# state under truncated backpropagation, weights in meta-learning. And `register_buffer` runs before
# the first step, when all is still well. What would have to be forbidden comes later: an assignment,
# or a write in place, which never passes `register_buffer` at all.
#
# So it is left to you. `guard_buffers` is that rule, for the models where you
# want it. It raises **at the line that does it**, before it is done:

# %% tags=["nbval-check-output"]
net = nn.Sequential(nn.Conv2d(2, 3, 3), LeakyBatchNorm2d(3, update="inplace"))
try:
    with guard_buffers(net):
        net(torch.randn(4, 2, 6, 6))
except BufferGraphError as error:
    print("buffer:", error.buffer)
    print("file:  ", Path(error.origin).name.partition(":")[0])

# %% [markdown]
# The whole message says what to write instead:

# %%
try:
    with guard_buffers(net):
        net(torch.randn(4, 2, 6, 6))
except BufferGraphError as error:
    text = str(error).replace(error.origin, Path(error.origin).name)
    print(textwrap.fill(text, plots.LINE, break_long_words=False))

# %% [markdown]
# And it lets a healthy model alone, `nn.BatchNorm2d` and the cures included:

# %% tags=["nbval-check-output"]
healthy = nn.Sequential(
    nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), LeakyBatchNorm2d(3, update="detach"), nn.Conv2d(3, 1, 1)
)
with guard_buffers(healthy):
    for _ in range(3):
        healthy(torch.randn(4, 2, 6, 6)).sum().backward()
print("three steps under guard, and every buffer is clean:", inspect_buffers(healthy).ok)

# %% [markdown]
# ### Exercise: which buffer? (★☆☆, 5 minutes)
#
# This model leaks somewhere. Find the buffer with the guard, and put its name (a string, such as
# `"3.running_mean"`) in the place of TODO.


# %%
def suspicious_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3)]
    for update in ("no_grad", "data", "lerp", "detach"):
        layers += [LeakyBatchNorm2d(4, update=update), nn.ReLU()]
    return nn.Sequential(*layers)


# %% exercise="which buffer"
leaking_buffer = TODO

# %%
check("which buffer", leaking_buffer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Run one forward pass of `suspicious_model()` under `guard_buffers`, and read the error. The first
# buffer that is about to take a history is the one that it names.
#
# </details>

# %% [markdown] solution="which buffer"
# <details><summary>Solution</summary>
#
# ```python
# leaking_buffer = None
# model = suspicious_model()
# try:
#     with guard_buffers(model):
#         model(torch.randn(4, 2, 6, 6))
# except BufferGraphError as error:
#     leaking_buffer = error.buffer
# ```
#
# </details>

# %% [markdown]
# ## Summary
#
# - In place or not, an update outside `no_grad` leaks. `no_grad`, `detach` and `.data` cure it, and no
#   number changes.
# - The batch statistics themselves belong **into** the graph. Under `no_grad` they give a wrong
#   gradient, without a word.
# - PyTorch does not forbid a history in a buffer, for reasons. `guard_buffers` does, where you ask.
#
# **To think about.** Would you want the guard as PyTorch's default, with a keyword to switch it off?
# Whose code would break, and whose night would it save?
#
# **Sources.** PyTorch documentation, *Autograd mechanics*, on locally disabling gradient computation;
# S. Ioffe and C. Szegedy, *Batch Normalization*, ICML 2015, section 3, on why the statistics belong
# into the gradient.
#
# Next: [7. Diagnose your own model](07_diagnose.ipynb)
