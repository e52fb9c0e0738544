"""Walks of deep graphs, their end, and the counting of bytes."""

import contextlib
import subprocess
import sys
import time

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import graph, saved, storages
from cbn_lab.diagnostics.census import Census

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


def test_without_care_the_process_dies_exactly_where_the_keeper_says_that_it_is_needed():
    """The same chain, touched and dropped: torch 2.13 crashes, 2.6 frees it in a loop."""
    tensor = torch.ones(1, requires_grad=True) * 2
    graph.measure(tensor)
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
    died = done.returncode < 0 or done.returncode > 100
    assert died == graph.keeper.needed and (died or done.returncode == 0), done.stderr


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


class SavesTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_ones(4))
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    "operation, kept", [(SavesTwo.apply, 16), (lambda x: x[torch.tensor([0, 1])], 16)]
)
def test_a_list_of_saved_tensors_is_gone_after_backward(operation, kept):
    """Torch raises where the whole list has been freed, and gives no list of None."""
    w = torch.ones(8, requires_grad=True)
    y = operation(w)
    assert graph.measure(y, (w,)) == (2, 2, kept)
    y.sum().backward()
    assert graph.measure(y, (w,)) == (2, 2, 0)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Census])
def test_what_hooks_have_packed_is_counted_and_never_unpacked(mode):
    ran = []

    def unpack(packed):
        ran.append(packed)
        return packed

    w = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
        y, both = w.exp(), SavesTwo.apply(w)
    with torch.autograd.graph.save_on_cpu():
        z = w.exp()
    with mode():
        assert saved_bytes(y, w) == saved_bytes(z, w) == 32
        # Where torch shows packed tensors only by unpacking (2.6), the first of the two is seen.
        assert saved_bytes(both, w) == (32 + 16 if saved.SHOWS_DATA else 32)
    assert not ran
    y.sum().backward()
    assert len(ran) == 1 and saved_bytes(y, w) == 0


def test_a_saved_tensor_that_was_changed_in_place():
    w = torch.ones(8, requires_grad=True)
    x = w.exp()
    y = x * x
    x.detach().add_(1)  # a backward would raise now, and older torch (2.6) shows nothing
    assert saved_bytes(y, w) == (32 if saved.SHOWS_DATA else 0)


def test_a_profiler_is_left_in_place():
    w, before = torch.ones(8, requires_grad=True), sys.getprofile()
    y = w.exp()
    seen = []

    def profile(frame, event, arg):
        seen.append(event)

    sys.setprofile(profile)
    try:
        under = saved_bytes(y, w)
        kept = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert kept is profile and seen
    assert under == (32 if saved.SHOWS_DATA else 0)
    assert saved_bytes(y, w) == 32 and sys.getprofile() is before


def test_an_excluded_storage_does_not_pass_its_address_on():
    buffer = torch.zeros(8)
    walked = graph.Graph([buffer])
    del buffer  # as rebinding does
    w = torch.ones(8, requires_grad=True)
    values = [w.exp() for _ in range(20)]
    assert walked.measure(*values) == (21, 2, 21 * 32)


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
