"""diagnose: what it puts back, what it says, and what it does with bad input."""

import copy
import gc
import json

import gallery
import pytest
import torch
from torch import nn

import cbn_lab
from cbn_lab.diagnostics import graph, heap


def values_of(*objects):
    return copy.deepcopy([o.state_dict() for o in objects])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Loop:
    """A loop with everything in it that a step can change."""

    def __init__(self, update="rebind"):
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3), cbn_lab.LeakyBatchNorm2d(3, update=update), nn.Dropout()
        )
        self.opt = torch.optim.AdamW(self.net.parameters())
        self.losses, self.count = [], 0

    def step(self):
        self.opt.zero_grad()
        loss = self.net(torch.randn(2, 1, 6, 6)).square().mean()
        loss.backward()
        self.opt.step()
        self.losses.append(loss.item())
        self.net[1].last = loss
        self.count += 1


@pytest.mark.parametrize("update", ["rebind", "inplace", "no_grad"])
def test_everything_is_put_back(update):
    loop = Loop("no_grad")
    loop.step()  # optimizer state and gradients exist
    loop.net[1].update = update
    state, rng = values_of(loop.net, loop.opt), torch.get_rng_state()
    grads = [p.grad.clone() for p in loop.net.parameters()]
    buffers = [id(b) for b in loop.net.buffers()]
    last, losses = loop.net[1].last, list(loop.losses)
    cbn_lab.diagnose(loop.step, loop.net, loop.opt)
    assert same(values_of(loop.net, loop.opt), state)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(map(torch.equal, grads, [p.grad for p in loop.net.parameters()]))
    assert [id(b) for b in loop.net.buffers()] == buffers
    assert cbn_lab.inspect_buffers(loop.net).ok
    assert (loop.net[1].last is last, loop.losses, loop.count) == (True, losses, 1)


def test_restore_false_leaves_what_the_steps_did():
    loop = Loop()
    cbn_lab.diagnose(loop.step, loop.net, steps=6, restore=False)
    assert loop.count == 6 and not cbn_lab.inspect_buffers(loop.net).ok


def test_the_steps_memory_is_given_back():
    loop = Loop()
    loop.step()
    gc.collect()
    with cbn_lab.MemoryTrace("cpu") as trace:
        trace.step()
        diagnosis = cbn_lab.diagnose(loop.step, loop.net)
        gc.collect()
        trace.step()
    assert diagnosis.verdict == "growing"
    assert trace.rows[0].tensor_bytes == trace.rows[1].tensor_bytes
    del loop, diagnosis
    gc.collect()
    graph.release()
    assert not gc.get_freeze_count()


def test_a_step_that_raises_keeps_its_error_and_the_state():
    loop = Loop()
    state = values_of(loop.net, loop.opt)

    def step():
        loop.step()
        if loop.count == 4:
            raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        cbn_lab.diagnose(step, loop.net)
    assert same(values_of(loop.net, loop.opt), state) and loop.count == 0
    assert not torch.is_anomaly_enabled()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_figures_are_the_same_in_ten_runs():
    found = set()
    for _ in range(10):
        loop = Loop()
        diagnosis = cbn_lab.diagnose(loop.step, loop.net, steps=6)
        found.add(
            json.dumps([[f.path, f.nodes_per_step, f.bytes_per_step] for f in diagnosis.findings])
        )
    (only,) = found
    assert json.loads(only)[:2] == [["1.running_var", 6, 0], ["1.running_mean", 5, 0]]


def test_bytes_per_step_are_those_of_the_tensors_kept():
    net, outputs = nn.Linear(6, 5), []
    step = lambda: outputs.append(net(torch.randn(4, 6)))  # noqa: E731
    (found,) = cbn_lab.diagnose(step, net, outputs).findings
    # The output, 4 × 5, and the input that Linear saves, 4 × 6; nodes: Addmm, T.
    assert (found.path, found.bytes_per_step) == ("outputs[…]", (20 + 24) * 4)
    assert found.nodes_per_step == 2
    assert found.origin == f"{__file__}:{step.__code__.co_firstlineno}"


def test_text_html_and_dict():
    loop = Loop()
    diagnosis = cbn_lab.diagnose(loop.step, loop.net)
    text, page = str(diagnosis), diagnosis._repr_html_()
    assert text.startswith("growing: ") and "GROWING  1.running_mean" in text
    assert "BOUNDED  1.last" in text and "specimens.py:" in text
    assert page.count(">▲ growing<") == 2 and "torch.no_grad()" in page
    found = json.loads(json.dumps(diagnosis.to_dict()))
    assert found["verdict"] == "growing" and found["findings"][0]["path"] == "1.running_var"


