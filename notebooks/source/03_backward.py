# %% [markdown]
# # 3. Does it need its own backward?
#
# > *My layer has a `forward` and nothing else, and it trains. Other people's layers come with a
# > `backward`. Have I left something out? And if not, why do they write one?*
#
# **Afterwards you can** say when autograd is enough, derive the gradient of batch norm on one page,
# write it as a `torch.autograd.Function`, test it with `gradcheck`, and measure what a layer
# keeps in memory for its backward pass.
#
# **Time** 50 minutes. **Needs** notebook 2; derivatives of functions of many variables.

# %%
import inspect
import time
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from cbn_lab import BatchNormFunction, plots
from cbn_lab.exercises import TODO, check, predict

_ = torch.manual_seed(0)

# %% [markdown]
# ## Autograd is enough
#
# Here is batch norm in training, written as one reads it. There is no backward. Each operation in it
# knows its own derivative, and autograd strings these together by the chain rule.

# %%
C = (1, -1, 1, 1)  # the shape that (C,) takes to meet (N, C, H, W)


def formula(x, weight, bias, eps=1e-5):
    mean = x.mean((0, 2, 3), keepdim=True)
    centred = x - mean
    var = (centred**2).mean((0, 2, 3), keepdim=True)
    x_hat = centred / (var + eps).sqrt()
    return weight.view(C) * x_hat + bias.view(C)


