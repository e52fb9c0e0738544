"""Calls like earlier ones: what is recognised, and that nothing else changes by it."""

import gc
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cbn_lab
from cbn_lab import ComplexBatchNorm1d, ComplexBatchNorm2d, kernels
from cbn_lab import functional as F
from cbn_lab.kernels import recall
from cbn_lab.kernels.cpu import engine as cpu_engine


@pytest.fixture(autouse=True)
def nothing_known():
    kernels.forget()


# --- tensors ---------------------------------------------------------------------------------

SHAPE = 3, 2


class Subclass(torch.Tensor):
    pass


def inference_tensor():
    with torch.inference_mode():
        return torch.zeros(SHAPE)


OTHERS = {  # what a plain float32 tensor of that shape must not be taken for
    "dtype": lambda: torch.zeros(SHAPE, dtype=torch.float64),
    "int": lambda: torch.zeros(SHAPE, dtype=torch.int32),
    "complex": lambda: torch.zeros(SHAPE, dtype=torch.cfloat),
    "shape": lambda: torch.zeros(3, 3),
    "dimensions": lambda: torch.zeros(6),
    "strides": lambda: torch.zeros(2, 3).T,
    "gaps": lambda: torch.zeros(3, 4)[:, :2],
    "expanded": lambda: torch.zeros(1, 2).expand(SHAPE),
    "device": lambda: torch.zeros(SHAPE, device="meta"),
    "requires grad": lambda: torch.zeros(SHAPE, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.zeros(SHAPE)),
    "frozen parameter": lambda: nn.Parameter(torch.zeros(SHAPE), requires_grad=False),
    "subclass": lambda: torch.zeros(SHAPE).as_subclass(Subclass),
    "negative view": lambda: torch._neg_view(torch.zeros(SHAPE)),
    "inference": inference_tensor,
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
    "none": lambda: None,
    "number": lambda: 1.0,
}
SAME = {
    "itself": lambda tensor: tensor,
    "other numbers": torch.ones_like,
    "another place": lambda tensor: torch.zeros(7)[1:].view(SHAPE),
    "detached": lambda tensor: (tensor.clone().requires_grad_() * 2).detach(),
}


@pytest.fixture(params=["torch's guards", "public properties"])
def alike(request, monkeypatch):
    """Both ways to recognise tensors; the other one is for a torch without these guards."""
    guards = recall._guards()
    assert guards is not recall.Properties  # this torch has them
    chosen = guards if request.param == "torch's guards" else recall.Properties
    monkeypatch.setattr(recall, "_guards", lambda: chosen)
    return recall.alike


@pytest.mark.parametrize("name", OTHERS)
def test_another_tensor_is_not_recognised(name, alike):
    tensor, first = torch.zeros(SHAPE), torch.zeros(4)
    check = alike((first, tensor))
    assert check(first, tensor) and not check(first, OTHERS[name]())
    with torch.no_grad():
        assert check(first, tensor) and not check(first, OTHERS[name]())
    with torch.inference_mode():
        inside = alike((first, tensor))
        assert inside(first, tensor) and not inside(first, OTHERS[name]())


@pytest.mark.parametrize("name", SAME)
def test_other_numbers_are_recognised(name, alike):
    tensor = torch.zeros(SHAPE)
    assert alike((tensor,))(SAME[name](tensor))


def test_a_conjugate_view_is_not_recognised(alike):
    z = torch.zeros(SHAPE, dtype=torch.cfloat)
    assert alike((z,))(z) and not alike((z,))(z.conj())


def test_one_tensor_that_is_there_twice_is_recognised(alike):
    tensor = torch.zeros(SHAPE)
    check = alike((tensor, tensor))
    assert check(tensor, tensor) and not check(tensor, OTHERS["strides"]())


@pytest.mark.parametrize("broken", ["gone", "raises", "always true", "always false"])
def test_guards_that_do_not_work_are_not_used(broken, monkeypatch):
    class Guards:
        def __init__(self, *tensors, **options):
            if broken == "raises":
                raise TypeError("missing dynamic_dims_colours")

        def check(self, *tensors):
            return broken == "always true"

    if broken == "gone":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Guards)
    recall._guards.cache_clear()
    try:
        assert recall._guards() is recall.Properties
    finally:
        recall._guards.cache_clear()


