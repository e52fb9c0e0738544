"""What keeps history from one training step to the next: run a few steps, and compare."""

import contextlib
import dataclasses
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbn_lab import kernels
from cbn_lab.diagnostics import advice, graph, heap, render, source, storages, trend
from cbn_lab.diagnostics.census import Census
from cbn_lab.diagnostics.holders import Held, Survey, roots_of
from cbn_lab.diagnostics.state import Snapshot

Verdict = Literal["clean", "bounded", "growing"]
LEAST_STEPS = 6
# Growth without history: a list of detached losses is a log, a list of activations is a leak.
LEAST_PLAIN_BYTES = 1024
# A clean loop moves the heap by less, and not at every step.
LEAST_HEAP_BYTES = 1024
LEAST_HEAP_STEPS = 9  # untraced ones: the trend looks at the second half of them
LEAST_STEPS_WITH_HEAP = 11
UNKNOWN = "(not reachable)"


@dataclasses.dataclass(slots=True)
class Finding:
    """Something that keeps history, or keeps growing.

    Attributes:
        path: the way to it, such as ``1.running_mean``, ``losses[…]``, ``ema['w']``; or
            ``(not reachable)`` where memory grows and no object leads to it.
        verdict: ``"growing"``, or ``"bounded"``: it holds a graph, but no more at every step.
        nodes_per_step: autograd nodes that a step adds.
        bytes_per_step: bytes of tensors that a step adds; of the heap where only that is known.
        origin: ``file:line`` that computed what is held, or None where that is not known.
        advice: what to write instead.
        nodes: autograd nodes held after the last step.
        retained_bytes: bytes of tensors held then.
    """

    path: str
    verdict: Verdict
    nodes_per_step: float
    bytes_per_step: float
    origin: str | None
    advice: str
    nodes: int = 0
    retained_bytes: int = 0


@dataclasses.dataclass
class Diagnosis:
    """What :func:`diagnose` found; prints as text, shows as a table in a notebook.

    Attributes:
        verdict: the worst of the findings', ``"clean"`` if there are none.
        findings: what keeps history, growing ones first.
        steps: how often the step was run.
        tensor_bytes_per_step: growth of all live tensors, whoever holds them.
        heap_bytes_per_step: growth of the host's heap without those, where nodes live; rough.
        notes: what could not be looked at.
    """

    verdict: Verdict
    findings: list[Finding]
    steps: int
    tensor_bytes_per_step: float
    heap_bytes_per_step: float
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return render.diagnosis_as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render.diagnosis_as_html(self)


def diagnose(
    step: Callable[[], Any], *objects: Any, steps: int = 12, restore: bool = True
) -> Diagnosis:
    """Run a training step a few times and tell what keeps history.

    Looked at are the objects given and whatever ``step`` refers to: its closure, its defaults,
    the global variables that it and the functions it calls name. From there all that is stored:
    buffers, attributes, lists, dicts, hooks' closures, optimizer state, exceptions. Memory that
    grows and cannot be reached that way shows in a census of live tensors and in the heap.

    Args:
        step: one training step, without arguments: forward, backward, optimizer.
        objects: the model, the optimizer, lists, ...; optional, since ``step`` leads to them.
        steps: how often to run it, 6 or more. The last quarter runs in anomaly mode, which is
            slow and records the lines.
        restore: put back what the steps changed: parameters, buffers, gradients, optimizer
            state, containers, attributes, closure and global variables, and the state of the
            random number generators. Iterators cannot be put back.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        TypeError: ``step`` is not callable.
        ValueError: fewer than 6 steps: too few to tell growing from warming up.
        Exception: whatever ``step`` raises, with the state put back.
    """
    if not callable(step):
        raise TypeError(f"expected step to be callable, got {type(step).__name__}")
    if steps < LEAST_STEPS:
        raise ValueError(f"expected steps to be at least {LEAST_STEPS}, got {steps}")
    roots = roots_of(step, objects, sys._getframe(1))
    snapshot = Snapshot(Survey(roots)) if restore else None
    trial = _Trial(roots)
    try:
        trial.run(step, steps)
        return trial.diagnosis()
    finally:
        if snapshot is not None:
            snapshot.restore()
        trial.forget()
        graph.release()


