# %% [markdown]
# # 9. Does whitening help?
#
# > *The covariance form costs more code and more thought than two ordinary batch norms, one for each
# > part. Has anybody checked that a network learns better with it?*
#
# **Afterwards you can** say how circular your data are, set up a comparison of two layers that is
# fair, read a paired interval, and say what came out here: when whitening matters, and when not.
#
# **Time** 40 minutes. **Needs** notebook 4 for the two layers; some statistics.
#
# The experiment behind this notebook took hundreds of trainings. Its results are stored in the kit
# and drawn here; three of the trainings are repeated in front of your eyes, and the last section
# says how to run it larger.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from cbn_lab import ComplexBatchNorm1d, NaiveComplexBatchNorm1d, datasets, experiments, plots
from cbn_lab.exercises import TODO, check, predict
from cbn_lab.experiments import METHODS, Run, interval
from cbn_lab.explorers.results import ResultsExplorer

_ = torch.manual_seed(0)
torch.set_num_threads(1)  # small networks: a second thread would only wait

# %% [markdown]
# ## Where could there be a difference?
#
# *Naive*: the real and the imaginary part are scaled apart. *Whitening*: the cloud of values is
# turned and scaled until it is round. A cloud that is round already is called **circular**: no
# direction of the complex plane is preferred. Then there is nothing to turn. How far apart are the
# two layers on such data?

# %%
guess_apart = predict(
    "Circular data, a batch of 1000: by how much do the two outputs differ (rms)?",
    ["nothing at all", "a few per cent", "more than half"],
)
guess_apart

# %% tags=["nbval-check-output"]
naive, whitening = NaiveComplexBatchNorm1d(8, affine=False), ComplexBatchNorm1d(8, affine=False)
generator = torch.Generator().manual_seed(0)
apart = {}
for circularity in (1.0, 0.5, 0.2):
    z = datasets.speckle((1000, 8), circularity, angle=torch.pi / 4, generator=generator)
    a, b = naive(z), whitening(z)
    apart[circularity] = ((a - b).abs().square().mean() / b.abs().square().mean()).sqrt().item()
    print(f"circularity {circularity}: the outputs differ by {100 * apart[circularity]:.0f} %")
kind = (
    "nothing at all"
    if apart[1.0] < 1e-3
    else "a few per cent"
    if apart[1.0] < 0.1
    else "more than half"
)
guess_apart.compare(kind)

# %% [markdown]
# On circular data the layers all but agree; what is left is chance, because a batch of 1000 is never
# perfectly round. **So any advantage of whitening must come from data that are not circular.** The
# ellipses below have circularity 0.2 (short axis over long axis). Left, the long axis lies along the
# real axis: scaling the parts is whitening. Right, it lies at 45°: both parts have the same variance,
# and the naive layer changes the size of the ellipse, not its shape.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
for ax, angle in zip(axes, (0.0, torch.pi / 4), strict=True):
    z = datasets.speckle((2000,), 0.2, angle=angle, generator=generator)
    plots.whitening(z, ax)
plt.show()
for side, ax in zip(("Left", "Right"), axes, strict=True):
    print(plots.described(ax, side))

# %% [markdown]
# ### Exercise: how circular is it? (★★☆, 8 minutes)
#
# Axes are awkward for many channels; a quotient is handier. Take away the mean, and compare
# $\langle z^2\rangle$ with $\langle |z|^2\rangle$:
#
# $$q = \frac{|\langle z^2 \rangle|}{\langle |z|^2 \rangle}$$
#
# For a circle the phases of $z^2$ cancel, $q = 0$; for a line they agree, $q = 1$. `z` is a complex
# tensor of one dimension; return one real number.


# %% exercise="circularity quotient"
def quotient(z):
    return TODO


# %%
check("circularity quotient", quotient)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which comes first, the mean or the modulus? `z.square()`, `z.abs()`, `z.mean()` are all there for
# complex tensors. Do not forget the mean of `z` itself.
#
# </details>

# %% [markdown] solution="circularity quotient"
# <details><summary>Solution</summary>
#
# ```python
# def quotient(z):
#     z = z - z.mean()
#     return (z.square().mean().abs() / z.abs().square().mean()).item()
# ```
#
# An ellipse of circularity $c$ has $q = (1 - c^2)/(1 + c^2)$, however it is turned.
#
# </details>