# --- calls -----------------------------------------------------------------------------------


def step(bn, z, grad):
    z = z.clone().requires_grad_() if grad is not None else z
    y = bn(z)
    if grad is not None:
        y.backward(grad)
    return y.detach(), z.grad


def test_the_second_call_is_recognised(alike, monkeypatch):
    bn = ComplexBatchNorm2d(3)
    z, grad = (oracle.correlated(4, 3, 5, 5).cfloat() for _ in range(2))
    examined, check = [], cbn_lab.complex_batch_norm.check_arguments
    monkeypatch.setattr(
        cbn_lab.complex_batch_norm, "check_arguments", lambda *a: examined.append(a) or check(*a)
    )
    step(bn, z, grad)
    assert len(examined) == 1
    # From now on only the way of tensors that are taken as they are is left.
    monkeypatch.setattr(cpu_engine, "Sweep", None)
    first = step(bn, z, grad)
    bn.reset_running_stats()
    again = step(bn, 1 * z, grad)
    assert len(examined) == 1 and all(map(torch.equal, first, again))
    assert bn.num_batches_tracked == 1 and bn.running_mean.any()


def test_nothing_that_is_known_keeps_a_tensor_alive(alike):
    bn, z = ComplexBatchNorm2d(3), oracle.correlated(4, 3, 5, 5).cfloat().requires_grad_()
    grad = torch.ones_like(z)
    y = bn(z)
    y.backward(grad)
    bn.eval()(z)
    assert recall._known
    gone = [weakref.ref(x) for x in (bn, z, grad, y, z.grad, *bn.parameters(), *bn.buffers())]
    del bn, z, grad, y
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_only_so_many_calls_are_kept(monkeypatch):
    monkeypatch.setattr(recall, "CALLS", 5)
    monkeypatch.setattr(recall, "VARIANTS", 2)
    for n in range(2, 30):
        F.complex_batch_norm(oracle.correlated(n, 2), None, None, training=True)
        assert len(recall._known) <= 5
    kernels.forget()
    for dtype in (torch.complex64, torch.complex128):
        for strides in ((6, 3, 1), (6, 1, 2), (3, 18, 1)):
            z = torch.empty_strided((6, 2, 3), strides, dtype=dtype)
            F.complex_batch_norm(z.copy_(oracle.correlated(6, 2, 3)), None, None, training=True)
    (variants,) = recall._known.values()
    assert len(variants) == 2


def test_a_number_of_threads_of_its_own():
    z, before = oracle.correlated(64, 16, 32, 32).cfloat(), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            F.complex_batch_norm(z, None, None, training=True)
            known = recall.recall_call((z, *[None] * 5), (True, "auto", True, None))
            assert known.direct.plan.threads == threads
    finally:
        torch.set_num_threads(before)


# Each makes one argument wrong.
WRONG = {
    "rank": lambda a: a | dict(input=a["input"].flatten(2)),
    "channels": lambda a: a | dict(input=a["input"][:, :2]),
    "real": lambda a: a | dict(input=a["input"].real),
    "none": lambda a: a | dict(input=None),
    "one part": lambda a: a | dict(input=[a["input"]]),
    "three parts": lambda a: a | dict(input=(a["input"],) * 3),
    "number": lambda a: a | dict(input=3),
    "meta": lambda a: a | dict(input=a["input"].to("meta")),
    "one value": lambda a: a | dict(input=a["input"][:1, :, :1, :1]),
    "weight's shape": lambda a: a | dict(weight=torch.ones(3, 2)),
    "weight's device": lambda a: a | dict(weight=a["weight"].to("meta")),
    "integer weight": lambda a: a | dict(weight=a["weight"].int()),
    "bias' shape": lambda a: a | dict(bias=torch.ones(3)),
    "covariance's shape": lambda a: a | dict(running_covar=torch.ones(3, 4)),
    "complex mean": lambda a: a | dict(running_mean=torch.zeros(3, 2, dtype=torch.cfloat)),
    "counter": lambda a: a | dict(num_batches_tracked=torch.tensor(0.0)),
    "eps": lambda a: a | dict(eps=-1.0),
    "momentum": lambda a: a | dict(momentum=None),
    "engine": lambda a: a | dict(engine="fast"),
    "engines": lambda a: a | dict(engine=["numba"]),
    "momentum before the engine": lambda a: a | dict(momentum=None, engine="fast"),
}


