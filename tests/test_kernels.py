"""The operator and its engines: each against float64, and against each other."""

import os
import subprocess
import sys
import textwrap
import warnings

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from cbn_lab import ComplexBatchNorm2d, kernels
from cbn_lab import functional as F
from cbn_lab.kernels import operator
from cbn_lab.kernels.cpu import engine as cpu_engine
from cbn_lab.kernels.cpu import native
from cbn_lab.kernels.layout import layout


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def step(z, g, weight, bias, engine="auto", **options):
    """Output and gradients of one training step."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (z, weight, bias)]
    leaves = [t.requires_grad_() for t in leaves]
    y = F.complex_batch_norm(
        leaves[0], None, None, *leaves[1:], training=True, engine=engine, **options
    )
    y.backward(g)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def condition(covar, eps):
    """The largest ratio of a channel's two eigenvalues, or more: two values alone lie on a line."""
    rr, ii, ri = (covar + eps * torch.tensor([1.0, 1.0, 0.0])).unbind(1)
    least = (rr * ii - ri * ri).div(rr + ii).clamp_min(eps)
    return ((rr + ii) / least).max().item()


# --- every layout, dtype and option against float64 -------------------------------------------


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    z=oracle.batches(),
    affine=st.booleans(),
    pair=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
)
def test_any_layout_against_float64(z, affine, pair, eps, scale):
    z, c = z * scale if scale != 1.0 else z, z.shape[1]
    weight, bias = (torch.randn(c, 3), torch.randn(c, 2)) if affine else (None, None)
    value = (z.real, z.imag) if pair else z
    y = F.complex_batch_norm(value, None, None, weight, bias, training=True, eps=eps)
    y = torch.complex(*y) if pair else y
    expected = oracle.complex_batch_norm(z, weight, bias, eps=eps)
    assert y.dtype == z.dtype
    limit = 1e-4 if z.dtype == torch.complex64 else 1e-9
    assert (y - expected.output).abs().max() <= limit * max(1, expected.output.abs().max())
    g = torch.randn(z.shape, dtype=z.dtype)
    leaves = [z.detach().clone().requires_grad_() for _ in range(3)]
    for leaf, engine in zip(leaves, ("auto", "reference"), strict=False):
        out = F.complex_batch_norm(
            leaf, None, None, weight, bias, training=True, eps=eps, engine=engine
        )
        out.backward(g)
    # In training what remains of Aᵀ·g may be much smaller than Aᵀ·g, which float32 rounds.
    statistics = expected.mean, expected.covar
    F.complex_batch_norm(leaves[2], *statistics, weight, bias, eps=eps).backward(g)
    difference = (leaves[0].grad - leaves[1].grad).abs().max()
    # And float64 itself keeps no more than its precision times the condition of V.
    limit = max(limit, torch.finfo(torch.float64).eps * condition(expected.covar, eps))
    assert difference <= limit * leaves[2].grad.abs().max()


