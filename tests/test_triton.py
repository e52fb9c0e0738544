"""The Triton engine: on a GPU where there is one, elsewhere in Triton's interpreter,
which conftest.py asks for."""

import inspect
import os
import subprocess
import sys
import textwrap

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbn_lab import functional as F
from cbn_lab.kernels import operator

triton = pytest.importorskip("triton", reason="Triton is to be had on Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 100 if DEVICE == "cuda" else 10  # the interpreter takes a tenth of a second for each


@pytest.fixture(autouse=True, scope="module")
def engine():
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        # Up to 3.6 it makes the ends of a loop ints with int(), which NumPy 2.4 refuses for an
        # array of one number.
        patch = interpreter._patch_lang_tensor

        def patched(tensor, *scope):
            patch(tensor, *scope)
            tensor.__index__ = lambda self: np.asarray(self.handle.data).item()

        interpreter._patch_lang_tensor = patched
    found = operator.load_engine("triton")
    assert found.__name__ == "cbn_lab.kernels.cuda.engine"  # no stand-in
    return found


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(engine, monkeypatch):
    """Small batches then have many tiles, several to a slice, and more slices than are merged at
    a time."""
    monkeypatch.setattr(engine, "BLOCK", 16)
    monkeypatch.setattr(engine, "ROW", 4)
    monkeypatch.setattr(engine, "MERGED", 1)
    monkeypatch.setattr(engine, "processors", lambda device: 1)
    engine.forget()
    yield
    engine.forget()


def step(z, g, weight, bias, name, pair=False, **options):
    """Output and gradients of one step, in training if no statistics are given."""
    parts = (z.real.clone(), z.imag.clone()) if pair else (z.clone(),)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (*parts, weight, bias)]
    given = leaves[:2] if pair else leaves[0]
    statistics = options.pop("statistics", (None, None))
    options.setdefault("training", statistics[0] is None)
    y = F.complex_batch_norm(given, *statistics, *leaves[-2:], engine=name, **options)
    if pair:
        torch.autograd.backward(y, (g.real, g.imag))
    else:
        y.backward(g)
    y = y if pair else (y,)
    return [t.detach() for t in y] + [leaf.grad for leaf in leaves if leaf is not None]


def same(z, tolerance=1e-4, affine=True, parts_apart=False, **options):
    c, g = z.shape[1], torch.randn_like(z)
    weight = torch.randn(c, 3, device=DEVICE) if affine else None
    bias = torch.randn(c, 2, device=DEVICE) if affine else None
    mine, expected = (step(z, g, weight, bias, name, **options) for name in ("triton", "reference"))
    for a, b in zip(mine, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert b.isfinite().all()
        for x, y in zip(parts(a), parts(b), strict=True) if parts_apart else [(a, b)]:
            assert (x - y).abs().max() <= tolerance * max(0 if parts_apart else 1, y.abs().max())


def parts(tensor):
    return (tensor.real, tensor.imag) if tensor.is_complex() else (tensor,)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(z=oracle.batches(), affine=st.booleans(), pair=st.booleans(), training=st.booleans())
def test_any_layout_against_the_reference(z, affine, pair, training):
    z, c = z.to(DEVICE), z.shape[1]
    options = {}
    if not training:
        covar = torch.tensor([[2.0, 1.0, 0.5]], device=DEVICE).repeat(c, 1)
        options["statistics"] = torch.randn(c, 2, device=DEVICE), covar
    exact = z.dtype == torch.complex128
    same(z, 1e-9 if exact else 1e-3, affine=affine, pair=pair, eps=1e-2, **options)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "few"),  # few slices are merged by each program, more by a kernel
    [
        ((2, 2, 3, 40), "contiguous", torch.complex64, 64),
        ((2, 2, 3, 40), "contiguous", torch.complex128, 0),
        ((4, 2, 31), "sliced", torch.complex64, 64),
        ((4, 2, 31), "sliced", torch.complex64, 0),
        ((70, 2, 3), "contiguous", torch.complex64, 0),
        ((30, 6), "contiguous", torch.complex64, 64),
        ((2, 5, 4, 5), "channels_last", torch.complex64, 64),
        ((2, 5, 4, 5), "channels_last", torch.complex128, 64),
    ],
)
def test_where_the_work_is_cut(engine, small_tiles, monkeypatch, shape, kind, dtype, few):
    monkeypatch.setattr(engine, "FEW", few)
    z = oracle.correlated(*shape, dtype=dtype).to(DEVICE) + 1
    if kind == "channels_last":
        z = z.to(memory_format=torch.channels_last)
    if kind == "sliced":
        z = torch.cat([z, z], -1)[..., : shape[-1]]
    found = engine.plan(z.shape, z.stride(), dtype, z.device)
    slices, *_ = found.partial
    *_, per, tiles, _, _ = found.numbers
    assert slices > engine.MERGED and tiles > per > 1
    assert found.few is (few > 0 and kind != "channels_last" and z.dim() > 2)
    same(z, pair=kind == "sliced" and few == 0)


