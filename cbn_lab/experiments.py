"""Does whitening help? The experiment of notebook 9, and the command that makes its stored results.

    python -m cbn_lab.experiments                              what the stored file lacks
    python -m cbn_lab.experiments --out mine.csv --seeds 40 --hidden 128 --epochs 60

Figures are shown to a complex network, once through a scattering medium of a set circularity, once
as their Fourier transform; the network says which figure it was. Three networks differ in one thing
alone: what stands in the place of the normalisation.

Each run is given by (task, circularity, method, learning rate, seed) and nothing else, so a broken
series goes on where it stopped, and two methods at the same seed see the same medium, noise, split,
first weights and order of the batches: their difference is paired.
"""

import argparse
import csv
import itertools
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from scipy.special import stdtrit
from torch import Tensor, nn
from tqdm import tqdm

from cbn_lab import datasets
from cbn_lab.complex_batch_norm import ComplexBatchNorm1d, NaiveComplexBatchNorm1d
from cbn_lab.whitening import symmetric

STORED = Path(__file__).parent / "results" / "whitening.csv"
METHODS = ("none", "naive", "whitening")
CIRCULARITIES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
RATES = (0.03, 0.1, 0.3, 1.0)
TUNING_SEEDS = (1000, 1001, 1002)  # these choose the learning rate, and are not reported
FFT = math.nan  # the circularity of the Fourier transforms is not ours to set


@dataclass(frozen=True)
class Settings:
    """What all runs of one series share."""

    train: int = 1000  # of the 1797 figures
    validation: int = 300  # chooses the learning rate; the rest is the test set
    detectors: int = 64  # points of the field that are measured; 64 pixels are sent
    hidden: int = 32
    epochs: int = 20
    batch: int = 50
    momentum: float = 0.9  # of the optimizer
    noise: float = 1.0  # of the measurement, as a part of the rms of the field's variation


@dataclass(frozen=True)
class Run:
    """One network, trained and tested; ``validation`` and ``test`` are fractions that are right."""

    task: str  # "medium" or "fft"
    circularity: float  # of the medium's matrix; nan for "fft"
    method: str
    rate: float
    seed: int
    validation: float = math.nan
    test: float = math.nan

    @property
    def key(self) -> tuple:
        return (self.task, f"{self.circularity:g}", self.method, self.rate, self.seed)


# --- the data -------------------------------------------------------------------------------------


def medium(
    images: Float[Tensor, "N pixels"], circularity: float, noise: float, detectors: int, seed: int
) -> Complex[Tensor, "N detectors"]:
    """The field that each image makes behind a fixed medium, measured with noise.

    y = T·x + noise: a pixel is a source in phase with the others, T is the transmission matrix
    (Popoff et al., *Phys. Rev. Lett.* 104, 100601, 2010). Strong scattering spreads the phases of T
    over the circle (circularity 1); weak scattering leaves them along a line. Where that line lies
    is the phase of the reference at that detector: drawn at random. The noise is circular.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (detectors, images.shape[1])
    matrix = datasets.speckle(shape, circularity, generator=generator)
    phase = 2 * torch.pi * torch.rand(detectors, 1, generator=generator)
    field = images.to(torch.cfloat) @ (matrix * torch.exp(1j * phase)).T
    spread = (field - field.mean(0)).abs().square().mean().sqrt()
    noise = noise * spread * datasets.speckle(tuple(field.shape), generator=generator)
    return field + noise


def data(
    task: str, circularity: float, seed: int, settings: Settings
) -> tuple[Complex[Tensor, "N detectors"], Int[Tensor, "N"]]:
    """Fields and figures in the order of the split, scaled to a mean power of 1."""
    images, labels = datasets.digits(fft=task == "fft")
    fields = images.flatten(1)
    if task == "medium":
        fields = medium(fields, circularity, settings.noise, settings.detectors, seed)
    order = torch.randperm(len(fields), generator=torch.Generator().manual_seed(seed))
    power = fields[order[: settings.train]].abs().square().mean()
    return fields[order] / power.sqrt(), labels[order]


# --- the networks ---------------------------------------------------------------------------------


class Affine(nn.Module):
    """Γ·x + β with a symmetric Γ: the same five numbers a channel, whatever stands before it."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([scale, scale, 0.0]).repeat(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 2))

    def forward(self, z: Complex[Tensor, "N C"]) -> Complex[Tensor, "N C"]:
        rows = torch.einsum("cij,ncj->nci", symmetric(self.weight), torch.view_as_real(z))
        # einsum may choose any layout, and does so from version to version.
        return torch.view_as_complex((rows + self.bias).contiguous())