def arguments():
    return dict(
        input=oracle.correlated(6, 3, 4, 4).cfloat(),
        running_mean=torch.zeros(3, 2), running_covar=torch.ones(3, 3),
        weight=torch.ones(3, 3), bias=torch.zeros(3, 2),
        training=True, momentum=0.1, eps=1e-5,
        engine="numba", num_batches_tracked=torch.tensor(0),
    )  # fmt: skip


def outcome(call):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return type(error.value), str(error.value)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "rank"])
def test_after_good_calls_a_bad_one_is_refused_as_ever(name, alike):
    bad = WRONG[name](arguments())
    expected = outcome(lambda: F.complex_batch_norm(**bad))
    kernels.forget()
    good = arguments()
    for _ in range(2):
        F.complex_batch_norm(**good)
    bad = WRONG[name](good)
    mean = good["running_mean"].clone()
    assert outcome(lambda: F.complex_batch_norm(**bad)) == expected
    assert torch.equal(mean, good["running_mean"]) and good["num_batches_tracked"] == 2


INPUTS = ["rank", "channels", "real", "none", "number", "one part", "three parts", "one value"]


@pytest.mark.parametrize("name", INPUTS)
def test_after_good_calls_a_layer_refuses_a_bad_input_as_ever(name, alike):
    bn, good = ComplexBatchNorm2d(3), arguments()
    bad = WRONG[name](good)["input"]
    expected = outcome(lambda: bn(bad))
    for _ in range(2):
        bn(good["input"])
    assert outcome(lambda: bn(bad)) == expected


def test_what_one_layer_takes_another_may_refuse():
    z = oracle.correlated(6, 3, 4, 4).cfloat()
    options = dict(affine=False, track_running_stats=False)
    for _ in range(2):
        ComplexBatchNorm2d(3, **options)(z)
        F.complex_batch_norm(z, None, None, training=True)
    with pytest.raises(ValueError, match=re.escape("expected 2D or 3D input, got 4D")):
        ComplexBatchNorm1d(3, **options)(z)
    with pytest.raises(ValueError, match="expected 5 channels"):
        ComplexBatchNorm2d(5, **options)(z)


def test_a_layer_that_checks_more_does_so_every_time():
    class Even(ComplexBatchNorm2d):
        ranks = [4]  # a list, which cannot be hashed

        def check_input(self, input):
            super().check_input(input)
            if input.shape[-1] % 2:
                raise ValueError("expected an even width")

    z = oracle.correlated(6, 3, 4, 5).cfloat()
    for _ in range(2):
        ComplexBatchNorm2d(3)(z)
        Even(3)(z[..., :4])
        with pytest.raises(ValueError, match="even width"):
            Even(3)(z)


@pytest.mark.parametrize("within", ["inference mode", "an operator's kernel", "nothing"])
def test_statistics_of_inference_mode_are_refused_whatever_was_known(within, alike):
    """Their guards look alike where inference mode, or an operator, hides what tells them apart."""
    z = oracle.correlated(6, 3, 4, 4).cfloat()
    learn, state = ComplexBatchNorm2d(3, affine=False), ComplexBatchNorm2d(3, affine=False)
    with torch.inference_mode():
        made, other = [buffer.clone() for buffer in state.buffers()], z.clone()
    for name, tensor in zip(dict(state.named_buffers()), made, strict=True):
        state._buffers[name] = tensor

    @torch.library.custom_op("cbn_lab_test::run", mutates_args=())
    def run(z: torch.Tensor) -> torch.Tensor:
        return learn(z) + 0

    if within == "inference mode":
        with torch.inference_mode():
            learn(z)
    else:
        (run if within == "an operator's kernel" else learn)(z)
    with pytest.raises(RuntimeError, match="made in inference mode"):
        state(other)
    assert not state.running_mean.any() and state.num_batches_tracked == 0