SHAPES = [(1, 1, 1, 1000003), (3, 2, 1, 70001), (70000, 2), (5, 700), (300, 33), (9, 5, 7, 9)]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 40, 41), (2, 3, 2, 2, 2), (2, 3)])
def test_sizes_at_which_the_work_is_cut(shape, dtype):
    z, g = oracle.correlated(*shape, dtype=dtype) + 1, torch.randn(shape, dtype=dtype)
    weight, bias = torch.randn(shape[1], 3), torch.randn(shape[1], 2)
    formats = [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4)
    for kind in formats:
        z, g = z.contiguous(memory_format=kind), g.contiguous(memory_format=kind)
        found = step(z, g, weight, bias)
        assert found[0].stride() == found[1].stride() == z.stride()
        close(found, step(z, g, weight, bias, engine="reference"), 1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    z, g = oracle.correlated(16, 12, 20, 20), torch.randn(16, 12, 20, 20, dtype=torch.cfloat)
    weight, bias = torch.randn(12, 3), torch.randn(12, 2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step(z, g, weight, bias))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_python_threads_where_there_is_no_openmp(monkeypatch):
    from cbn_lab.kernels.cpu import native

    z, g = oracle.correlated(16, 12, 20, 20), torch.randn(16, 12, 20, 20, dtype=torch.cfloat)
    weight, bias = torch.randn(12, 3), torch.randn(12, 2)
    expected = step(z, g, weight, bias)
    monkeypatch.setattr(native, "openmp", lambda: None)
    pools, pool = [], native._pool
    monkeypatch.setattr(native, "_pool", lambda *args: pools.append(args) or pool(*args))
    kernels.forget()  # plans that know of OpenMP
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = step(z, g, weight, bias)
    finally:
        torch.set_num_threads(before)
        kernels.forget()
    assert len(pools) == 4  # one for each sweep
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ctrl_c_takes_no_memory_from_python_threads_at_work():
    script = """
        import signal, torch
        from cbn_lab import functional as F
        from cbn_lab.kernels.cpu import native
        native.openmp = lambda: None
        torch.set_num_threads(2)
        z = torch.randn(16, 64, 60, 60, dtype=torch.complex64)
        F.complex_batch_norm(z, None, None, training=True)
        interrupted = 0

        def press(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, press)
        for k in range(150):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.00003 * k)
                    F.complex_batch_norm(z, None, None, training=True)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, RuntimeError):  # the latter from Python's own executor
                interrupted += 1
        print(interrupted)
    """
    assert int(run_script(script)) > 10


STREAMED = {  # whether each row or plane of the result begins with a cache line
    "planes": (torch.Size([3, 5, 16, 8]), torch.contiguous_format, True),
    "planes that begin anywhere": (torch.Size([3, 5, 7, 9]), torch.contiguous_format, False),
    "one long plane": (torch.Size([1, 2, 1, 80003]), torch.contiguous_format, False),
    "long planes": (torch.Size([2, 2, 1, 80000]), torch.contiguous_format, True),
    "rows": (torch.Size([1100, 1040]), torch.contiguous_format, True),
    "rows that begin anywhere": (torch.Size([300, 33]), torch.contiguous_format, False),
    "channels_last": (torch.Size([3, 32, 7, 9]), torch.channels_last, True),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("name", STREAMED)
def test_writing_past_the_cache_changes_no_bit(name, pair, dtype, monkeypatch):
    shape, kind, streamed = STREAMED[name]
    z, g = (oracle.correlated(*shape, dtype=dtype).contiguous(memory_format=kind) for _ in "zg")
    z[:, 1].imag = 2 * z[:, 1].real  # a channel that is done in float64
    weight, bias = torch.randn(shape[1], 3), torch.randn(shape[1], 2)

    def run(cache):
        monkeypatch.setattr(native, "cache_bytes", lambda: cache)
        kernels.forget()
        parts = [t.clone().requires_grad_() for t in ((z.real, z.imag) if pair else (z,))]
        value = tuple(parts) if pair else parts[0]
        y = F.complex_batch_norm(value, None, None, weight, bias, training=True)
        y = y if pair else (y,)
        torch.autograd.backward(y, (g.real.clone(), g.imag.clone()) if pair else (g,))
        chosen = cpu_engine.plan(parts[0].shape, parts[0].stride(), parts[0].dtype, 1).streams
        return chosen, [*y, *(part.grad for part in parts)]

    (none, kept), (both, past) = run(1 << 60), run(1)
    kernels.forget()
    assert none == () and both == (("apply", "apply_backward") if streamed else ())
    assert all(torch.equal(a, b) for a, b in zip(kept, past, strict=True))


def test_half_a_line_is_never_written_past_the_cache(monkeypatch):
    monkeypatch.setattr(native, "cache_bytes", lambda: 1)
    kernels.forget()
    for length, expected in ((28, ()), (32, ("apply", "apply_backward"))):  # 3.5 and 4 lines
        z = torch.empty(3, 5, 1, length, dtype=torch.cfloat)
        assert cpu_engine.plan(z.shape, z.stride(), z.dtype, 1).streams == expected
    kernels.forget()


def test_data_that_fill_the_cache_are_written_past_it(monkeypatch):
    z = torch.empty(64, 32, dtype=torch.cfloat)
    for cache, expected in (
        (2 * z.nbytes, ("apply", "apply_backward")),
        (2 * z.nbytes + 1, ("apply_backward",)),
        (3 * z.nbytes + 1, ()),
    ):
        monkeypatch.setattr(native, "cache_bytes", lambda cache=cache: cache)
        kernels.forget()
        assert cpu_engine.plan(z.shape, z.stride(), z.dtype, 1).streams == expected
    kernels.forget()


def test_two_calls_at_a_time_have_scratch_memory_of_their_own():
    z = oracle.correlated(4, 3, 8, 8)
    F.complex_batch_norm(z, None, None, training=True)  # leaves its memory for one of the two
    sweeps = [cpu_engine.Sweep((z,), 1e-5) for _ in range(2)]
    for sweep in sweeps:
        sweep.moments()
    used = {sweep.work.job.partial for sweep in sweeps}
    assert len(used) == 2
    y, *statistics = sweeps[1].forward(None, None, None, None)
    work = sweeps[1].work
    sweeps[1].finish(None, *statistics)
    assert cpu_engine.Sweep((z,), 1e-5).work is work  # and it is used again
    assert torch.equal(y[0], F.complex_batch_norm(z, None, None, training=True))


def test_a_negative_view_as_parameter_keeps_its_sign():
    z = oracle.correlated(6, 3, 5, 5)
    weight, bias = torch._neg_view(torch.randn(3, 3)), torch._neg_view(torch.randn(3, 2))
    both = (
        F.complex_batch_norm(z, None, None, weight, bias, training=True, engine=engine)
        for engine in ("auto", "reference")
    )
    close([next(both)], [next(both)], 1e-5)


def test_few_rows_are_shared_between_threads_too():
    z = torch.empty(256, 1024, dtype=torch.cfloat)
    assert cpu_engine.plan(z.shape, z.stride(), z.dtype, 4).threads == 4


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32, torch.float64, None])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64, None])
def test_parameters_of_any_precision(weight_dtype, bias_dtype):
    z, g = oracle.correlated(6, 3, 5, 5), torch.randn(6, 3, 5, 5, dtype=torch.cfloat)
    dtypes = (weight_dtype, 3), (bias_dtype, 2)
    given = [None if d is None else torch.randn(3, k).to(d) for d, k in dtypes]
    found = []
    for engine in ("auto", "reference"):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (z, *given)]
        options = dict(training=True, engine=engine)
        y = F.complex_batch_norm(leaves[0], None, None, *leaves[1:], **options)
        y.backward(g)
        found.append([y, *(t.grad for t in leaves if t is not None)])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    close(*found, 2e-3 if weight_dtype is torch.float16 else 1e-5)