@pytest.mark.parametrize("slope", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [1, 3000])
def test_proportional_parts_against_float64(small_tiles, scale, slope):
    re = scale * torch.randn(3, 2, 4, 4, device=DEVICE)
    same(torch.complex(re, slope * re), 1e-3, parts_apart=slope != 1)


def test_what_float32_leaves_of_the_mean_is_made_good():
    z = oracle.correlated(4, 2, 3, 5).to(DEVICE) + 1e6 * (1 - 2j)
    covar = torch.tensor([[2.0, 1.0, 0.5]], device=DEVICE).repeat(2, 1).double()
    mean = torch.tensor([1e6 + 0.01, -2e6 + 0.02], device=DEVICE, dtype=torch.double).repeat(2, 1)
    same(z, 1e-6)
    same(z, 1e-6, statistics=(mean, covar))


def test_statistics_that_float32_cannot_hold():
    z = oracle.correlated(4, 2, 3).to(DEVICE)
    mean = torch.full((2, 2), 1e39, device=DEVICE, dtype=torch.double)
    covar = torch.tensor([[1e78, 1e78, 0.0]], device=DEVICE, dtype=torch.double).repeat(2, 1)
    same(z, 1e-6, statistics=(mean, covar))


def test_a_kernel_is_started_at_once_only_for_the_same_kinds_of_tensors(engine, monkeypatch):
    class Kernel:
        """Like Triton's: indexed by the grid, it compiles; what it returns can be started."""

        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                calls.append((self.name, grid, arguments, constants))
                return Kernel("compiled")

            return run

    monkeypatch.setattr(engine, "INTERPRETED", False)
    calls, ready, kernel = [], {}, Kernel("jit")
    flat = torch.zeros(64, device=DEVICE)
    others = (flat[1:], None), (flat, flat), (flat.double(), None)
    for tensors in [(flat, None), (flat, None), *others]:
        engine.launch(ready, kernel, 7, tensors, (3, 0.5), {"BB": 2})
    assert [name for name, *_ in calls] == ["jit", "compiled", "jit", "jit", "jit"]
    assert calls[1][1:] == ((7, 1, 1), (flat.data_ptr(), None, 3, 0.5, 2), {})
    assert calls[2][1:3] == ((7,), calls[2][2]) and calls[2][2][2:] == (3, 0.5)
    assert calls[2][3] == {"BB": 2} and len(ready) == 3  # none for the one that is not aligned


