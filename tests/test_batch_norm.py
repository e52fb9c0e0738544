"""The real layers against ``torch.nn``: outputs, gradients, buffers, errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from cbn_lab import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormFunction
from cbn_lab import functional as F

LAYERS = [
    (BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (BatchNorm1d, nn.BatchNorm1d, (6, 3, 5)),
    (BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (BatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]
OPTIONS = [
    {},
    {"eps": 0.1},
    {"momentum": 0.7},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
    {"dtype": torch.float64},
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def name(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def same_step(ours, theirs, x):
    """One step of both on the same input; outputs and all gradients must agree."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = ours(a), theirs(b)
    torch.testing.assert_close(ya, yb)
    g = torch.randn_like(ya)
    ya.backward(g)
    yb.backward(g)
    torch.testing.assert_close(a.grad, b.grad)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")
        p.grad = q.grad = None


def same_state(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize(("ours", "theirs", "shape"), LAYERS)
def test_steps_in_both_modes_agree_with_torch(ours, theirs, shape, options):
    ours, theirs = ours(3, **options), theirs(3, **options)
    if ours.affine:
        with torch.no_grad():
            for layer in (ours, theirs):
                layer.weight.copy_(torch.tensor([0.5, -2.0, 1.5]))
                layer.bias.copy_(torch.tensor([0.0, 3.0, -1.0]))
    for mode in (True, True, False, True, False):
        ours.train(mode), theirs.train(mode)
        x = 3 * torch.randn(shape, dtype=options.get("dtype")) + 2
        same_step(ours, theirs, x)
        same_state(ours, theirs)


@pytest.mark.parametrize(("ours", "theirs", "shape"), LAYERS)
def test_repr_parameters_and_state_are_torchs(ours, theirs, shape):
    a, b = ours(3, momentum=None, affine=True), theirs(3, momentum=None, affine=True)
    # torch 2.13 added bias=, which older versions do not print
    assert a.extra_repr().replace("bias=True, ", "") == b.extra_repr().replace("bias=True, ", "")
    assert [k for k, _ in a.named_parameters()] == [k for k, _ in b.named_parameters()]
    same_state(a, b)
    b(torch.randn(shape))
    a.load_state_dict(b.state_dict())
    same_state(a, b)
    b.load_state_dict(a.state_dict())
    a.reset_parameters(), b.reset_parameters()
    same_state(a, b)


def test_statistics_are_not_counted_by_a_call_that_fails():
    bn = BatchNorm2d(3)
    before = copy.deepcopy(bn.state_dict())
    for bad in (torch.randn(1, 3, 1, 1), torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5)):
        with pytest.raises(ValueError, match="expected"):
            bn(bad)
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_train_flag_rules_and_grad_mode_does_not():
    x, bn = torch.randn(4, 3, 2, 2) + 5, BatchNorm2d(3)
    with torch.no_grad():
        bn(x)
    assert bn.num_batches_tracked == 1 and bn.running_mean.abs().min() > 0
    bn.eval()
    before = bn.running_mean.clone()
    bn(x.requires_grad_())
    assert torch.equal(bn.running_mean, before) and bn.num_batches_tracked == 1


def test_statistics_have_no_history_and_a_step_leaves_no_graph():
    bn = BatchNorm2d(3)
    bn(torch.randn(4, 3, 2, 2, requires_grad=True))
    assert all(not b.requires_grad and b.grad_fn is None for b in bn.buffers())


