"""Walks of deep graphs, their end, and the counting of bytes."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import graph, storages

DEEP = """
import time, torch
import cbn_lab

module = torch.nn.Module()
module.w = torch.nn.Parameter(torch.ones(3))
module.register_buffer("running_mean", torch.zeros(3))
for _ in range(300_000):
    module.running_mean = 0.1 * module.w + 0.9 * module.running_mean
start = time.process_time()  # what else runs on the machine does not count
row = cbn_lab.inspect_buffers(module)["running_mean"]
seconds = time.process_time() - start
print(row.nodes, row.depth, row.retained_bytes, seconds)
{end}
print("alive")
"""
ENDS = {
    "kept_until_exit": "pass",
    "grown_further_then_freed": "for _ in range(30_000):\n"
    "    module.running_mean = 0.1 * module.w + 0.9 * module.running_mean\n"
    "module.running_mean = module.running_mean.detach()\nimport gc\ngc.collect()",
}


def test_a_chain_of_300_000_steps_is_inspected_in_time_and_the_process_lives():
    code = DEEP.format(end=ENDS["grown_further_then_freed"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nodes, depth, retained, seconds = done.stdout.splitlines()[0].split()
    # Add and two Mul a step, and the leaf; the first step's buffer had no Mul of its own.
    assert (int(nodes), int(depth), int(retained)) == (3 * 300_000, 2 * 300_000 + 1, 0)
    assert float(seconds) < 10
    assert done.stdout.splitlines()[-1] == "alive"


def test_a_walked_chain_may_end_with_the_process():
    code = DEEP.replace("300_000", "40_000").format(end=ENDS["kept_until_exit"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "alive", done.stderr


def test_without_care_the_process_would_have_died():
    """What the keeper is for: the same chain, touched and dropped. Torch 2.13 and later."""
    tensor = torch.ones(1, requires_grad=True) * 2
    graph.measure(tensor)
    if not graph.keeper.needed:
        pytest.skip("this torch frees a walked graph in a loop")
    code = (
        DEEP.replace("300_000", "60_000")
        .format(end="del module")
        .replace(
            "start =",
            "from cbn_lab.diagnostics import graph\n"
            "graph.keeper.hold = lambda *args: None\nstart =",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0 or done.returncode > 100


def test_clean_buffers_cost_next_to_nothing_and_create_no_wrapper(monkeypatch):
    net = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(334)))
    monkeypatch.setattr(graph, "Graph", None)  # the only place that reads a grad_fn's links
    times = []
    for _ in range(20):
        start = time.perf_counter()
        report = cbn_lab.inspect_buffers(net)
        times.append(time.perf_counter() - start)
    assert len(report) == 1002 and report.ok
    assert min(times) < 0.005


def test_shared_parts_are_freed_once_and_only_when_nothing_holds_them(others):
    w = torch.ones(3, requires_grad=True)
    shared = (w * w).exp()
    one, two = shared * 2, shared * 3
    walked = graph.Graph()
    assert walked.measure(one).nodes == walked.measure(two).nodes == 4
    assert walked.measure(one, two).nodes == 5
    del walked, one
    graph.release()
    two.sum().backward()  # the shared part is still whole
    assert w.grad is not None
    del shared, two
    graph.release()
    assert len(graph.keeper.nodes) == others


def test_counting_live_nodes_follows_growth_and_release(others):
    w = torch.ones(3, requires_grad=True)
    value = torch.zeros(3)
    counts = []
    for _ in range(4):
        value = value + w
        counts.append(graph.count_live([value]) - others)
    assert counts == [2, 3, 4, 5]
    value = value.detach()
    assert graph.count_live([]) == others


def saved_bytes(tensor, *exclude):
    return graph.measure(tensor, exclude).retained_bytes


def test_bytes_of_what_nodes_save():
    w = torch.ones(8, requires_grad=True)
    x = torch.ones(8)
    assert saved_bytes(w * x) == 2 * 32  # the factor, and the leaf itself
    assert saved_bytes(w * x, w) == 32
    assert saved_bytes(w * x, w, x) == 0
    assert saved_bytes(0.9 * w, w) == 0  # a Python number is no tensor of the user's
    assert saved_bytes(w * torch.tensor(0.9, dtype=torch.float64), w) == 8
    wide = torch.ones(100)
    assert saved_bytes(w * wide[:8], w) == 400  # a view keeps its whole storage


def test_bytes_are_gone_after_backward():
    w = torch.ones(8, requires_grad=True)
    y = (w.exp() * 2).sum()
    before = saved_bytes(y, w)
    y.backward()
    assert (before, saved_bytes(y, w)) == (32, 0)


def test_custom_functions_and_checkpoints():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.new_ones(4))
            ctx.extra = x.new_ones(2)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    w = torch.ones(8, requires_grad=True)
    assert saved_bytes(Scale.apply(w), w) == 16 + 8
    calls = []

    def body(x):
        calls.append(1)
        return x.exp()

    out = torch.utils.checkpoint.checkpoint(body, w, use_reentrant=False)
    assert saved_bytes(out, w) == 0 and len(calls) == 1  # nothing is recomputed


def test_storages_of_unusual_tensors():
    dense = torch.ones(4)
    assert [size for _, size in storages.of_tensor(dense[1:])] == [16]
    sparse = torch.eye(3).to_sparse()
    assert sum(size for _, size in storages.of_tensor(sparse)) == 2 * 3 * 8 + 3 * 4
    assert storages.of_tensor(torch.ones(4, device="meta")) == []
    rows = torch.sparse_csr_tensor([0, 1, 2], [0, 1], [1.0, 2.0])
    assert sum(size for _, size in storages.of_tensor(rows)) == 3 * 8 + 2 * 8 + 2 * 4