@pytest.mark.parametrize("engine", ["numba", "reference"])
def test_the_gradient_of_the_bias_never_goes_through_half_precision(engine):
    z, weight = oracle.correlated(64, 2, 40, 40), torch.ones(2, 3, dtype=torch.float16)
    bias = torch.zeros(2, 2, requires_grad=True)
    y = F.complex_batch_norm(z, None, None, weight, bias, training=True, engine=engine)
    y.real.sum().backward()  # more than 65504, the largest number of float16
    assert bias.grad[:, 0].eq(64 * 40 * 40).all()


def test_layouts_are_recognised_without_a_copy():
    z = torch.empty(4, 6, 5, 3)
    known = {
        "contiguous": (z, False),
        "channels_last": (z.to(memory_format=torch.channels_last), True),
        "some channels": (z[:, 1:4], False),
        "every other sample": (z[::2], False),
        "height and width exchanged": (z.transpose(2, 3), False),
        "samples by channels": (torch.empty(7, 3), True),
    }
    for name, (tensor, rows) in known.items():
        found = layout(tensor.shape, tensor.stride())
        assert found is not None and found.rows is rows, name
    overlapping = torch.empty(4, 90).unfold(1, 15, 10)
    for tensor in (z[..., ::2], z[:, :, :1].expand(4, 6, 5, 3), z[:, :, 1:3, :2], overlapping):
        assert layout(tensor.shape, tensor.stride()) is None


