"""Which buffers of a module hold history, how much of it, and where it came from."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cbn_lab.diagnostics import graph, render, source

LEAF = "a leaf that requires grad"
HISTORY = "holds the autograd graph of earlier steps"


@dataclasses.dataclass(slots=True)  # frozen takes five times as long to make
class BufferRow:
    """One buffer.

    Attributes:
        name: dotted path in the module, as in ``state_dict``.
        shape: of the tensor.
        requires_grad: False for every healthy buffer.
        grad_fn: name of the operation that autograd thinks made it, or None.
        nodes: autograd nodes that the buffer keeps alive.
        depth: nodes on the longest path from it.
        retained_bytes: bytes of the tensors those nodes keep, each storage once, without the
            module's own parameters and buffers.
        origin: ``file:line`` that gave it its history, or None where that is not known.
        problem: what is wrong with it, in words, or None.
        chain: the nodes next to the buffer, for the picture.
    """

    name: str
    shape: tuple[int, ...]
    requires_grad: bool
    grad_fn: str | None = None
    nodes: int = 0
    depth: int = 0
    retained_bytes: int = 0
    origin: str | None = None
    problem: str | None = None
    chain: tuple[graph.Link, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields but the picture's, as plain JSON-ready values."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "chain"]
        return {name: getattr(self, name) for name in fields} | {"shape": list(self.shape)}


class BufferReport:
    """A row for every buffer of a module, in the module's order; prints as a table.

    Attributes:
        rows: one :class:`BufferRow` per buffer.
        leaks: the rows of buffers that should not be as they are.
        ok: whether there are none.
    """

    def __init__(self, owner: str, rows: list[BufferRow]) -> None:
        self.owner = owner
        self.rows = rows

    @property
    def leaks(self) -> list[BufferRow]:
        return [row for row in self.rows if row.problem]

    @property
    def ok(self) -> bool:
        return not self.leaks

    def __iter__(self) -> Iterator[BufferRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> BufferRow:
        """The row of the buffer called ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows) or "none"
        raise KeyError(f"no buffer called {name!r}; this report has: {names}")

    def to_dict(self) -> dict[str, Any]:
        """``{"module", "ok", "rows"}``, JSON-ready."""
        return {
            "module": self.owner,
            "ok": self.ok,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        return render.buffers_as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render.buffers_as_html(self)


def inspect_buffers(module: nn.Module) -> BufferReport:
    """Look at every buffer of ``module`` and measure the history that hangs on it.

    A healthy buffer costs a look at two flags; nothing is created in autograd for it. The graph
    of a leaking one is walked without recursion, and can be freed safely afterwards (torch alone
    would end the process on a deep one, see :mod:`cbn_lab.diagnostics.graph`). Nothing is changed.

    Args:
        module: any module, scripted and compiled ones included.

    Returns:
        A row per buffer: name, shape, requires_grad, grad_fn, nodes, depth, retained bytes,
        origin. ``origin`` is the line that made the history where anomaly mode recorded it, and
        else the line of the layer's source that writes the buffer with gradients on.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    owned = _Owned(module)
    rows = [owned.row(name, buffer) for name, buffer in module.named_buffers()]
    return BufferReport(type(module).__name__, rows)


class _Owned:
    """A module with the one graph that all its buffers' histories are parts of."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._graph: graph.Graph | None = None

    def row(self, name: str, buffer: Tensor) -> BufferRow:
        if "_orig_mod." in name:  # torch.compile's wrapper
            name = name.replace("_orig_mod.", "")
        if not buffer.requires_grad:
            return BufferRow(name, tuple(buffer.shape), False)
        if buffer.is_leaf:
            return BufferRow(name, tuple(buffer.shape), True, problem=LEAF)
        if self._graph is None:
            self._graph = graph.Graph([*self._module.parameters(), *self._module.buffers()])
        nodes, depth, retained = self._graph.measure(buffer)
        node = buffer.grad_fn
        return BufferRow(
            name,
            tuple(buffer.shape),
            True,
            node.name(),
            nodes,
            depth,
            retained,
            source.of_node(node) or self._written_at(name),
            HISTORY,
            self._graph.neighbourhood(buffer),
        )

    def _written_at(self, name: str) -> str | None:
        path, _, attribute = name.rpartition(".")
        owner = getattr(self._module, "_orig_mod", self._module)
        return source.of_writes(owner.get_submodule(path), attribute)
