"""The complex layers: the whitening one against a float64 eigendecomposition, the naive one
against two ``torch.nn`` layers, and the mistakes of other implementations, one test each."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

from cbn_lab import (
    ComplexBatchNorm1d,
    ComplexBatchNorm2d,
    ComplexBatchNorm3d,
    NaiveComplexBatchNorm1d,
    NaiveComplexBatchNorm2d,
    NaiveComplexBatchNorm3d,
)
from cbn_lab import functional as F

LAYERS = [
    (ComplexBatchNorm1d, (7, 3)),
    (ComplexBatchNorm1d, (6, 3, 5)),
    (ComplexBatchNorm2d, (4, 3, 5, 2)),
    (ComplexBatchNorm3d, (2, 3, 2, 3, 2)),
]
NAIVE = [
    (NaiveComplexBatchNorm1d, nn.BatchNorm1d, (7, 3)),
    (NaiveComplexBatchNorm1d, nn.BatchNorm1d, (6, 3, 5)),
    (NaiveComplexBatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (NaiveComplexBatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


# --- whitening -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_output_and_statistics_match_the_eigendecomposition(layer, shape, dtype):
    bn = randomise(layer(3, momentum=0.3, dtype=dtype.to_real()))
    z = oracle.correlated(*shape, dtype=dtype) + 1
    expected = oracle.complex_batch_norm(z, bn.weight, bn.bias)
    y = bn(z)
    assert y.dtype == dtype and y.shape == z.shape
    torch.testing.assert_close(y, expected.output.to(dtype))
    n = z.numel() // 3
    start = torch.tensor([0.5**0.5, 0.5**0.5, 0.0])
    covar = 0.7 * start + 0.3 * expected.covar * n / (n - 1)
    torch.testing.assert_close(bn.running_mean, (0.3 * expected.mean).to(dtype.to_real()))
    torch.testing.assert_close(bn.running_covar, covar.to(dtype.to_real()))
    bn.eval()
    expected = oracle.complex_batch_norm(
        z, bn.weight, bn.bias, mean=bn.running_mean, covar=bn.running_covar
    )
    torch.testing.assert_close(bn(z), expected.output.to(dtype))
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_pair_is_the_complex_input_in_two_parts(layer, shape):
    a, b = randomise(layer(3)), layer(3)
    b.load_state_dict(a.state_dict())
    z = oracle.correlated(*shape)
    w = z.clone().requires_grad_()
    re, im = (part.clone().requires_grad_() for part in (z.real, z.imag))
    y, pair = a(w), b(re, im)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(y, torch.complex(*pair))
    g = torch.randn_like(y)
    y.backward(g)
    torch.autograd.backward(pair, (g.real, g.imag))
    torch.testing.assert_close(w.grad, torch.complex(re.grad, im.grad))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for key, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[key])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(training, affine):
    z = oracle.correlated(3, 2, 2, 2, dtype=torch.complex128).requires_grad_()
    w, b = (torch.randn(2, k, dtype=torch.float64, requires_grad=True) for k in (3, 2))
    mean = torch.randn(2, 2, dtype=torch.float64)
    covar = torch.tensor([[1.0, 2.0, 0.5], [0.3, 0.2, -0.1]], dtype=torch.float64)

    def function(z, *wb):
        stats = mean.clone(), covar.clone()
        return F.complex_batch_norm(z, *stats, *(wb or (None, None)), training=training)

    inputs = (z, w, b) if affine else (z,)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_a_pair():
    re, im = torch.randn(2, 4, 2, 3, dtype=torch.float64).unbind()
    re.requires_grad_(), im.requires_grad_()

    def function(re, im):
        return F.complex_batch_norm((re, im), None, None, training=True)

    assert torch.autograd.gradcheck(function, (re, im))
    assert torch.autograd.gradgradcheck(function, (re, im))


def test_whitened_output_is_round_and_default_total_variance_is_one():
    y = ComplexBatchNorm2d(3)(oracle.correlated(64, 3, 8, 8, scale=7) + 2)
    covar = oracle.complex_batch_norm(y).covar
    torch.testing.assert_close(
        covar, torch.tensor([0.5, 0.5, 0.0]).double().expand(3, 3), atol=1e-4, rtol=0
    )
    assert y.mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize(("options", "factors"), [({}, [0.1, 0.1]), ({"momentum": None}, [1, 0.5])])
def test_momentum_none_is_the_cumulative_average(options, factors):
    bn, mean = ComplexBatchNorm1d(2, **options), torch.zeros(2, 2)
    for count, f in enumerate(factors, 1):
        z = oracle.correlated(9, 2)
        bn(z)
        mean = (1 - f) * mean + f * torch.stack([z.real.mean(0), z.imag.mean(0)], -1)
        assert bn.num_batches_tracked == count
    torch.testing.assert_close(bn.running_mean, mean)


def test_the_cumulative_average_is_as_exact_as_the_layer():
    z = oracle.correlated(9, 2, dtype=torch.complex128) + 1
    bn = ComplexBatchNorm1d(2, momentum=None, dtype=torch.float64)
    default = torch.get_default_dtype()
    for dtype in (torch.float32, torch.bfloat16) * 4:
        torch.set_default_dtype(dtype)
        try:
            bn(z)
        finally:
            torch.set_default_dtype(default)
    mean = torch.stack([z.real.mean(0), z.imag.mean(0)], -1)
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-14, atol=0)


def test_without_a_counter_nothing_is_counted():
    bn = ComplexBatchNorm1d(2)
    bn.num_batches_tracked = None
    bn(oracle.correlated(9, 2) + 1)
    assert bn.running_mean.all()
    for layer in (ComplexBatchNorm1d(2, momentum=None), nn.BatchNorm1d(2, momentum=None)):
        layer.num_batches_tracked = None
        z = oracle.correlated(9, 2) + 1
        layer(z if isinstance(layer, ComplexBatchNorm1d) else z.real.float())
        assert not layer.running_mean.any()


@pytest.mark.parametrize("state", [(None, None), (torch.zeros(2, 2), torch.ones(2, 3))])
def test_a_functional_form_has_no_cumulative_average(state):
    with pytest.raises(TypeError, match="expected momentum to be a number, got None"):
        F.complex_batch_norm(oracle.correlated(9, 2), *state, training=True, momentum=None)


def test_without_statistics_evaluation_uses_the_batchs_own():
    z = oracle.correlated(9, 2)
    bn = ComplexBatchNorm1d(2, track_running_stats=False)
    assert list(bn.buffers()) == []
    torch.testing.assert_close(bn(z), bn.eval()(z))
    with pytest.raises(ValueError, match="more than 1 value"):
        bn(z[:1])
    bn = ComplexBatchNorm1d(2)
    bn.running_mean = bn.running_covar = None
    torch.testing.assert_close(bn.eval()(z), ComplexBatchNorm1d(2)(z))
    bn = ComplexBatchNorm1d(2)
    bn.track_running_stats = False
    bn(z)
    assert not bn.running_mean.any() and bn.num_batches_tracked == 0


def test_affine_off_and_bias_off():
    z = oracle.correlated(9, 2)
    bn = ComplexBatchNorm1d(2, affine=False)
    assert list(bn.parameters()) == []
    torch.testing.assert_close(bn(z), oracle.complex_batch_norm(z).output.cfloat())
    bn = ComplexBatchNorm1d(2, bias=False)
    assert bn.bias is None and bn.weight is not None
    torch.testing.assert_close(bn(z), oracle.complex_batch_norm(z, bn.weight).output.cfloat())


def test_shapes_of_parameters_and_buffers():
    shapes = {key: tuple(value.shape) for key, value in ComplexBatchNorm2d(4).state_dict().items()}
    assert shapes == {
        "weight": (4, 3),
        "bias": (4, 2),
        "running_mean": (4, 2),
        "running_covar": (4, 3),
        "num_batches_tracked": (),
    }


def test_copies_and_pickles_in_mid_training():
    bn = ComplexBatchNorm2d(3)
    loss = bn(oracle.correlated(4, 3, 2, 2).requires_grad_()).abs().mean()
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        for key, value in twin.state_dict().items():
            assert torch.equal(value, bn.state_dict()[key])
    loss.backward()


def test_backward_in_evaluation_after_training():
    bn = ComplexBatchNorm2d(3)
    z = oracle.correlated(4, 3, 2, 2).requires_grad_()
    for _ in range(2):
        bn.train()(z).abs().mean().backward()
        bn.eval()(z).abs().mean().backward()
    assert z.grad.isfinite().all()
    assert all(not b.requires_grad for b in bn.buffers())


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda bn: bn(torch.randn(2, 3, 4, 4)), TypeError, "complex.*float32"),
        (lambda bn: bn(torch.ones(2, 3, 4).cfloat()), ValueError, "4D.*3D"),
        (lambda bn: bn(torch.ones(2, 5, 4, 4).cfloat()), ValueError, "3 channels.*5"),
        (lambda bn: bn(torch.ones(1, 3, 1, 1).cfloat()), ValueError, "more than 1 value.*1"),
        (lambda bn: bn(torch.ones(0, 3, 4, 4).cfloat()), ValueError, "more than 1 value.*0"),
        (
            lambda bn: bn(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)),
            ValueError,
            r"\(2, 3, 4, 4\).*\(2, 3, 4, 5\)",
        ),
        (
            lambda bn: bn(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4).double()),
            ValueError,
            "float32.*float64",
        ),
        (
            lambda bn: bn(torch.ones(2, 3, 4, 4).cfloat(), torch.ones(2, 3, 4, 4).cfloat()),
            TypeError,
            r"two real tensors.*complex64.*bn\(z\)",
        ),
        (lambda bn: bn(torch.ones(2, 3, 4, 4).cfloat().numpy()), TypeError, "tensor.*ndarray"),
    ],
)
@pytest.mark.parametrize("layer", [ComplexBatchNorm2d, NaiveComplexBatchNorm2d])
def test_bad_input_is_named_and_the_statistics_stay(layer, call, error, words):
    bn = layer(3)
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(error, match=words):
        call(bn)
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("name", "shape"), [("running_mean", 2), ("running_covar", 3), ("weight", 3), ("bias", 2)]
)
def test_a_wrong_shape_is_named(name, shape):
    z = oracle.correlated(4, 3)
    given = {"running_mean": torch.zeros(3, 2), "running_covar": torch.ones(3, 3)}
    given[name] = torch.ones(3, shape + 1)
    with pytest.raises(ValueError, match=rf"{name}.*\(3, {shape}\).*\(3, {shape + 1}\)"):
        F.complex_batch_norm(z, **given, training=True)
    given[name] = torch.ones(3, shape, dtype=torch.cfloat)
    with pytest.raises(TypeError, match=f"{name}.*complex64"):
        F.complex_batch_norm(z, **given, training=True)
    assert not given["running_mean"].any() or name == "running_mean"


def test_evaluation_without_statistics_raises_in_the_functional_form():
    with pytest.raises(ValueError, match="running_mean and running_covar"):
        F.complex_batch_norm(oracle.correlated(4, 3), None, None)


def test_an_empty_batch_in_evaluation_is_empty_as_in_torch():
    bn = ComplexBatchNorm2d(3).eval()
    z = torch.zeros(0, 3, 4, 4, dtype=torch.cfloat, requires_grad=True)
    y = bn(z)
    assert y.shape == z.shape
    y.real.sum().backward()
    assert z.grad.shape == z.shape and not bn.weight.grad.any()


# --- naive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize(("layer", "theirs", "shape"), NAIVE)
def test_naive_is_two_real_layers(layer, theirs, shape, options):
    bn = randomise(layer(3, **options))
    parts = [theirs(3, **options) for _ in range(2)]
    for k, part in enumerate(parts):
        for key, value in part.named_parameters():
            value.data.copy_(getattr(bn, key)[:, k])
    for mode in (True, True, False):
        bn.train(mode)
        z = (oracle.correlated(*shape) + 2).requires_grad_()
        w = z.detach().clone().requires_grad_()
        y = bn(z)
        parts_of_w = zip(parts, (w.real, w.imag), strict=True)
        twin = torch.complex(*(p.train(mode)(x) for p, x in parts_of_w))
        torch.testing.assert_close(y, twin)
        g = torch.randn_like(y)
        y.backward(g)
        twin.backward(g)
        torch.testing.assert_close(z.grad, w.grad)
    for k, part in enumerate(parts):
        torch.testing.assert_close(bn.running_mean[:, k], part.running_mean)
        torch.testing.assert_close(bn.running_var[:, k], part.running_var)
    pair = bn(z.real, z.imag)
    torch.testing.assert_close(torch.complex(*pair), bn(z))


# --- what other implementations get wrong ----------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 1e-3, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1, 30, 300, 3000])
def test_proportional_parts_stay_finite_and_match_float64(scale, slope):
    re = scale * torch.randn(8, 2, 16, 16)
    z = torch.complex(re, slope * re).requires_grad_()
    g = torch.randn(8, 2, 16, 16, dtype=torch.cfloat)
    bn = ComplexBatchNorm2d(2)
    y = bn(z)
    y.backward(g)
    exact = copy.deepcopy(bn).double()
    exact.zero_grad(), exact.reset_running_stats()
    w = z.detach().cdouble().requires_grad_()
    wide = exact(w)
    wide.backward(g.cdouble())
    expected = oracle.complex_batch_norm(z, bn.weight, bn.bias).output
    assert y.isfinite().all() and z.grad.isfinite().all()
    assert (y - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert (wide - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert (z.grad - w.grad).abs().max() <= 1e-2 * w.grad.abs().max()
    for p, q in zip(bn.parameters(), exact.parameters(), strict=True):
        assert p.grad.isfinite().all()
        assert (p.grad - q.grad).abs().max() <= 1e-2 * q.grad.abs().max()
    bn.eval()
    assert bn(z).isfinite().all()


@pytest.mark.parametrize("case", ["constant", "large mean", "zero", "imaginary"])
def test_other_extremes_stay_finite_and_match_float64(case):
    noise = torch.randn(8, 2, 16, 16, dtype=torch.cfloat)
    z = {
        "constant": torch.full_like(noise, 3 - 1.7j),
        "large mean": noise + 1e4 * (1 - 2j),
        "zero": torch.zeros_like(noise),
        "imaginary": 1j * noise.real,
    }[case].requires_grad_()
    bn = ComplexBatchNorm2d(2)
    y = bn(z)
    y.backward(noise)
    expected = oracle.complex_batch_norm(z, bn.weight, bn.bias).output
    assert y.isfinite().all() and z.grad.isfinite().all()
    assert (y - expected).abs().max() <= 1e-2 * max(expected.abs().max(), 1)
    assert bn.running_covar.isfinite().all()


def test_training_output_is_evaluation_output_at_momentum_1():
    z = oracle.correlated(16, 3, 8, 8)
    bn = ComplexBatchNorm2d(3, momentum=1.0, eps=0.1)
    y = bn(z)
    n = z.numel() // 3
    torch.testing.assert_close(bn.eval()(z), y, rtol=2 / n, atol=2 / n)


def test_one_value_per_channel_raises_and_stores_nothing():
    bn = ComplexBatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value"):
        bn(torch.ones(1, 3).cfloat())
    assert all(b.isfinite().all() for b in bn.buffers()) and bn.num_batches_tracked == 0
    assert bn.eval()(torch.ones(1, 3).cfloat()).isfinite().all()


def test_one_channel():
    z = oracle.correlated(16, 1, 3, 3)
    expected = oracle.complex_batch_norm(z, ComplexBatchNorm2d(1).weight).output.cfloat()
    torch.testing.assert_close(ComplexBatchNorm2d(1)(z), expected)


def test_not_a_number_and_infinity_show_as_in_torch():
    for bad in (float("nan"), float("inf")):
        z = oracle.correlated(4, 2, 3, 3)
        z[0, 0, 0, 0] = bad
        ours, theirs = ComplexBatchNorm2d(2), nn.BatchNorm2d(2)
        y, stock = ours(z), theirs(z.real)
        assert y[:, 0].isnan().all() == stock[:, 0].isnan().all()
        assert y[:, 1].isfinite().all()
        assert ours.running_covar[0].isnan().any() == theirs.running_var[0].isnan()
        assert ours.running_covar[1].isfinite().all()


@pytest.mark.parametrize("layer", [ComplexBatchNorm2d, NaiveComplexBatchNorm2d])
def test_memory_formats_are_kept_in_output_and_gradient(layer):
    z = oracle.correlated(4, 3, 5, 6)
    expected = layer(3)(z)
    for format in (torch.contiguous_format, torch.channels_last):
        w = z.clone(memory_format=format).requires_grad_()
        y = layer(3)(w)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=format)
        y.backward(torch.ones_like(y))
        assert w.grad.is_contiguous(memory_format=format)


@pytest.mark.parametrize(
    "view",
    {
        "sliced": lambda z: z[1:7:2, :, 1:, ::2],
        "transposed": lambda z: z.transpose(2, 3),
        "conjugate": lambda z: z.conj(),
        "expanded": lambda z: z[:, :, :1].expand(-1, -1, 4, -1),
        "zero stride": lambda z: z[:1, :, :, :1].expand(4, -1, -1, 3),
        "real part of one number": lambda z: torch.complex(z.real, torch.zeros(())),
    }.items(),
    ids=lambda item: item[0],
)
def test_views_as_input(view):
    z = oracle.correlated(8, 3, 5, 6).requires_grad_()
    w = z.detach().clone().requires_grad_()
    y = ComplexBatchNorm2d(3)(view[1](z))
    twin = ComplexBatchNorm2d(3)(view[1](w).clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(y, twin)
    g = torch.randn_like(twin)
    y.backward(g)
    twin.backward(g)
    torch.testing.assert_close(z.grad, w.grad, atol=1e-4, rtol=1e-4)


def test_parameters_that_are_computed_or_lent_are_used():
    class Twice(torch.nn.Module):
        def forward(self, value):
            return 2 * value

    z, bn = oracle.correlated(4, 3, 5, 5), ComplexBatchNorm2d(3)
    torch.nn.init.ones_(bn.bias)
    once = bn(z)
    lent = torch.func.functional_call(bn, {"bias": torch.full((3, 2), 3.0)}, (z,))
    torch.testing.assert_close(lent - once, torch.full_like(z, 2 + 2j))
    torch.nn.utils.parametrize.register_parametrization(bn, "bias", Twice())
    torch.testing.assert_close(bn(z) - once, torch.full_like(z, 1 + 1j))


def test_compiles_without_a_break():
    z = oracle.correlated(4, 3, 5, 5).requires_grad_()
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        plain, compiled = ComplexBatchNorm2d(3, **options), ComplexBatchNorm2d(3, **options)
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            grads = [torch.autograd.grad(f(z).abs().sum(), z)[0] for f in (run, plain)]
            torch.testing.assert_close(*grads)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(value, compiled.state_dict()[key])
    torch._dynamo.reset()


def test_a_layer_may_weigh_the_batch_in_its_own_way():
    class Halving(ComplexBatchNorm2d):
        def average_factor(self):
            return 0.5

    z = (
        torch.full((2, 3, 2, 2), 4 + 2j, dtype=torch.cfloat)
        + oracle.correlated(2, 3, 2, 2).cfloat()
    )
    layer = Halving(3)
    layer(z)
    expected = 0.5 * torch.view_as_real(z.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_mean, expected)


def test_evaluation_needs_no_counter():
    layer, z = ComplexBatchNorm2d(3).eval(), oracle.correlated(2, 3, 2, 2).cfloat()
    expected = layer(z)
    del layer.num_batches_tracked
    assert torch.equal(layer(z), expected)
