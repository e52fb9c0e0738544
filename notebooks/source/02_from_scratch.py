# %% [markdown]
# # 2. Batch norm from scratch
#
# > *I take away each channel's mean and divide by its `std`. My numbers come close to those of
# > `nn.BatchNorm2d`, and never agree. What exactly does it compute, and how close is close enough?*
#
# **Afterwards you can** write a batch norm layer that agrees with PyTorch's in training and in
# evaluation, tell a rounding error from a mistake, and have your layer graded.
#
# **Time** 45 minutes. **Needs** notebook 1: buffers, and the update rule.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from cbn_lab import BatchNorm2d, check_batch_norm, plots
from cbn_lab.exercises import TODO, check, predict

_ = torch.manual_seed(0)

# %% [markdown]
# ## What it does to a batch
#
# Eight images of 4×4 pixels with three channels. The channels differ in mean and in spread. PyTorch
# keeps such a batch as a tensor of shape (N, C, H, W): samples, channels, height, width.

# %%
means, spreads = torch.tensor([0.0, 5.0, -3.0]), torch.tensor([1.0, 2.0, 0.5])
x = means.view(1, 3, 1, 1) + spreads.view(1, 3, 1, 1) * torch.randn(8, 3, 4, 4)
stock = nn.BatchNorm2d(3)
y = stock(x).detach()

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for ax, values, title in zip(axes, (x, y), ("before", "after"), strict=True):
    plots.channels(values, ax).set_title(title)
plt.show()
for ax in axes:
    print(plots.described(ax, ax.get_title()))

# %% [markdown]
# Each channel is shifted and scaled by itself. So there is one mean and one variance **per channel**.
# Over what are they taken?

# %%
guess_count = predict("A batch of shape (8, 3, 4, 4). How many values does each mean average?")
guess_count

# %% tags=["nbval-check-output"]
for name, dims in (("samples", 0), ("pixels", (2, 3)), ("both", (0, 2, 3))):
    left_over = (y.mean(dims)).abs().max()
    print(f"mean over {name:8} shape {str(tuple(y.mean(dims).shape)):10} at most {left_over:.2f}")
guess_count.compare(x.numel() / x.shape[1])

# %% [markdown]
# Only the mean over samples **and** pixels is 0 after the layer. The pixels of one image count as so
# many further samples. From now on
#
# $$n = \frac{N \cdot C \cdot H \cdot W}{C} = N \cdot H \cdot W$$
#
# is the number of values per channel: `x.numel() // x.shape[1]`.
#
# ## The variance over several dimensions
#
# `torch.var` takes a tuple of dimensions and treats all of them as one long list. Step by step does
# not give the same: the average of the variances misses the variance of the averages.

# %% tags=["nbval-check-output"]
channel = x[:, 1].double()
whole = channel.var(correction=0)
inside = channel.var((1, 2), correction=0).mean()
between = channel.mean((1, 2)).var(correction=0)
print(f"variance of all values     {whole:.4f}")
print(f"mean of images' variances  {inside:.4f}")
print(f"variance of images' means  {between:.4f}")
print(f"the sum of the two         {inside + between:.4f}")

# %% [markdown]
# ## Divide by n, or by n − 1?
#
# The squared deviations are summed, and then divided: by $n$ (the *biased* variance) or by $n - 1$
# (the *unbiased* one, which `torch.var` gives unless it is told `correction=0`). A batch of four
# values is small enough to show which one the layer uses.

# %%
guess_divisor = predict(
    "Which variance does the layer normalise with?", ["divided by n", "divided by n - 1"]
)
guess_divisor

# %% tags=["nbval-check-output"]
small, layer = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(4, 1, 1, 1), nn.BatchNorm2d(1)
out = layer(small).detach().flatten()
biased, unbiased = small.var(correction=0), small.var(correction=1)
print(f"biased {biased:.2f}, unbiased {unbiased:.2f}")
print("output of the layer    ", [f"{value:+.3f}" for value in out])
candidates = {"divided by n": biased, "divided by n - 1": unbiased}
for name, var in candidates.items():
    print(f"{name:22} ", [f"{value:+.3f}" for value in ((small - 3) / var.sqrt()).flatten()])
stored = (layer.running_var.item() - 0.9) / 0.1
print(f"variance that it stored {stored:.2f}")
matching = min(
    candidates, key=lambda name: (out - (small.flatten() - 3) / candidates[name].sqrt()).abs().max()
)
guess_divisor.compare(matching)

# %% [markdown]
# Both, each in its place. It **normalises** with the biased variance and **stores** the unbiased one.
# There is a reason for each:
#
# - The output is to have variance 1 *on this very batch*. That takes the variance of this batch as it
#   is, divided by $n$.
# - The running variance is used later, on *other* data. It is to estimate the variance of the
#   source. A batch lies closer to its own mean than to the true one, so its biased variance is too
#   small, by the factor $(n-1)/n$ on average.