def leaves(*shape, dtype=torch.float64, seed=1):
    """Input, weight and bias that ask for a gradient."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, generator=source).requires_grad_()
    weight = (1 + torch.rand(shape[1], dtype=dtype, generator=source)).requires_grad_()
    bias = torch.randn(shape[1], dtype=dtype, generator=source).requires_grad_()
    return x, weight, bias


# %% tags=["nbval-check-output"]
x, weight, bias = leaves(8, 3, 4, 4)
g = torch.randn(x.shape, dtype=x.dtype)  # the gradient that arrives from the layers behind
mine = torch.autograd.grad(formula(x, weight, bias), (x, weight, bias), g)

stock_output = nn.functional.batch_norm(x, None, None, weight, bias, training=True)
stock = torch.autograd.grad(stock_output, (x, weight, bias), g)
for name, a, b in zip(("input", "weight", "bias"), mine, stock, strict=True):
    print(f"gradient of the {name:6} agrees:", torch.allclose(a, b, rtol=1e-10, atol=1e-12))

# %% [markdown]
# **A layer made of PyTorch operations needs no backward of its own.** You have left nothing out.
#
# A backward by hand can still pay. To see where, we first work it out.
#
# ## A strange loss
#
# Take the sum of the squared outputs as the loss, with $\gamma = 1$ and $\beta = 0$. What will be its
# gradient with respect to the input?

# %%
guess_strange = predict(
    "The gradient of Σ y² with respect to the input is",
    ["0, up to eps", "2y/σ", "2y"],
)
guess_strange

# %% tags=["nbval-check-output"]
ones, zeros = torch.ones(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
y = formula(x, ones, zeros)
(strange,) = torch.autograd.grad((y**2).sum(), x)
print(f"largest output    {y.detach().abs().max():.2f}")
print(f"largest gradient  {strange.abs().max():.4f}")
guess_strange.compare("0, up to eps" if strange.abs().max() < 1e-3 else "2y")

# %% [markdown]
# It is a matter of **symmetry**. Shift a channel of the input, or stretch it: the output stays as it
# was (up to eps). A loss behind the layer cannot notice, so its gradient has no component along these
# two directions:
#
# $$\sum_i \bar x_i = 0 \qquad\text{and}\qquad \sum_i \bar x_i\,\hat x_i = 0$$
#
# A bar marks the gradient of the loss, $\bar x = \partial L/\partial x$. The sums run over the $n$
# values of one channel. The output has variance 1 whatever the input, so $\sum y^2$ is a constant.
# With any other loss it is the same:

# %% tags=["nbval-check-output"]
per_channel = {"sum of the gradient": mine[0], "sum of gradient times x̂": mine[0] * y.detach()}
for name, values in per_channel.items():
    print(f"{name:25}", [f"{abs(value):.3f}" for value in values.sum((0, 2, 3)).tolist()])
print(
    f"{'sum of its square':25}",
    [f"{value:.0f}" for value in mine[0].square().sum((0, 2, 3)).tolist()],
)

# %% [markdown]
# ## The derivation, drawn
#
# Forward, the input goes three ways: straight on, through the mean $\mu$, and through the standard
# deviation $\sigma = \sqrt{\text{var} + \varepsilon}$. The gradient comes back along the same arrows.
# Each dashed arrow carries the factor by which it multiplies. $\Sigma$ sums over the channel, for
# *one* $\mu$ has served *all* values; $1/n$ deals the result out again.

# %%
nodes = {
    "$x$": (0, 0),
    "$μ$": (1.2, 1.3),
    "$x - μ$": (2.4, 0),
    "$σ$": (3.9, 1.3),
    r"$\hat{x}$": (5.4, 0),
    "$y$": (7, 0),
}
a, mu, centred, sigma, hat, out = nodes  # their names
forward = [(a, mu), (a, centred), (mu, centred), (centred, sigma), (centred, hat), (sigma, hat)]
backward = {(out, hat): "$γ$", (hat, centred): "$1/σ$", (hat, sigma): r"$-Σ\,\hat{x}/σ$"}
backward |= {(sigma, centred): r"$\hat{x}/n$", (centred, mu): "$-Σ$", (mu, a): "$1/n$"}

fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
plots.computation(nodes, [*forward, (hat, out)], backward | {(centred, a): "1"}, ax)
plt.show()
print(plots.described(ax))

# %% [markdown]
# Read off the paths from $y$ back to $x$, beginning with $\bar{\hat x} = \gamma\,g$, where $g = \bar y$:
#
# | path | what it adds to $\bar x$ |
# |---|---|
# | straight on | $\gamma g/\sigma$ |
# | through $\mu$ | $-\operatorname{mean}(\gamma g)/\sigma$ |
# | through $\sigma$ | $-\hat x\,\operatorname{mean}(\gamma g\,\hat x)/\sigma$ |
# | through $\sigma$ and then $\mu$ | 0, because $\hat x$ has mean 0 |
#
# The sum is the whole backward:
#
# $$\bar x = \frac{1}{\sigma}\Big(\gamma g - \operatorname{mean}(\gamma g) - \hat x\,\operatorname{mean}(\gamma g\,\hat x)\Big)$$
#
# It takes $\gamma g$ and **projects out** the two directions of the symmetry: the constant one, and
# $\hat x$. What is left is divided by $\sigma$.
#
# ### Exercise: gradients of weight and bias (★☆☆, 5 minutes)
#
# $y = \gamma\,\hat x + \beta$, with one $\gamma$ and one $\beta$ per channel. Return $\bar\gamma$ and
# $\bar\beta$, both of shape (C,), from `g` and `x_hat` of shape (N, C, H, W).


# %% exercise="gradients of weight and bias"
def parameter_gradients(g, x_hat):
    grad_weight = TODO
    grad_bias = TODO
    return grad_weight, grad_bias


# %%
check("gradients of weight and bias", parameter_gradients)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Every value of the channel uses the same $\gamma$: the contributions add up. What is
# $\partial y_i/\partial\gamma$? And $\partial y_i/\partial\beta$?
#
# </details>

# %% [markdown] solution="gradients of weight and bias"
# <details><summary>Solution</summary>
#
# ```python
# def parameter_gradients(g, x_hat):
#     return (g * x_hat).sum((0, 2, 3)), g.sum((0, 2, 3))
# ```
#
# </details>

# %% [markdown]
# ### Exercise: gradient of the input (★★☆, 10 minutes)
#
# Write the formula above. `g` and `x_hat` have the shape (N, C, H, W). `inv_std` is $1/\sigma$; it and
# `weight` have the shape (1, C, 1, 1), so that they multiply as they are.


# %% exercise="gradient of the input"
def input_gradient(g, x_hat, inv_std, weight):
    return TODO


# %%
check("gradient of the input", input_gradient)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `.mean((0, 2, 3), keepdim=True)` averages over the channel and keeps a shape that multiplies. Begin
# with a name for $\gamma g$.
#
# </details>

# %% [markdown] solution="gradient of the input"
# <details><summary>Solution</summary>
#
# ```python
# def input_gradient(g, x_hat, inv_std, weight):
#     dims = (0, 2, 3)
#     g = g * weight
#     along = (g * x_hat).mean(dims, keepdim=True)
#     return (g - g.mean(dims, keepdim=True) - x_hat * along) * inv_std
# ```
#
# </details>

# %% [markdown]
# ## How to know that it is right
#
# A derivative can be measured: move one input by $\pm h$ and see how far the output moves. The error
# of this has two parts. A step too large leaves the straight line: $h^2$. A step too small drowns in
# rounding: $1/h$.

# %%
steps = [10.0**-k for k in range(1, 11)]
errors = {"float32": [], "float64": []}
for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
    x1, *rest = (t.detach().to(dtype) for t in (x, weight, bias))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = (mine[0] * direction).sum().item()
    for h in steps:
        ahead, behind = (formula(x1 + s * h * direction, *rest) for s in (1, -1))
        measured = ((ahead - behind) * g.to(dtype)).sum().item() / (2 * h)
        errors[name].append(abs(measured / exact - 1))

# %%
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
plots.deviation(steps, errors, ax, xlabel="step h", ylabel="relative error of the derivative")
plt.show()
print(plots.described(ax))

# %% [markdown]
# `gradcheck` does this for every pair of an input and an output number, with a small fixed step, and
# compares with what the backward says. The formula at the top has a right gradient. Let us hand it to
# `gradcheck` in float32.

# %%
guess_single = predict("gradcheck, on a right gradient, in float32:", ["it passes", "it fails"])
guess_single

# %% tags=["nbval-check-output"]
verdicts = {}
print("step of gradcheck:", inspect.signature(gradcheck).parameters["eps"].default)
for dtype in (torch.float32, torch.float64):
    small = leaves(3, 2, 2, 2, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says itself that float32 is asking for trouble
        verdicts[dtype] = gradcheck(formula, small, raise_exception=False)
    print(dtype, "it passes" if verdicts[dtype] else "it fails")
guess_single.compare("it passes" if verdicts[torch.float32] else "it fails")

# %% [markdown]
# At a step of 1e-6, rounding spoils the measurement in float32, as the picture shows. **Check gradients
# in float64**, on a small input.
#
# A check is worth what it catches. So here is a backward with a usual mistake: it forgets that
# $\sigma$ depends on the input. It also shows what a `Function` looks like.


# %%
class Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        inv_std = torch.rsqrt(var + eps)
        ctx.save_for_backward(weight, inv_std)  # tensors, for the backward
        return (x - mean) * inv_std * weight.view(C) + bias.view(C)

    @staticmethod
    def backward(ctx, g):
        weight, inv_std = ctx.saved_tensors
        grad_x = (g - g.mean((0, 2, 3), keepdim=True)) * weight.view(C) * inv_std
        # One gradient for each argument of forward after ctx. None where there is none.
        return grad_x, None, g.sum((0, 2, 3)), None


# %% tags=["nbval-check-output"]
x1, weight1, bias1 = leaves(3, 2, 2, 2)
output = Forgetful.apply(x1, weight1.detach(), bias1, 1e-5)
print("its output is right:", torch.allclose(output, formula(x1, weight1, bias1)))
try:
    gradcheck(Forgetful.apply, (x1, weight1.detach(), bias1, 1e-5))
except RuntimeError as error:
    print(str(error).splitlines()[0])

# %% [markdown]
# The forward is right, so no comparison of outputs would have found it. `gradcheck` names the pair:
# the derivative of output 0 with respect to input 0.
#
# ### Exercise: a Function of your own (★★★, 20 minutes)
#
# Write batch norm in training as a `Function`, with all three gradients. It is called as
# `MyFunction.apply(x, weight, bias, eps)`.
#
# One demand more: save **no more than the input and some numbers per channel**. $\hat x$ is as large as
# the input, and can be had again from it. The next section says why one would care.


# %% exercise="a Function of your own"
class MyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        return TODO

    @staticmethod
    def backward(ctx, g):
        return TODO


# %%
check("a Function of your own", MyFunction)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Start from `Forgetful`. Save `x`, `weight`, `mean` and `inv_std`. In the backward make `x_hat` again,
# and put in what you wrote in the two exercises above.
#
# </details>

# %% [markdown] solution="a Function of your own"
# <details><summary>Solution</summary>
#
# ```python
# class MyFunction(torch.autograd.Function):
#     @staticmethod
#     def forward(ctx, x, weight, bias, eps):
#         var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
#         inv_std = torch.rsqrt(var + eps)
#         ctx.save_for_backward(x, weight, mean, inv_std)
#         return (x - mean) * inv_std * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
#
#     @staticmethod
#     def backward(ctx, g):
#         x, weight, mean, inv_std = ctx.saved_tensors
#         dims = (0, 2, 3)
#         x_hat = (x - mean) * inv_std
#         grad_weight, grad_bias = (g * x_hat).sum(dims), g.sum(dims)
#         g = g * weight.view(1, -1, 1, 1)
#         along = (g * x_hat).mean(dims, keepdim=True)
#         grad_x = (g - g.mean(dims, keepdim=True) - x_hat * along) * inv_std
#         return grad_x, grad_weight, grad_bias, None
# ```
#
# </details>

# %% [markdown]
# ## What is kept for the backward
#
# Between forward and backward, autograd keeps the tensors that it will need. `saved_tensors_hooks`
# calls a function of yours for each of them. Two of them may share one memory, which counts once.


# %%
def saved_bytes(function, *args):
    """Bytes of all different memory that ``function`` keeps for its backward."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(*args)  # kept until we have counted, or memory would be used again
    del output
    return sum(storages.values())