def test_overlapping_frames_are_told_apart():
    x = oracle.correlated(8, 500, 1)[..., 0].requires_grad_()
    frames, c = x.unfold(1, 64, 16), torch.randn(8, 28, 64, dtype=torch.cfloat)
    found = []
    for re, im in (
        (frames.real, frames.imag.contiguous()),
        (frames.real.contiguous(), frames.imag.contiguous()),
    ):
        alone = torch.autograd.grad(
            F.complex_batch_norm(torch.complex(re, im), None, None, training=True), x, c
        )
        y = torch.complex(*F.complex_batch_norm((re, im), None, None, training=True))
        found.append([y, *alone, *torch.autograd.grad(y, x, c)])
    whole = F.complex_batch_norm(frames, None, None, training=True)
    found.append([whole, *torch.autograd.grad(whole, x, c) * 2])
    close(found[0], found[1], 1e-5)
    close(found[2], found[1], 1e-5)


def test_values_whose_squares_float32_cannot_hold():
    z, g = oracle.correlated(6, 3, 5, 5) + 1, torch.randn(6, 3, 5, 5, dtype=torch.cfloat)
    weight, bias = torch.randn(3, 3), torch.randn(3, 2)
    for scale in (1e15, 1e17, 1e19, 1e22, 1e38, 1e39, 1e60):
        values = scale * z if scale < 1e30 else scale * z.to(torch.complex128)
        found = step(values, g.to(values.dtype), weight, bias)
        expected = step(values, g.to(values.dtype), weight, bias, engine="reference")
        assert all(t.isfinite().all() for t in found)
        close(found, expected, 1e-5)


# --- what torch asks of an operator ------------------------------------------------------------


def samples():
    for pair in (False, True):
        z = oracle.correlated(3, 2, 2, 3, dtype=torch.complex128)
        parts = [z.real.clone(), z.imag.clone()] if pair else [z, None]
        for evaluation in (False, True):
            given = (
                [torch.randn(2, 2).double(), torch.tensor([[1.0, 2.0, 0.5]] * 2).double()]
                if evaluation
                else [None, None]
            )
            yield parts, given


def test_opcheck():
    ops = torch.ops.cbn_lab
    for parts, fixed in samples():
        w, b = torch.randn(2, 3).double(), torch.randn(2, 2).double()
        leaves = [None if t is None else t.clone().requires_grad_() for t in (*parts, w, b)]
        args = (*leaves[:2], *fixed, *leaves[2:], 1e-5, "auto")
        torch.library.opcheck(ops.complex_batch_norm.default, args)
        _, _, mean, covar = ops.complex_batch_norm(*args)
        grads = [None if t is None else torch.randn_like(t).requires_grad_() for t in parts]
        backward = (*leaves[:2], *grads, mean.detach(), covar.detach(), leaves[2], 1e-5)
        torch.library.opcheck(
            ops.complex_batch_norm_backward.default,
            (*backward, fixed[0] is None, True, "auto"),
        )