# %% tags=["nbval-check-output"]
many = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1))  # true variance 1
print(f"biased, on average over batches of 4:   {many.var(1, correction=0).mean():.2f}")
print(f"unbiased, on average over batches of 4: {many.var(1, correction=1).mean():.2f}")

# %% [markdown]
# ### Exercise: the batch statistics (★☆☆, 5 minutes)
#
# Write a function that returns the mean and the **biased** variance of each channel, two tensors of
# shape (C,). It must take any input that begins with (N, C): also (N, C) and (N, C, L).


# %% exercise="batch statistics"
def statistics(x):
    mean = TODO
    var = TODO
    return mean, var


# %%
check("batch statistics", statistics)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Average over every dimension but dimension 1. `range(x.dim())` runs over all of them, and
# `torch.mean` and `torch.var` take a list.
#
# </details>

# %% [markdown] solution="batch statistics"
# <details><summary>Solution</summary>
#
# ```python
# def statistics(x):
#     dims = [dim for dim in range(x.dim()) if dim != 1]
#     return x.mean(dims), x.var(dims, correction=0)
# ```
#
# `torch.var_mean(x, dims, correction=0)` computes both in one sweep.
#
# </details>

# %% [markdown]
# ### Exercise: the variance to store (★☆☆, 5 minutes)
#
# You have the input `x` and the biased variance `var` of each channel. Return the unbiased variance,
# without going through the data again.


# %% exercise="variance to store"
def to_store(var, x):
    return TODO


# %%
check("variance to store", to_store)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The sum of the squared deviations is $n$ times the one and $n - 1$ times the other. And $n$ counts
# the pixels too.
#
# </details>

# %% [markdown] solution="variance to store"
# <details><summary>Solution</summary>
#
# ```python
# def to_store(var, x):
#     n = x.numel() // x.shape[1]
#     return var * n / (n - 1)
# ```
#
# </details>

# %% [markdown]
# ## The formula
#
# $$y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta$$
#
# $\varepsilon$ stands **inside** the root. It keeps a channel without any spread from dividing by 0.
# $\gamma$ (`weight`) and $\beta$ (`bias`) are learned, one of each per channel.
#
# In code, all of $\mu$, $\sigma^2$, $\gamma$, $\beta$ have the shape (C,) and have to meet an input of
# shape (N, C, H, W). PyTorch lines shapes up **from the right**, so (C,) meets W. Where W happens to
# equal C, there is no error, only a wrong result:

# %% tags=["nbval-check-output"]
square = torch.zeros(2, 3, 5, 3)  # C = 3 and W = 3
per_channel = torch.tensor([1.0, 2.0, 3.0])
for name, shape in (("as it is", (3,)), ("view(1, -1, 1, 1)", (1, -1, 1, 1))):
    result = square + per_channel.view(shape)
    print(f"{name:18} channel 0: {sorted(set(result[:, 0].flatten().tolist()))}")

# %% [markdown]
# ### Exercise: normalise (★★☆, 10 minutes)
#
# Write the formula for an input of shape (N, C, H, W). All else has shape (C,).


# %% exercise="normalise"
def normalise(x, mean, var, weight, bias, eps):
    return TODO


