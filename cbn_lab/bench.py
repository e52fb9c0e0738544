"""``cbn-lab bench``: a training step of every complex batch norm at hand, side by side.

All candidates of a shape run in turns, some steps each per round, so that whatever else the machine
does falls on all of them alike. A is the ratio to two ``torch.nn`` layers on separate real tensors.
"""

import argparse
import csv
import importlib
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbn_lab.speed import has_compiler, saved_bytes

SHAPES = [(8, 16, 8, 8), (32, 32, 16, 16), (32, 64, 32, 32), (4096, 512), (32, 256, 64, 64)]
QUICK = [(8, 16, 8, 8), (16, 32, 16, 16)]
PEERS = {  # package: module, class for (N, C), class for (N, C, H, W), takes a pair of parts
    "complexPyTorch": ("complexPyTorch.complexLayers", "ComplexBatchNorm1d", "ComplexBatchNorm2d"),
    "torchcvnn": ("torchcvnn.nn.modules.batchnorm", "BatchNorm1d", "BatchNorm2d"),
    "complextorch": ("complextorch.nn", "BatchNorm1d", "BatchNorm2d"),
    "cplxmodule": ("cplxmodule.nn", "CplxBatchNorm1d", "CplxBatchNorm2d"),
}
STOCK = "two stock BatchNorm"
IN_A_ROW = 4  # steps: all but the first find their code in the cache, whoever had the turn before


@dataclass
class Candidate:
    """Something that normalises, and the inputs and output gradients it wants."""

    name: str
    forward: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    whitens: bool
    forward_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    eval_s: list[float] = field(default_factory=list)
    layers: tuple[nn.Module, ...] = ()  # timed in evaluation too
    saved: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    parser.add_argument(
        "--shape", action="append", type=shape_of, help="such as 32x64x32x32; may be repeated",
    )  # fmt: skip
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, help="rounds per shape (default: by size)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--ours-only", action="store_true", help="our engines and stock alone")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder for the results")


def shape_of(text: str) -> tuple[int, ...]:
    """(N, C) or (N, C, H, W)."""
    sizes = text.split("x")
    if len(sizes) not in (2, 4) or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected a shape such as 32x64x32x32, got {text!r}")
    return tuple(map(int, sizes))


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device here")
        return 1
    before, rows = torch.get_num_threads(), []
    shapes = args.shape or (QUICK if args.quick else SHAPES)
    try:
        for threads in args.threads if args.device == "cpu" else [None]:
            torch.set_num_threads(threads or before)
            for shape in shapes:
                rows += run_shape(shape, threads, args)
    finally:
        torch.set_num_threads(before)
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.output / "bench.csv")
    text = f"{machine(args.device)}\n\n{ratios(rows)}\n{markdown(rows)}"
    (args.output / "bench.md").write_text(text, encoding="utf-8")
    plot(rows, args.output / "bench.png")
    print(text)
    print(f"written: {args.output / 'bench.csv'}, bench.md, bench.png")
    return 0


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}"


