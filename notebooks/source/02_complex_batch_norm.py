# %% [markdown]
# # 2. Complex batch norm
#
# > *My data is complex: a field with amplitude and phase. `nn.BatchNorm2d` does not take it. What does
# > it mean to normalise complex values, and how do I write it?*
#
# **Afterwards you can** say why a complex value needs a covariance and not only a variance, whiten a
# cloud of points by hand, and use `ComplexBatchNorm2d`.
#
# **Time** 20 minutes. **Needs** notebook 1; eigenvectors of a 2×2 matrix.

# %%
import matplotlib.pyplot as plt
import torch
from ipywidgets import IntSlider, interact
from torch import nn

from cbn_lab import (
    ComplexBatchNorm1d,
    ComplexBatchNorm2d,
    NaiveComplexBatchNorm1d,
    datasets,
    plots,
    whitening_matrix,
)

_ = torch.manual_seed(0)

# %% [markdown]
# PyTorch's own layer refuses complex input:

# %% tags=["nbval-check-output"]
try:
    nn.BatchNorm1d(1)(torch.randn(8, 1, dtype=torch.complex64))
except (NotImplementedError, RuntimeError) as error:
    print(type(error).__name__)

# %% [markdown]
# ## Real data that is complex
#
# 1797 handwritten digits of 8×8 pixels. Their two-dimensional Fourier transform is complex: 64 bins
# per image, and over all images each bin is a cloud of points in the complex plane. Here are nine of
# the images, and the cloud of bin (1, 1).

# %%
images, labels = datasets.digits()
spectrum, _ = datasets.digits(fft=True)
z = spectrum[:, 0, 1, 1]