# %% [markdown]
# Four ways to the same output. `folded` makes one factor per channel first, so that the large tensor is
# multiplied once.


# %%
def folded(x, weight, bias, eps=1e-5):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = weight / (var + eps).sqrt()
    return (x - mean.view(C)) * scale.view(C) + bias.view(C)


def stock_layer(x, weight, bias):
    return nn.functional.batch_norm(x, None, None, weight, bias, training=True)


def by_hand(x, weight, bias):
    return BatchNormFunction.apply(x, None, None, weight, bias, True, 0.1, 1e-5)


forms = {"formula": formula, "folded": folded, "Function": by_hand, "nn.BatchNorm2d": stock_layer}

# %%
guess_saved = predict(
    "How many times the input's size does the plain formula keep for its backward?",
    ["1", "2", "3", "4"],
)
guess_saved

# %% tags=["nbval-check-output"]
large = leaves(32, 64, 32, 32, dtype=torch.float32)
size = large[0].nbytes
kept = {name: saved_bytes(form, *large) for name, form in forms.items()}
print(f"input           {size / 2**20:5.1f} MiB")
for name, count in kept.items():
    print(f"{name:15} {count / 2**20:5.1f} MiB, {count / size:.1f} times the input")
guess_saved.compare(f"{kept['formula'] / size:.0f}")