def run_shape(shape: tuple[int, ...], threads: int | None, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    found = list(candidates(shape, args))
    check_against_each_other(found)
    element = 8 * math.prod(shape)
    rounds = args.rounds or max(6, min(240, (5 if args.quick else 20) * (1 << 24) // element))
    for candidate in found:
        candidate.saved = saved_bytes(partial(candidate.forward, *candidate.inputs))
    for _ in range(math.ceil(rounds / IN_A_ROW) + 1):
        for candidate in found:
            time_steps(candidate, args.device)
            time_evaluation(candidate, args.device)
    for candidate in found:  # the first round compiles and warms up
        for times in (candidate.forward_s, candidate.step_s, candidate.eval_s):
            del times[:IN_A_ROW]
    stock = next(c for c in found if c.name == STOCK)
    label = "×".join(map(str, shape))
    label += " channels_last" if args.channels_last and len(shape) == 4 else ""
    rows = [row(c, stock, label, threads, element) for c in found]
    return [*rows, bound(label, threads, stock, element, args.device)]


# --- candidates ------------------------------------------------------------------------------


def candidates(shape: tuple[int, ...], args: argparse.Namespace):
    """Every set-up that can run here; prints why one cannot."""
    make = Inputs(shape, args.device, args.channels_last)
    yield make.stock()
    yield from make.ours()
    if args.ours_only:
        return
    yield make.naive()
    yield make.thread()
    if has_compiler() or args.device == "cuda":
        yield make.thread(compiled=True)
    else:
        print("bench: skipped torch.compile(the thread's formula): no C++ compiler here")
    for package in PEERS:
        try:
            yield make.peer(package)
        except Exception as error:
            print(f"bench: skipped {package}: {type(error).__name__}: {error}")


class Inputs:
    def __init__(self, shape: tuple[int, ...], device: str, channels_last: bool) -> None:
        kind = torch.contiguous_format
        if channels_last and len(shape) == 4:
            kind = torch.channels_last
        x = torch.randn(2, *shape, 2, device=device)
        x[0, ..., 1] += 0.5 * x[0, ..., 0]
        self.shape, self.device = shape, device
        self.z, self.g = (torch.view_as_complex(t).clone(memory_format=kind) for t in x)
        self.flat = len(shape) == 2

    def complex(self, name: str, layer: Callable, whitens: bool = True) -> Candidate:
        z = self.z.clone().requires_grad_()
        return Candidate(name, lambda z: (layer(z),), (z,), (self.g,), whitens)

    def pair(self, name: str, layer: Callable, whitens: bool = True) -> Candidate:
        parts = tuple(p.clone().requires_grad_() for p in (self.z.real, self.z.imag))
        grads = self.g.real.clone(), self.g.imag.clone()
        return Candidate(name, layer, parts, grads, whitens)

    def stock(self) -> Candidate:
        kind = nn.BatchNorm1d if self.flat else nn.BatchNorm2d
        re, im = (kind(self.shape[1], device=self.device) for _ in range(2))
        candidate = self.pair(STOCK, lambda x, y: (re(x), im(y)), whitens=False)
        candidate.layers = re, im
        return candidate

    def ours(self):
        from cbn_lab import ComplexBatchNorm1d, ComplexBatchNorm2d
        from cbn_lab import functional as F

        layer = ComplexBatchNorm1d if self.flat else ComplexBatchNorm2d
        for name, form in (("ours", self.complex), ("ours, pair", self.pair)):
            bn = layer(self.shape[1], device=self.device)
            candidate = form(name, bn)
            candidate.layers = (bn,)
            yield candidate
        reference = layer(self.shape[1], device=self.device)

        def run(z: Tensor) -> Tensor:
            state = dict(reference.named_buffers()), dict(reference.named_parameters())
            statistics = state[0]["running_mean"], state[0]["running_covar"]
            parameters = state[1]["weight"], state[1]["bias"]
            return F.complex_batch_norm(
                z, *statistics, *parameters, training=True, engine="reference"
            )

        yield self.complex("ours, reference engine", run)

    def naive(self) -> Candidate:
        from cbn_lab import NaiveComplexBatchNorm1d, NaiveComplexBatchNorm2d

        layer = NaiveComplexBatchNorm1d if self.flat else NaiveComplexBatchNorm2d
        return self.complex("naive", layer(self.shape[1], device=self.device), whitens=False)

    def thread(self, compiled: bool = False) -> Candidate:
        """The formula as the thread has it: every intermediate a tensor, autograd behind it."""
        state = torch.tensor([[0.5**0.5, 0.5**0.5, 0.0]], device=self.device)
        weight = nn.Parameter(state.repeat(self.shape[1], 1))
        bias = nn.Parameter(torch.zeros(self.shape[1], 2, device=self.device))

        def formula(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
            return written_out(re, im, weight, bias)

        if not compiled:
            return self.pair("the thread's formula", formula)
        return self.pair("the thread's formula, torch.compile", torch.compile(formula))

    def peer(self, package: str) -> Candidate:
        module, flat, spatial = PEERS[package]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = getattr(importlib.import_module(module), flat if self.flat else spatial)
        layer = kind(self.shape[1]).to(self.device)
        if package != "cplxmodule":
            return self.complex(package, layer)
        cplx = importlib.import_module("cplxmodule").Cplx

        def run(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
            out = layer(cplx(re, im))
            return out.real, out.imag

        return self.pair(package, run)


def written_out(re: Tensor, im: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(re.dim()) if d != 1]
    shape = [1, -1, *[1] * (re.dim() - 2)]
    re, im = re - re.mean(dims, keepdim=True), im - im.mean(dims, keepdim=True)
    rr, ii = (x.square().mean(dims, keepdim=True) + 1e-5 for x in (re, im))
    ri = (re * im).mean(dims, keepdim=True)
    s = (rr * ii - ri * ri).sqrt()
    t = (rr + ii + 2 * s).sqrt()
    u, v = ((ii + s) * re - ri * im) / (s * t), ((rr + s) * im - ri * re) / (s * t)
    w_rr, w_ii, w_ri = (w.view(shape) for w in weight.unbind(1))
    b_re, b_im = (b.view(shape) for b in bias.unbind(1))
    return w_rr * u + w_ri * v + b_re, w_ri * u + w_ii * v + b_im


def check_against_each_other(found: list[Candidate]) -> None:
    """Outputs must agree before anything is timed, up to a factor: peers differ in Γ."""
    for kind in (True, False):
        expected = None
        for candidate in (c for c in found if c.whitens is kind):
            out = candidate.forward(*candidate.inputs)
            y = torch.complex(*out) if len(out) == 2 else out[0]
            y = y.detach() / y.detach().abs().square().mean().sqrt()
            expected = y if expected is None else expected
            difference = (y - expected).abs().max().item()
            if not difference < 1e-2:
                raise RuntimeError(f"bench: {candidate.name} differs by {difference:.2g}")


# --- measuring -------------------------------------------------------------------------------


class Clock:
    """Marks in time: read at once, or on CUDA left in the queue and read when all is done.

    There the steps follow each other without a gap, as in training: while the device works on one,
    Python is at the next.
    """

    def __init__(self, device: str, marks: int) -> None:
        self.unused = None
        if device == "cuda":  # made before, for that takes as long as a small kernel
            self.unused = [torch.cuda.Event(enable_timing=True) for _ in range(marks)]
            for event in self.unused:
                event.record()
            torch.cuda.synchronize()

    def mark(self) -> Any:
        if self.unused is None:
            return time.perf_counter()
        event = self.unused.pop()
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if self.unused is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def time_steps(candidate: Candidate, device: str) -> None:
    clock, marks = Clock(device, 3 * IN_A_ROW), []
    for _ in range(IN_A_ROW):
        for leaf in candidate.inputs:
            leaf.grad = None
        start = clock.mark()
        out = candidate.forward(*candidate.inputs)
        middle = clock.mark()
        torch.autograd.backward(out, candidate.grads)
        marks.append((start, middle, clock.mark()))
        del out
    candidate.forward_s += [clock.seconds(start, middle) for start, middle, _ in marks]
    candidate.step_s += [clock.seconds(start, end) for start, _, end in marks]


def time_evaluation(candidate: Candidate, device: str) -> None:
    for layer in candidate.layers:
        layer.eval()
    clock, marks = Clock(device, 2 * IN_A_ROW), []
    with torch.no_grad():
        for _ in range(IN_A_ROW if candidate.layers else 0):
            start = clock.mark()
            out = candidate.forward(*candidate.inputs)
            marks.append((start, clock.mark()))
            del out
    candidate.eval_s += [clock.seconds(*pair) for pair in marks]
    for layer in candidate.layers:
        layer.train()


def row(c: Candidate, stock: Candidate, label: str, threads: int | None, element: int) -> dict:
    return {
        "shape": label,
        "threads": threads,
        "candidate": c.name,
        "A_min": min(c.step_s) / min(stock.step_s),
        "A_median": statistics.median(c.step_s) / statistics.median(stock.step_s),
        "step_ms_min": 1e3 * min(c.step_s),
        "step_ms_median": 1e3 * statistics.median(c.step_s),
        "forward_ms_min": 1e3 * min(c.forward_s),
        "eval_A_min": min(c.eval_s) / min(stock.eval_s) if c.eval_s else None,
        "saved_to_input": c.saved / element,
    }


def bound(label: str, threads: int | None, stock: Candidate, element: int, device: str) -> dict:
    """Eight sweeps (forward two reads and a write, backward four and a write) at copy speed.

    Evaluation is two, a read and a write.
    """
    source = torch.zeros(element // 4, device=device)
    target = torch.zeros_like(source)
    clock, marks = Clock(device, 64), []
    for _ in range(32):
        start = clock.mark()
        target.copy_(source)
        marks.append((start, clock.mark()))
    times = [clock.seconds(*pair) for pair in marks]
    step = [4 * t for t in times]  # a copy is two sweeps
    known = Candidate("memory-traffic bound", lambda: (), (), (), True, [math.nan], step, times)
    return row(known, stock, label, threads, element) | {"saved_to_input": 1.0}


# --- results ---------------------------------------------------------------------------------


def write_csv(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def ratios(rows: list[dict]) -> str:
    """A training step over that of two stock layers (minima): a column a shape.

    Where more than one number of threads was measured, a cell has one figure for each.
    """
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    found: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        found.setdefault((r["candidate"], r["shape"]), []).append(f"{float(r['A_min']):.2f}")
        if r["eval_A_min"] and r["candidate"] != STOCK:
            cell = found.setdefault((f"{r['candidate']}: evaluation", r["shape"]), [])
            cell.append(f"{float(r['eval_A_min']):.2f}")
    lines = ["| | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    for name in dict.fromkeys(candidate for candidate, _ in found):
        cells = (" / ".join(found.get((name, shape), ["–"])) for shape in shapes)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict]) -> str:
    lines = [
        "| shape | threads | candidate | A min | A median | step ms min | eval A | saved/input |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        evaluation = "" if r["eval_A_min"] is None else f"{r['eval_A_min']:.2f}"
        lines.append(
            f"| {r['shape']} | {r['threads'] or ''} | {r['candidate']} | {r['A_min']:.2f} | "
            f"{r['A_median']:.2f} | {r['step_ms_min']:.3f} | {evaluation} | "
            f"{r['saved_to_input']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((r["shape"], r["threads"]) for r in rows))
    figure = Figure(figsize=(9, 2.4 + 2.2 * len(groups)), layout="constrained")
    for ax, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        chosen = [r for r in rows if (r["shape"], r["threads"]) == group]
        ax.barh([r["candidate"] for r in chosen], [r["A_min"] for r in chosen], color="#0072B2")
        ax.axvline(1, color="#D55E00")
        ax.set_xscale("log")
        ax.invert_yaxis()
        threads = {None: "", 1: ", 1 thread"}.get(group[1], f", {group[1]} threads")
        ax.set_title(group[0] + threads, fontsize=9)
        ax.tick_params(labelsize=8)
    ax.set_xlabel("training step relative to two stock batch norms (A, minima)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