class _Trial:
    """Some steps, with the measurements taken after each."""

    def __init__(self, roots: list[tuple[str, Any]]) -> None:
        self._roots = roots
        self._steps = 0
        self._extents: dict[str, list[tuple[int, int]]] = {}  # by path: (nodes, bytes)
        self._examples: dict[str, Held] = {}
        self._shelves: dict[str, str] = {}
        self._origins: dict[str, str] = {}
        self._census: list[int] = []
        self._unreached: list[int] = []
        self._nodes: list[int] = []  # of everything reachable
        self._heap: list[int] = []
        self._complete = True

    def run(self, step: Callable[[], Any], steps: int) -> None:
        census = Census(device=None)
        with census, _collections_of_new_objects():
            for index in range(steps):
                traced = index >= steps - max(1, steps // 4)
                before = _heap_without_tensors(census)
                with _anomaly_mode(traced):
                    step()
                gc.collect()  # cycles that Python would free some time are no leak
                graph.release()
                kernels.forget()  # an engine's notes on inputs of many sizes are none either
                if not traced:  # anomaly mode stores a traceback in every node
                    grown = _heap_without_tensors(census) - before
                    self._heap.append((self._heap[-1] if self._heap else 0) + grown)
                self._measure(census, traced)

    def forget(self) -> None:
        """Let go of every tensor, so that the state that is put back is all there is."""
        self._examples.clear()
        self._roots = []

    def _measure(self, census: Census, traced: bool) -> None:
        self._census.append(census.tensor_bytes)
        survey = Survey(self._roots)
        self._complete &= survey.complete
        groups: dict[str, list[Held]] = defaultdict(list)
        for held in survey.held:
            groups[held.path].append(held)
            if held.shelf and held.shelf != held.path:
                groups[held.shelf].append(held)
                self._shelves[held.path] = held.shelf
        with torch._C.DisableTorchFunctionSubclass():
            self._measure_groups(survey, groups, traced)
        self._steps += 1

    def _measure_groups(self, survey: Survey, groups: dict, traced: bool) -> None:
        parameters = [h.thing for h in survey.held if isinstance(h.thing, nn.Parameter)]
        walked = graph.Graph(parameters)
        total: dict[int, int] = {}
        for path, members in groups.items():
            extent, own = _measure_group(walked, members)
            total.update(own)
            if extent.nodes or own:
                series = self._extents.setdefault(path, [(0, 0)] * self._steps)
                series.append((extent.nodes, extent.retained_bytes + sum(own.values())))
                # Without the tensor: what is held here would be freed at the wrong time.
                self._examples[path] = dataclasses.replace(members[-1], thing=None)
                if traced:
                    self._note_origin(path, members)
        for series in self._extents.values():
            series += [(0, 0)] * (self._steps + 1 - len(series))
        total.update(walked.retained())
        self._nodes.append(len(walked.numbers))
        self._unreached.append(self._census[-1] - sum(total.values()))

    def _note_origin(self, path: str, members: list[Held]) -> None:
        for held in reversed(members):
            if graph.is_root(held.thing):
                node = held.thing.grad_fn if isinstance(held.thing, Tensor) else held.thing
                origin = source.of_node(node)
                if origin is not None:
                    self._origins[path] = origin
                    return

    def diagnosis(self) -> Diagnosis:
        findings = list(self._reachable())
        findings += self._unreachable_tensors() or self._unreachable_heap()
        findings.sort(key=lambda f: (f.verdict != "growing", -f.bytes_per_step, -f.nodes_per_step))
        verdicts = {finding.verdict for finding in findings}
        verdict = next((v for v in ("growing", "bounded") if v in verdicts), "clean")
        notes = [] if self._complete else ["there were too many objects to look at all of them"]
        if heap.kind != "malloc":
            notes.append("the heap was not judged: this system tells only the resident memory")
        elif len(self._heap) < LEAST_HEAP_STEPS:
            notes.append(
                f"the heap was not judged: that takes {LEAST_STEPS_WITH_HEAP} steps or more"
            )
        return Diagnosis(
            verdict,
            findings,
            self._steps,
            trend.per_step(self._census),
            trend.per_step(self._heap),
            notes,
        )

    def _reachable(self) -> Iterator[Finding]:
        verdicts = {path: self._verdict(path) for path in self._extents}
        growing_shelves = {
            self._shelves[path]
            for path, verdict in verdicts.items()
            if verdict == "growing" and path in self._shelves
        }
        shelves = set(self._shelves.values())
        for path, verdict in verdicts.items():
            if verdict is None:
                continue
            if path in shelves and (verdict != "growing" or path in growing_shelves):
                continue  # its entries are reported one by one
            if verdicts.get(self._shelves.get(path)) == "growing" and verdict != "growing":
                continue  # the dict grows by new entries, each of which stays as it is
            yield self._finding(path, verdict)

    def _verdict(self, path: str) -> Verdict | None:
        nodes, retained = zip(*self._extents[path], strict=True)
        held = self._examples[path]
        if trend.grows(nodes):
            return "bounded" if held.bounded else "growing"
        if not any(nodes) and trend.grows(retained) and not held.bounded:
            return "growing" if trend.per_step(retained) >= LEAST_PLAIN_BYTES else None
        return "bounded" if nodes[-1] else None

    def _finding(self, path: str, verdict: Verdict) -> Finding:
        nodes, retained = zip(*self._extents[path], strict=True)
        held = self._examples[path]
        origin = self._origins.get(path)
        if origin is None and held.owner is not None:
            origin = source.of_writes(held.owner, held.attribute)
        growing = verdict == "growing"
        return Finding(
            path,
            verdict,
            trend.per_step(nodes) if growing else 0,
            trend.per_step(retained) if growing else 0,
            origin,
            advice.for_held(held, path, any(nodes)) if growing else advice.BOUNDED,
            nodes[-1],
            retained[-1],
        )

    def _unreachable_tensors(self) -> list[Finding]:
        if not trend.grows(self._unreached):
            return []
        slope = trend.per_step(self._unreached)
        return [Finding(UNKNOWN, "growing", 0, slope, None, advice.UNREACHABLE_TENSORS)]

    def _unreachable_heap(self) -> list[Finding]:
        """Asked where nothing else explains it: known nodes and tensors live on the heap too."""
        if heap.kind != "malloc" or trend.grows(self._nodes):
            return []
        if not trend.climbs_steadily(self._heap, LEAST_HEAP_BYTES):
            return []
        slope = round(trend.per_step(self._heap))
        return [Finding(UNKNOWN, "growing", 0, slope, None, advice.UNREACHABLE_HEAP)]


def _heap_without_tensors(census: Census) -> int:
    """Taken before and after each step, so that our own notes in between do not count."""
    return heap.in_use() - census.bytes_on("cpu")


def _measure_group(walked: graph.Graph, members: list[Held]) -> tuple[graph.Extent, dict[int, int]]:
    """The graphs of some things together, and the storages of the tensors among them."""
    things = [held.thing for held in members]
    own = dict(
        block
        for thing in things
        if isinstance(thing, Tensor)
        for block in storages.of_tensor(thing)
    )
    roots = [thing for thing in things if graph.is_root(thing)]
    return (walked.measure(*roots) if roots else graph.NOTHING), own


@contextlib.contextmanager
def _collections_of_new_objects() -> Iterator[None]:
    """What exists already is set aside, so that a collection takes a millisecond, not a hundred."""
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextlib.contextmanager
def _anomaly_mode(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        yield
