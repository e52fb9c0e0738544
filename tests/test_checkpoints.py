"""Checkpoints of other kinds, and what ``.to()`` does to parameters and statistics."""

import pytest
import torch
from torch import nn

from cbn_lab import BatchNorm2d, ComplexBatchNorm1d, ComplexBatchNorm2d, NaiveComplexBatchNorm2d


def test_complexpytorch_checkpoint_evaluates_as_there():
    torch.manual_seed(0)
    state = {
        "weight": torch.randn(3, 3),
        "bias": torch.randn(3, 2),
        "running_mean": torch.randn(3, dtype=torch.cfloat),
        "running_covar": torch.tensor([[2.0, 1.0, 0.5]] * 3),
        "num_batches_tracked": torch.tensor(7),
    }
    bn = ComplexBatchNorm2d(3).eval()
    bn.load_state_dict(state)
    assert bn.num_batches_tracked == 7
    torch.testing.assert_close(bn.running_mean, torch.view_as_real(state["running_mean"]))
    torch.testing.assert_close(bn.running_covar, state["running_covar"])
    # What complexPyTorch computes: eps added once more to what it stored.
    z = torch.randn(2, 3, 4, 4, dtype=torch.cfloat)
    v = torch.tensor([[2.0 + 1e-5, 0.5], [0.5, 1.0 + 1e-5]], dtype=torch.float64)
    spread, axes = torch.linalg.eigh(v)
    root = (axes @ torch.diag(spread**-0.5) @ axes.T).float()
    x = torch.view_as_real(z - state["running_mean"].view(1, 3, 1, 1))
    w = state["weight"][:, [0, 2, 2, 1]].view(3, 2, 2)
    y = torch.einsum("cij,nchwj->nchwi", w @ root, x) + state["bias"].view(1, 3, 1, 1, 2)
    torch.testing.assert_close(bn(z), torch.view_as_complex(y.contiguous()))


def test_two_real_layers_load_into_the_naive_one():
    torch.manual_seed(0)
    pair = nn.ModuleDict({"bn_r": nn.BatchNorm2d(3), "bn_i": nn.BatchNorm2d(3)})
    for layer in pair.values():
        layer(torch.randn(4, 3, 2, 2) * 3 + 1)
        nn.init.normal_(layer.weight)
    bn = NaiveComplexBatchNorm2d(3)
    bn.load_state_dict(pair.state_dict())
    z = torch.randn(4, 3, 2, 2, dtype=torch.cfloat)
    pair.eval(), bn.eval()
    torch.testing.assert_close(bn(z), torch.complex(pair.bn_r(z.real), pair.bn_i(z.imag)))
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("layer", "state", "words"),
    [
        (
            ComplexBatchNorm2d,
            nn.BatchNorm2d(3).state_dict(),
            r"(?s)running_covar.*weight.*\[3, 3\]",
        ),
        (BatchNorm2d, ComplexBatchNorm2d(3).state_dict(), r"(?s)running_covar.*weight.*\[3, 3\]"),
        (ComplexBatchNorm2d, ComplexBatchNorm2d(4).state_dict(), r"weight.*\[4, 3\].*\[3, 3\]"),
        (
            ComplexBatchNorm2d,
            {**ComplexBatchNorm2d(3).state_dict(), "running_covar": torch.ones(3, 3).cfloat()},
            r"running_covar: expected real numbers of shape \(3, 3\), got torch.complex64",
        ),
        (
            BatchNorm2d,
            {**BatchNorm2d(3).state_dict(), "running_mean": torch.ones(3).cfloat()},
            r"running_mean: expected real numbers of shape \(3,\), got torch.complex64",
        ),
    ],
)
def test_a_checkpoint_of_the_wrong_kind_names_key_and_shape(layer, state, words):
    with pytest.raises(RuntimeError, match=words):
        layer(3).load_state_dict(state)


def test_version_1_checkpoint_keeps_the_count():
    state = ComplexBatchNorm2d(3).state_dict()
    del state["num_batches_tracked"], state._metadata
    bn = ComplexBatchNorm2d(3)
    bn(torch.randn(4, 3, 2, 2, dtype=torch.cfloat))
    bn.load_state_dict(state)
    assert bn.num_batches_tracked.dtype == torch.long


@pytest.mark.parametrize("layer", [ComplexBatchNorm2d, NaiveComplexBatchNorm2d])
def test_everything_stays_real_whatever_the_network_is_cast_to(layer):
    casts = {
        torch.complex64: (torch.float32, torch.float32),
        torch.complex128: (torch.float64, torch.float64),
        torch.float64: (torch.float64, torch.float64),
        torch.float16: (torch.float16, torch.float32),
        torch.bfloat16: (torch.bfloat16, torch.float32),
    }
    for cast, (parameters, statistics) in casts.items():
        bn = layer(3)
        with torch.no_grad():
            bn.running_mean.fill_(0.1)
        kept = bn.running_mean.clone()
        bn = bn.to(cast)
        assert bn.weight.dtype == bn.bias.dtype == parameters
        assert bn.running_mean.dtype == statistics
        assert torch.equal(bn.running_mean.float(), kept)
        assert bn.num_batches_tracked.dtype == torch.long
        y = bn(torch.randn(4, 3, 2, 2, dtype=torch.cfloat))
        assert y.dtype == torch.complex64 and y.isfinite().all()
    assert layer(3, dtype=torch.complex128).weight.dtype == torch.float64


def test_meta_device():
    bn = ComplexBatchNorm1d(3, device="meta")
    assert all(t.is_meta for t in (*bn.parameters(), *bn.buffers()))
    assert bn(torch.empty(4, 3, dtype=torch.cfloat, device="meta")).shape == (4, 3)
    bn = bn.to_empty(device="cpu")
    bn.reset_parameters()
    for key, value in ComplexBatchNorm1d(3).state_dict().items():
        assert torch.equal(bn.state_dict()[key], value)
