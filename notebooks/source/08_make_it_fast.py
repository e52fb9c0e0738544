# %% [markdown]
# # 8. Make it fast
#
# > *My complex batch norm is right now, but it is several times slower than the built-in one. Is there
# > an easy way to speed it up, numba style? And how fast could it be at all?*
#
# **Afterwards you can** say how fast an operation can possibly be, find out where its time goes, and
# take the steps that lead from a formula to that bound, knowing which of them pay.
#
# **Time** 45 minutes. **Needs** notebook 3 (an own backward) and notebook 4 (the formula).
#
# Times differ from machine to machine, so the text speaks of them only roughly; your own are in the
# outputs. What can be **counted** is the same everywhere, and carries the argument.

# %%
import inspect

import matplotlib.pyplot as plt
import torch
from tqdm.auto import tqdm

from cbn_lab import functional, plots, speed
from cbn_lab.exercises import TODO, check, predict

_ = torch.manual_seed(0)
torch.set_num_threads(1)  # one thread: easier to compare

# %% [markdown]
# ## How fast could it be?
#
# Whitening does little arithmetic for each value: some ten multiplications. A processor core does
# billions of those in a second, but it cannot **fetch the values** from memory that fast. So count how
# often the batch must pass through memory. One *sweep*: the batch is read once, or written once.
#
# - Forward: read x, write y. Backward: read x and the output's gradient g, write the gradient of x.
#   That is **five sweeps**, and no layer can do with less.
# - But y cannot be written before the mean is known, and the mean takes a look at all of x. So x is
#   read twice; and so are x and g in the backward. **Eight sweeps**, unless the second look finds the
#   values still in the cache.
#
# ### Exercise: the bound in milliseconds (★☆☆, 5 minutes)
#
# A batch has `values` complex64 numbers, of 8 bytes each. Memory moves `gigabytes` (10⁹ bytes) a second.
# Return the time of a training step with eight sweeps, **in milliseconds**.


# %% exercise="traffic bound"
def traffic_bound(values, gigabytes):
    return TODO


# %%
check("traffic bound", traffic_bound)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Bytes of one sweep, times eight, over bytes a second gives seconds.
#
# </details>

# %% [markdown] solution="traffic bound"
# <details><summary>Solution</summary>
#
# ```python
# def traffic_bound(values, gigabytes):
#     return 1000 * 8 * (8 * values) / (gigabytes * 1e9)
# ```
#
# </details>

# %% [markdown]
# How fast is your memory? A copy reads once and writes once; over an array that no cache holds, it
# tells the time of a sweep.

# %%
z, weight, bias, grad = speed.batch((16, 64, 32, 32))
sweep = speed.sweep_time(z)
print(f"batch {tuple(z.shape)} complex64: {z.nbytes / 2**20:.0f} MiB")
print(
    f"one sweep {sweep:.2f} ms ({z.nbytes / sweep / 1e6:.1f} GB/s), eight sweeps {8 * sweep:.1f} ms"
)

# %% [markdown]
# ## Step 0: the formula, as it stands in the paper

# %%
print(inspect.getsource(speed.formula))

# %% [markdown]
# Each line makes new tensors of the size of the batch, and autograd adds as many on the way back. How
# many sweeps do forward and backward take together?

# %%
guess_sweeps = predict(
    "Sweeps of the formula, forward and backward:", ["8 to 20", "20 to 60", "over 60"]
)
guess_sweeps

# %% [markdown]
# `speed.traffic` watches every operation that PyTorch runs (a `TorchDispatchMode`) and adds up the bytes
# of the tensors that it reads and writes. Views cost nothing and are left out.

# %% tags=["nbval-check-output"]
step = speed.step(speed.formula, z, weight, bias, grad)
counted = speed.traffic(step)
sweeps = counted.bytes / z.nbytes
print(
    f"operations {counted.operations}, sweeps {sweeps:.0f}: {counted.read / z.nbytes:.0f} reading, "
    f"{counted.written / z.nbytes:.0f} writing"
)
print(f"kept for the backward: {speed.saved_bytes(step) / z.nbytes:.1f} times the input")
guess_sweeps.compare("8 to 20" if sweeps < 20 else "20 to 60" if sweeps < 60 else "over 60")

