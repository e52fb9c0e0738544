# %% [markdown]
# # 1. Where is `running_mean` updated?
#
# > *I want to write my own batch norm. I read the source of `nn.BatchNorm2d`, and no line assigns
# > `running_mean`. Where does it change?*
#
# **Afterwards you can** say what a buffer is and who writes it, check PyTorch's update rule by hand,
# and choose a momentum, knowing what you choose.
#
# **Time** 25 minutes. **Needs** Python; no PyTorch beyond tensors.
#
# Run the cells one by one (Shift+Enter). Before each key result you are asked for a **prediction**: it
# is stored, and held against what comes. (*Run → Run All Cells* asks nobody. Predict all the same, and
# run the next cell again.) The **exercises** check themselves; hints and solutions are folded away
# below them.

# %%
import inspect
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from cbn_lab import BatchNorm2d, MomentumExplorer, plots
from cbn_lab.exercises import TODO, check, predict
from cbn_lab.running_stats import moved, update_

_ = torch.manual_seed(0)

# %% [markdown]
# ## Two kinds of state
#
# A batch norm holds **parameters**, which the optimizer changes, and **buffers**, which it does not.
# Both are saved in the `state_dict`, and both move along in `.to(device)`.

# %% tags=["nbval-check-output"]
bn = nn.BatchNorm2d(2)
for name, parameter in bn.named_parameters():
    print(f"parameter  {name:20} {parameter.tolist()}")
for name, buffer in bn.named_buffers():
    print(f"buffer     {name:20} {buffer.tolist()}")

# %% [markdown]
# Now one batch in training mode. The data has mean 5, and nothing but the layer is called. What will
# become of `running_mean`, which is 0 now?

# %%
guess_mean = predict("running_mean after one batch of mean 5:", ["0", "about 0.5", "5"])
guess_mean

# %% tags=["nbval-check-output"]
bn = nn.BatchNorm2d(2)  # a new one, or a second run of this cell would be its second batch
batch = 5 + 2 * torch.randn(16, 2, 4, 4)
address, version = bn.running_mean.data_ptr(), bn.running_mean._version

bn(batch)

print("running_mean          ", [f"{value:.3f}" for value in bn.running_mean.tolist()])
print("same memory as before ", bn.running_mean.data_ptr() == address)
print("version counter       ", version, "->", bn.running_mean._version)
value = bn.running_mean.mean()
guess_mean.compare("0" if value < 0.1 else "about 0.5" if value < 1 else "5")

# %% [markdown]
# The numbers changed, **in the same memory**: no new tensor took the place of the old one. Somebody
# wrote into this very tensor, and so quietly that not even its version counter moved. (In-place
# operations raise that counter; autograd relies on it. Batch norm forgets to, a known gap:
# [pytorch#13402](https://github.com/pytorch/pytorch/issues/13402), open since 2018.)
#
# Who? Let us search the Python source of the layer for an assignment.

# %%
guess_line = predict(
    "How many lines of nn.BatchNorm2d assign running_mean?", ["none", "one", "two"]
)
guess_line

# %% tags=["nbval-check-output"]
source = inspect.getsource(nn.modules.batchnorm._BatchNorm.forward)
assigned = [line for line in source.splitlines() if "running_mean =" in line]
passed = [line.strip() for line in source.splitlines() if "self.running_mean" in line]
print("lines that assign it:", assigned)
print("lines that mention it:", *passed, sep="\n  ")
guess_line.compare(["none", "one", "two"][len(assigned)])

# %% [markdown]
# None assigns it. The layer only **passes the buffer on** to `torch.nn.functional.batch_norm`, which
# calls ATen, PyTorch's C++ library. There it is written. You can see it with two tensors of your own,
# and no layer at all:

# %% tags=["nbval-check-output"]
mine, yours = torch.zeros(2), torch.ones(2)
torch.nn.functional.batch_norm(batch, mine, yours, training=True, momentum=0.1)
print("my tensor, after the call:", [f"{value:.3f}" for value in mine.tolist()])

# %% [markdown]
# That answers the question: **`running_mean` is updated in C++, in place, in the tensor that is
# handed over.**
#
# ## The rule, checked by hand
#
# $$\text{running} \leftarrow (1 - m)\cdot\text{running} + m\cdot\text{batch}$$
#
# with momentum $m$ = 0.1: the **new** value counts for a tenth. (In Keras it is the other way round:
# 0.9 there is 0.1 here.) `running_mean` starts at 0, `running_var` at 1.

# %% tags=["nbval-check-output"]
m, n = 0.1, batch.numel() // 2  # n: values per channel, pixels included
mean = batch.mean((0, 2, 3))
var = batch.var((0, 2, 3), correction=1)  # divided by n - 1
print("n =", n)
print("mean agrees:", torch.allclose(bn.running_mean, (1 - m) * 0 + m * mean))
print("var agrees: ", torch.allclose(bn.running_var, (1 - m) * 1 + m * var))

# %% [markdown]
# One subtlety: the variance that is **stored** is divided by $n - 1$ (unbiased). Keep it in mind for
# the next notebook.
#
# ### Exercise: the update rule (★☆☆, 5 minutes)
#
# Write the rule as a function that **returns** the new running value.


# %% exercise="update rule"
def update(running, batch, momentum):
    return TODO


# %%
check("update rule", update)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The weights of the old and of the new value add up to 1. Which of the two is 0.1?
#
# </details>

# %% [markdown] solution="update rule"
# <details><summary>Solution</summary>
#
# ```python
# def update(running, batch, momentum):
#     return (1 - momentum) * running + momentum * batch
# ```
#
# </details>