# %% [markdown]
# ## A task in which circularity can be set
#
# A handwritten figure is sent, as amplitudes of 64 pixels, through a scattering medium. 64 detectors
# measure the complex field behind it:
#
# $$y = T x + \text{noise}$$
#
# Each detector adds up waves from all pixels. **Strong scattering** spreads the phases of the
# transmission matrix $T$ over the whole circle: circularity 1. **Weak scattering** leaves them along a
# line, whose direction is the phase of the reference at this detector: circularity near 0. A network
# is to tell which figure was sent. The noise is circular, and as strong as the signal.
#
# (Figures have few pixels that vary much. So even with phases all over the circle the cloud of a single
# detector is not quite round.)

# %%
images, labels = datasets.digits()
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
axes[0].imshow(images[5, 0], cmap="gray")
axes[0].set(title=f"sent: a {labels[5]}", xticks=[], yticks=[])
said = []
for ax, circularity in zip(axes[1:], (1.0, 0.35, 0.0), strict=True):
    fields = experiments.medium(images.flatten(1), circularity, 0.0, 64, seed=0)
    shapes = [1 / plots.axis_ratio(z) for z in fields.T]
    z = fields[:, np.argsort(shapes)[32]]  # a detector in the middle
    ax.plot(z.real, z.imag, ".", ms=2, color=plots.PALETTE["blue"])
    ax.set(
        title=f"circularity {circularity:g}",
        xlabel="real part",
        xlim=(-12, 12),
        ylim=(-12, 12),
        aspect="equal",
    )
    said.append(f"{np.median(shapes):.2f} at {circularity:g}")
axes[1].set_ylabel("imaginary part")
plt.show()
print(f"The field at one detector, {len(images)} figures, without noise.")
print("Short over long axis, median:", ", ".join(said))

# %% [markdown]
# ## What is a fair comparison?
#
# The three networks differ **in one thing**: what stands in front of the affine map Γ·x + β. All else
# is equal: layers, number of parameters, first weights, data, order of the batches, optimizer, number
# of steps.

# %% tags=["nbval-check-output"]
settings = experiments.load().settings
for method in METHODS:
    model = experiments.network(method, settings)
    numbers = sum(
        torch.view_as_real(p).numel() if p.is_complex() else p.numel() for p in model.parameters()
    )
    before = type(model[0][0]).__name__
    print(f"{method:10} {numbers} real numbers to learn; in front of the affine map: {before}")

# %% [markdown]
# One thing must **not** be equal: the learning rate. A rate that suits one network may be too large
# for another. So each method, at each circularity, gets the same search over the same rates, on
# seeds of its own, judged on validation data. What is reported comes from other seeds and from test
# data that took part in no choice.
#
# A *seed* stands for everything random: medium, noise, split, weights, batches. Methods share it. So
# we may compare **in pairs**.

# %% tags=["nbval-check-output"]
results = experiments.load()
print(f"trainings stored: {len(results.runs)}, with")
print(textwrap.fill(", ".join(f"{k} {v}" for k, v in vars(results.settings).items()), plots.LINE))
print("seeds reported:", len(results.accuracy("medium", 1.0, "naive")))
test = len(labels) - settings.train - settings.validation
chance = 100 * (0.9 * 0.1 / test) ** 0.5
print(f"test set: {test} figures: chance moves an accuracy of 90 % by {chance:.1f} points")
print("learning rates tried:", *experiments.RATES)
print("found, at circularity", *experiments.CIRCULARITIES)
for method in METHODS:
    print(f"  {method:18}", *(results.rate("medium", c, method) for c in experiments.CIRCULARITIES))

# %% [markdown]
# ## Three of the trainings, now
#
# Circularity 0.2, seed 0, with the rates that were found. Your machine rounds differently from the
# one that made the stored results, and training amplifies that: the results agree within a few points,
# not to the last digit.

# %%
live = {}
for method in tqdm(METHODS, desc="training"):
    run = Run("medium", 0.2, method, results.rate("medium", 0.2, method), seed=0)
    live[method] = 100 * experiments.perform(run, results.settings).test
for method, accuracy in live.items():
    there = results.accuracy("medium", 0.2, method)[0]
    print(f"{method:10} now {accuracy:.1f} %, stored {there:.1f} %")
    assert abs(accuracy - there) < 5, "further apart than rounding explains"