# %% [markdown]
# There is the reason, before any clock has run: the arithmetic is small, and the values travel again
# and again. A **profiler** (`torch.profiler`, inside `speed.profile`) says the same in time. Which operations are on top?

# %%
top, total = speed.profile(step)
for name, calls, microseconds in top[:6]:
    print(f"{name:14} {calls:4} calls  {100 * microseconds / total:3.0f} % of the time")

# %% [markdown]
# Products are on top, and there are dozens of them; sums, copies and means follow. Not one of the calls
# is slow for what it does: each goes over the whole batch. So the cure is not a faster multiplication, but **fewer sweeps**.
#
# ## Step 1: fold the affine
#
# Per channel everything is linear: $y = \Gamma R (x - \mu) + \beta$. Multiply out what does not depend
# on the value, a handful of numbers per channel, and one map $y = A x + b$ is left.
#
# ### Exercise: fold it (★★☆, 8 minutes)
#
# `gamma` and `r` are (C, 2, 2), `mean` and `bias` (C, 2). Return `a` (C, 2, 2) and `b` (C, 2).


# %% exercise="fold"
def fold(gamma, r, mean, bias):
    return TODO


# %%
check("fold", fold)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which acts first on x, R or Γ? And what does the map do with the mean? `@` multiplies matrices channel
# by channel; a vector needs one more dimension, `mean[..., None]`.
#
# </details>

# %% [markdown] solution="fold"
# <details><summary>Solution</summary>
#
# ```python
# def fold(gamma, r, mean, bias):
#     a = gamma @ r
#     return a, bias - (a @ mean[..., None])[..., 0]
# ```
#
# In float32, `a @ x + b` cancels where the mean is large. A careful layer subtracts the mean first, in
# the same sweep, and loses no time by it.
#
# </details>

# %% [markdown]
# ## Step 2: save only the input
#
# Autograd keeps what each operation will need for its derivative: three times the input. But the whole
# backward can be written in closed form, from x alone (notebook 3 tells how to find it, the docstring of
# `cbn_lab.kernels.reference` has the result). A `Function` with that backward keeps x, which is alive
# anyhow, and recomputes the rest.

# %%
print(inspect.getsource(speed.SaveInput))

# %% tags=["nbval-check-output"]
candidates = {
    "formula": speed.formula,
    "folded": speed.folded,
    "only the input saved": speed.save_input,
}
expected = step()
for name, candidate in candidates.items():
    run = speed.step(candidate, z, weight, bias, grad)
    same = all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(run(), expected, strict=True)
    )
    print(
        f"{name:20}  sweeps {speed.traffic(run).bytes / z.nbytes:3.0f}   kept "
        f"{speed.saved_bytes(run) / z.nbytes:.1f} x input   output and gradients agree: {same}"
    )

# %% [markdown]
# Memory is down to the least there can be. Sweeps are fewer, but still many: as long as every product
# and every sum is an operation of its own, each is a sweep of its own, or three.
#
# ## Step 3: let a tool fuse them?
#
# - **`torch.jit.trace`** records the operations and replays them without Python.
# - **`torch.compile`** does fuse. It writes C++ for a chain of operations, so that a value stays in a
#   register from one to the next. It needs a C++ compiler on your machine, its first call takes many
#   seconds, and it does not generate code for complex numbers: those must be handed over as pairs.

# %%
guess_trace = predict(
    "jit.trace of the folded form, against the folded form itself?",
    ["at least twice as fast", "within a factor of two", "at least twice as slow"],
)
guess_trace

# %% tags=["nbval-check-output"]
candidates["jit.trace"] = speed.traced(z, weight, bias)
for name in ("folded", "jit.trace"):
    counted = speed.traffic(speed.step(candidates[name], z, weight, bias, grad))
    print(f"{name:10} operations {counted.operations}, sweeps {counted.bytes / z.nbytes:.0f}")