# %%
check("normalise", normalise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Bring each of the four to the shape (1, C, 1, 1) before it meets `x`. A small helper function saves
# typing.
#
# </details>

# %% [markdown] solution="normalise"
# <details><summary>Solution</summary>
#
# ```python
# def normalise(x, mean, var, weight, bias, eps):
#     scale = weight / (var + eps).sqrt()
#     shape = (1, -1, 1, 1)
#     return (x - mean.view(shape)) * scale.view(shape) + bias.view(shape)
# ```
#
# The factor of a channel is made of single numbers: it costs nothing to work it out before it meets
# the large tensor.
#
# </details>

# %% [markdown]
# ## How close is close enough?
#
# `cbn_lab.BatchNorm2d` is this formula in plain PyTorch. On the same data, how far will it be from
# the stock layer?

# %%
guess_gap = predict(
    "Largest difference between our output and the stock layer's:",
    ["exactly 0", "about 1e-6", "about 1e-3"],
)
guess_gap

# %% tags=["nbval-check-output"]
gap = (BatchNorm2d(3)(x) - nn.BatchNorm2d(3)(x)).abs().max().item()
gap_double = (
    (BatchNorm2d(3).double()(x.double()) - nn.BatchNorm2d(3).double()(x.double())).abs().max()
)
print(f"float32 has a relative step of {torch.finfo(torch.float32).eps:.1e}")
print(f"float64 has a relative step of {torch.finfo(torch.float64).eps:.1e}")
print("they differ, by less than 5e-6: ", 0 < gap < 5e-6)
print("in float64 by less than 5e-14:  ", bool(gap_double < 5e-14))
guess_gap.compare("exactly 0" if gap == 0 else "about 1e-6" if gap < 1e-5 else "about 1e-3")

# %% [markdown]
# That is **rounding**, not an error. Two programs that add the same numbers in a different order come
# out some last digits apart. The test that tells: do it again in float64. Rounding shrinks by the
# ratio of the two steps. A mistake in the formula stays where it was.
#
# Here are the right formula and two mistakes, all in float32, for batches of different size. The data
# has mean 5 and standard deviation 2.

# %%
sizes = [2**k for k in range(1, 15)]
gaps = {"divided by n (right)": [], "divided by n - 1": [], "eps outside the root": []}
for n in sizes:
    batch = 5 + 2 * torch.randn(n, 8, 1, 1)
    centred, goal = batch - batch.mean(0), nn.BatchNorm2d(8)(batch)
    var, var_unbiased = batch.var(0, correction=0), batch.var(0, correction=1)
    forms = (
        centred / (var + 1e-5).sqrt(),
        centred / (var_unbiased + 1e-5).sqrt(),
        centred / (var.sqrt() + 1e-5),
    )
    for name, form in zip(gaps, forms, strict=True):
        gaps[name].append((form - goal).abs().max().item())

# %%
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
plots.deviation(
    sizes,
    gaps,
    ax,
    xlabel="values per channel, n",
    ylabel="largest difference from nn.BatchNorm2d",
    floor=torch.finfo(torch.float32).eps,
)
plt.show()
print(plots.described(ax))

# %% [markdown]
# The confusion of $n$ with $n - 1$ fades like $1/n$: with large batches a test does not see it
# unless its tolerance is tight. So test with **few values per channel**. And the misplaced eps hides
# just above rounding: test with **a large eps**.
#
# ## When rounding does become an error
#
# Let the mean be much larger than the spread. A float32 near 1000 has steps of about 6e-5, and the
# batch is already rounded to them; that error (dotted below) is nobody's fault, and float64 is given
# the same rounded batch here. The formula may add errors of its own, small or huge:
#
# $$\sigma^2 = \overline{x^2} - \bar x^2$$
#
# is right on paper. In floating point it is the small difference of two huge numbers. Each result
# below is held against float64.

# %%
ratios = [10.0 ** (k / 2) for k in range(9)]
noise = torch.randn(4096, 8, 1, 1, dtype=torch.float64)
errors = {"E[x²] − E[x]²": [], "nn.BatchNorm2d": [], "cbn_lab.BatchNorm2d": []}
for ratio in ratios:
    batch = (noise + ratio).float()
    exact = BatchNorm2d(8).double()(batch.double())
    mean = batch.mean(0)
    one_pass = (batch - mean) / ((batch * batch).mean(0) - mean * mean + 1e-5).sqrt()
    results = (one_pass, nn.BatchNorm2d(8)(batch), BatchNorm2d(8)(batch))
    for name, result in zip(errors, results, strict=True):
        errors[name].append((result - exact).abs().max().item())

# %%
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
plots.deviation(
    ratios,
    errors,
    ax,
    xlabel="mean over standard deviation of the input",
    ylabel="largest error of the output",
    floor=[torch.finfo(torch.float32).eps * ratio for ratio in ratios],
)
plt.show()
print(plots.described(ax))

# %% tags=["nbval-check-output"]
at_1000 = {name: values[ratios.index(1000.0)] for name, values in errors.items()}
print(f"step of float32 at 1000: {torch.finfo(torch.float32).eps * 512:.0e}")
print("at mean 1000, E[x²] − E[x]² is off by more than 10 %:", at_1000["E[x²] − E[x]²"] > 0.1)
print("and ours by less than 0.1 %:", at_1000["cbn_lab.BatchNorm2d"] < 1e-3)
print(
    "at mean 10,000 the first is not finite or off by more than 100 %:",
    not errors["E[x²] − E[x]²"][-1] < 1,
)

# %% [markdown]
# The error of the first formula grows with the **square** of the ratio. Subtract the mean first, then
# square: `torch.var` does. And note the order of the other two curves. A difference from the stock
# layer does not say which of the two is off. Only a third, better result does: float64.
#
# ## Training and evaluation
#
# In evaluation the layer takes the *running* statistics in place of the batch's, and changes nothing.
# Which mode it is in, `layer.training` says; `layer.train()` and `layer.eval()` set it.
#
# Now a batch of a single image with a single pixel: one value per channel.

# %%
guess_single = predict(
    "One value per channel. The stock layer raises an error:",
    ["in both modes", "in training only", "in evaluation only", "never"],
)
guess_single

# %% tags=["nbval-check-output"]
single, raised = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), []
for mode in ("training", "evaluation"):
    stock.train(mode == "training")
    try:
        print(f"{mode:11}", [f"{value:+.2f}" for value in stock(single).flatten()])
    except ValueError as error:
        raised.append(mode)
        print(f"{mode:11}", str(error).split(",")[0])