class ComplexLinear(nn.Module):
    """W·x with complex W, of the variance that keeps the power through a split ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(outputs, inputs, dtype=torch.cfloat) * (2 / inputs) ** 0.5
        )

    def forward(self, z: Complex[Tensor, "N C"]) -> Complex[Tensor, "N D"]:
        return z @ self.weight.T


class SplitReLU(nn.Module):
    """ReLU of the real and of the imaginary part."""

    def forward(self, z: Complex[Tensor, "*shape"]) -> Complex[Tensor, "*shape"]:
        return torch.complex(z.real.relu(), z.imag.relu())


class RealPart(nn.Module):
    def forward(self, z: Complex[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return z.real


def normalisation(method: str, channels: int) -> nn.Sequential:
    """Nothing, part by part, or whitening; then Γ and β, begun so that the power is 1."""
    layers = {
        "none": nn.Identity,
        "naive": lambda: NaiveComplexBatchNorm1d(channels, affine=False),
        "whitening": lambda: ComplexBatchNorm1d(channels, affine=False),
    }
    return nn.Sequential(layers[method](), Affine(channels, 1.0 if method == "none" else 0.5**0.5))


def network(method: str, settings: Settings) -> nn.Sequential:
    """Normalised at the input and after each hidden layer; the real part is the score."""
    sizes = [settings.detectors, settings.hidden, settings.hidden]
    layers = [normalisation(method, sizes[0])]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [ComplexLinear(inputs, outputs), normalisation(method, outputs), SplitReLU()]
    return nn.Sequential(*layers, ComplexLinear(sizes[-1], 10), RealPart())


# --- one run --------------------------------------------------------------------------------------


def train(run: Run, settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained network, in evaluation mode, with the fields and figures it may be tested on."""
    fields, labels = data(run.task, run.circularity, run.seed, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = network(run.method, settings)
    order = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.rate, momentum=settings.momentum, nesterov=True
    )
    steps = settings.epochs * (settings.train // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        for rows in torch.randperm(settings.train, generator=order).split(settings.batch):
            if len(rows) < settings.batch:
                continue
            loss = nn.functional.cross_entropy(model(fields[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), fields[settings.train :], labels[settings.train :]


def perform(run: Run, settings: Settings) -> Run:
    """The run with its two results filled in. Where training diverged they are what is left."""
    model, fields, labels = train(run, settings)
    with torch.no_grad():
        right = (model(fields).argmax(1) == labels).float()
    found, n = asdict(run), settings.validation
    return Run(**found | dict(validation=right[:n].mean().item(), test=right[n:].mean().item()))


# --- the series -----------------------------------------------------------------------------------


@dataclass
class Results:
    """A series: its settings, the versions it ran with, and its runs."""

    settings: Settings
    versions: dict[str, str]
    runs: list[Run] = field(default_factory=list)

    def of(self, task: str, circularity: float, method: str) -> list[Run]:
        """All runs at one point with one method, at any rate and seed."""
        wanted = Run(task, circularity, method, 0, 0).key[:3]
        found = (run for run in self.runs if run.method == method and run.task == task)
        return [run for run in found if run.key[:3] == wanted]

    def rate(self, task: str, circularity: float, method: str) -> float:
        """The learning rate of the best mean validation over the tuning seeds."""
        found: dict[float, list[float]] = {rate: [] for rate in RATES}
        for run in self.of(task, circularity, method):
            if run.seed in TUNING_SEEDS:
                found[run.rate].append(run.validation)
        if any(len(values) != len(TUNING_SEEDS) for values in found.values()):
            raise LookupError(f"no complete search of {task!r}, {circularity}, {method!r}")
        return max(found, key=lambda rate: np.mean(found[rate]))

    def accuracy(self, task: str, circularity: float, method: str) -> Float[np.ndarray, "seeds"]:
        """Accuracy on the test set, in per cent, by seed, at the learning rate found."""
        rate = self.rate(task, circularity, method)
        runs = [run for run in self.of(task, circularity, method) if run.rate == rate]
        reported = sorted((run.seed, run.test) for run in runs if run.seed not in TUNING_SEEDS)
        return np.array([100 * test for _, test in reported])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of Student's t."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected at least 2 values in one row, got shape {values.shape}")
    factor = stdtrit(len(values) - 1, 0.975)
    return float(values.mean()), float(factor * values.std(ddof=1) / len(values) ** 0.5)


def load(path: Path | str = STORED) -> Results:
    """A stored series.

    Raises:
        ValueError: a file that is not one.
    """
    with open(path, newline="", encoding="utf-8") as file:
        head = [file.readline() for _ in range(2)]
        if not (head[0].startswith("# settings ") and head[1].startswith("# versions ")):
            raise ValueError(f"expected lines of settings and versions first, got {head[0]!r}")
        settings, versions = (json.loads(line.split(" ", 2)[2]) for line in head)
        types = dict(task=str, method=str, seed=int)
        runs = [
            Run(**{name: types.get(name, float)(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]
    return Results(Settings(**settings), versions, runs)


def save(results: Results, path: Path) -> None:
    """Write the series in a fixed order, so that a series broken off makes the same file."""
    order = sorted(results.runs, key=lambda run: run.key)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# settings {json.dumps(asdict(results.settings))}\n")
        file.write(f"# versions {json.dumps(results.versions)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(asdict(order[0]) if order else asdict(Run("", 0, "", 0, 0)))
        for run in order:
            cells = asdict(run).values()
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in cells)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def points() -> Iterator[tuple[str, float]]:
    yield from (("medium", circularity) for circularity in CIRCULARITIES)
    yield "fft", FFT


def search() -> list[Run]:
    """First stage: every learning rate, on seeds of its own."""
    grid = itertools.product(points(), METHODS, RATES, TUNING_SEEDS)
    return [Run(*point, method, rate, seed) for point, method, rate, seed in grid]


def final(results: Results, seeds: int) -> list[Run]:
    """Second stage: the learning rate found, on the seeds that are reported."""
    return [
        Run(*point, method, results.rate(*point, method), seed)
        for point, method in itertools.product(points(), METHODS)
        for seed in range(seeds)
    ]


def one_thread() -> None:
    torch.set_num_threads(1)


def perform_all(todo: list[Run], results: Results, path: Path, workers: int) -> None:
    """Perform the runs in processes of one thread each, and save as they come."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as pool:
        done = pool.map(perform, todo, itertools.repeat(results.settings))
        for count, run in enumerate(tqdm(done, total=len(todo)), start=1):
            results.runs.append(run)
            if count % 8 == 0 or count == len(todo):
                save(results, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cbn_lab.experiments", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="stop after so many runs; call again to go on")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    results = load(given.out) if given.out.exists() else Results(settings, versions())
    if results.settings != settings:
        parser.error(f"{given.out} holds another series: {results.settings}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for stage in (search, lambda: final(results, given.seeds)):
        planned = stage()
        there = {run.key for run in results.runs}
        todo = [run for run in planned if run.key not in there][: given.limit]
        if todo:
            perform_all(todo, results, given.out, given.workers)
        if given.limit is not None and len(todo) == given.limit:
            print(f"{len(results.runs)} runs in {given.out}; call again to go on")
            return 0
    print(f"complete: {len(results.runs)} runs in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
