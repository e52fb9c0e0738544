"""inspect_buffers: names, counts and bytes of what a module's buffers keep alive."""

import copy
import io
import json

import pytest
import torch
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import graph


def leaky_net(update: str = "rebind") -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), cbn_lab.LeakyBatchNorm2d(4, update=update))


def train(net: nn.Module, steps: int) -> nn.Module:
    torch.manual_seed(0)
    for _ in range(steps):
        net(torch.randn(2, 1, 6, 6)).square().sum().backward()
    return net


# The counts are those of the formulas, step by step: reading the buffer, scaling, adding.
@pytest.mark.parametrize("update, per_step", [("rebind", 5), ("inplace", 5), ("lerp", 3)])
def test_nodes_grow_by_the_same_number_every_step(update, per_step):
    counts = [
        cbn_lab.inspect_buffers(train(leaky_net(update), n))["1.running_mean"].nodes
        for n in (3, 4, 5)
    ]
    assert counts[1] - counts[0] == counts[2] - counts[1] == per_step


@pytest.mark.parametrize("update", ["no_grad", "detach", "data", "over_detached"])
def test_the_cures_are_clean(update):
    report = cbn_lab.inspect_buffers(train(leaky_net(update), 3))
    assert report.ok and not report.leaks
    assert [(row.nodes, row.depth, row.retained_bytes) for row in report] == [(0, 0, 0)] * 3


def test_a_row_names_the_buffer_and_measures_its_graph():
    class Tracker(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(3))

        def forward(self):
            self.seen = self.seen + (self.w * 2).exp()

    module = Tracker()
    for _ in range(4):
        module()
    (row,) = cbn_lab.inspect_buffers(module)
    # A step: add, exp, mul; exp saves its result, 12 bytes. The leaf's node is shared.
    assert (row.name, row.shape, row.grad_fn) == ("seen", (3,), "AddBackward0")
    assert (row.nodes, row.depth, row.retained_bytes) == (4 * 3 + 1, 4 + 3, 4 * 12)
    line = Tracker.forward.__code__.co_firstlineno + 1
    assert row.origin == f"{__file__}:{line}"


def test_retained_bytes_are_what_cutting_frees():
    net = leaky_net()
    for _ in range(3):
        net(torch.randn(2, 1, 6, 6))  # no backward: everything saved stays
    with cbn_lab.MemoryTrace() as trace:
        retained = cbn_lab.inspect_buffers(net)["1.running_mean"].retained_bytes
        net[1].running_var = net[1].running_var.detach()
        both = trace.step()[0].tensor_bytes
        retained_alone = cbn_lab.inspect_buffers(net)["1.running_mean"].retained_bytes
        net[1].running_mean = net[1].running_mean.detach()
        after = trace.step()[0].tensor_bytes
    assert retained == retained_alone > 0
    assert both - after == retained


def test_ten_runs_give_the_same_numbers():
    seen = {json.dumps(cbn_lab.inspect_buffers(train(leaky_net(), 3)).to_dict()) for _ in range(10)}
    assert len(seen) == 1


def test_a_pickled_leak_comes_back_as_a_leaf_and_is_reported():
    net = train(leaky_net(), 2)
    file = io.BytesIO()
    torch.save(net[1].running_mean, file)
    file.seek(0)
    fresh = nn.BatchNorm2d(4)
    fresh.running_mean = torch.load(file)
    report = cbn_lab.inspect_buffers(fresh)
    assert [row.name for row in report.leaks] == ["running_mean"] and not report.ok
    assert report["running_mean"].requires_grad and report["running_mean"].nodes == 0


def test_text_and_html_mark_a_leak_in_words():
    report = cbn_lab.inspect_buffers(train(leaky_net(), 2))
    text, page = str(report), report._repr_html_()
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [
        ["LEAK", "1.running_mean"],
        ["LEAK", "1.running_var"],
        ["ok", "1.num_batches_tracked"],
    ]
    assert page.count(">▲ leak<") == page.count("<details>") == 2
    assert "AddBackward0" in page and "var(--jp-" in page


def test_clean_modules_without_buffers_and_anything_else():
    assert cbn_lab.inspect_buffers(nn.Linear(2, 2)).ok
    assert "no buffers" in str(cbn_lab.inspect_buffers(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got Tensor"):
        cbn_lab.inspect_buffers(torch.zeros(2))


def test_inspecting_changes_nothing():
    net = train(leaky_net("no_grad"), 1)
    before = copy.deepcopy(net.state_dict())
    identities = [id(buffer) for buffer in net.buffers()]
    cbn_lab.inspect_buffers(net)
    assert [id(buffer) for buffer in net.buffers()] == identities
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_what_was_walked_is_freed_once_nothing_holds_it(others):
    net = train(leaky_net(), 50)
    cbn_lab.inspect_buffers(net)
    held = len(graph.keeper.nodes) - others
    assert (held > 0) == graph.keeper.needed  # older torch frees what was walked by itself
    assert graph.release() == 0  # the buffers still hold it all
    del net
    assert graph.release() == held
    assert len(graph.keeper.nodes) == others
