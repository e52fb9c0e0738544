"""Walking an autograd graph, measuring it, and letting go of it without killing the process.

Since torch 2.13 a node that Python has looked at keeps its Python wrapper for as long as it lives,
and freeing a chain of such nodes recurses once per node: after some 20,000 steps of a leak the C
stack overflows and the process is gone, without a traceback. Chains nobody looked at are freed in
a loop and never crash. So whoever walks a graph must also answer for its end: every node that a
walk touches is handed to :data:`keeper`, which holds on to it and lets go root first, one node at
a time, as soon as nothing else holds it.

Torch keeps for each step nodes (host memory) and the tensors saved for backward (device memory).
Backward frees the second kind only, which is why a leak can grow while tensor memory looks flat.
"""

import atexit
import contextlib
import ctypes
import gc
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbn_lab.diagnostics import storages

Node = Any  # torch.autograd.graph.Node is not the base class of the C++ nodes


def has_history(tensor: Tensor) -> bool:
    """Whether autograd knows how ``tensor`` was computed. Creates no wrapper on any node."""
    return tensor.requires_grad and not tensor.is_leaf


def is_root(thing: Any) -> bool:
    """Whether a graph hangs on ``thing``: a tensor with history, or a node itself."""
    return has_history(thing) if isinstance(thing, Tensor) else True


class Extent(NamedTuple):
    """How much of a graph hangs on a tensor.

    Attributes:
        nodes: autograd nodes reachable from it, each counted once.
        depth: nodes on the longest path from it.
        retained_bytes: bytes of all storages that those nodes keep alive, each counted once,
            without the excluded ones. A ``CopySlices`` node does not show what its inner
            operation saved, so with slice assignments this is a lower bound; so it is on torch 2.6
            in the cases that :mod:`cbn_lab.diagnostics.saved` names.
    """

    nodes: int
    depth: int
    retained_bytes: int


class Link(NamedTuple):
    """A node as drawn: its name, steps from the tensor, the drawn nodes it leads to, and whether
    it leads to others as well."""

    name: str
    level: int
    successors: tuple[int, ...]
    goes_on: bool


NOTHING = Extent(0, 0, 0)


class Graph:
    """A directed acyclic graph of autograd nodes, copied into integers as far as it was walked.

    What two tensors share is walked once.

    Args:
        exclude: tensors whose storages do not count as retained, parameters and buffers, say.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        exclude = list(exclude)
        self._excluded = {key for t in exclude for key, _ in storages.of_tensor(t)}
        # A storage is known by its address, which must not be another's while this graph lives:
        # rebinding frees a buffer that was excluded.
        self._kept = [storages.storage_of(t) for t in exclude]
        self.numbers: dict[Node, int] = {}
        self._successors: list[list[int]] = []
        self._depths: list[int] = []
        self._saved: dict[int, list[storages.Block]] = {}

    def measure(self, *things: Tensor | Node) -> Extent:
        """The extent of the graphs of tensors or nodes together; a leaf has none."""
        with _untorched():
            roots = {self.add(thing) for thing in things if is_root(thing)}
        if not roots:
            return NOTHING
        reached = bytearray(len(self._successors))
        stack, nodes = list(roots), 0
        for root in roots:
            reached[root] = 1
        retained: dict[Any, int] = {}
        while stack:
            number = stack.pop()
            nodes += 1
            if number in self._saved:
                retained.update(self._saved[number])
            for successor in self._successors[number]:
                if not reached[successor]:
                    reached[successor] = 1
                    stack.append(successor)
        depth = max(self._depths[root] for root in roots)
        return Extent(nodes, depth, sum(retained.values()))

    def retained(self) -> dict[int, int]:
        """Bytes by storage of all that the walked nodes keep alive."""
        return dict(block for blocks in self._saved.values() for block in blocks)

    def neighbourhood(self, tensor: Tensor, levels: int = 5, most: int = 24) -> tuple[Link, ...]:
        """The nodes within ``levels`` of a measured tensor, nearest first, ``most`` of them."""
        root = self.add(tensor)
        level_of, order = {root: 0}, [root]
        for number in order:  # grows while it is gone through
            for successor in self._successors[number]:
                level = level_of[number] + 1
                if successor not in level_of and level < levels and len(order) < most:
                    level_of[successor] = level
                    order.append(successor)
        names = {n: node.name() for node, n in self.numbers.items() if n in level_of}
        position = {number: k for k, number in enumerate(order)}
        return tuple(
            Link(
                names[number],
                level_of[number],
                tuple(position[s] for s in self._successors[number] if s in position),
                any(s not in position for s in self._successors[number]),
            )
            for number in order
        )

    def links(self, first: int = 0) -> list[tuple[str, list[int]]]:
        """Name and successors of each node walked so far, from number ``first`` on."""
        return [
            (node.name(), list(self._successors[number]))
            for node, number in itertools.islice(self.numbers.items(), first, None)
        ]

    def add(self, thing: Tensor | Node) -> int:
        """Walk from a node, or from the ``grad_fn`` of a tensor with history; its number."""
        with _untorched(), collection_paused():
            root = thing.grad_fn if isinstance(thing, Tensor) else thing
            if root not in self.numbers:
                first = len(self.numbers)
                self.numbers[root] = first
                try:
                    self._walk([root])
                finally:  # also when interrupted: whatever was touched must be freed with care
                    keeper.hold(root, _last(self.numbers, len(self.numbers) - first))
                self._measure_depths(first)
            return self.numbers[root]

    def _walk(self, found: list[Node]) -> None:
        """Number all nodes that hang on those found, and note what they keep. No recursion."""
        numbers, successors = self.numbers, self._successors
        for node in found:  # grows while it is gone through
            links = []
            for successor, _ in node.next_functions:
                if successor is None:  # an input that needs no gradient
                    continue
                number = numbers.get(successor)
                if number is None:
                    number = numbers[successor] = len(numbers)
                    found.append(successor)
                links.append(number)
            blocks = [b for b in storages.of_node(node) if b[0] not in self._excluded]
            if blocks:
                self._saved[len(successors)] = blocks
            successors.append(links)

    def _measure_depths(self, first: int) -> None:
        """Longest paths from the nodes numbered ``first`` and up, of which ``first`` is the root.

        A node follows all that lead to it (Kahn 1962); depths are then summed from the far end.
        """
        successors = self._successors
        waiting = [0] * (len(successors) - first)
        for links in successors[first:]:
            for number in links:
                if number >= first:
                    waiting[number - first] += 1
        order = [first]
        for node in order:  # grows while it is gone through
            for number in successors[node]:
                if number >= first:
                    waiting[number - first] -= 1
                    if not waiting[number - first]:
                        order.append(number)
        depths = self._depths
        depths += [0] * len(order)
        for node in reversed(order):
            deepest = 0
            for number in successors[node]:
                if depths[number] > deepest:
                    deepest = depths[number]
            depths[node] = deepest + 1


def _last(mapping: dict, count: int) -> list:
    """The ``count`` keys that came last."""
    return list(itertools.islice(reversed(mapping), count))


def measure(tensor: Tensor, exclude: Iterable[Tensor] = ()) -> Extent:
    """Nodes, depth and retained bytes of one tensor's graph, without the ``exclude``d tensors."""
    return Graph(exclude).measure(tensor)