# %%
fig, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
mib = {name: count / 2**20 for name, count in kept.items()}
bounds = {"the input": size / 2**20}
plots.costs(mib, ax, xlabel="kept for the backward (MiB)", bounds=bounds, decimals=0)
plt.show()
print(plots.described(ax))

# %% [markdown]
# `formula` keeps $x - \mu$ (to differentiate the square, and the quotient) and $\hat x$ (to
# differentiate the product with $\gamma$). Autograd treats each operation by itself: it does not see
# that the one is a multiple of the other, and that both follow from the input. **You do see it.** And
# where the layer before keeps its output anyway (a ReLU does, a convolution does not), the input is
# there already, and the `Function` keeps next to nothing of its own.
#
# In a deep network this helps to decide how large a batch fits.
#
# ## Is it faster, too?
#
# The times are those of the machine that ran this. Yours will differ.


# %%
def seconds(form, repeats=3):
    """Median time of forward and backward."""
    times, grad = [], torch.ones_like(large[0])
    for _ in range(repeats):
        start = time.perf_counter()
        torch.autograd.grad(form(*large), large, grad)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


for name, form in forms.items():
    print(f"{name:15} {1000 * seconds(form):6.0f} ms")

# %% [markdown]
# The `Function` in plain PyTorch need not win: its backward still goes over the whole tensor once for
# each operation, only now you wrote them down. The stock layer goes over it a few times
# altogether, in compiled code. **A `Function` saves memory at once. It saves time when something
# compiled stands inside** (notebook 8).
#
# ## The one in the kit
#
# `cbn_lab.BatchNormFunction` is the formula from above, with evaluation mode and missing parameters
# besides:

# %%
print(inspect.getsource(BatchNormFunction.backward))

# %% tags=["nbval-check-output"]
small = leaves(3, 2, 2, 2)
print("gradcheck:    ", gradcheck(by_hand, small))
print("gradgradcheck:", gradgradcheck(by_hand, small))

# %% [markdown]
# `gradgradcheck` differentiates the backward once more. That works because this backward is itself made
# of PyTorch operations. With a compiled one it would not, unless you wrote the second derivative too.
#
# | leave it to autograd | write a `Function` |
# |---|---|
# | while you are still changing the formula | when memory decides, and what is saved can be had again |
# | where a few operations are not the bottleneck | when a kernel (numba, Triton, C++) has no derivative |
# | when you need second derivatives | when the derivative has a form that rounds better |
#
# ## Summary
#
# - Made of PyTorch operations, a layer needs no backward.
# - The gradient of batch norm is a projection: it takes out the constant part and the part along
#   $\hat x$, because the output does not change under a shift and a stretch of the input.
# - `gradcheck` tests a backward, in float64. It finds the wrong ones that have right outputs.
# - A `Function` decides what is saved. Here: the input, instead of twice its size.
#
# **To think about.** $\hat x = (y - \beta)/\gamma$. So one could save the *output* in place of the
# input, and let the layer overwrite its input. When does that go wrong?
#
# **Sources.** S. Ioffe and C. Szegedy, *Batch Normalization*, ICML 2015, section 3. PyTorch notes
# *Extending PyTorch* and *Gradcheck mechanics*. On saving the output: S. Rota Bulò, L. Porzi and
# P. Kontschieder, *In-Place Activated BatchNorm*, CVPR 2018.
#
# Next: [4. Complex batch norm](04_complex_batch_norm.ipynb)