# %% [markdown]
# One seed says next to nothing: chance alone moves such an accuracy by more than a point. Hence several
# seeds, and intervals.
#
# ## The result
#
# Before you look: at circularity 0 the naive layer leaves each cloud as elongated as the reference
# phase would have it, and whitening makes all of them round. (You get the answer further down, with the
# differences: the intervals of the next picture are too wide to decide it.)

# %%
guess_zero = predict(
    "Circularity 0: whitening against naive, over all seeds?",
    ["helps", "hurts", "cannot tell"],
)
guess_zero

# %%
series = {
    m: [(c, *interval(results.accuracy("medium", c, m))) for c in experiments.CIRCULARITIES]
    for m in METHODS
}
fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
plots.intervals(
    series, ax, xlabel="circularity (short axis over long axis)", ylabel="test accuracy (%)"
)
plt.show()
print(plots.described(ax))

# %% [markdown]
# These intervals are wide, because each seed is another medium, some harder than others. But that is
# common to the methods, and drops out of their **difference at the same seed**.
#
# ### Exercise: the paired interval (★★☆, 10 minutes)
#
# `a` and `b` hold one accuracy a seed, in the same order. Return the mean of `a - b`, and half of its
# 95 % interval: Student's $t$ for $n - 1$ degrees of freedom, times the standard error of the mean.
# `stats.t.ppf(0.975, k)` is $t$ for $k$ degrees of freedom.


# %% exercise="paired interval"
def paired(a, b):
    return TODO


# %%
check("paired interval", paired)

# %% [markdown]
# <details><summary>Hint</summary>
#
# First the differences, `d = a - b`. Their standard deviation (with $n - 1$), over $\sqrt n$, is the
# standard error of their mean.
#
# </details>

# %% [markdown] solution="paired interval"
# <details><summary>Solution</summary>
#
# ```python
# def paired(a, b):
#     d, n = a - b, len(a)
#     return float(d.mean()), float(stats.t.ppf(0.975, n - 1) * d.std() / n**0.5)
# ```
#
# `d.std()` divides by $n - 1$ in torch, by $n$ in numpy.
#
# </details>

# %% [markdown]
# ### Exercise: the verdict (★☆☆, 3 minutes)
#
# From a mean difference and half of its interval, say `"helps"`, `"hurts"` or `"cannot tell"`.


# %% exercise="verdict"
def verdict(mean, half):
    return TODO


# %%
check("verdict", verdict)

# %% [markdown]
# <details><summary>Hint</summary>
#
# On which side of 0 does the whole interval lie, if on one?
#
# </details>

# %% [markdown] solution="verdict"
# <details><summary>Solution</summary>
#
# ```python
# def verdict(mean, half):
#     return "helps" if mean > half else "hurts" if mean < -half else "cannot tell"
# ```
#
# "Cannot tell" is not "there is no effect": the interval says how large an effect may still hide.
#
# </details>

# %% [markdown]
# ## What came out
#
# Whitening minus naive, and naive minus none, at the same seeds:


# %% tags=["nbval-check-output"]
def difference(task, circularity, first, second):
    a, b = (results.accuracy(task, circularity, method) for method in (first, second))
    return interval(a - b)


def say(mean, half):
    return "helps" if mean > half else "hurts" if mean < -half else "cannot tell"


pairs = [("whitening", "naive"), ("naive", "none")]
print("circularity   whitening - naive              naive - none")
for c in experiments.CIRCULARITIES:
    rows = [difference("medium", c, *pair) for pair in pairs]
    print(f"{c:<11g}", *(f"  {m:+.2f} ± {h:.2f} points: {say(m, h):12}" for m, h in rows))
guess_zero.compare(say(*difference("medium", 0.0, "whitening", "naive")))

# %%
series = {
    f"{first} minus {second}": [
        (c, *difference("medium", c, first, second)) for c in experiments.CIRCULARITIES
    ]
    for first, second in pairs
}
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
plots.intervals(
    series,
    ax,
    xlabel="circularity (short axis over long axis)",
    ylabel="difference (points)",
    zero=True,
)
plt.show()
print(plots.described(ax))

# %% [markdown]
# Beware of picking the one interval that pleases you. Of so many 95 % intervals, one in twenty misses
# the truth by chance alone. Three questions need only **one** interval each: does normalising
# help, on average over all circularities? Does whitening help over naive? And is that difference larger for
# non-circular fields (circularity 0 and 0.1) than for circular ones (0.7 and 1)?