# %%
names = ("folded", "jit.trace")
found = speed.times({n: speed.step(candidates[n], z, weight, bias, grad) for n in names}, rounds=5)
print(", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items()))
ratio = found["jit.trace"] / found["folded"]
names = ["at least twice as fast", "within a factor of two", "at least twice as slow"]
guess_trace.compare(names[0 if ratio < 0.5 else 1 if ratio < 2 else 2])

# %% [markdown]
# What `jit.trace` replays are the same operations with the same sweeps: Python was not the problem.
#
# `torch.compile` is not run here, to keep this notebook short; its bar below comes from stored figures.
# To run it on your machine, set `COMPILE` to true:

# %%
COMPILE = False
if not speed.has_compiler():
    print("No C++ compiler on this machine: torch.compile cannot work here, and is left out.")
elif COMPILE:
    candidates["torch.compile"] = speed.compiled()
else:
    print("There is a C++ compiler; set COMPILE to True to measure torch.compile as well.")

# %% [markdown]
# ## Step 4: write the loops
#
# Eight sweeps, then, by hand: one loop that collects the sums, a few numbers per channel in between, one
# loop that writes the result; the same again for the backward. In Python such loops would be hopeless.
# **numba** compiles them to machine code, and brings its own compiler along, so that nobody needs one.
#
# All sums in **one** sweep: five numbers per channel will do, Σre, Σim, Σre², Σim², Σre·im. But beware:
# $\langle x^2\rangle - \langle x\rangle^2$ cancels when the mean is large.
#
# ### Exercise: the covariance in one sweep (★★★, 10 minutes)
#
# `re` and `im` are float32 tensors of one channel. Return the biased variances and covariance (rr, ii, ri),
# from sums over **each element once** (no mean first). It must hold at a mean 10⁴ times the spread.


# %% exercise="one sweep"
def covariance(re, im):
    return TODO


# %%
check("one sweep", covariance)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A variance does not change when all values are shifted. Which shift is known before the sweep begins, and
# is near the mean?
#
# </details>

# %% [markdown] solution="one sweep"
# <details><summary>Solution</summary>
#
# ```python
# def covariance(re, im):
#     re, im = re - re[0], im - im[0]  # in a loop: subtracted in passing, no extra sweep
#     m_re, m_im = re.mean(), im.mean()
#     rr, ii, ri = (re * re).mean(), (im * im).mean(), (re * im).mean()
#     return rr - m_re**2, ii - m_im**2, ri - m_re * m_im
# ```
#
# Shifted by the first value, the sums are as large as the spread, and nothing cancels any more. (Shifted
# by the mean they would be better still, but that takes a sweep more. The check cannot see it; a clock can.)
#
# </details>

# %% [markdown]
# The kit's CPU engine does just that, in `cbn_lab/kernels/cpu`. Three refinements:
#
# - The work is cut into pieces that fit the cache.
# - The second loop runs **backwards**, so that it begins with what the first one has just left there.
# - A result too large for the cache is written **past** it. An ordinary write first *reads* the piece of
#   memory that it is about to overwrite: a hidden sweep, which a copy pays as well.
#
# The engine is an argument of the layer's function:

# %% tags=["nbval-check-output"]
options = dict(running_mean=None, running_covar=None, weight=weight, bias=bias, training=True)
outputs = {e: functional.complex_batch_norm(z, engine=e, **options) for e in ("reference", "numba")}
print("same output:", torch.allclose(outputs["reference"], outputs["numba"], atol=1e-5))
candidates["numba"] = speed.engine("numba")
run = speed.step(candidates["numba"], z, weight, bias, grad)
same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(run(), expected, strict=True))
print("same gradients:", same, f"  kept {speed.saved_bytes(run) / z.nbytes:.1f} x input")

# %% [markdown]
# ## Step 5: on a graphics card
#
# For CUDA there is **Triton**, a language for kernels that comes with torch there. One writes a program for
# one block of the data: load it into registers, add up its sums or apply the map, write it back; thousands of
# such programs run at the same time. The sweeps are the same eight; only the memory is faster.

# %%
if torch.cuda.is_available():
    on_card = [tensor.cuda() for tensor in (z, weight, bias)]
    y = functional.complex_batch_norm(
        on_card[0], None, None, *on_card[1:], training=True, engine="triton"
    )
    print("Triton agrees:", torch.allclose(y.cpu(), outputs["reference"], atol=1e-5))