def test_objects_are_found_without_being_given():
    loop = Loop()
    diagnosis = cbn_lab.diagnose(loop.step)
    assert {f.path for f in diagnosis.findings if f.verdict == "growing"} == {
        "loop.net.1.running_mean",
        "loop.net.1.running_var",
    }


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected step to be callable, got int"):
        cbn_lab.diagnose(3)
    with pytest.raises(ValueError, match="expected steps to be at least 6, got 2"):
        cbn_lab.diagnose(lambda: None, steps=2)


def test_a_step_without_any_torch_is_clean():
    assert cbn_lab.diagnose(lambda: None).verdict == "clean"


class Sub(torch.Tensor):
    pass


class OfSubclass(gallery.Running):
    def __init__(self):
        super().__init__()
        self.mean = self.mean.as_subclass(Sub)

    def update(self, mean):
        self.mean = 0.9 * self.mean + 0.1 * mean


def test_subclass_and_meta_tensors():
    net = nn.Sequential(nn.Linear(6, 5), OfSubclass())
    step = lambda: net(gallery.data())  # noqa: E731
    assert cbn_lab.diagnose(step, net).verdict == "growing"
    net(gallery.data())
    assert cbn_lab.inspect_buffers(net)["1.mean"].nodes > 0
    meta = nn.Sequential(nn.Linear(6, 5), OfSubclass()).to("meta")
    meta(gallery.data().to("meta"))
    row = cbn_lab.inspect_buffers(meta)["1.mean"]
    assert row.nodes > 0 and row.retained_bytes == 0
    step = lambda: meta(gallery.data().to("meta"))  # noqa: E731
    assert cbn_lab.diagnose(step, meta).verdict == "growing"


def test_a_model_on_several_devices():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).append(nn.BatchNorm1d(5, device="meta"))
    assert cbn_lab.inspect_buffers(net).ok
    assert (
        cbn_lab.diagnose(lambda: net[:2](gallery.data()).sum().backward(), net).verdict == "clean"
    )


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_compiled_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    step = lambda: scripted(gallery.data()).sum().backward()  # noqa: E731
    assert cbn_lab.diagnose(step, scripted).verdict == "clean"
    assert cbn_lab.inspect_buffers(scripted).ok
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), cbn_lab.LeakyBatchNorm2d(2))
    compiled = torch.compile(net, backend="eager")
    step = lambda: compiled(torch.randn(2, 1, 5, 5)).sum().backward()  # noqa: E731
    found = {f.path for f in cbn_lab.diagnose(step, compiled).findings}
    assert found == {"1.running_mean", "1.running_var"}
    step()
    names = [row.name for row in cbn_lab.inspect_buffers(compiled).leaks]
    assert names == ["1.running_mean", "1.running_var"]


def test_a_freed_graph_is_counted_without_its_tensors():
    w = torch.ones(3, requires_grad=True)
    module = nn.Module()
    module.register_buffer("loss", (w.exp() * 2).sum())
    module.loss.backward()
    (row,) = cbn_lab.inspect_buffers(module)
    assert (row.nodes, row.retained_bytes) == (4, 12)  # what is left is the leaf itself


def test_the_published_complex_layer_is_convicted():
    from complexPyTorch import complexLayers as layers

    net = nn.Sequential(layers.ComplexLinear(4, 3), layers.ComplexBatchNorm1d(3))

    def step():
        net(torch.randn(8, 4, dtype=torch.complex64)).abs().sum().backward()

    growing = {f.path: f for f in cbn_lab.diagnose(step, net).findings if f.verdict == "growing"}
    assert "1.running_covar" in growing
    assert growing["1.running_covar"].nodes_per_step > 0
    assert "complexLayers.py:" in growing["1.running_covar"].origin
    step()
    assert "1.running_covar" in [row.name for row in cbn_lab.inspect_buffers(net).leaks]


@pytest.mark.skipif(heap.kind != "malloc", reason="this system does not tell of the heap")
@pytest.mark.parametrize("channels", [2, 64, 512])
def test_batches_of_many_lengths_are_no_leak(channels):
    bn, lengths = cbn_lab.ComplexBatchNorm1d(channels), iter(range(10, 1000, 3))

    def step():
        z = torch.randn(next(lengths), channels, dtype=torch.complex64)
        bn(z).abs().square().mean().backward()
        bn.zero_grad(set_to_none=True)

    # In a fresh process the first steps add a few kilobytes of their own, once.
    assert cbn_lab.diagnose(step, bn, steps=40).verdict == "clean"


def test_growth_that_is_no_tensor_is_given_in_bytes():
    kept = []

    def step():
        kept.append(bytearray(300_000))
        torch.ones(3, requires_grad=True).sum().backward()

    (found,) = cbn_lab.diagnose(step).findings
    assert found.path == "(not reachable)" and found.nodes_per_step == 0
    assert 290_000 < found.bytes_per_step < 330_000