def release() -> int:
    """Free what walks have touched and nothing else holds; the number of nodes freed.

    It happens by itself at the next garbage collection or walk; call it where memory must be
    back at once.
    """
    return keeper.sweep()


def count_live(tensors: Iterable[Tensor]) -> int:
    """The nodes of all graphs that hang on ``tensors``, each counted once.

    Where the keeper knows nodes of earlier calls, only the new ones are walked, so that watching
    a leak grow costs the same at every step.
    """
    keeper.sweep()
    if keeper.needed is None:
        keeper.calibrate()
    if not keeper.needed:
        graph = Graph()
        for tensor in tensors:
            graph.add(tensor)
        return len(graph.numbers)
    for tensor in tensors:
        keeper.extend(tensor.grad_fn)
    return len(keeper.nodes)


class _Keeper:
    """Holds every node that a walk has touched until nothing else does, then frees it safely.

    Who else holds a node shows in the reference count of its wrapper, because (since torch 2.13)
    the C++ side counts as one holder. Older versions drop a wrapper with its last Python
    reference, free their graphs in a loop, and need no keeper.
    """

    def __init__(self) -> None:
        self.nodes: dict[Node, None] = {}
        self._roots: dict[Node, None] = {}  # nodes whose end is to be looked for
        self._lock = threading.Lock()
        self._sole_owner: int | None = None
        self.needed: bool | None = None  # not known before the first walk

    def hold(self, root: Node, nodes: list[Node]) -> None:
        if self.needed is None:
            self.calibrate()
        if self.needed:
            self.nodes.update(dict.fromkeys(nodes))
            self._roots[root] = None

    def extend(self, root: Node) -> None:
        """Hold a root and whatever hangs on it and is not held yet."""
        found = [] if root in self.nodes else [root]
        self._roots[root] = None
        self.nodes[root] = None
        with collection_paused():
            for node in found:  # grows while it is gone through
                for successor, _ in node.next_functions:
                    if successor is not None and successor not in self.nodes:
                        self.nodes[successor] = None
                        found.append(successor)

    def sweep(self) -> int:
        """Free, root first, all held nodes that nothing else holds; how many there were."""
        if not self._roots or not self._lock.acquire(blocking=False):
            return 0
        try:
            # Unlike a list this holds a node once, however many roads lead to it.
            work, self._roots = self._roots, {}
            freed = 0
            while work:
                node, _ = work.popitem()
                self._roots.pop(node, None)  # an earlier look, which counts as an owner
                if node not in self.nodes:
                    continue
                if _owners(node) > self._sole_owner:
                    self._roots[node] = None
                    continue
                successors = [n for n, _ in node.next_functions if n in self.nodes]
                del self.nodes[node], node
                while successors:  # a for loop's variable would go on holding the last one
                    work[successors.pop()] = None
                freed += 1
            return freed
        finally:
            self._lock.release()

    def calibrate(self) -> None:
        """Count the references to a node that C++ holds too, then to one that only we hold."""
        with torch.enable_grad():
            tensor = torch.zeros((), requires_grad=True) * 2
        node = tensor.grad_fn
        holder = {node: None}
        shared = _owners(node)
        del tensor
        self._sole_owner = _owners(node)
        self.needed = shared > self._sole_owner
        del holder
        if self.needed:
            gc.callbacks.append(_sweep_after_collection)
            atexit.register(self._outlive_everything)

    def _outlive_everything(self) -> None:
        """At exit modules are cleared in no useful order; nothing may be freed after the keeper.

        One reference too many keeps the nodes until the process is gone, which is then.
        """
        gc.callbacks.remove(_sweep_after_collection)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.nodes))


def _owners(node: Node) -> int:
    return sys.getrefcount(node)


def _sweep_after_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop":
        keeper.sweep()


keeper = _Keeper()


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage is collected meanwhile: a walk makes millions of containers, and none of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _untorched() -> contextlib.AbstractContextManager:
    """Attributes of tensor subclasses are read as they are, past ``__torch_function__``."""
    return torch._C.DisableTorchFunctionSubclass()