def test_the_operator_and_the_eager_path_are_the_same(monkeypatch):
    z, g = oracle.correlated(6, 3, 4, 4), torch.randn(6, 3, 4, 4, dtype=torch.cfloat)
    weight, bias = torch.randn(3, 3), torch.randn(3, 2)
    eager = step(z, g, weight, bias)
    calls = []
    monkeypatch.setattr(operator, "is_plain", lambda *args: calls.append(1))
    dispatched = step(z, g, weight, bias)
    assert calls and all(torch.equal(a, b) for a, b in zip(eager, dispatched, strict=True))


def test_third_derivative_and_functional_transforms():
    z = oracle.correlated(3, 2, 2, dtype=torch.complex128)

    def loss(z):
        y = F.complex_batch_norm(z, None, None, training=True)
        return (y.abs() ** 4).sum()

    transformed = torch.func.grad(loss)(z)
    leaf = z.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(transformed, plain)
    second = torch.autograd.grad((plain.abs() ** 2).sum(), leaf, create_graph=True)[0]
    third = torch.autograd.grad((second.abs() ** 2).sum(), leaf)[0]
    assert third.isfinite().all() and third.abs().max() > 0


def test_a_kind_that_cannot_be_compiled_falls_back_with_one_warning(monkeypatch):
    """Loops of one kind may be on disk and numba gone: another kind must not raise."""
    module = operator.load_engine("numba")
    monkeypatch.setitem(operator._loaded, "numba", module)

    def fail(*args):
        raise ImportError("no numba today")

    kernels.forget()
    monkeypatch.setattr(module, "plan", fail)
    z = oracle.correlated(4, 3, 5)
    with pytest.warns(UserWarning, match="numba engine cannot be loaded.*no numba today"):
        got = F.complex_batch_norm(z, None, None, training=True)
    expected = F.complex_batch_norm(z, None, None, training=True, engine="reference")
    torch.testing.assert_close(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.complex_batch_norm(z, None, None, training=True)


@pytest.mark.parametrize("rows", [False, True])
def test_compiled_loops_raise_nothing(rows):
    """An error in a loop would call what is not there once the loops come from the disk."""
    cpu_engine.loops(torch.float32, True, rows)
    kind = "rows" if rows else "planes"
    newest = max(
        native.cache_folder().glob(f"{kind}_f4_interleaved*"), key=lambda p: p.stat().st_mtime
    )
    assert b"numba_do_raise" not in newest.read_bytes()


@pytest.mark.parametrize("pair", [False, True])
def test_inductor_compiles_the_layer_without_a_break(pair):
    if not any(os.access(os.path.join(p, "cc"), os.X_OK) for p in os.get_exec_path()):
        pytest.skip("torch.compile's default backend needs a C++ compiler")
    z = oracle.correlated(4, 3, 6, 6)
    args = (z.real.clone(), z.imag.clone()) if pair else (z,)
    plain, compiled = ComplexBatchNorm2d(3), ComplexBatchNorm2d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex operators are called, not generated
        run = torch.compile(lambda *a: compiled(*a), fullgraph=True)
        out = run(*args)
    expected = plain(*args)
    for a, b in zip(out if pair else (out,), expected if pair else (expected,), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(compiled.running_covar, plain.running_covar)
    assert compiled.num_batches_tracked == 1
    torch._dynamo.reset()


def test_only_the_input_is_saved():
    for parts in ((torch.randn(8, 16, 8, 8, dtype=torch.cfloat),), torch.randn(2, 8, 16, 8, 8)):
        parts, saved = tuple(p.requires_grad_() for p in parts), {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ComplexBatchNorm2d(16)(*(p * 1 for p in parts))
        size = 8 * 16 * 8 * 8 * 8
        assert size <= sum(saved.values()) - 0 <= 1.05 * size


# --- precision ------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32():
    z = oracle.correlated(8, 3, 4, 4, scale=300)  # squares overflow float16
    bn = ComplexBatchNorm2d(3)
    y = bn(z.to(torch.complex32).requires_grad_())
    assert y.dtype == torch.complex32
    expected = oracle.complex_batch_norm(z, bn.weight).output
    assert (y.to(torch.complex128) - expected).abs().max() < 1e-2
    assert bn.running_covar.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        re, im = (p.to(dtype).requires_grad_() for p in (z.real, z.imag))
        out = bn(re, im)
        assert out[0].dtype == dtype
        (out[0].float().sum() + out[1].float().square().sum()).backward()
        assert re.grad.dtype == dtype and im.grad.isfinite().all()


def test_statistics_stay_in_full_precision_under_autocast():
    z, bn = oracle.correlated(8, 3, 4, 4), ComplexBatchNorm2d(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bn(z)
        re, _ = bn(z.real.bfloat16(), z.imag.bfloat16())
    assert y.dtype == torch.complex64 and re.dtype == torch.bfloat16
    expected = oracle.complex_batch_norm(z, bn.weight).output.cfloat()
    torch.testing.assert_close(y, expected)
    assert bn.running_mean.dtype == bn.running_covar.dtype == torch.float32


# --- choice of engine ---------------------------------------------------------------------


def test_engines_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = oracle.correlated(4, 2)
    with pytest.raises(ValueError, match="auto, reference, numba, triton.*'fast'"):
        F.complex_batch_norm(z, None, None, training=True, engine="fast")
    with pytest.raises(ValueError, match="on cuda for engine='triton', got cpu"):
        F.complex_batch_norm(z, None, None, training=True, engine="triton")


def test_forward_mode_never_loses_its_tangent_in_silence():
    z = oracle.correlated(5, 3, 4, dtype=torch.complex128)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level():
            dual = forward_ad.make_dual(z, torch.randn_like(z))
            with pytest.raises(NotImplementedError, match="jvp"):
                F.complex_batch_norm(dual, None, None, training=True)


def test_a_device_without_float64_is_named():
    with pytest.raises(NotImplementedError, match="got mps.*no float64"):
        operator.check_engine("auto", "mps")


def test_an_engine_that_cannot_load_warns_once_and_is_replaced(monkeypatch):
    def fail():
        raise OSError("no loops today")

    module = operator.load_engine("numba")
    monkeypatch.setattr(module, "check_available", fail)
    monkeypatch.setattr(operator, "_loaded", {"reference": kernels.reference})
    kernels.forget()
    z = oracle.correlated(4, 2)
    with pytest.warns(UserWarning, match="numba engine cannot be loaded.*no loops today"):
        y = F.complex_batch_norm(z, None, None, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = F.complex_batch_norm(z, None, None, training=True)
    torch.testing.assert_close(y, oracle.complex_batch_norm(z).output.cfloat())
    assert torch.equal(y, again)


def run_script(text, **environment):
    path = os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_a_new_process_neither_compiles_nor_imports_numba():
    F.complex_batch_norm(oracle.correlated(4, 2, 3), None, None, training=True)  # fills the cache
    script = """
        import sys, time, torch
        from cbn_lab import functional as F
        assert "numba" not in sys.modules and "llvmlite" not in sys.modules
        z = torch.randn(4, 2, 3, dtype=torch.cfloat)
        start = time.perf_counter()
        F.complex_batch_norm(z, None, None, training=True, engine="numba")
        first = time.perf_counter() - start
        start = time.perf_counter()
        F.complex_batch_norm(torch.randn(40, 20, 30, dtype=torch.cfloat), None, None, training=True)
        print("numba" in sys.modules, first, time.perf_counter() - start)
    """
    for _ in range(3):  # the machine may be busy with something else
        imported, first, other_shape = run_script(script).split()
        assert imported == "False"
        if float(first) <= 0.5 and float(other_shape) <= 0.5:
            return
    pytest.fail(f"first call {first} s, new shape {other_shape} s")


def test_damaged_cache_is_compiled_again(tmp_path):
    from cbn_lab.kernels.cpu import native

    good = {"loop": ("symbol", b"code")}
    native._store(tmp_path / "loop.bin", good)
    data = (tmp_path / "loop.bin").read_bytes()
    assert native._unpack(data, ["loop"]) == good
    for bad in (data[:-1], data + b"x", b"", b"\n"):
        with pytest.raises(ValueError):
            native._unpack(bad, ["loop"])


@pytest.mark.parametrize("where", ["statistics", "weight"])
def test_state_on_another_device_is_named_and_never_read(where):
    bn = ComplexBatchNorm2d(3)
    z = torch.randn(4, 3, 5, 5, dtype=torch.cfloat)
    if where == "weight":
        bn.weight = torch.nn.Parameter(bn.weight.detach().to("meta"))
    else:
        bn = bn.to("meta").eval()
    with pytest.raises(ValueError, match="expected .* on cpu, as the input, got meta"):
        bn(z)


def test_a_default_device_does_not_move_the_engines_own_memory():
    z = torch.randn(4, 3, 5, 5, dtype=torch.cfloat, requires_grad=True)
    bn = ComplexBatchNorm2d(3)
    expected = ComplexBatchNorm2d(3)(z)
    with torch.device("meta"):
        y = bn(z)
        y.abs().sum().backward()
    torch.testing.assert_close(y, expected)


# --- running statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("gone", [None, 0, 1])
@pytest.mark.parametrize("kind", oracle.RUNNING)
def test_the_engine_moves_the_running_statistics_by_the_rule(kind, gone, factor):
    z = oracle.correlated(6, 3, 5, dtype=torch.complex64) + 1
    start = torch.randn(3, 2).double(), torch.rand(3, 3).double()
    found = {}
    for engine in ("reference", "numba"):
        form = oracle.RUNNING[kind]
        running = [None if k == gone else form(t.clone()) for k, t in enumerate(start)]
        places = [t if t is None else (t.data_ptr(), t._version) for t in running]
        for _ in range(2):
            F.complex_batch_norm(z, *running, training=True, momentum=factor, engine=engine)
        for tensor, place in zip(running, places, strict=True):
            assert tensor is None or tensor.data_ptr() == place[0]  # in place
            assert tensor is None or tensor._version > place[1]  # and autograd is told
        found[engine] = running
    for mine, expected in zip(found["numba"], found["reference"], strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", oracle.RUNNING)
def test_given_statistics_may_have_any_real_type_and_stride(kind):
    z = oracle.correlated(6, 3, 5, dtype=torch.complex64)
    mean, covar = torch.randn(3, 2), torch.tensor([[2.0, 1.0, 0.5]]).repeat(3, 1)
    running = oracle.RUNNING[kind](mean), oracle.RUNNING[kind](covar)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outputs = [
                F.complex_batch_norm(z.clone().requires_grad_(grad), *running, engine=engine)
                for engine in ("reference", "numba")
            ]
        torch.testing.assert_close(*outputs)


def test_running_statistics_made_in_inference_mode_can_be_moved():
    with torch.inference_mode():
        running = torch.zeros(3, 2), torch.ones(3, 3)
        z = oracle.correlated(6, 3, 5, dtype=torch.complex64) + 1
        F.complex_batch_norm(z, *running, training=True, engine="numba")
        assert not running[0].eq(0).any()


def test_running_statistics_made_in_inference_mode_are_not_moved_outside():
    with torch.inference_mode():
        running = torch.zeros(3, 2), torch.ones(3, 3)
    z, count = oracle.correlated(6, 3, 5, dtype=torch.complex64) + 1, torch.tensor(0)
    with pytest.raises(RuntimeError, match="inference"):
        F.complex_batch_norm(z, *running, training=True, num_batches_tracked=count)
    assert running[0].eq(0).all() and running[1].eq(1).all() and count == 0


@pytest.mark.parametrize("engine", ["numba", "reference"])
def test_running_statistics_of_a_tensor_subclass_are_moved(engine):
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    mean, covar = (two(torch.zeros(3, k), torch.zeros(3, k)) for k in (2, 3))
    z = oracle.correlated(6, 3, 5, dtype=torch.complex64) + 1
    F.complex_batch_norm(z, mean, covar, training=True, engine=engine)
    assert mean.a.all() and mean.b.all() and covar.a[:, :2].all()


@pytest.mark.parametrize("run", ["eager", "operator", "torch.func"])
def test_a_step_leaves_its_workspaces_to_the_next(run, monkeypatch):
    z = oracle.correlated(4, 3, 5, 5, dtype=torch.complex64)

    def forward(z):
        if run == "operator":
            args = z, None, None, None, None, None, 1e-5, "numba"
            return torch.ops.cbn_lab.complex_batch_norm(*args)[0]
        return F.complex_batch_norm(z, None, None, training=True)

    def backward():
        if run == "torch.func":
            return torch.func.grad(lambda z: forward(z).real.sum())(z)
        forward(z.clone().requires_grad_()).real.sum().backward()

    backward()
    new, made = [], cpu_engine.Workspace
    monkeypatch.setattr(cpu_engine, "Workspace", lambda *args: new.append(args) or made(*args))
    backward()
    assert not new


@pytest.mark.parametrize("bad", [torch.tensor([0, 0, 0]), torch.tensor(True), torch.tensor(0.0), 3])
def test_a_counter_that_cannot_count_is_named(bad):
    z, mean = oracle.correlated(6, 3, 5, dtype=torch.complex64) + 1, torch.zeros(3, 2)
    with pytest.raises((TypeError, ValueError), match="expected"):
        F.complex_batch_norm(z, mean, None, training=True, num_batches_tracked=bad)
    assert not mean.any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_the_batch_is_counted_with_the_statistics(kind):
    z, count = oracle.correlated(6, 3, 5, dtype=torch.complex64), torch.tensor(4, dtype=kind)
    for state in ((None, None), (torch.zeros(3, 2), None)):
        for batch in (z, z.to(torch.complex128)):
            version = count._version
            F.complex_batch_norm(batch, *state, training=True, num_batches_tracked=count)
            assert count._version > version
    with pytest.raises(ValueError, match="eps"):
        F.complex_batch_norm(z, None, None, training=True, eps=-1, num_batches_tracked=count)
    F.complex_batch_norm(z, torch.zeros(3, 2), torch.ones(3, 3), num_batches_tracked=count)
    assert count == 8


def test_nothing_is_moved_where_the_tensors_cannot_be_saved():
    bn, z = ComplexBatchNorm2d(3), oracle.correlated(4, 3, 5, 5, dtype=torch.complex64) + 1

    def full(tensor):
        raise MemoryError("no room")

    with (
        torch.autograd.graph.saved_tensors_hooks(full, lambda t: t),
        pytest.raises(MemoryError),
    ):
        bn(z.requires_grad_())
    assert not bn.running_mean.any() and bn.num_batches_tracked == 0


def test_a_checkpoint_that_ends_with_the_layer_moves_the_statistics_once():
    from torch.utils.checkpoint import checkpoint

    layers = ComplexBatchNorm2d(3, momentum=None), ComplexBatchNorm2d(3, momentum=None)
    for k in range(4):
        z = (oracle.correlated(4, 3, 5, 5, dtype=torch.complex64) + k).requires_grad_()
        layers[0](z)
        checkpoint(layers[1], z, use_reentrant=False).abs().sum().backward()
    for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_traced_layer_follows_its_input():
    bn = ComplexBatchNorm2d(3).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer calls itself deprecated
        traced = torch.jit.trace(bn, oracle.correlated(4, 3, 5, 6, dtype=torch.complex64))
        z = oracle.correlated(4, 3, 5, 6, dtype=torch.complex64)
        torch.testing.assert_close(traced(z), bn(z))
