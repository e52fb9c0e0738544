"""The specimens: the leaks leak, the cures cure, and no form but the over-cure changes a number."""

import copy

import pytest
import torch
from torch import nn

from cbn_lab import (
    BatchNorm2d,
    ComplexBatchNorm2d,
    LeakyBatchNorm2d,
    LeakyComplexBatchNorm2d,
    inspect_buffers,
)
from cbn_lab.specimens import CURES, LEAKS

REAL = [(LeakyBatchNorm2d, torch.float32, update) for update in LEAKS if update != "slice"]
COMPLEX = [(LeakyComplexBatchNorm2d, torch.cfloat, update) for update in LEAKS]
CURED = [
    (layer, dtype, update)
    for layer, dtype in [(LeakyBatchNorm2d, torch.float32), (LeakyComplexBatchNorm2d, torch.cfloat)]
    for update in CURES
]
FORMS = [(layer, dtype) for layer, dtype, update in CURED if update == "no_grad"]


def train(layer: nn.Module, dtype: torch.dtype, steps: int = 3) -> tuple[nn.Module, list]:
    """A few steps behind a trainable convolution; the gradients of its weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=dtype), layer)
    generator, grads = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        net.zero_grad()
        x = torch.randn(4, 2, 6, 6, dtype=dtype, generator=generator)
        (net(x).abs() ** 3).sum().backward()
        grads.append(net[0].weight.grad.clone())
    return net, grads


def nodes(net: nn.Module) -> list[int]:
    return [row.nodes for row in inspect_buffers(net).rows if row.name != "1.num_batches_tracked"]


@pytest.mark.parametrize("layer, dtype, update", REAL + COMPLEX)
def test_a_leak_grows_by_the_same_number_of_nodes_each_step(layer, dtype, update):
    two, three, four = (nodes(train(layer(3, update=update), dtype, n)[0]) for n in (2, 3, 4))
    steps = [(b - a, c - b) for a, b, c in zip(two, three, four, strict=True)]
    assert all(first == second > 0 for first, second in steps)


@pytest.mark.parametrize("layer, dtype, update", CURED)
def test_a_cure_leaves_nothing_behind(layer, dtype, update):
    net, _ = train(layer(3, update=update), dtype)
    assert nodes(net) == [0, 0]
    copy.deepcopy(net)  # which a leak does not survive


@pytest.mark.parametrize("layer, dtype, update", REAL + COMPLEX + CURED)
def test_no_leak_and_no_cure_changes_a_number(layer, dtype, update):
    healthy = BatchNorm2d if dtype is torch.float32 else ComplexBatchNorm2d
    specimen, grads = train(layer(3, update=update), dtype)
    reference, expected = train(healthy(3), dtype)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(specimen.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layer, dtype", FORMS)
def test_the_over_cure_does_not_leak_and_has_a_wrong_gradient(layer, dtype):
    over, wrong = train(layer(3, update="over_detached"), dtype, steps=1)
    _, right = train(layer(3, update="no_grad"), dtype, steps=1)
    assert nodes(over) == [0, 0]
    error = (wrong[0] - right[0]).abs().max() / right[0].abs().max()
    assert error > 0.05


@pytest.mark.parametrize("layer, dtype", FORMS)
def test_without_a_trainable_layer_in_front_nothing_leaks(layer, dtype):
    specimen = layer(3, update="rebind")
    for _ in range(3):
        specimen(torch.randn(4, 3, 5, 5, dtype=dtype)).abs().sum().backward()
    assert [row.nodes for row in inspect_buffers(specimen).rows] == [0, 0, 0]


@pytest.mark.parametrize("layer, dtype", FORMS)
def test_a_leak_makes_a_backward_in_evaluation_fail(layer, dtype):
    net, _ = train(layer(3, update="rebind"), dtype)
    net.eval()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        net(torch.randn(4, 2, 6, 6, dtype=dtype)).abs().sum().backward()


def test_a_pair_goes_in_and_comes_out():
    specimen = LeakyComplexBatchNorm2d(3, update="no_grad")
    z = torch.randn(4, 3, 5, 5, dtype=torch.cfloat)
    re, im = specimen(z.real, z.imag)
    specimen.reset_running_stats()
    torch.testing.assert_close(torch.complex(re, im), specimen(z))


@pytest.mark.parametrize("layer, update", [(LeakyBatchNorm2d, "slice"), (LeakyBatchNorm2d, "none")])
def test_an_unknown_form_is_named(layer, update):
    with pytest.raises(ValueError, match=f"got '{update}'"):
        layer(3, update=update)


@pytest.mark.parametrize("layer, dtype", FORMS)
def test_bad_input_leaves_the_statistics_untouched(layer, dtype):
    specimen = layer(3)
    before = copy.deepcopy(specimen.state_dict())
    other = torch.cfloat if dtype is torch.float32 else torch.float32
    for bad, error in [
        (torch.randn(4, 2, 5, 5, dtype=dtype), ValueError),
        (torch.randn(4, 3, 5, dtype=dtype), ValueError),
        (torch.randn(1, 3, 1, 1, dtype=dtype), ValueError),
        (torch.randn(0, 3, 5, 5, dtype=dtype), ValueError),
        (torch.randn(4, 3, 5, 5, dtype=other), TypeError),
    ]:
        with pytest.raises(error, match="expected"):
            specimen(bad)
    for name, value in specimen.state_dict().items():
        assert torch.equal(value, before[name]), name