else:
    print(
        "No CUDA device here: the Triton engine stays unused. On CUDA the layer takes it by itself."
    )

# %% [markdown]
# ## All bars beside the bound
#
# The yardstick: two ordinary `nn.BatchNorm2d`, one for the real and one for the imaginary parts, stored
# apart. They do not whiten, and they are what one would use without thinking. Is the compiled whitening
# slower?

# %%
guess_ratio = predict(
    "numba engine against two stock nn.BatchNorm2d, forward and backward:",
    ["slower", "about as fast (within 20 %)", "faster"],
)
guess_ratio

# %%
steps = {"two stock BatchNorm2d": speed.stock_step(z, grad)}
steps |= {
    name: speed.step(candidate, z, weight, bias, grad) for name, candidate in candidates.items()
}
found = speed.times(steps, rounds=8, progress=lambda rounds: tqdm(rounds, desc="measuring"))
bounds = {"five sweeps": 5 * sweep, "eight sweeps": 8 * sweep}

fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
plots.costs(found, ax, xlabel="one training step on one thread (ms)", bounds=bounds, decimals=1)
plt.show()
print(plots.described(ax))
ratio = found["numba"] / found["two stock BatchNorm2d"]
names = ["slower", "about as fast (within 20 %)", "faster"]
guess_ratio.compare(names[0 if ratio > 1.2 else 1 if ratio > 0.8 else 2])

# %% [markdown]
# The formula moves the most bytes and has the longest bar; the loops move the least, and theirs is the
# shortest. In between it is close: an own backward saves memory for certain, time not always; `jit.trace`
# stays near the folded form, whose bytes it moves. A bar below eight sweeps: the second look found
# values in the cache, or writes were spared their hidden read. A bar beyond eight sweeps: fresh memory,
# which the system must supply page by page, and arithmetic.
#
# `torch.compile` is missing above. Here are stored figures of a larger batch, with it:

# %% tags=["nbval-check-output"]
head, rows = speed.load()
print(", ".join(f"{key} {value}" for key, value in head.items()))
for row in rows:
    kept = f"kept {row['saved']} x input" if row["saved"] else ""
    print(f"{row['candidate']:22} {row['ratio']:5.2f} of two stock layers   {kept}")

# %%
fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
bars = {row["candidate"]: row["ratio"] for row in rows if "sweeps" not in row["candidate"]}
bounds = {row["candidate"]: row["ratio"] for row in rows if "sweeps" in row["candidate"]}
plots.costs(bars, ax, xlabel="training step relative to two stock layers (stored)", bounds=bounds)
plt.show()
print(plots.described(ax))

# %% [markdown]
# To repeat these, `python -m cbn_lab.speed --out mine.csv`. For a full comparison, more shapes, two
# threads, CUDA, other people's packages: `cbn-lab bench`.
#
# ## Summary
#
# - Whitening is limited by **memory traffic**, not by arithmetic: count sweeps before you time anything.
#   Five are the least, eight what two passes need without a cache.
# - The formula as written takes 90, more than ten times as many as eight. Folding the affine and an own backward reduce them;
#   the own backward also brings what is kept for the backward down to the input.
# - `jit.trace` removes Python, which was not the problem. `torch.compile` fuses, and needs a compiler and
#   real pairs.
# - Loops written by hand and compiled by numba (on CUDA by Triton) move eight sweeps, and stand nearest to
#   the bounds.
#
# **To think about.** Two stock layers need eight sweeps as well, and yet they are slower than the bound.
# What else costs time besides memory? And: in evaluation mode there are no sums to collect. How many sweeps
# are left, and which of the steps above still pays?
#
# **Sources.** S. Williams, A. Waterman and D. Patterson, *Roofline: An Insightful Visual Performance Model*,
# CACM 2009. PyTorch's documentation of `torch.compile`, `torch.profiler` and `torch.library`. numba's and
# Triton's documentation. T. F. Chan, G. H. Golub and R. J. LeVeque, *Algorithms for Computing the Sample
# Variance*, The American Statistician 1983, on shifted sums.
#
# Next: [9. Does whitening help?](09_does_whitening_help.ipynb)