def test_an_empty_batch_in_evaluation_is_empty_as_in_torch():
    assert BatchNorm2d(3).eval()(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_without_bias_as_in_torch():
    ours, theirs = BatchNorm2d(3, bias=False), nn.BatchNorm2d(3)
    theirs.bias = None
    x = torch.randn(4, 3, 2, 2)
    assert ours.bias is None and ours.weight is not None and "bias=False" in repr(ours)
    same_step(ours, theirs, x)
    same_state(ours, theirs)


def test_one_value_per_channel_raises_in_training_only():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(3)(torch.randn(1, 3))
    assert BatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(3, track_running_stats=False).eval()(torch.randn(1, 3))


def test_large_mean_does_not_cancel():
    x = torch.randn(8, 3, 16, 16) + 1e4
    assert (BatchNorm2d(3)(x).std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_tracking_toggled_after_construction_as_in_torch():
    x = torch.randn(4, 3, 2, 2)
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    ours.track_running_stats = theirs.track_running_stats = False
    same_step(ours, theirs, x)
    same_state(ours, theirs)
    ours.eval(), theirs.eval()
    same_step(ours, theirs, x)
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    ours.running_mean = ours.running_var = theirs.running_mean = theirs.running_var = None
    ours.eval(), theirs.eval()
    same_step(ours, theirs, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    ours, theirs = BatchNorm2d(3, dtype=dtype), nn.BatchNorm2d(3, dtype=dtype)
    y, other = ours(x), theirs(x)
    assert y.dtype == dtype
    # Against float64, rounded once: torch's own layer rounds the batch's mean to half precision
    # before it subtracts it, and is off by several units in the last place where y is near 0.
    exact = BatchNorm2d(3, dtype=torch.float64)(x.double())
    torch.testing.assert_close(y, exact.to(dtype))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    one = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= one and (other - exact).abs().max() <= 4 * one


def test_channels_last_is_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert BatchNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)


def test_copies_and_pickles_in_mid_training():
    bn = BatchNorm2d(3)
    loss = bn(torch.randn(4, 3, 2, 2)).square().mean()
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        same_state(twin, bn)
    file = io.BytesIO()
    torch.save(bn.state_dict(), file)
    file.seek(0)
    BatchNorm2d(3).load_state_dict(torch.load(file))
    loss.backward()


def test_version_1_checkpoint_has_no_count():
    state = BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    del state._metadata
    bn = BatchNorm2d(3)
    bn(torch.randn(4, 3, 2, 2))
    bn.load_state_dict(state)
    assert bn.num_batches_tracked.dtype == torch.long


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BatchNorm2d(3)(torch.randn(2, 3, 4)), ValueError, "4D.*3D"),
        (lambda: BatchNorm1d(3)(torch.randn(2, 3, 4, 4)), ValueError, "2D or 3D.*4D"),
        (lambda: BatchNorm2d(3)(torch.randn(2, 5, 4, 4)), ValueError, "3 channels.*5"),
        (lambda: BatchNorm2d(3)(torch.ones(2, 3, 4, 4).cfloat()), TypeError, "ComplexBatchNorm"),
        (lambda: BatchNorm2d(3)(torch.ones(2, 3, 4, 4).long()), TypeError, "int64"),
        (lambda: F.batch_norm(torch.randn(2, 3), None, None), ValueError, "running_mean"),
        (
            lambda: F.batch_norm(torch.randn(2, 3), torch.zeros(3), torch.ones(4)),
            ValueError,
            r"running_var.*\(3,\).*\(4,\)",
        ),
        (
            lambda: F.batch_norm(
                torch.randn(2, 3), None, None, weight=torch.ones(3, 1), training=True
            ),
            ValueError,
            r"weight.*\(3,\).*\(3, 1\)",
        ),
        (lambda: BatchNorm2d(-1), ValueError, "num_features.*-1"),
        (lambda: BatchNorm2d(2.5), TypeError, "num_features.*2.5"),
        (lambda: BatchNorm2d(3, eps=0.0)(torch.randn(2, 3, 4, 4)), ValueError, "eps.*0"),
        (lambda: BatchNorm2d(3, eps=-1.0).eval()(torch.randn(2, 3, 4, 4)), ValueError, "eps.*-1"),
        (lambda: BatchNorm2d(3, dtype=torch.long), TypeError, "dtype.*int64"),
        (lambda: BatchNorm2d(3, dtype=torch.cfloat), TypeError, "dtype.*complex64"),
        (lambda: BatchNorm2d(3)(torch.randn(0, 3, 4, 4)), ValueError, "more than 1 value.*0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_function_with_backward_by_hand_agrees_with_autograd(training, affine):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if not affine:
        w = b = None
    stats = [torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5]

    def function(x, *wb):
        w, b = wb or (None, None)
        return BatchNormFunction.apply(x, *map(torch.clone, stats), w, b, training, 0.1, 1e-5)

    inputs = [t for t in (x, w, b) if t is not None]
    twin = F.batch_norm(x, *map(torch.clone, stats), w, b, training=training)
    torch.testing.assert_close(function(*inputs), twin)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_function_updates_the_statistics_and_saves_only_the_input():
    x = torch.randn(8, 3, 16, 16, requires_grad=True)
    mine, torchs = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        BatchNormFunction.apply(x, *mine, None, None, True, 0.1, 1e-5)
    torch.nn.functional.batch_norm(x, *torchs, training=True)
    torch.testing.assert_close(mine, torchs)
    assert sum(t.nbytes for t in saved if t is not None) <= 1.05 * x.nbytes


def test_compiles_without_a_break():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for options in ({}, {"momentum": None}, {"track_running_stats": False}):
        plain, compiled = BatchNorm2d(3, **options), BatchNorm2d(3, **options)
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(run(x), plain(x))
        same_state(compiled, plain)
    torch._dynamo.reset()


def test_moves_between_devices_and_dtypes():
    bn = BatchNorm2d(3, device="meta", dtype=torch.float64)
    assert bn.weight.is_meta and bn.running_mean.is_meta and bn.weight.dtype == torch.float64
    bn = bn.to_empty(device="cpu")
    bn.reset_parameters()
    same_state(bn, nn.BatchNorm2d(3, dtype=torch.float64))
    assert bn.half().running_mean.dtype == torch.float16
    assert bn.num_batches_tracked.dtype == torch.long
