"""Memory step by step: what the device's allocator says, or what lives on the host."""

import csv
import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cbn_lab.diagnostics import graph, heap, render
from cbn_lab.diagnostics.census import Census

Device = torch.device | str | int


@dataclasses.dataclass(slots=True)
class MemoryRow:
    """Memory after one step, on one device. Bytes throughout; None where it does not apply.

    Attributes:
        index: number of the step, from 0.
        label: what ``step`` was given.
        device: ``"cpu"``, ``"cuda:0"``, ...
        tensor_bytes: CPU: bytes of all live storages, each once.
        heap_bytes: bytes that the process has allocated on the host's heap.
        nodes: CPU: live autograd nodes of all live tensors.
        allocated: CUDA: bytes in live tensors.
        peak: CUDA: most bytes allocated at once since the step before.
        reserved: CUDA: bytes that torch holds from the driver.
    """

    index: int
    label: str
    device: str
    tensor_bytes: int | None = None
    heap_bytes: int | None = None
    nodes: int | None = None
    allocated: int | None = None
    peak: int | None = None
    reserved: int | None = None


class Slope(NamedTuple):
    """Growth per step, with the ends of its 95 % confidence interval; units of the field."""

    per_step: float
    low: float
    high: float


class MemoryTrace:
    """Record memory at every step of a training loop::

        with MemoryTrace() as trace:
            for batch in loader:
                train(batch)
                trace.step()
        trace.plot()

    On CUDA a row has what the caching allocator reports, and the host's heap: the nodes of a leak
    live there. ``peak`` is that of one step, for which the device's peak statistics are reset at
    every step. On CPU a row has the exact bytes of live tensors, the autograd nodes and the heap.

    Args:
        device: a device, or several; by default the current CUDA device where there is one, and
            the CPU elsewhere. Asked for CUDA on a machine without, it warns and traces the CPU.
        census: whether tensors and nodes are counted on CPU, for which every operation of torch
            is seen by Python first: some 10 µs each. Without it a CPU row has the heap only.
        history: CUDA: record where each block was allocated, for :meth:`snapshot`.

    Attributes:
        rows: a :class:`MemoryRow` per step and device.
        note: why the trace is not what was asked for, or None.
    """

    def __init__(
        self,
        device: Device | Sequence[Device] | None = None,
        *,
        census: bool = True,
        history: bool = False,
    ) -> None:
        self.devices, self.note = _devices(device)
        self.rows: list[MemoryRow] = []
        self._history = history and self._cuda_devices != []
        wants_census = census and len(self._cuda_devices) < len(self.devices)
        self._census = Census() if wants_census else None
        self._entered = False
        self._index = 0
        if self.note:
            warnings.warn(self.note, RuntimeWarning, stacklevel=2)

    @property
    def _cuda_devices(self) -> list[torch.device]:
        return [device for device in self.devices if device.type == "cuda"]

    def __enter__(self) -> "MemoryTrace":
        if self._history:
            torch.cuda.memory._record_memory_history()
        if self._census is not None:
            self._census.__enter__()
        for device in self._cuda_devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._entered = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered = False
        if self._census is not None:
            self._census.__exit__(*error)
        if self._history:
            torch.cuda.memory._record_memory_history(enabled=None)

    def step(self, label: Any = None) -> list[MemoryRow]:
        """Record a row per device, which is returned too; ``label`` defaults to the index."""
        label = str(self._index if label is None else label)
        graph.release()  # what an inspection still holds is not the model's
        host = heap.in_use()
        rows = [self._row(device, label, host) for device in self.devices]
        self.rows += rows
        self._index += 1
        return rows

    def _row(self, device: torch.device, label: str, host: int) -> MemoryRow:
        row = MemoryRow(self._index, label, str(device), heap_bytes=host)
        if device.type == "cuda":
            row.allocated = torch.cuda.memory_allocated(device)
            row.peak = torch.cuda.max_memory_allocated(device)
            row.reserved = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
        elif self._census is not None and self._entered:
            row.tensor_bytes = self._census.tensor_bytes
            row.nodes = graph.count_live(self._census.with_history())
        return row

    def values(self, field: str, device: Device | None = None) -> np.ndarray:
        """One field of all rows of a device (the first by default), as float64, nan for None."""
        wanted = str(self.devices[0] if device is None else torch.device(device))
        values = [getattr(row, field) for row in self.rows if row.device == wanted]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def slope(self, field: str | None = None, device: Device | None = None) -> Slope:
        """Growth per step by the median of all pairwise slopes (Theil 1950, Sen 1968).

        A median: the heap moves in leaps, and the first steps allocate what later ones reuse.

        Args:
            field: by default ``allocated`` on CUDA and ``heap_bytes`` on CPU.

        Raises:
            ValueError: fewer than three rows have the field.
        """
        from scipy.stats import theilslopes  # comes with scikit-learn; slow to import

        default = "allocated" if self.devices[0].type == "cuda" else "heap_bytes"
        values = self.values(field or default, device)
        steps = np.flatnonzero(np.isfinite(values))
        if len(steps) < 3:
            raise ValueError(f"expected at least 3 steps with {field or default}, got {len(steps)}")
        steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), 500)).astype(int)]
        found = theilslopes(values[steps], steps, alpha=0.95)
        return Slope(*(float(x) for x in (found.slope, found.low_slope, found.high_slope)))

    def table(self) -> render.Table:
        """All rows; text when printed, a table in a notebook. Empty columns are left out."""
        names = [field.name for field in dataclasses.fields(MemoryRow)]
        kept = [
            name
            for name in names
            if not self.rows or any(getattr(row, name) is not None for row in self.rows)
        ]
        cells = [[_cell(name, getattr(row, name)) for name in kept] for row in self.rows]
        return render.Table([name.removesuffix("_bytes") for name in kept], cells)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, ax: Any = None) -> Any:
        """Draw memory over steps into ``ax`` (a new one if None); returns the ``Axes``."""
        # Pictures are built on diagnostics, not the other way round: this is a short cut for the
        # user, and must not make matplotlib a cost of every diagnosis.
        from cbn_lab import plots

        return plots.memory(self, ax=ax)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write all rows, with a header; bytes as plain integers, empty where not applicable."""
        names = [field.name for field in dataclasses.fields(MemoryRow)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in self.rows)

    def snapshot(self, path: str | os.PathLike) -> bool:
        """Write the CUDA allocator's state for https://pytorch.org/memory_viz.

        With ``history=True`` the file also says which line allocated each block.

        Returns:
            Whether a file was written. Without CUDA there is nothing to write: it warns.
        """
        if not self._cuda_devices:
            message = "no CUDA device is traced, so there is no allocator snapshot to write"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return False
        torch.cuda.memory._dump_snapshot(os.fspath(path))
        return True


def _devices(
    asked: Device | Sequence[Device] | None,
) -> tuple[list[torch.device], str | None]:
    """The devices to trace, and a note where they are not those asked for."""
    has_cuda = torch.cuda.is_available()
    if asked is None:
        asked = "cuda" if has_cuda else "cpu"
    several = isinstance(asked, Sequence) and not isinstance(asked, str)
    devices = [torch.device(one) for one in (asked if several else [asked])]
    if not has_cuda and any(device.type == "cuda" for device in devices):
        return [torch.device("cpu")], "no CUDA device is available: tracing the CPU instead"
    # An unnumbered "cuda" means the current device: rows must say which one that was.
    return [
        torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and device.index is None
        else device
        for device in devices
    ], None


def _cell(name: str, value: Any) -> Any:
    if value is None:
        return "-"
    return value if name in ("index", "label", "device", "nodes") else (value, render.size(value))