guess_single.compare(
    f"in {raised[0]} only" if len(raised) == 1 else "in both modes" if raised else "never"
)

# %% [markdown]
# One value lies exactly on its own mean, so the output would always be 0, and $n/(n-1)$ is 1/0. The
# layer refuses. In evaluation no statistic is taken from the batch, and one value is as good as many.
#
# ## The pieces of a layer
#
# A layer is a class that derives from `nn.Module`. It needs two methods:
#
# - `__init__` first calls `super().__init__()` and then makes the state. A **parameter** is made by
#   `self.weight = nn.Parameter(tensor)`, a **buffer** by `self.register_buffer("name", tensor)`.
# - `forward(self, x)` computes. It may look at `self.training`, which `nn.Module` keeps for you.
#
# A small layer, to see the syntax:


# %%
class Recentre(nn.Module):
    """Subtracts a learned shift, and counts its calls."""

    def __init__(self, num_features):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.calls += 1
        return x - self.shift.view(1, -1, 1, 1)


# %% tags=["nbval-check-output"]
recentre = Recentre(3)
recentre(x)
recentre.eval()(x)
print({name: value.tolist() for name, value in recentre.state_dict().items()})

# %% [markdown]
# ## How a layer is graded
#
# `check_batch_norm` takes anything that builds a layer, puts the layer through its paces and returns
# a list. The stock layer passes, as it should:

# %%
check_batch_norm(nn.BatchNorm2d)

# %% [markdown]
# ### Exercise: your own layer (★★★, 20 minutes)
#
# Now put it together. Besides what you have written above, it needs the choice between training and
# evaluation, an error where a channel has one value, and the update of the running statistics. Write
# the update under `torch.no_grad()`; notebook 5 shows what happens otherwise.
#
# The message names the first rows that fail, and what came instead. Work through them one by one.


# %% exercise="your own layer"
class MyBatchNorm(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        # here: weight, bias, running_mean, running_var

    def forward(self, x):
        return TODO


# %%
check("your own layer", MyBatchNorm)

# %% [markdown]
# <details><summary>Hint</summary>
#
# - `weight` and `running_var` start at 1, `bias` and `running_mean` at 0.
# - In `forward`: if training, take the statistics from the batch and update the running ones; if not,
#   take the running ones. What follows is the same in both modes.
# - `no_grad` around the update only. What the output is normalised with must keep its gradient.
#
# </details>

# %% [markdown] solution="your own layer"
# <details><summary>Solution</summary>
#
# ```python
# class MyBatchNorm(nn.Module):
#     def __init__(self, num_features, eps=1e-5, momentum=0.1):
#         super().__init__()
#         self.eps, self.momentum = eps, momentum
#         self.weight = nn.Parameter(torch.ones(num_features))
#         self.bias = nn.Parameter(torch.zeros(num_features))
#         self.register_buffer("running_mean", torch.zeros(num_features))
#         self.register_buffer("running_var", torch.ones(num_features))
#
#     def forward(self, x):
#         mean, var = self.running_mean, self.running_var
#         if self.training:
#             n = x.numel() // x.shape[1]
#             if n < 2:
#                 raise ValueError(f"expected more than 1 value per channel, got {n}")
#             var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
#             with torch.no_grad():
#                 self.running_mean.lerp_(mean, self.momentum)
#                 self.running_var.lerp_(var * n / (n - 1), self.momentum)
#         scale = self.weight / (var + self.eps).sqrt()
#         shape = (1, -1, 1, 1)
#         return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
# ```
#
# `a.lerp_(b, m)` is $(1 - m)\,a + m\,b$, written into `a`.
#
# </details>

# %% [markdown]
# ## Summary
#
# - One mean and one variance per channel, over samples and pixels: $n$ = `x.numel() // x.shape[1]`.
# - Normalise with the biased variance; store the unbiased one. eps stands inside the root.
# - Bring (C,) to (1, C, 1, 1) before it meets the input.
# - Rounding shrinks in float64, a mistake does not. Test with few values, a large eps, a large mean.
#
# **To think about.** You evaluate on the very batch on which you trained with momentum 1. The output
# is not quite that of training. By what factor do the two differ, and for which $n$ would you notice?
#
# **Sources.** S. Ioffe and C. Szegedy, *Batch Normalization*, ICML 2015, Algorithms 1 and 2. T. Chan,
# G. Golub and R. LeVeque, *Algorithms for computing the sample variance*, The American Statistician
# 37, 1983.
#
# Next: [3. Does it need its own backward?](03_backward.ipynb)