# %% [markdown]
# ## The same in Python
#
# `cbn_lab.BatchNorm2d` is the layer from scratch, and there the line exists. The rule has one place in
# the kit, and all its layers take it from there:

# %%
print(inspect.getsource(moved), inspect.getsource(update_), sep="\n")

# %% [markdown]
# `no_grad` in front of it looks harmless. Notebook 5 is about what happens without it. Five steps of
# both layers, on the same data:

# %% tags=["nbval-check-output"]
stock, ours = nn.BatchNorm2d(2), BatchNorm2d(2)
for _ in range(5):
    x = 5 + 2 * torch.randn(16, 2, 4, 4)
    same = torch.allclose(stock(x), ours(x), atol=1e-5)
    mean_same = torch.allclose(stock.running_mean, ours.running_mean, rtol=1e-5)
    var_same = torch.allclose(stock.running_var, ours.running_var, rtol=1e-5)
    print(f"output {same}, running_mean {mean_same}, running_var {var_same}")

# %% [markdown]
# ## What momentum does
#
# Unrolled, the rule is an **exponential average**: a batch that is $k$ steps old counts for
# $m(1-m)^k$. That is an effective memory of about $1/m$ batches. A small $m$ averages over many
# batches: little noise, but slow to follow when the data drifts. Below, the true mean rises and then
# stays; each point is the mean of one batch.


# %%
STEPS = 150
true_mean = torch.linspace(0, 2 * STEPS / 60, STEPS).clamp(max=2)
batches = true_mean[:, None, None] + torch.randn(
    STEPS, 16, 1, generator=torch.Generator().manual_seed(1)
)


def running_means(momentum):
    """running_mean of a stock layer after each of the batches; None: cumulative average."""
    layer, history = nn.BatchNorm1d(1, momentum=momentum), []
    for x in batches:
        layer(x)
        history.append(layer.running_mean.item())
    return history


# %%
guess_momentum = predict(
    "Which momentum ends nearest to the true mean of the last 50 steps?", ["0.01", "0.1", "0.5"]
)
guess_momentum

# %%
curves = {f"momentum {m}": running_means(m) for m in (0.01, 0.1, 0.5, None)}
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
plots.running_statistics(curves, batches.mean((1, 2)), true_mean, ax)
plt.show()
print(plots.described(ax))

# %% [markdown]
# - **0.5** follows at once, and follows the noise as well.
# - **0.01** has a memory of 100 batches: it still lags behind at the end.
# - **None** is the cumulative average of *all* batches. It never forgets the ramp at the start.
#
# How far off is each, over the last 50 steps, where the true mean stands still?

# %% tags=["nbval-check-output"]
errors = {}
for label, values in curves.items():
    late, steps = torch.tensor(values[-50:]) - 2, torch.linspace(-1, 1, 50)
    errors[label] = late.square().mean().sqrt()
    climb = (late @ steps) / (steps @ steps) * steps  # what still rises evenly is no noise
    print(f"{label:14}  bias {late.mean():+.2f}   noise {(late - climb).std():.2f}")
best = min(("0.01", "0.1", "0.5"), key=lambda m: errors[f"momentum {m}"])
guess_momentum.compare(best)

# %% [markdown]
# ## Move it yourself
#
# Focus a slider and press the arrow keys, or drag it. Where would you stop, if the data drifted all
# the time? And if it never did?

# %%
MomentumExplorer()

# %% [markdown]
# ### Exercise: the cumulative average (★★☆, 5 minutes)
#
# With `momentum=None` the running mean is to be the plain average of all batches so far. Which factor
# must the *n*-th batch have? Write the function for both cases; `count` is 1 at the first batch.


# %% exercise="cumulative average"
def factor(momentum, count):
    return TODO


# %%
check("cumulative average", factor)

# %% [markdown]
# <details><summary>Hint</summary>
#
# After $n$ batches each must count for $1/n$. The newest one counts for the factor itself.
#
# </details>

# %% [markdown] solution="cumulative average"
# <details><summary>Solution</summary>
#
# ```python
# def factor(momentum, count):
#     return 1 / count if momentum is None else momentum
# ```
#
# The old average of $n - 1$ values, times $1 - 1/n$, leaves each of them $1/n$.
#
# </details>

# %% [markdown]
# ### Exercise: the half-life (★★☆, 5 minutes)
#
# After how many further batches has a batch lost half of its weight? Write it as a function of the
# momentum; `math.log` is there.


# %% exercise="half-life"
def half_life(momentum):
    return TODO


# %%
check("half-life", half_life)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each further batch multiplies the weight by $1 - m$. Solve $(1 - m)^k = 1/2$ for $k$.
#
# </details>

# %% [markdown] solution="half-life"
# <details><summary>Solution</summary>
#
# ```python
# def half_life(momentum):
#     return math.log(0.5) / math.log(1 - momentum)
# ```
#
# For small momenta that is nearly $0.69/m$.
#
# </details>

# %% [markdown]
# ## Summary
#
# - `running_mean` is a **buffer**; ATen writes it **in place**, from inside
#   `torch.nn.functional.batch_norm`. No line of Python assigns it.
# - The rule is $(1 - m)\cdot\text{running} + m\cdot\text{batch}$; the variance stored is the unbiased
#   one.
# - Momentum trades noise against lag; its memory is about $1/m$ batches.
#
# **To think about.** In evaluation mode the layer uses the running statistics. What happens to a
# network that is evaluated after three training steps, with momentum 0.01?
#
# **Sources.** S. Ioffe and C. Szegedy, *Batch Normalization*, ICML 2015, section 3.1. PyTorch's
# documentation of `torch.nn.BatchNorm2d`.
#
# Next: [2. Batch norm from scratch](02_from_scratch.ipynb)
