"""What only a GPU can show: the layer as a whole, memory, streams, graphs, ranks and the traces."""

import copy
import gc
import os
import traceback

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import cbn_lab
from cbn_lab import ComplexBatchNorm2d, SyncComplexBatchNorm, kernels
from cbn_lab import functional as F

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train(layer, z, g):
    leaf = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward(g)
    return y.detach(), leaf.grad


@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(32, 64, 32, 32), (8, 3, 7, 7), (2, 1, 700, 900)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_gpu_and_cpu_train_alike(dtype, shape, kind):
    z, g = oracle.correlated(*shape, dtype=dtype) + 3, torch.randn(shape, dtype=dtype)
    z, g = z.contiguous(memory_format=kind), g.contiguous(memory_format=kind)
    here = ComplexBatchNorm2d(shape[1], dtype=dtype)
    there = copy.deepcopy(here).cuda()
    for _ in range(3):
        expected = train(here, z, g)
        found = train(there, z.cuda(), g.cuda())
        for a, b in zip(found, expected, strict=True):
            assert a.stride() == b.stride()
            exact = dtype == torch.complex128
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-10 if exact else 1e-5)
            assert not exact or (a.cpu() - b).abs().max() <= 1e-9 * b.abs().max()
    for (name, a), b in zip(there.state_dict().items(), here.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, msg=name)
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-2)
    there.eval(), here.eval()
    torch.testing.assert_close(there(z.cuda()).cpu(), here(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1 << 15, 1 << 15), (1, 1, 46342, 46342), (46342**2, 1)])
def test_more_values_than_32_bits_count(shape):
    z = torch.randn(*shape, device="cuda", dtype=torch.cfloat)
    z.real.add_(5)
    y = F.complex_batch_norm(z, None, None, training=True)
    del z
    flat = torch.view_as_real(y).flatten(0, -2)
    for part in (flat[: 1 << 20], flat[-(1 << 20) :]):
        assert part.isfinite().all() and part.mean().abs() < 0.01
        assert (part.square().mean(0) - 1).abs().max() < 0.01


