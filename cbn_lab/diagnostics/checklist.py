"""Grades a batch norm that somebody wrote: each row one property, with what was expected."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbn_lab.diagnostics import references, render
from cbn_lab.diagnostics.buffers import inspect_buffers
from cbn_lab.diagnostics.diagnose import diagnose

EPS, MOMENTUM = 1e-3, 0.2
PAPER = "Ioffe and Szegedy 2015, arxiv.org/abs/1502.03167, Algorithm 1"
COMPLEX = "Trabelsi et al. 2018, arxiv.org/abs/1705.09792, section 3.5"
TORCH = "pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html"
BUFFERS = "pytorch.org/docs/stable/generated/torch.nn.Module.html, register_buffer"
WELFORD = "Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance"
LEAK = "pytorch.org/docs/stable/notes/faq.html, My model reports out of memory"


@dataclasses.dataclass(slots=True)
class CheckRow:
    """One property: what was tested, whether it held, what was expected, what came, a reading."""

    name: str
    passed: bool
    expected: str
    found: str
    see: str


class Checklist:
    """What :func:`check_batch_norm` returns; prints as text, shows as a table in a notebook.

    Attributes:
        rows: a :class:`CheckRow` per property.
        ok: whether all passed.
    """

    def __init__(self, rows: list[CheckRow]) -> None:
        self.rows = rows

    @property
    def ok(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[CheckRow]:
        return [row for row in self.rows if not row.passed]

    def __iter__(self) -> Iterator[CheckRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> CheckRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return render.checklist_as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render.checklist_as_html(self)


class Failed(Exception):
    """A property does not hold; the message says what was found instead."""


def check_batch_norm(
    factory: Callable[..., nn.Module], kind: Literal["real", "complex"] = "real"
) -> Checklist:
    """Grade a 2d batch norm against the definition, in numbers and in manners.

    Args:
        factory: ``factory(num_features, eps=..., momentum=...)`` builds the layer. It is called
            several times, and its layers are run on small CPU batches.
        kind: ``"real"`` for (N, C, H, W) float32 input; ``"complex"`` for complex64, where
            ``running_covar`` (C, 3: rr, ii, ri) takes the place of ``running_var``.

    Returns:
        A :class:`Checklist`. A layer that raises fails the rows it raises in, with its message.

    Raises:
        TypeError: ``factory`` is not callable.
        ValueError: an unknown kind, or a layer that takes input of the other kind only.
    """
    if not callable(factory):
        raise TypeError(f"expected factory to be callable, got {type(factory).__name__}")
    if kind not in references.KINDS:
        raise ValueError(f"expected kind to be 'real' or 'complex', got {kind!r}")
    subject = Subject(factory, references.KINDS[kind]())
    checks = [check for check in CHECKS if check.kind in (None, kind)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_kind(factory, kind)
        return Checklist([_run(check, subject) for check in checks])


def _check_kind(factory: Callable[..., nn.Module], kind: str) -> None:
    """Raise where the layer refuses this kind of input and takes the other."""
    taken = {}
    for name, reference in references.KINDS.items():
        batch = reference().batch(seed=0)
        try:
            factory(batch.shape[1], eps=EPS, momentum=MOMENTUM)(batch)
            taken[name] = True
        except Exception:
            taken[name] = False
    (other,) = set(references.KINDS) - {kind}
    if taken[other] and not taken[kind]:
        raise ValueError(
            f"expected a layer that takes {kind} input, got one that takes {other} input only; "
            f'pass kind="{other}"'
        )


@dataclasses.dataclass
class Check:
    name: str
    expected: str
    see: str
    kind: str | None
    run: Callable[["Subject"], None]


CHECKS: list[Check] = []


def check(name: str, expected: str, see: str, kind: str | None = None) -> Callable:
    """Register a property; its function raises :class:`Failed` where it does not hold."""

    def register(run: Callable[["Subject"], None]) -> Callable:
        CHECKS.append(Check(name, expected, see, kind, run))
        return run

    return register


def _run(check: Check, subject: "Subject") -> CheckRow:
    try:
        with torch.enable_grad():
            check.run(subject)
        return CheckRow(check.name, True, check.expected, "as expected", check.see)
    except Failed as failure:
        found = str(failure)
    except Exception as error:  # the layer is somebody's first attempt: anything may come
        found = f"raised {type(error).__name__}: {error}"
    return CheckRow(check.name, False, check.expected, found, check.see)


class Subject:
    """The factory under examination, and the reference it is held against."""

    def __init__(
        self, factory: Callable[..., nn.Module], reference: references.Real | references.Complex
    ) -> None:
        self._factory = factory
        self.reference = reference

    def layer(self, eps: float = EPS, momentum: float = MOMENTUM) -> nn.Module:
        """A new layer of 3 channels, with parameters that are not their initial ones."""
        layer = self._factory(3, eps=eps, momentum=momentum)
        if not isinstance(layer, nn.Module):
            raise Failed(f"the factory returned {type(layer).__name__}, not a torch.nn.Module")
        source = torch.Generator().manual_seed(7)
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=source) * 0.1
            with torch.no_grad():
                parameter.add_(noise.to(parameter.dtype))
        return layer

    def statistics(self, layer: nn.Module) -> references.Statistics:
        """Copies of the running statistics, which must be tensors of these names."""
        found = {}
        for name in self.reference.initial:
            value = getattr(layer, name, None)
            if not isinstance(value, Tensor):
                raise Failed(f"{name} is {type(value).__name__}, not a tensor")
            found[name] = references.as_real(value).clone()
        return found

    def expected(
        self, x: Tensor, layer: nn.Module, eps: float, held: tuple[bool, bool] = (False, False)
    ) -> Tensor:
        """The output in training; ``held`` says which batch statistics get no gradient."""
        moments = self.reference.moments(x)
        mean, spread = (m.detach() if h else m for m, h in zip(moments, held, strict=True))
        return self.reference.normalise(x, mean, spread, layer, eps)


def close(a: Tensor, b: Tensor, rtol: float = 1e-3) -> bool:
    """Equal up to ``rtol`` of the larger tensor's greatest entry."""
    if a.shape != b.shape:
        return False
    error = (a.detach() - b.detach()).abs().max()
    return bool(error <= rtol * b.detach().abs().max().clamp(min=1e-12))