def test_a_hook_may_call_the_layer_again(alike):
    bn, z = ComplexBatchNorm2d(3), oracle.correlated(6, 3, 4, 4).cfloat()
    grad, found = torch.ones_like(z), []
    expected = step(bn, z, grad)
    leaf = z.clone().requires_grad_()

    def hook(_):
        with torch.enable_grad():
            found.append(step(bn, z, grad))

    leaf.register_hook(hook)
    y = bn(leaf)
    y.register_hook(hook)
    y.backward(grad)
    for again in (*found, (y.detach(), leaf.grad)):
        assert all(map(torch.equal, again, expected))
    assert len(found) == 2


def test_threads_that_call_at_the_same_time():
    layers = [ComplexBatchNorm2d(3) for _ in range(4)]
    z = [oracle.correlated(6, 3, 8, 8 + k % 2).cfloat() for k in range(4)]
    expected = [step(bn, x, torch.ones_like(x)) for bn, x in zip(layers, z, strict=True)]

    def run(k):
        return [step(layers[k], z[k], torch.ones_like(z[k])) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for steps, one in zip(pool.map(run, range(4)), expected, strict=True):
            assert all(
                torch.equal(a, b) for again in steps for a, b in zip(again, one, strict=True)
            )


def test_autocast_and_transforms_of_a_known_call():
    z = oracle.correlated(6, 3, 4, 4).cfloat()

    def loss(z):
        return F.complex_batch_norm(z, None, None, training=True).real.pow(3).sum()

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.autocast("cpu"):
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss(leaf), leaf)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(z), expected)
    with pytest.raises(RuntimeError):
        torch.func.vmap(loss)(z[None])


def test_what_a_sweep_has_copied_lives_as_long():
    """Its loops have addresses alone, and another step may come after much else."""
    z, grad = (oracle.correlated(64, 8, 4, 4).cfloat() for _ in "zg")
    turned = grad.transpose(2, 3).contiguous().transpose(2, 3)  # copied, to lie as z does
    sweep, reference = cpu_engine.Sweep((z,), 1e-5), kernels.operator.reference.Sweep((z,), 1e-5)
    mean, covar = sweep.moments()
    sweep.take_gradient((turned,), mean.float(), covar.float())
    rubbish = [torch.full((64, 8, 4, 4), torch.nan, dtype=torch.cfloat) for _ in range(8)]
    rubbish += [torch.full((8, k), torch.nan, dtype=torch.float64) for k in (2, 3) for _ in "1234"]
    reference.take_gradient((grad,), mean.float().double(), covar.float().double())
    for found, expected in zip(sweep.gram(), reference.gram(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    del rubbish


def test_a_saved_tensor_that_comes_back_different_is_seen(alike):
    """Hooks may keep it elsewhere, in another order."""
    bn, z = ComplexBatchNorm2d(3), oracle.correlated(4, 3, 6, 6).cfloat()
    grad = oracle.correlated(4, 3, 6, 6).cfloat()
    expected = step(bn, z, grad)
    step(bn, z, grad)

    def turned(tensor):
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda tensor: tensor):
        found = step(bn, z, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_takes_statistics_of_any_precision_in_the_backward():
    backward = torch.ops.cbn_lab.complex_batch_norm_backward
    z, grad = (oracle.correlated(4, 3, 6, 6).cfloat() for _ in "zg")
    mean, covar = (t.float() for t in torch.ops.cbn_lab.complex_batch_norm(
        z, None, None, None, None, None, 1e-5, "auto"
    )[2:])  # fmt: skip
    for _ in range(2):
        found, expected = (
            backward(z, None, grad, None, m, v, None, 1e-5, True, True, "numba")
            for m, v in ((mean, covar), (mean.double(), covar.double()))
        )
        assert all(map(torch.equal, found, expected))


LAYOUTS = {
    "contiguous": lambda z: z,
    "channels_last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "turned": lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "every other": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda z: z[:, :, :1].expand_as(z),
    "conjugate": lambda z: z.conj(),
}


def strided(tensor):
    return torch.stack([tensor, -tensor], -1)[..., 0]


STATES = {  # what the loops cannot read, or write, as it is
    "statistics of two precisions": lambda bn: dict(running_covar=bn.running_covar.double()),
    "statistics with gaps": lambda bn: dict(running_mean=strided(bn.running_mean)),
    "negative statistics": lambda bn: dict(running_mean=torch._neg_view(bn.running_mean)),
    "a short counter": lambda bn: dict(num_batches_tracked=bn.num_batches_tracked.int()),
    "parameters of two precisions": lambda bn: dict(weight=nn.Parameter(bn.weight.double())),
    "parameters with gaps": lambda bn: dict(weight=nn.Parameter(strided(bn.weight.detach()))),
    "plain": lambda bn: {},
}


@st.composite
def runs(draw):
    layouts = st.sampled_from(list(LAYOUTS))
    return dict(
        layouts=draw(st.lists(st.tuples(layouts, layouts, layouts), min_size=2, max_size=4)),
        state=draw(st.sampled_from(list(STATES))),
        pair=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.complex64, torch.complex128, torch.complex32])),
        layer=dict(
            affine=draw(st.booleans()),
            bias=draw(st.booleans()),
            momentum=draw(st.sampled_from([0.1, None])),
            track_running_stats=draw(st.booleans()),
            dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.float16])),
        ),
        modes=draw(st.lists(st.sampled_from(["train", "eval", "no_grad"]), min_size=1, max_size=2)),
        threads=draw(st.sampled_from([1, 2])),
    )


