"""Notebook 8: the way from the formula to a fast layer, and what each step costs.

    python -m cbn_lab.speed          measure every step here and store it beside the kit's figures

Each candidate takes ``(z, weight, bias)`` and whitens the batch z. Three costs are told apart:
bytes that pass through memory, bytes kept for the backward, and time.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from cbn_lab.complex_batch_norm import complex_batch_norm
from cbn_lab.kernels import reference
from cbn_lab.shapes import per_channel
from cbn_lab.whitening import symmetric, whitening_matrix

STORED = Path(__file__).parent / "results" / "speed.csv"
SHAPE = (32, 64, 32, 32)
Z = Complex[Tensor, "N C H W"]
Weight, Bias = Float[Tensor, "C 3"], Float[Tensor, "C 2"]
Step = Callable[[], Any]


# --- the candidates ---------------------------------------------------------------------------


def formula(z: Z, weight: Weight, bias: Bias, eps: float = 1e-5) -> Z:
    """The formula of the paper, line by line."""
    re, im = z.real, z.imag
    re = re - re.mean((0, 2, 3), keepdim=True)
    im = im - im.mean((0, 2, 3), keepdim=True)
    v_rr = (re * re).mean((0, 2, 3), keepdim=True) + eps
    v_ii = (im * im).mean((0, 2, 3), keepdim=True) + eps
    v_ri = (re * im).mean((0, 2, 3), keepdim=True)
    s = (v_rr * v_ii - v_ri * v_ri).sqrt()
    t = (v_rr + v_ii + 2 * s).sqrt()
    r_rr, r_ii, r_ri = (v_ii + s) / (s * t), (v_rr + s) / (s * t), -v_ri / (s * t)
    x = r_rr * re + r_ri * im
    y = r_ri * re + r_ii * im
    g_rr, g_ii, g_ri = (per_channel(weight[..., k], re) for k in range(3))
    b_re, b_im = (per_channel(bias[..., k], re) for k in range(2))
    return torch.complex(g_rr * x + g_ri * y + b_re, g_ri * x + g_ii * y + b_im)


def folded(z: Z, weight: Weight, bias: Bias, eps: float = 1e-5) -> Z:
    """Γ, R, μ and β multiplied out per channel: one linear map of each value is left."""
    re, im = z.real, z.imag
    mean, covar = reference.moments(re, im)
    a = symmetric(weight) @ whitening_matrix(covar, eps)
    b = bias - (a @ mean[..., None])[..., 0]
    re, im = reference.apply(a, re, im)
    return torch.complex(re + per_channel(b[..., 0], re), im + per_channel(b[..., 1], im))


class SaveInput(torch.autograd.Function):
    """The same with its own backward: of the batch, only the input is kept."""

    @staticmethod
    def forward(ctx: Any, z: Z, weight: Weight, bias: Bias, eps: float) -> Z:
        mean, covar = reference.moments(z.real, z.imag)
        ctx.save_for_backward(z, weight, mean, covar)
        ctx.eps = eps
        out = reference.whiten(z.real, z.imag, mean, covar, weight, bias, eps)
        return torch.complex(*out)

    @staticmethod
    def backward(ctx: Any, grad: Z) -> tuple:
        z, weight, mean, covar = ctx.saved_tensors
        x, g, count = (z.real, z.imag), (grad.real, grad.imag), z.numel() // z.shape[1]
        total, product = reference.gram(*x, *g, mean)
        state = mean, covar, weight, ctx.eps, total, product, count
        weight_grad, bias_grad = reference.parameter_gradients(covar, ctx.eps, total, product)
        return (
            torch.complex(*reference.input_gradient(*x, *g, *state)),
            weight_grad,
            bias_grad,
            None,
        )


def save_input(z: Z, weight: Weight, bias: Bias, eps: float = 1e-5) -> Z:
    return SaveInput.apply(z, weight, bias, eps)


def traced(z: Z, weight: Weight, bias: Bias) -> Callable:
    """:func:`folded` as a TorchScript graph, made by watching one call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is being retired, and says so at each call
        return torch.jit.trace(folded, (z, weight, bias))


def compiled() -> Callable:
    """:func:`folded` through ``torch.compile``; raises at the first call without a compiler."""
    return torch.compile(folded)


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def engine(name: str) -> Callable:
    """The kit's layer on one of its engines."""

    def run(z: Z, weight: Weight, bias: Bias) -> Z:
        return complex_batch_norm(z, None, None, weight, bias, training=True, engine=name)

    run.__name__ = name
    return run


def step(candidate: Callable, z: Z, weight: Weight, bias: Bias, grad: Z) -> Step:
    """Forward and backward, as one call without arguments."""
    inputs = [tensor.detach().requires_grad_() for tensor in (z, weight, bias)]
    return lambda: torch.autograd.grad(candidate(*inputs), inputs, grad)


def stock_step(z: Z, grad: Z) -> Step:
    """Two ``nn.BatchNorm2d`` on separate floats: the yardstick. They take and give no complex."""
    layers = [torch.nn.BatchNorm2d(z.shape[1]) for _ in range(2)]
    parts = [part.contiguous().requires_grad_() for part in (z.real, z.imag)]
    grads = [grad.real.contiguous(), grad.imag.contiguous()]
    inputs = [*parts, *(p for layer in layers for p in layer.parameters())]

    def run() -> Any:
        out = [layer(part) for layer, part in zip(layers, parts, strict=True)]
        return torch.autograd.grad(out, inputs, grads)

    return run


