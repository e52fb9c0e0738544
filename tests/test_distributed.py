"""Statistics over ranks, in processes that talk through gloo."""

import os
import traceback

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cbn_lab import (
    ComplexBatchNorm1d,
    ComplexBatchNorm2d,
    SyncComplexBatchNorm,
    convert_sync_complex_batchnorm,
)

SIZES = (5, 0, 2)  # unequal batches, one of them empty


def batch(shape=(3, 4, 2), mean=0.0):
    torch.manual_seed(0)
    return oracle.correlated(sum(SIZES), *shape, dtype=torch.complex128) + mean


def share(z, rank):
    return z.split(SIZES)[rank].clone()


def work(rank, folder, tasks, results):
    """Each task in a process group of its own, so that one cannot disturb the next."""
    torch.set_num_threads(1)
    for task in tasks:
        path = os.path.join(folder, task.__name__)
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=len(SIZES)
        )
        try:
            results[task.__name__, rank] = task(rank)
        except Exception:
            results[task.__name__, rank] = traceback.format_exc()
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_all_ranks(tmp_path_factory):
    """What each task returned on each rank; one start of the processes serves all tasks."""
    tasks = [step, too_few, data_parallel]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (tmp_path_factory.mktemp("ranks"), tasks, results), nprocs=len(SIZES))
        results = dict(results)

    def of_task(task):
        found = [results[task.__name__, rank] for rank in range(len(SIZES))]
        for text in found:
            assert not isinstance(text, str), text
        return found

    return of_task


def layer(**kwargs):
    bn = SyncComplexBatchNorm(3, dtype=torch.float64, **kwargs)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in bn.parameters():
            p.copy_(torch.randn_like(p))
    return bn


def numbers(*tensors):
    return [t.detach().numpy() for t in tensors]


def step(rank):
    reductions, plain = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: reductions.append(1) or plain(*a, **k)
    bn, z = layer(), share(batch(mean=1e4), rank).requires_grad_()
    y = bn(z)
    forward = len(reductions)
    y.backward(share(torch.randn_like(batch()), rank))
    pair = layer()(z.detach().real.clone(), z.detach().imag.clone())
    dist.all_reduce = plain
    return forward, len(reductions) - forward - 1, numbers(
        y, z.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_covar, *pair
    )  # fmt: skip


def test_all_ranks_together_are_one_layer_on_the_whole_batch(on_all_ranks):
    single = ComplexBatchNorm1d(3, dtype=torch.float64)
    single.load_state_dict(layer().state_dict())
    z = batch(mean=1e4).flatten(2).requires_grad_()
    y = single(z)
    y.backward(torch.randn_like(batch()).flatten(2))
    ranks = on_all_ranks(step)
    assert [r[:2] for r in ranks] == [(1, 1)] * len(SIZES)  # one all-reduce each way
    out, grad, weight, bias, mean, covar, re, im = zip(*(r[2] for r in ranks), strict=True)

    def joined(parts):
        return torch.cat([torch.from_numpy(p) for p in parts]).flatten(2)

    torch.testing.assert_close(joined(out), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.complex(joined(re), joined(im)), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(joined(grad), z.grad, rtol=1e-5, atol=1e-6)
    for got, wanted in ((weight, single.weight), (bias, single.bias)):
        torch.testing.assert_close(torch.from_numpy(sum(got)), wanted.grad, rtol=1e-5, atol=1e-5)
    for rank in range(len(SIZES)):
        torch.testing.assert_close(torch.from_numpy(mean[rank]), single.running_mean)
        torch.testing.assert_close(torch.from_numpy(covar[rank]), single.running_covar)


def too_few(rank):
    bn = SyncComplexBatchNorm(3)
    try:
        bn(batch()[: 1 if rank == 0 else 0, :, :1, :1].cfloat())
    except ValueError as error:
        return str(error), int(bn.num_batches_tracked), not bn.running_mean.any()


def test_one_value_over_all_ranks_raises_on_each(on_all_ranks):
    for text, count, untouched in on_all_ranks(too_few):
        assert "over all ranks" in text and "got 1" in text
        assert count == 0 and untouched


def data_parallel(rank):
    torch.manual_seed(rank)  # buffers and parameters differ before DDP broadcasts them
    bn = SyncComplexBatchNorm(3, dtype=torch.float64)
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_covar.uniform_(), bn.weight.normal_()
    model = nn.parallel.DistributedDataParallel(bn)
    model(share(batch(), rank)).abs().square().sum().backward()
    return numbers(bn.running_mean, bn.running_covar, bn.weight, bn.weight.grad)


def test_buffers_and_gradients_under_data_parallel(on_all_ranks):
    ranks = on_all_ranks(data_parallel)
    for other in ranks[1:]:
        for a, b in zip(ranks[0], other, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


def test_converter_keeps_parameters_buffers_and_mode():
    model = nn.Sequential(
        ComplexBatchNorm2d(3, momentum=None), nn.Sequential(ComplexBatchNorm1d(4))
    )
    model[1][0].eval()
    before = dict(model.named_parameters()), dict(model.named_buffers())
    converted = convert_sync_complex_batchnorm(model)
    assert [type(m) for m in (converted[0], converted[1][0])] == [SyncComplexBatchNorm] * 2
    assert converted[0].momentum is None and not converted[1][0].training
    for old, new in zip(
        before, (dict(converted.named_parameters()), dict(converted.named_buffers())), strict=True
    ):
        assert list(old) == list(new) and all(old[k] is new[k] for k in old)
    z = oracle.correlated(4, 3, 2, 2)
    torch.testing.assert_close(converted[0](z), ComplexBatchNorm2d(3)(z))
    with pytest.raises(ValueError, match="more than 1 value"):
        converted[0](z[:1, :, :1, :1])
