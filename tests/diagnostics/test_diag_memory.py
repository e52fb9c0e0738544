"""MemoryTrace: exact on CPU, faithful to torch's counters on CUDA, quiet where there is none."""

import csv
import gc
import time

import pytest
import torch
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import census, heap


def test_tensor_bytes_on_cpu_are_exact():
    gc.collect()  # not to count what another test has left
    kept = []
    with cbn_lab.MemoryTrace("cpu") as trace:
        trace.step("start")
        for k in range(3):
            kept.append(torch.zeros(1000 + k))
            kept.append(kept[-1][5:])  # a view takes nothing
            trace.step()
        kept[0].resize_(4000)
        trace.step("resized")
        kept.clear()
        trace.step("freed")
    found = [row.tensor_bytes - trace.rows[0].tensor_bytes for row in trace.rows]
    assert found == [0, 4000, 8004, 12012, 24012, 0]
    assert [row.label for row in trace.rows] == ["start", "1", "2", "3", "resized", "freed"]


def test_what_only_autograd_holds_is_counted():
    w = torch.ones(1000, requires_grad=True)
    with cbn_lab.MemoryTrace("cpu") as trace:
        trace.step()
        out = w.exp().sin().sum()  # exp and sin keep the result of exp
        trace.step()
        out.backward()
        trace.step()
    counts = [row.tensor_bytes - trace.rows[0].tensor_bytes for row in trace.rows]
    assert counts == [0, 4000 + 4, 4000 + 4]  # then the gradient
    assert [row.nodes - trace.rows[0].nodes for row in trace.rows] == [0, 4, 4]


@pytest.mark.parametrize("update, nodes", [("rebind", 9), ("inplace", 9), ("no_grad", 0)])
def test_nodes_show_a_leak_that_tensor_bytes_do_not(update, nodes):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), cbn_lab.LeakyBatchNorm2d(4, update=update))
    with cbn_lab.MemoryTrace("cpu") as trace:
        for _ in range(8):
            net(torch.randn(2, 1, 6, 6)).sum().backward()
            trace.step()
    assert trace.slope("nodes") == (nodes, nodes, nodes)
    assert trace.slope("tensor_bytes").per_step == 0
    if heap.kind == "malloc":
        slope = trace.slope()
        assert (slope.per_step > 4000) == (nodes > 0)
        assert slope.low <= slope.per_step <= slope.high