def test_nothing_waits_for_the_device():
    bn = ComplexBatchNorm2d(5).cuda()
    z = torch.randn(4, 5, 6, 6, dtype=torch.cfloat, device="cuda", requires_grad=True)
    bn(z).abs().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bn(z).abs().sum().backward()
        bn.eval()(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_and_replayed():
    bn = ComplexBatchNorm2d(5).cuda()
    twin = copy.deepcopy(bn)
    z = torch.randn(4, 5, 6, 6, dtype=torch.cfloat, device="cuda", requires_grad=True)
    g = torch.randn_like(z)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(bn(z), [z, *bn.parameters()], g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bn(z)
        grads = torch.autograd.grad(y, [z, *bn.parameters()], g)
    twin.load_state_dict(bn.state_dict())
    with torch.no_grad():
        z.copy_(oracle.correlated(4, 5, 6, 6).cuda() + 2)
    graph.replay()
    expected = twin(z)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, [z, *twin.parameters()], g)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(bn.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_calls_on_two_streams_do_not_share_memory():
    z = [oracle.correlated(64, 8, 64, 64).cuda() * scale for scale in (1, 7)]
    expected = [F.complex_batch_norm(part, None, None, training=True) for part in z]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for part, stream in zip(z, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(F.complex_batch_norm(part, None, None, training=True))
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("offset", [1, 2])
def test_a_view_that_begins_anywhere(offset):
    flat = oracle.correlated(3 * 4 * 32 + offset).cuda()
    for start in (0, offset):
        z = flat[start : start + 3 * 4 * 32].view(3, 4, 32)
        y = F.complex_batch_norm(z, None, None, training=True)
        expected = oracle.complex_batch_norm(z).output.cfloat()
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_input_is_saved():
    bn = ComplexBatchNorm2d(64).cuda()
    z = torch.randn(16, 64, 32, 32, dtype=torch.cfloat, device="cuda", requires_grad=True)
    bn(z)
    before = torch.cuda.memory_allocated()
    y = bn(z)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= 0.02 * z.nbytes  # the input is there anyway


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second in CUDA graphs
@pytest.mark.parametrize("pair", [False, True])
def test_compiles_without_a_break(pair, mode):
    kernels.operator.forget()  # what the engine keeps must not be kept in a graph's memory
    bn = ComplexBatchNorm2d(3).cuda()
    twin = copy.deepcopy(bn)
    compiled = torch.compile(bn, fullgraph=True, mode=mode)
    for _ in range(3):
        z = oracle.correlated(4, 3, 5, 6).cuda()
        args = (z.real.clone(), z.imag.clone()) if pair else (z,)
        found, expected = compiled(*args), twin(*args)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(bn.running_covar, twin.running_covar)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    re, im = (256 * part for part in torch.randn(2, 8, 3, 9, 9, device="cuda"))
    bn = ComplexBatchNorm2d(3).cuda()
    with torch.autocast("cuda", dtype=dtype):
        y = bn(re.to(dtype), im.to(dtype))
    assert y[0].dtype == dtype and bn.running_covar.dtype == torch.float32
    for part in y:
        assert abs(part.float().square().mean() - 0.5) < 0.05


def test_state_on_another_device_is_named():
    z = torch.randn(4, 3, 5, 5, dtype=torch.cfloat, device="cuda")
    with pytest.raises(ValueError, match="on cuda:0, as the input, got cpu"):
        ComplexBatchNorm2d(3)(z)
    with pytest.raises(ValueError, match="expected input on cpu for engine='numba', got cuda"):
        F.complex_batch_norm(z, None, None, training=True, engine="numba")


# --- ranks -----------------------------------------------------------------------------------


def work(rank, backend, path, sizes, results):
    torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        dist.init_process_group(
            backend, init_method=f"file://{path}", rank=rank, world_size=len(sizes)
        )
        torch.manual_seed(0)
        z = oracle.correlated(sum(sizes), 3, 4, 2).cuda() + 2
        g = torch.randn(z.shape, dtype=torch.cfloat).cuda()
        bn = SyncComplexBatchNorm(3).cuda()
        y, grad = train(bn, z.split(sizes)[rank], g.split(sizes)[rank])
        results[rank] = [t.cpu().numpy() for t in (y, grad, bn.running_covar)]
    except Exception:
        results[rank] = traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "sizes"), [("gloo", (5, 0, 2)), ("nccl", (5, 2))])
def test_statistics_over_ranks_on_the_device(backend, sizes, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < len(sizes):
        pytest.skip("NCCL needs a GPU for each rank")
    with mp.Manager() as manager:
        results = manager.dict()
        path = os.path.join(tmp_path, backend)
        mp.spawn(work, (backend, path, sizes, results), nprocs=len(sizes))
        results = dict(results)
    for text in results.values():
        assert not isinstance(text, str), text
    torch.manual_seed(0)
    z = oracle.correlated(sum(sizes), 3, 4, 2).cuda() + 2
    g = torch.randn(z.shape, dtype=torch.cfloat).cuda()
    bn = ComplexBatchNorm2d(3).cuda()
    y, grad = train(bn, z, g)
    for k, whole in enumerate((y, grad)):
        for rank, part in enumerate(whole.cpu().split(sizes)):
            mine = torch.from_numpy(results[rank][k])
            torch.testing.assert_close(mine, part, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(results[0][2]), bn.running_covar.cpu())


# --- diagnostics -------------------------------------------------------------------------------


def leaking(update):
    bn = cbn_lab.LeakyComplexBatchNorm2d(16, update=update).cuda()
    z = torch.randn(16, 16, 32, 32, dtype=torch.cfloat, device="cuda")
    z = z.requires_grad_()

    def step():
        bn(z).abs().mean()

    return bn, step


def test_a_trace_sees_a_leak_grow_and_the_cure_hold(tmp_path):
    slopes = {}
    for update in ("rebind", "no_grad"):
        bn, step = leaking(update)
        step()
        gc.collect()
        with cbn_lab.MemoryTrace(history=True) as trace:
            before = cbn_lab.inspect_buffers(bn)
            for _ in range(8):
                step()
                trace.step()
            after = cbn_lab.inspect_buffers(bn)
        row = trace.rows[-1]
        assert row.device == "cuda:0" and row.peak > row.allocated > 0 and row.reserved > 0
        slopes[update] = trace.slope()[0]
        assert trace.snapshot(tmp_path / f"{update}.pickle")
        assert (tmp_path / f"{update}.pickle").stat().st_size > 1000
        if update == "rebind":
            held = max(r.retained_bytes for r in after) - max(r.retained_bytes for r in before)
    assert slopes["rebind"] == pytest.approx(held / 8, rel=0.05) and held > 1 << 20
    assert abs(slopes["no_grad"]) < 0.01 * slopes["rebind"]


def test_the_doctor_names_a_leak_on_the_device():
    bn, step = leaking("rebind")
    diagnosis = cbn_lab.diagnose(step, bn)
    assert diagnosis.verdict == "growing"
    assert {f.path.rpartition(".")[2] for f in diagnosis.findings} >= {"running_covar"}
    assert max(f.bytes_per_step or 0 for f in diagnosis.findings) > 1 << 17
    bn, step = leaking("no_grad")
    assert cbn_lab.diagnose(step, bn).verdict == "clean"


def test_the_checklist_grades_layers_on_the_device():
    def factory(num_features, **options):
        return ComplexBatchNorm2d(num_features, **options)

    assert cbn_lab.check_batch_norm(factory, kind="complex").ok
    assert isinstance(factory(2), nn.Module)