# --- what a step costs ------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations below it read and write.

    An operation reads each of its tensors once and writes its result once. That is too little for
    fused ones, which are opaque here: theirs is written down in ``FUSED``, from their source.
    """

    FUSED = {  # operation: (times it reads each big input, times it writes its output)
        "cbn_lab::complex_batch_norm": (2, 1),
        "cbn_lab::complex_batch_norm_backward": (2, 1),
        "aten::native_batch_norm": (2, 1),
        "aten::native_batch_norm_backward": (2, 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = storages([args, kwargs]), storages(out)
        fresh = {key: size for key, size in outputs.items() if key not in inputs}
        changes = func._schema.is_mutable
        if fresh or changes:  # else a view: nothing moves
            name = func.name().split(".")[0]
            reads, writes = self.FUSED.get(name, (1, 1))
            self.read += reads * sum(inputs.values())
            self.written += writes * sum(outputs.values() if changes else fresh.values())
            self.operations += 1
        return out

    @property
    def bytes(self) -> int:
        return self.read + self.written


def storages(values: Any) -> dict[int, int]:
    """{storage: bytes of it that the tensor covers} of all tensors among ``values``."""
    found: dict[int, int] = {}
    for tensor in tensors(values):
        storage = tensor.untyped_storage()
        size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
        key = storage._cdata
        found[key] = min(found.get(key, 0) + size, storage.nbytes())
    return found


def tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))


def traffic(run: Step) -> Traffic:
    with Traffic() as counted:
        run()
    return counted


def saved_bytes(run: Step) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def profile(run: Step) -> tuple[list[tuple[str, int, float]], float]:
    """(operation, calls, microseconds) by torch.profiler, longest first, and the sum of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with without_stderr(), torch.profiler.profile(activities=activities) as profiler:
        run()
    events = [(e.key, e.count, e.self_cpu_time_total) for e in profiler.key_averages()]
    return sorted(events, key=lambda event: -event[2]), sum(event[2] for event in events)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Some builds of the profiler write marks for tracers there, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def times(steps: dict[str, Step], rounds: int, progress: Callable = iter) -> dict[str, float]:
    """Least milliseconds of each, taken in turn so that all meet the same weather."""
    least = dict.fromkeys(steps, float("inf"))
    for run in steps.values():
        run()  # whatever happens once only
    for _ in progress(range(rounds)):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return least


def sweep_time(z: Z, rounds: int = 5) -> float:
    """Least milliseconds for one sweep over z through memory.

    A copy reads once and writes once. It goes over eight times as much, so that no cache holds it.
    """
    source = z.new_zeros(8 * z.numel())
    target = torch.zeros_like(source)
    return times({"copy": lambda: target.copy_(source)}, rounds)["copy"] / 16


# --- the stored figures -----------------------------------------------------------------------


def batch(shape: Sequence[int] = SHAPE) -> tuple[Z, Weight, Bias, Z]:
    """A batch, Γ, β and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(shape, dtype=torch.cfloat, generator=generator) for _ in range(2))
    return z, torch.tensor([0.7, 0.7, 0.1]).repeat(shape[1], 1), torch.zeros(shape[1], 2), grad


def candidates(z: Z, weight: Weight, bias: Bias) -> dict[str, Callable]:
    found = {
        "formula": formula,
        "folded": folded,
        "only the input saved": save_input,
        "jit.trace": traced(z, weight, bias),
        "numba": engine("numba"),
    }
    if has_compiler():
        found["torch.compile"] = compiled()
    return found


def measure(rounds: int, threads: int, shape: Sequence[int] = SHAPE) -> list[dict]:
    """A row for each candidate, the yardstick and the bound."""
    torch.set_num_threads(threads)
    z, weight, bias, grad = batch(shape)
    steps = {"two stock BatchNorm2d": stock_step(z, grad)}
    for name, candidate in candidates(z, weight, bias).items():
        steps[name] = step(candidate, z, weight, bias, grad)
    found = times(steps, rounds)
    sweep = sweep_time(z)
    found |= {f"{name} sweeps": number * sweep for name, number in dict(five=5, eight=8).items()}
    return [
        dict(
            candidate=name,
            threads=threads,
            ms=f"{ms:.2f}",
            ratio=f"{ms / found['two stock BatchNorm2d']:.3f}",
            saved=f"{saved_bytes(steps[name]) / z.nbytes:.2f}" if name in steps else "",
        )
        for name, ms in found.items()
    ]


def load(path: Path | str = STORED) -> tuple[dict, list[dict]]:
    """Where the stored figures come from, and their rows."""
    with open(path, newline="", encoding="utf-8") as file:
        head = json.loads(file.readline().removeprefix("# "))
        rows = list(csv.DictReader(file))
    return head, [row | dict(ms=float(row["ms"]), ratio=float(row["ratio"])) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cbn_lab.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE)
    given = parser.parse_args(arguments)
    rows = measure(given.rounds, given.threads, given.shape)
    head = {
        "shape": list(given.shape),
        "dtype": "complex64",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps(head)}\n")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{value!s:>22}" for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