def test_table_csv_and_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    with cbn_lab.MemoryTrace("cpu") as trace:
        for label in ("first", "second", "third"):
            trace.step(label)
    lines = str(trace.table()).splitlines()
    assert lines[0].split() == ["index", "label", "device", "tensor", "heap", "nodes"]
    assert len(lines) == 4 and "second" in lines[2]
    assert "<table>" in trace._repr_html_()
    trace.to_csv(tmp_path / "trace.csv")
    with open(tmp_path / "trace.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["heap_bytes"]) for row in rows] == [row.heap_bytes for row in trace.rows]
    assert rows[0]["allocated"] == ""
    assert isinstance(trace.plot(), matplotlib.axes.Axes)


def test_without_a_gpu_it_warns_and_traces_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(RuntimeWarning, match="no CUDA device is available"):
        trace = cbn_lab.MemoryTrace("cuda:0")
    with trace:
        (row,) = trace.step()
    assert row.device == "cpu" and row.tensor_bytes is not None and row.allocated is None
    with pytest.warns(RuntimeWarning, match="no allocator snapshot"):
        assert not trace.snapshot(tmp_path / "snapshot.pickle")
    assert not (tmp_path / "snapshot.pickle").exists()


def test_outside_its_block_and_without_census_there_is_still_the_heap():
    trace = cbn_lab.MemoryTrace("cpu", census=False)
    with trace:
        trace.step()
    trace.step()
    assert all(row.heap_bytes > 0 and row.tensor_bytes is None for row in trace.rows)
    with pytest.raises(ValueError, match="expected at least 3 steps with heap_bytes, got 2"):
        trace.slope()


class FakeCuda:
    """Two devices whose allocator a test fills by hand."""

    def __init__(self, monkeypatch):
        self.allocated, self.peak = {0: 0, 1: 0}, {0: 0, 1: 0}
        self.calls = []
        index = lambda device: torch.device(device).index  # noqa: E731
        fakes = {
            "is_available": lambda: True,
            "current_device": lambda: 1,
            "memory_allocated": lambda d: self.allocated[index(d)],
            "max_memory_allocated": lambda d: self.peak[index(d)],
            "memory_reserved": lambda d: 2**21,
            "reset_peak_memory_stats": lambda d: self.peak.update(
                {index(d): self.allocated[index(d)]}
            ),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        record = lambda *args, **kwargs: self.calls.append(("history", args, kwargs))  # noqa: E731
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
        dump = lambda path: self.calls.append(("dump", path))  # noqa: E731
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)

    def use(self, device, nbytes, then_free=0):
        self.allocated[device] += nbytes
        self.peak[device] = max(self.peak[device], self.allocated[device])
        self.allocated[device] -= then_free


def test_cuda_rows_per_device_with_the_peak_of_each_step(monkeypatch, tmp_path):
    cuda = FakeCuda(monkeypatch)
    cuda.use(0, 5000, then_free=4000)  # a peak from before the trace
    with cbn_lab.MemoryTrace(["cuda:0", "cuda:1"], history=True) as trace:
        cuda.use(0, 500, then_free=400)
        trace.step("a")
        cuda.use(1, 70)
        trace.step("b")
    found = [(r.label, r.device, r.allocated, r.peak, r.reserved) for r in trace.rows]
    assert found == [
        ("a", "cuda:0", 1100, 1500, 2**21),
        ("a", "cuda:1", 0, 0, 2**21),
        ("b", "cuda:0", 1100, 1100, 2**21),
        ("b", "cuda:1", 70, 70, 2**21),
    ]
    assert all(row.heap_bytes > 0 and row.tensor_bytes is None for row in trace.rows)
    assert list(trace.values("allocated", "cuda:1")) == [0, 70]
    assert trace.snapshot(tmp_path / "s.pickle")
    assert cuda.calls == [
        ("history", (), {}),
        ("history", (), {"enabled": None}),
        ("dump", str(tmp_path / "s.pickle")),
    ]


def test_the_current_cuda_device_is_the_default(monkeypatch):
    FakeCuda(monkeypatch)
    trace = cbn_lab.MemoryTrace()
    assert [str(device) for device in trace.devices] == ["cuda:1"] and trace.note is None
    with trace:
        trace.step()
        trace.step()
        trace.step()
    assert trace.slope() == (0, 0, 0)


def test_a_trace_costs_at_most_a_quarter_of_a_step():
    net = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(800, 10),
    )
    x = torch.randn(32, 1, 28, 28)

    def seconds(after):
        times = []
        for _ in range(8):
            start = time.process_time()
            net(x).square().mean().backward()
            after()
            times.append(time.process_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain, traced = [], []
        for _ in range(4):
            plain.append(seconds(lambda: None))
            with cbn_lab.MemoryTrace("cpu", census=False) as trace:
                traced.append(seconds(trace.step))
    finally:
        torch.set_num_threads(threads)
    assert min(traced) <= 1.25 * min(plain)


def test_what_a_compiler_left_behind_is_not_counted():
    # A fake tensor of symbolic size, as torch.compile keeps them: it has no memory.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.zeros(700_001, 3))
    gc.collect()
    with census.Census() as counted:
        with_fake = counted.tensor_bytes
    assert fake.shape[1] == 3
    del fake
    gc.collect()
    with census.Census() as counted:
        assert abs(counted.tensor_bytes - with_fake) < 1_000_000 < 700_001 * 3 * 4