def results(run):
    """Of a few steps with changing input, twice."""
    torch.manual_seed(0)
    bn, found = ComplexBatchNorm2d(3, **run["layer"]), []
    if run["layer"]["affine"] and run["layer"]["track_running_stats"]:
        for name, tensor in STATES[run["state"]](bn).items():
            setattr(bn, name, tensor)
    for k, names in enumerate([*run["layouts"], *run["layouts"]]):
        mode = run["modes"][k % len(run["modes"])]
        z, g = (oracle.correlated(8, 3, 6, 4).to(run["dtype"]) for _ in "zg")
        if run["pair"]:
            first, second, third = (LAYOUTS[name] for name in names)
            inputs, grads = [first(z.real), second(z.imag)], [second(g.real), third(g.imag)]
        else:
            inputs, grads = [LAYOUTS[names[0]](z)], [LAYOUTS[names[1]](g)]
        inputs = [part.detach().requires_grad_(mode != "no_grad") for part in inputs]
        with torch.set_grad_enabled(mode != "no_grad"):
            out = bn.train(mode == "train")(*inputs)
        out = out if run["pair"] else (out,)
        if mode != "no_grad":
            torch.autograd.backward(out, grads)
        found += [part.detach() for part in out] + [part.grad for part in inputs]
        found += [p.grad for p in bn.parameters()] + [b.clone() for b in bn.buffers()]
    return found


def numbers(tensor):
    return (tensor.real, tensor.imag) if tensor.is_complex() else (tensor,)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@given(run=runs())
@settings(deadline=None, max_examples=150)
def test_what_is_known_changes_no_bit(run):
    before = torch.get_num_threads()
    torch.set_num_threads(run["threads"])
    try:
        kernels.forget()
        found = results(run)
        kernels.forget()
        with (
            mock.patch.object(kernels, "recall_call", lambda *call: None),
            mock.patch.object(cpu_engine, "direct", lambda *tensors: None),
        ):
            expected = results(run)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype is other.dtype and one.stride() == other.stride()
            # torch.equal does not know complex32.
            assert all(map(torch.equal, numbers(one), numbers(other)))