# %% tags=["nbval-check-output"]
def gain(circularity, first="whitening", second="naive"):
    a, b = (results.accuracy("medium", circularity, method) for method in (first, second))
    return a - b


average = np.mean([gain(c) for c in experiments.CIRCULARITIES], axis=0)  # one number a seed
questions = {
    "naive - none, all circularities": np.mean(
        [gain(c, "naive", "none") for c in experiments.CIRCULARITIES], axis=0
    ),
    "whitening - naive, all circularities": average,
    "the same, non-circular - circular": (gain(0.0) + gain(0.1) - gain(0.7) - gain(1.0)) / 2,
}
for text, values in questions.items():
    mean, half = interval(values)
    print(f"{text:37} {mean:+.2f} ± {half:.2f} points: {say(mean, half)}")

# %% [markdown]
# Read it calmly:
#
# - **Normalising helps**, a little: the first interval lies above 0.
# - **Whitening hurts here**, by about half a point on average: the second interval lies below 0.
# - **No effect of circularity shows.** The third interval holds 0. An effect smaller than its half-width may
#   still hide there; a large advantage on non-circular fields would have lifted it.
#
# There is a **control**: circularity 1, where the clouds are nearly round and the two layers nearly agree, so
# that the shape of the clouds can make little difference. Its difference is as large as the others. (That its
# interval is the only one of the seven to lie below 0 is chance picking; do not lean on it.) So what costs
# whitening half a point, it costs on circular data as well. A suspect: each batch of 50 must now supply one
# more number per channel, with the noise that 50 values have; `--batch 200` would be the experiment. The
# learning rates are less so: the search, from three seeds, found the same for both layers at five of the
# seven circularities. (Some lie at the edge of what was tried: a wider search would be fairer still.)
#
# ## Move it yourself
#
# The same results, one circularity at a time.

# %%
ResultsExplorer(results)

# %% [markdown]
# ## Why so little? Look inside
#
# The circularity is set at the **input**. (The noise on top of it is circular, so that even at
# circularity 0 the input's $q$ is less than 1.) What arrives at the layers inside? The first complex
# weight matrix adds up 64 detectors with random phases of its own.

# %%
guess_inside = predict(
    "Input at circularity 0. How non-circular is what the second normalisation sees (median q)?",
    ["as much as the input", "about half of it", "less than a third of it"],
)
guess_inside


# %% tags=["nbval-check-output"]
def median_q(z):
    z = z - z.mean(0)
    return (z.square().mean(0).abs() / z.abs().square().mean(0)).median().item()


print("circularity   q of the input   after its norm   at the second norm (untrained)")
inside = {}
for c in (0.0, 0.35, 1.0):
    fields, _ = experiments.data("medium", c, 0, settings)
    _ = torch.manual_seed(0)
    model = experiments.network("naive", settings)
    with torch.no_grad():
        inside[c] = [median_q(fields), median_q(model[0](fields)), median_q(model[:2](fields))]
    print(
        f"{c:<13g} {inside[c][0]:.2f}             {inside[c][1]:.2f}             {inside[c][2]:.2f}"
    )
part = inside[0.0][2] / inside[0.0][0]
names = ["as much as the input", "about half of it", "less than a third of it"]
guess_inside.compare(names[0 if part > 0.7 else 1 if part > 1 / 3 else 2])

# %% [markdown]
# This is the central limit theorem at work, the one that makes strong scattering circular: a sum of
# many terms of random phase prefers no direction. **A layer of complex weights is a scattering medium
# itself.** Behind it the values are nearly circular, whatever went in, and there the two
# normalisations all but agree. The set circularity acts at the first normalisation only. (Training
# may then make the values less circular again.)
#
# And at the first? Whitening makes the short axis as long as the long one. At circularity 0 the short
# axis carries **nothing but noise**:

# %% tags=["nbval-check-output"]
pixels = images.flatten(1)
print("noise in the power of   short axis   long axis   whitening lifts the short axis")
for c in (0.0, 0.35, 1.0):
    clean, noisy = (experiments.medium(pixels, c, noise, 64, seed=0) for noise in (0.0, 1.0))
    noise = noisy - clean
    z = torch.view_as_real(noisy - noisy.mean(0))
    values, axes = torch.linalg.eigh(torch.einsum("nci,ncj->cij", z, z) / len(z))
    along = torch.einsum("cij,nci->ncj", axes, torch.view_as_real(noise)).square().mean(0)
    share, gain_short = along / values, (values[:, 1] / values[:, 0]).sqrt()
    short, long = 100 * share.mean(0)
    print(f"circularity {c:<12g}{short:8.0f} %{long:10.0f} %{gain_short.mean():12.2f}-fold")