def demand_close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-3) -> None:
    if found.shape != expected.shape:
        raise Failed(f"{what} of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not torch.isfinite(found.detach().abs()).all():
        raise Failed(f"{what} that is not finite")
    if not close(found, expected, rtol):
        error = (found - expected).detach().abs().max() / expected.detach().abs().max()
        raise Failed(f"{what} off by {float(error):.1%} of the greatest value")


@check(
    "output", "(x - mean) / sqrt(var + eps) * weight + bias, over batch and space", PAPER, "real"
)
def _output(subject: Subject) -> None:
    layer, x = subject.layer(), subject.reference.batch(1)
    demand_close(layer(x).double(), subject.expected(x, layer, EPS), "an output")


@check(
    "whitening", "real and imaginary parts uncorrelated and of equal variance", COMPLEX, "complex"
)
def _whitening(subject: Subject) -> None:
    z = subject.reference.batch(1, (16, 3, 8, 8))
    # Its own initial parameters: a layer without a mixing weight is not to fail for that here.
    layer = subject._factory(3, eps=1e-9, momentum=MOMENTUM)
    rr, ii, ri = subject.reference.moments(layer(z))[1].detach().unbind(-1)
    if ri.abs().max() > 1e-2 * rr.max():
        correlation = float((ri / (rr * ii).sqrt()).abs().max())
        raise Failed(
            f"parts still correlated (|r| = {correlation:.2f}): it normalises them apart, "
            "which does not whiten"
        )
    if (rr - ii).abs().max() > 1e-2 * rr.max():
        raise Failed(f"variances of {float(rr[0]):.3f} and {float(ii[0]):.3f}")


@check("output", "weight · V^(-1/2) · (x - mean) + bias, over batch and space", COMPLEX, "complex")
def _complex_output(subject: Subject) -> None:
    layer, z = subject.layer(), subject.reference.batch(1)
    out = layer(z)
    if not out.is_complex():
        raise Failed(f"an output of {out.dtype}")
    demand_close(out.to(torch.complex128), subject.expected(z, layer, EPS), "an output")


@check("statistics are buffers", "buffers, saved in state_dict and moved by .to()", BUFFERS)
def _buffers(subject: Subject) -> None:
    layer = subject.layer()
    buffers, parameters = dict(layer.named_buffers()), dict(layer.named_parameters())
    for name in subject.reference.initial:
        if name in parameters:
            raise Failed(f"{name} is a parameter: the optimizer would train it")
        if name not in buffers:
            kind = type(getattr(layer, name)).__name__ if hasattr(layer, name) else "missing"
            raise Failed(f"{name} is no buffer ({kind}); buffers: {', '.join(buffers) or 'none'}")
        if name not in layer.state_dict():
            raise Failed(f"{name} is not in the state_dict")


@check("running mean", "(1 - momentum) * running_mean + momentum * batch mean", TORCH)
def _running_mean(subject: Subject) -> None:
    layer, x = subject.layer(), subject.reference.batch(1)
    start = subject.statistics(layer)
    layer(x)
    found = subject.statistics(layer)["running_mean"]
    expected = references.running(subject.reference, [x], start, MOMENTUM)["running_mean"]
    batch = subject.reference.moments(x)[0]
    if close(found, expected):
        return
    if close(found, start["running_mean"]):
        raise Failed("it was not updated in training")
    if close(found, MOMENTUM * start["running_mean"] + (1 - MOMENTUM) * batch):
        raise Failed("momentum is the weight of the old value, not of the new one")
    demand_close(found, expected, "a running mean")


@check("running spread", "the unbiased one: n / (n - 1), n = samples times pixels", TORCH)
def _running_spread(subject: Subject) -> None:
    layer, reference = subject.layer(), subject.reference
    x = reference.batch(1, (3, 3, 2, 2))  # few values: the corrections differ by much
    start = subject.statistics(layer)
    layer(x)
    found = subject.statistics(layer)[reference.spread]
    expected = references.running(reference, [x], start, MOMENTUM)[reference.spread]
    if close(found, expected):
        return
    for text, mistake in references.mistaken_spreads(
        reference, x, start[reference.spread], MOMENTUM
    ).items():
        if close(found, mistake):
            raise Failed(text)
    demand_close(found, expected, f"a {reference.spread}")


@check("momentum", "the momentum the layer was built with, at every batch", TORCH)
def _momentum(subject: Subject) -> None:
    for momentum in (0.05, 0.7):
        layer = subject.layer(momentum=momentum)
        batches = [subject.reference.batch(seed) for seed in (1, 2, 3)]
        start = subject.statistics(layer)
        for x in batches:
            layer(x)
        expected = references.running(subject.reference, batches, start, momentum)
        for name, value in subject.statistics(layer).items():
            demand_close(value, expected[name], f"with momentum {momentum} a {name}")


@check("eps", "inside the root: 1 / sqrt(var + eps)", PAPER)
def _eps(subject: Subject) -> None:
    eps = 0.5
    layer, x = subject.layer(eps=eps), subject.reference.batch(1)
    found, expected = layer(x), subject.expected(x, layer, eps)
    if close(found, expected):
        return
    if close(found, subject.expected(x, layer, EPS)) or close(
        found, subject.expected(x, layer, 1e-5)
    ):
        raise Failed("eps is not the one the layer was built with")
    if isinstance(subject.reference, references.Real):
        mean, var = subject.reference.moments(x)
        outside = subject.reference.eps_outside(x, var, eps)
        if close(found, subject.reference.normalise(x, mean, outside, layer, eps)):
            raise Failed("eps is added outside the root: 1 / (sqrt(var) + eps)")
    demand_close(found.to(expected.dtype), expected, "with eps = 0.5 an output")


@check("large means", "as accurate where the mean is 10,000 times the deviation", WELFORD)
def _large_means(subject: Subject) -> None:
    layer, x = subject.layer(), subject.reference.batch(1) + 10_000
    found = layer(x)
    expected = subject.expected(x, layer, EPS)
    try:
        demand_close(found.to(expected.dtype), expected, "an output", rtol=0.02)
    except Failed as failure:
        raise Failed(f"{failure}: E[x²] - E[x]² cancels; subtract the mean first") from None


@check("evaluation", "normalises by the running statistics, and leaves them alone", TORCH)
def _evaluation(subject: Subject) -> None:
    layer = subject.layer()
    for seed in (1, 2, 3):
        layer(subject.reference.batch(seed))
    layer.eval()
    _demand_running(subject, layer, "in evaluation")
    demand_one = layer(subject.reference.batch(5, (1, 3, 1, 1)))
    if tuple(demand_one.shape) != (1, 3, 1, 1):
        raise Failed(f"one value per channel gives shape {tuple(demand_one.shape)}")


@check("mode", "training or evaluation by self.training and by nothing else", TORCH)
def _mode(subject: Subject) -> None:
    layer, x = subject.layer(), subject.reference.batch(1)
    before = subject.statistics(layer)
    with torch.no_grad():
        found = layer(x)
    if all(close(before[name], value) for name, value in subject.statistics(layer).items()):
        raise Failed("in training under no_grad the running statistics are not updated")
    demand_close(
        found.to(subject.expected(x, layer, EPS).dtype),
        subject.expected(x, layer, EPS),
        "in training under no_grad an output",
    )
    layer.eval()
    with torch.no_grad():
        _demand_running(subject, layer, "in evaluation under no_grad")
    _demand_running(subject, layer, "in evaluation with gradients on", requires_grad=True)
    layer.train()
    before = subject.statistics(layer)
    layer(x.clone().requires_grad_())
    if all(close(before[name], value) for name, value in subject.statistics(layer).items()):
        raise Failed("back in training the running statistics are not updated")


def _demand_running(
    subject: Subject, layer: nn.Module, when: str, requires_grad: bool = False
) -> None:
    x = subject.reference.batch(4).requires_grad_(requires_grad)
    before = subject.statistics(layer)
    found = layer(x)
    mean, spread = before["running_mean"], before[subject.reference.spread]
    expected = subject.reference.normalise(x, mean, spread, layer, EPS)
    after = subject.statistics(layer)
    if not all(torch.equal(before[name], after[name]) for name in before):
        raise Failed(f"{when} the running statistics change")
    if not close(found, expected) and close(found, subject.expected(x, layer, EPS)):
        raise Failed(f"{when} it normalises by the batch, not by the running statistics")
    demand_close(found.to(expected.dtype), expected, f"{when} an output")


@check("one value per channel", "an error in training: one value has no variance", TORCH)
def _one_value(subject: Subject) -> None:
    layer = subject.layer()
    before = subject.statistics(layer)
    try:
        out = layer(subject.reference.batch(1, (1, 3, 1, 1)))
    except Exception:  # which error is a matter of taste; silence is not
        after = subject.statistics(layer)
        if not all(torch.equal(before[name], after[name]) for name in before):
            raise Failed("an error, but the running statistics had been changed before") from None
        return
    finite = bool(torch.isfinite(out.detach().abs()).all())
    raise Failed(f"silence, and an output that is {'constant' if finite else 'not finite'}")


@check(
    "gradients",
    "through the batch statistics too: the mean and the variance are not constants",
    PAPER,
)
def _gradients(subject: Subject) -> None:
    layer, x = subject.layer(), subject.reference.batch(1)
    wanted = _gradient_of(x, lambda v: subject.expected(v, layer, EPS), layer)
    found = _gradient_of(x, layer, layer)
    if all(close(f, w, 5e-3) for f, w in zip(found, wanted, strict=True)):
        return
    words = {
        (True, True): "the batch statistics are",
        (True, False): "the batch mean is",
        (False, True): "the batch variance is",
    }
    for held, text in words.items():
        over = _gradient_of(x, lambda v, h=held: subject.expected(v, layer, EPS, h), layer)
        if close(found[0], over[0], 5e-3):
            raise Failed(
                f"over-detached: {text} computed without a graph, and the gradient is wrong by "
                f"{float((found[0] - wanted[0]).norm() / wanted[0].norm()):.0%}"
            )
    for name, f, w in zip(("input", *dict(layer.named_parameters())), found, wanted, strict=True):
        demand_close(f, w, f"a gradient of the {name}", 5e-3)


def _gradient_of(x: Tensor, function: Callable, layer: nn.Module) -> list[Tensor]:
    """Gradients of a random projection of the output: to the input, then to each parameter."""
    x = x.clone().requires_grad_()
    out = function(x)
    if not out.requires_grad:
        raise Failed("an output without a graph: nothing before the layer would learn")
    source = torch.Generator().manual_seed(3)
    projection = torch.randn(out.shape, generator=source, dtype=torch.float64)
    loss = (torch.view_as_real(out) if out.is_complex() else out).double()
    if out.is_complex():
        projection = torch.stack([projection, projection.roll(1, 0)], -1)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad((loss * projection).sum(), inputs, allow_unused=True)
    return [
        torch.zeros_like(value) if grad is None else grad
        for value, grad in zip(inputs, grads, strict=True)
    ]


@check("no leak", "nothing with history is kept from one step to the next", LEAK)
def _no_leak(subject: Subject) -> None:
    complex_input = isinstance(subject.reference, references.Complex)
    dtype = torch.complex64 if complex_input else torch.float32
    net = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=dtype), subject.layer())

    def step() -> None:
        net(subject.reference.batch(1, (2, 2, 5, 5))).abs().square().mean().backward()

    diagnosis = diagnose(step, net, steps=6)
    growing = [found for found in diagnosis.findings if found.verdict == "growing"]
    if growing:
        names = ", ".join(found.path.removeprefix("1.") for found in growing)
        places = {found.origin for found in growing if found.origin}
        where = f" (line: {', '.join(sorted(places))})" if places else ""
        raise Failed(f"{names} keeps the graph of every step{where}: {growing[0].advice}")
    trained = copy.deepcopy(net)
    trained(subject.reference.batch(1, (2, 2, 5, 5)))
    leaks = [row.name.removeprefix("1.") for row in inspect_buffers(trained).leaks]
    if leaks:
        raise Failed(f"{', '.join(leaks)} holds the graph of the last step")