fig = plt.figure(figsize=(9, 4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[1, 1.3])
for image, ax in zip(images, left.subplots(3, 3).flat, strict=False):
    ax.imshow(image[0], cmap="gray_r")
    ax.axis("off")
ax = plots.whitening(z, right.subplots(), stages=["input"])
plt.show()
print(ax.get_label())

# %% [markdown]
# The cloud is not centred, and it is not round: it is an **ellipse**, tilted. Data whose cloud is
# round is called *circular*; this is not.
#
# ## One number is not enough
#
# `torch.var` of a complex tensor is one real number, the total variance. It says how large the cloud
# is and nothing about its shape. That takes three: the variances of both parts and their covariance.

# %% tags=["nbval-check-output"]
re, im = z.real.double(), z.imag.double()
re, im = re - re.mean(), im - im.mean()
rr, ii, ri = (re * re).mean(), (im * im).mean(), (re * im).mean()

print(f"torch.var(z)           {torch.var(z, correction=0):.4f}")
print(f"rr + ii                {rr + ii:.4f}")
print(f"covariance             rr {rr:.4f}   ii {ii:.4f}   ri {ri:.4f}")
print(f"correlation of parts   {ri / (rr * ii).sqrt():.2f}")

# %% [markdown]
# ## The naive way
#
# Treat real and imaginary parts as two real channels, and normalise them apart. Both variances become
# 1. The correlation stays, and so does the tilt:

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
for ax, stage in zip(axes, plots.STAGES, strict=True):
    plots.whitening(z, ax, stages=[stage], points=stage)
plt.show()
for ax in axes:
    print(ax.get_label())

# %% [markdown]
# On the right the cloud is **whitened**: round, with variance 1 in every direction. How?
#
# ## Whitening
#
# Let $V$ be the covariance matrix. We want a matrix $R$ such that $R\,x$ has the covariance
# $R\,V\,R^\top = 1$. The symmetric choice is
#
# $$R = V^{-1/2}$$
#
# Along each axis of the ellipse it divides by the standard deviation there. By hand, through the
# eigenvectors:

# %% tags=["nbval-check-output"]
V = torch.stack([torch.stack([rr, ri]), torch.stack([ri, ii])])
variances, axes = torch.linalg.eigh(V)
R = axes @ torch.diag(variances**-0.5) @ axes.T
white = R @ torch.stack([re, im])
print("R =", [[round(value, 3) for value in row] for row in R.tolist()])
after = white @ white.T / len(z)
print("covariance after R is the identity:", torch.allclose(after, torch.eye(2).double()))

# %% [markdown]
# For a 2×2 matrix no eigenvectors are needed. With $s = \sqrt{\det V}$ and
# $t = \sqrt{\operatorname{tr} V + 2s}$, the theorem of Cayley and Hamilton gives
#
# $$V^{-1/2} = \frac{1}{s\,t}\begin{pmatrix} V_{ii} + s & -V_{ri} \\ -V_{ri} & V_{rr} + s\end{pmatrix}$$
#
# That is what `whitening_matrix` computes, in double precision and for any number of channels:

# %% tags=["nbval-check-output"]
closed = whitening_matrix(torch.stack([rr, ii, ri]), eps=0)
print("largest difference below 1e-12:", bool((closed - R).abs().max() < 1e-12))

# %% [markdown]
# ## The layer
#
# Batch norm adds three things: running statistics for evaluation, a small `eps` on both variances,
# and a learnable map after the whitening,
#
# $$y = \Gamma\,V^{-1/2}(x - \mu) + \beta$$
#
# with a symmetric 2×2 matrix $\Gamma$ and a shift $\beta$. $\Gamma$ starts at $1/\sqrt2$ times the
# identity, so that the output has total variance 1.

# %% tags=["nbval-check-output"]
bn = ComplexBatchNorm2d(1)
print(bn)
for name, value in bn.state_dict().items():
    print(f"{name:20} {[round(v, 4) for v in value.flatten().tolist()]}")

# %% [markdown]
# Let us take each of the 64 bins as a channel, all images as one batch, and compare the two layers.

# %% tags=["nbval-check-output"]
bins = spectrum.flatten(1)  # (1797, 64)
for layer in (NaiveComplexBatchNorm1d(64), ComplexBatchNorm1d(64)):
    y = layer(bins).detach()
    print(layer.__class__.__name__)
    for k in (1, 9, 10):
        print(f"   bin {divmod(k, 8)}: axis ratio {plots.axis_ratio(y[:, k]):.2f}")

# %% [markdown]
# And bin (0, 0)? It is the sum of all pixels, purely real: a cloud without any width. Its $V$ has
# determinant 0, and $1/\sqrt{\det V}$ is where many a published layer returns NaN. The `eps` on the
# diagonal and the double precision keep this one finite:

# %% tags=["nbval-check-output"]
y = ComplexBatchNorm1d(64)(bins).detach()
print("imaginary part of bin (0, 0) at most", float(bins[:, 0].imag.abs().max()))
print("all outputs finite:", bool(torch.isfinite(torch.view_as_real(y)).all()))

# %% [markdown]
# ## Look at any bin
#
# Move the two sliders: row and column of the Fourier bin. Where is the data nearly circular? Where is
# it a line? (Bin (4, 4) and its like are real for every image, by symmetry.)


# %%
def show(row, column):
    fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    plots.whitening(spectrum[:, 0, row, column], ax)
    plt.show()
    print(ax.get_label())


row = IntSlider(1, 0, 7, description="row")
column = IntSlider(1, 0, 7, description="column")
_ = interact(show, row=row, column=column)

# %% [markdown]
# The same without a kernel: three bins side by side.

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained")
for ax, (r, c) in zip(axes, [(0, 1), (1, 1), (3, 2)], strict=True):
    plots.whitening(spectrum[:, 0, r, c], ax)
    ax.set_xlabel(f"real part, bin ({r}, {c})")
plt.show()
for ax in axes:
    print(ax.get_xlabel().removeprefix("real part, "), ax.get_label())

# %% [markdown]
# ## Training and evaluation
#
# After one batch with momentum 1, the running statistics are those of this batch, and evaluation
# must give what training gave. It does, up to $n/(n-1)$: the stored covariance is the unbiased one.

# %% tags=["nbval-check-output"]
bn = ComplexBatchNorm1d(64, momentum=1.0)
trained = bn(bins)
evaluated = bn.eval()(bins)
print(f"scale of the difference: {(trained.abs().mean() / evaluated.abs().mean()).item():.5f}")
print(f"sqrt(n / (n - 1)):       {(1797 / 1796) ** 0.5:.5f}")

# %% [markdown]
# ## Summary
#
# - A complex channel is a cloud in the plane. Its shape takes three numbers: rr, ii, ri.
# - Normalising the parts apart leaves the ellipse; multiplying by $V^{-1/2}$ makes it a circle.
# - For a 2×2 matrix the root is a closed formula, a few numbers per channel.
#
# **To think about.** Any $Q R$ with a rotation $Q$ whitens as well. What speaks for the symmetric
# choice?
#
# **Sources.** C. Trabelsi et al., *Deep Complex Networks*, ICLR 2018, section 3.5. Digits: E. Alpaydin
# and C. Kaynak, UCI Machine Learning Repository, 1998, as shipped with scikit-learn.
#
# Next: [3. The leak and its cure](03_leak_and_cure.ipynb)