# %% [markdown]
# So whitening treats the two directions alike although one of them may be worthless. Nothing is lost
# by that, for the map can be undone, and the network's own weights and Γ may do so. But nothing is
# gained either: **equal variance is not equal information.**
#
# ## Data that nobody made circular or not: the digits' FFT
#
# The Fourier transform of real pixels is complex, and not circular by nature. Bins that are their own
# mirror image are even purely real.

# %% tags=["nbval-check-output"]
spectrum = datasets.digits(fft=True)[0].flatten(1)
z = spectrum - spectrum.mean(0)
q = (z.square().mean(0).abs() / z.abs().square().mean(0)).reshape(8, 8)
others = q[q < 0.99].median()
print(f"bins with q > 0.99: {(q > 0.99).sum()} of 64; median of the others: {others:.2f}")
for method in METHODS:
    mean, half = interval(results.accuracy("fft", experiments.FFT, method))
    print(f"{method:10} {mean:.2f} ± {half:.2f} %")
for pair in [*pairs, ("whitening", "none")]:
    mean, half = difference("fft", experiments.FFT, *pair)
    print(f"{' - '.join(pair):20} {mean:+.2f} ± {half:.2f} points: {say(mean, half)}")

# %% [markdown]
# All three intervals hold 0: neither whitening nor even normalising made a difference that 12 seeds could
# show, and the task is nearly solved without. Nor does it test whitening hard: apart from the real bins, a
# median q near 0.2 is almost circular by the measure above. Real data need not be what one hopes for.
#
# ## Run it larger
#
# One small network on one small data set settles nothing for good. The experiment is in the kit, and
# one command, in the kit's environment, makes a series of your own. It can be broken off and goes on where it stopped:
#
# ```
# python -m cbn_lab.experiments --out mine.csv --seeds 40 --hidden 128 \
#     --epochs 60 --noise 0.5
# ```
#
# Then `experiments.load("mine.csv")` stands for `experiments.load()` in the cells above. To try another
# normalisation, add it to `experiments.normalisation`. How many seeds are enough? The half-width is
# $t_{n-1}\,s/\sqrt n$, and $s$ is known by now:

# %% tags=["nbval-check-output"]
s = average.std(ddof=1)
for wanted in (0.5, 0.2, 0.1):
    n = 2
    while stats.t.ppf(0.975, n - 1) * s / n**0.5 > wanted:
        n += 1
    print(f"± {wanted} points on the average: about {n} seeds")

# %% [markdown]
# ## Summary
#
# - On **circular** data naive and whitening do nearly the same to the clouds. What whitening is for are data
#   that are not.
# - In this experiment **whitening did not help**: behind the medium it cost about half a point, at circularity 1
#   too, and on the digits' FFT no difference showed. Normalising at all helped a little behind the medium.
# - One reason: complex weights make circular what they add up, so that only the first normalisation sees the
#   ellipses. Another: equal variance is not equal information; the short axis may be noise.
# - Fair means: one difference only, the same search for each, seeds shared, other data for choosing than for
#   reporting; and a **control** where the clouds are nearly round, to see what else differs.
# - This speaks of small networks, two data sets, one optimizer. It does not say that whitening never helps,
#   and it need not cost time (notebook 8). It says: do not expect it, **measure** it.
#
# **To think about.** In many experiments the phase of the laser drifts, so that each record comes with
# a random global phase. What does that do to the circularity of the data, and to the difference
# between the two layers? And: which task could there be in which the *short* axis carries the message?
#
# **Sources.** C. Trabelsi et al., *Deep Complex Networks*, ICLR 2018. J. W. Goodman, *Speckle Phenomena
# in Optics*, 2007, on circular and non-circular speckle. S. M. Popoff et al., *Measuring the
# Transmission Matrix in Optics*, Phys. Rev. Lett. 104, 100601 (2010). P. J. Schreier and L. L. Scharf,
# *Statistical Signal Processing of Complex-Valued Data*, 2010, on circularity. E. Alpaydin and
# C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998.
#
# This is the last notebook. Back to the first: [1. Where is running_mean updated?](01_running_mean.ipynb)