def test_a_counter_elsewhere_is_counted_there():
    z = oracle.correlated(4, 2, 3).to(DEVICE)
    running = torch.zeros(2, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    for device in (DEVICE, "cpu"):
        count = torch.tensor(0, device=device)
        F.complex_batch_norm(z, *running, training=True, engine="triton", num_batches_tracked=count)
        assert count == 1


def test_a_mean_far_from_zero_and_a_value_far_from_the_mean(small_tiles):
    z = oracle.correlated(4, 3, 2, 5).to(DEVICE) + 1e4 * (1 - 2j)
    z[0, 0, 0, 0], z[0, 1, 0, 0] = 1e9, 3e18j  # where a sum would begin
    running = torch.zeros(3, 2, device=DEVICE), torch.zeros(3, 3, device=DEVICE)
    y = F.complex_batch_norm(z, *running, training=True, momentum=1.0, engine="triton")
    expected = oracle.complex_batch_norm(z)
    assert (y.cpu() - expected.output).abs().max() <= 1e-3 * expected.output.abs().max()
    torch.testing.assert_close(running[0].cpu(), expected.mean.float())
    unbiased = expected.covar.float() * 40 / 39
    assert (running[1].cpu() - unbiased).abs().max() <= 1e-5 * unbiased.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_and_infinity_show_in_their_channel_alone(small_tiles, bad):
    z = oracle.correlated(4, 2, 3, 3).to(DEVICE)
    z[0, 0, 0, 0] = bad
    results = {}
    for name in ("triton", "reference"):
        running = torch.zeros(2, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE)
        y = F.complex_batch_norm(z, *running, training=True, engine=name)
        results[name] = y, *running
        assert y[:, 0].isnan().all() and y[:, 1].isfinite().all()
    for mine, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(mine, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("kind", "gone"), [*((kind, None) for kind in oracle.RUNNING), ("float32", 0), ("float64", 1)]
)
def test_the_running_statistics_are_moved_by_the_rule(kind, gone, factor):
    z = oracle.correlated(6, 3, 5).to(DEVICE) + 1
    start = torch.randn(3, 2, device=DEVICE).double(), torch.rand(3, 3, device=DEVICE).double()
    found = {}
    for name in ("triton", "reference"):
        running = [None if k == gone else oracle.RUNNING[kind](t) for k, t in enumerate(start)]
        running = [t if t is None else t.clone() if t is start[k] else t
                   for k, t in enumerate(running)]  # fmt: skip
        count = torch.tensor(4, device=DEVICE)
        before = [(t, t.data_ptr(), t._version) for t in (*running, count) if t is not None]
        for _ in range(2):
            F.complex_batch_norm(
                z, *running, training=True, momentum=factor, engine=name, num_batches_tracked=count
            )
        assert count == 6
        for tensor, place, version in before:
            assert tensor.data_ptr() == place and tensor._version > version
        found[name] = running
    for mine, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_parameters_of_any_precision_and_stride(dtype):
    z = oracle.correlated(4, 3, 5, 5).to(DEVICE)
    weight = torch.randn(3, 3, device=DEVICE).to(dtype).t()  # columns apart
    bias = torch._neg_view(torch.randn(3, 2, device=DEVICE).to(dtype))
    g = torch.randn_like(z)
    for mine, expected in zip(
        step(z, g, weight, bias, "triton"), step(z, g, weight, bias, "reference"), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_first_and_second_derivatives():
    z = oracle.correlated(2, 1, 3, dtype=torch.complex128).to(DEVICE).requires_grad_()
    w, b = (torch.randn(1, k, dtype=torch.double, device=DEVICE) for k in (3, 2))
    w.requires_grad_(), b.requires_grad_()

    def function(z, w, b):
        return F.complex_batch_norm(z, None, None, w, b, training=True, engine="triton")

    assert torch.autograd.gradcheck(function, (z, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (z, w, b), fast_mode=True)


def test_no_gradient_is_computed_that_nobody_wants(engine, monkeypatch):
    z, g = oracle.correlated(4, 3, 5).to(DEVICE), torch.randn(4, 3, 5, dtype=torch.cfloat)
    w = torch.randn(3, 3, device=DEVICE, requires_grad=True)
    monkeypatch.setattr(engine.maps, "apply_backward_kernel", None)  # would fail
    grads = []
    for name in ("triton", "reference"):
        y = F.complex_batch_norm(z, None, None, w, None, training=True, engine=name)
        grads += torch.autograd.grad(y, w, g.to(DEVICE))
    torch.testing.assert_close(*grads)


def test_the_kernels_compile_for_gpus_that_are_not_here():
    """The interpreter runs them as Python, and accepts what Triton's compiler would not."""
    script = inspect.getsource(compile_all) + "\ncompile_all()\n"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in (os.getcwd(), environment.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "15"


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cbn_lab.kernels.cuda import maps, sums

    def made(kernel, imag, **constants):
        kinds = {"eps": "fp64", "M": "fp64", "factor": "fp64", "unbiased": "fp64"}
        single = ("weight", "bias", "running_mean", "running_covar", "weight_grad", "bias_grad")
        kinds |= {name: "*fp32" for name in single} | {"batches": "*i64"}
        kinds |= {name + "_re": "*fp32" for name in "xgy"} | {name + "_im": imag for name in "xgy"}
        double = ("partial", "mean", "covar", "total_in", "total_out", "product")
        kinds |= {name: "*fp64" for name in double}
        signature = {}
        for name in kernel.arg_names:
            kind = "constexpr" if name in constants else kinds.get(name, "i32")
            signature[name] = kind or "constexpr"
            if kind is None:
                constants[name] = None
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        target = GPUTarget("cuda", 80, 32)
        code = triton.compile(ASTSource(kernel, signature, constants), target=target)
        assert code.asm["cubin"]
        return 1

    count = 0
    for rows, imag in ((False, None), (False, "*fp32"), (True, None)):
        tile = dict(ROWS=rows, BA=8, BB=64)
        count += made(sums.moments_kernel, imag, **tile)
        count += made(sums.gram_kernel, imag, **tile, DOUBLE=False)
        tile |= dict(partial=None, BS=1) if rows else dict(BS=16)
        count += made(maps.apply_kernel, imag, **tile, DOUBLE=rows)
        count += made(maps.apply_backward_kernel, imag, **tile, DOUBLE=False, TRAINING=not rows)
    count += made(sums.merge_moments_kernel, None, BS=64, BC=4)
    count += made(sums.merge_gram_kernel, None, BS=64, BC=4, DOUBLE=False)
    count += made(maps.move_running_kernel, None, BC=64)
    print(count)
