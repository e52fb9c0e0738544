"""check_batch_norm passes what is right, and rejects each mistake by name."""

import copy

import pytest
import torch
from torch import nn

import cbn_lab


class Handmade(nn.Module):
    """A correct layer in pieces; every mistake below changes one of them."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.make_statistics(num_features)

    def make_statistics(self, num_features):
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def in_training(self, x):
        return self.training

    def check(self, x):
        if x.numel() // x.shape[1] < 2:
            raise ValueError("expected more than 1 value per channel")

    def moments(self, x):
        return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

    def root(self, var):
        return torch.sqrt(var + self.eps)

    def unbiased(self, var, x):
        n = x.numel() // x.shape[1]
        return var * n / (n - 1)

    def update(self, name, value):
        with torch.no_grad():
            getattr(self, name).mul_(1 - self.momentum).add_(self.momentum * value)

    def forward(self, x):
        if self.in_training(x):
            self.check(x)
            mean, var = self.moments(x)
            self.update("running_mean", mean)
            self.update("running_var", self.unbiased(var, x))
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / self.root(var).view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


def squares(self, x):
    mean = x.mean((0, 2, 3))
    return mean, ((x * x).mean((0, 2, 3)) - mean * mean).clamp(min=0)


def detached(which):
    def moments(self, x):
        mean = x.mean((0, 2, 3))
        var = x.var((0, 2, 3), correction=0)
        return (mean.detach() if "mean" in which else mean), (
            var.detach() if "var" in which else var
        )

    return moments


def bessel_twice(self, var, x):
    n = x.numel() // x.shape[1]
    return var * (n / (n - 1)) ** 2


def rebound(self, name, value):
    setattr(self, name, (1 - self.momentum) * getattr(self, name) + self.momentum * value)


def reversed_momentum(self, name, value):
    with torch.no_grad():
        getattr(self, name).mul_(self.momentum).add_((1 - self.momentum) * value)


def in_place(self, name, value):
    getattr(self, name).mul_(1 - self.momentum).add_(self.momentum * value)


def hidden_list(self, name, value):
    vars(self).setdefault("history", []).append(value)
    with torch.no_grad():
        getattr(self, name).mul_(1 - self.momentum).add_(self.momentum * value)


def plain_tensors(self, num_features):
    self.running_mean, self.running_var = torch.zeros(num_features), torch.ones(num_features)


def as_parameters(self, num_features):
    self.running_mean = nn.Parameter(torch.zeros(num_features), requires_grad=False)
    self.running_var = nn.Parameter(torch.ones(num_features), requires_grad=False)


# what is changed: (method, its mistaken form, the row that must fail, words it must use)
MISTAKES = {
    "leak by rebinding": ("update", rebound, "no leak", "running_mean"),
    "leak in place": ("update", in_place, "no leak", "running_var"),
    "leak in a list": ("update", hidden_list, "no leak", "history"),
    "all detached": ("moments", detached("mean var"), "gradients", "the batch statistics are"),
    "mean detached": ("moments", detached("mean"), "gradients", "the batch mean is"),
    "variance detached": ("moments", detached("var"), "gradients", "the batch variance is"),
    "biased": ("unbiased", lambda self, var, x: var, "running spread", "biased"),
    "corrected twice": ("unbiased", bessel_twice, "running spread", "corrected twice"),
    "n without pixels": (
        *("unbiased", lambda self, var, x: var * len(x) / (len(x) - 1)),
        *("running spread", "forgets the pixels"),
    ),
    "reversed momentum": ("update", reversed_momentum, "running mean", "weight of the old value"),
    "eps outside": ("root", lambda self, var: var.sqrt() + self.eps, "eps", "outside the root"),
    "eps ignored": ("root", lambda self, var: (var + 1e-5).sqrt(), "eps", "not the one"),
    "squares": ("moments", squares, "large means", "cancels"),
    "mode by gradients": (
        *("in_training", lambda self, x: torch.is_grad_enabled()),
        *("mode", "under no_grad"),
    ),
    "mode by input": ("in_training", lambda self, x: not x.requires_grad, "mode", ""),
    "always training": ("in_training", lambda self, x: True, "evaluation", "statistics change"),
    "plain tensors": ("make_statistics", plain_tensors, "statistics are buffers", "no buffer"),
    "parameters": ("make_statistics", as_parameters, "statistics are buffers", "optimizer"),
    "silence": ("check", lambda self, x: None, "one value per channel", "silence"),
}


@pytest.mark.parametrize(
    "factory", [nn.BatchNorm2d, cbn_lab.BatchNorm2d, Handmade, cbn_lab.LeakyBatchNorm2d]
)
def test_correct_layers_pass(factory):
    if factory is cbn_lab.LeakyBatchNorm2d:
        for update in ("no_grad", "detach", "data"):
            result = cbn_lab.check_batch_norm(lambda *a, u=update, **k: factory(*a, update=u, **k))
            assert result.ok, str(result)
    else:
        result = cbn_lab.check_batch_norm(factory)
        assert result.ok and all(row.passed for row in result.rows), str(result)


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_rejected_with_its_reason(name):
    method, mistaken, row, words = MISTAKES[name]
    layer = type("Mistaken", (Handmade,), {method: mistaken})
    result = cbn_lab.check_batch_norm(layer)
    assert not result.ok
    assert not result[row].passed and words in result[row].found, str(result)
    assert result[row].expected and result[row].see


@pytest.mark.parametrize("update", ["rebind", "inplace", "slice", "lerp", "copy"])
def test_complex_leaks_are_rejected_and_nothing_else(update):
    result = cbn_lab.check_batch_norm(
        lambda *a, **k: cbn_lab.LeakyComplexBatchNorm2d(*a, update=update, **k), "complex"
    )
    assert [row.name for row in result.failures] == ["no leak"], str(result)
    assert "running_covar" in result["no leak"].found


def test_complex_layers():
    assert cbn_lab.check_batch_norm(cbn_lab.ComplexBatchNorm2d, kind="complex").ok
    naive = cbn_lab.check_batch_norm(cbn_lab.NaiveComplexBatchNorm2d, kind="complex")
    assert not naive.ok and "does not whiten" in naive["whitening"].found
    over = cbn_lab.check_batch_norm(
        lambda *a, **k: cbn_lab.LeakyComplexBatchNorm2d(*a, update="over_detached", **k), "complex"
    )
    assert [row.name for row in over.failures] == ["gradients"]


@pytest.mark.parametrize(
    "change, row",
    [
        (lambda layer: setattr(layer, "eps", 2 * layer.eps), "eps"),
        (lambda layer: setattr(layer, "momentum", 1 - layer.momentum), "running mean"),
    ],
)
def test_complex_mistakes(change, row):
    def factory(*args, **kwargs):
        layer = cbn_lab.ComplexBatchNorm2d(*args, **kwargs)
        change(layer)
        return layer

    assert not cbn_lab.check_batch_norm(factory, "complex")[row].passed


def test_a_factory_that_fails_is_told_so_in_every_row():
    def factory(num_features, eps, momentum):
        raise ArithmeticError("not today")

    result = cbn_lab.check_batch_norm(factory)
    assert not any(row.passed for row in result)
    assert "ArithmeticError: not today" in result["output"].found
    assert "not a torch.nn.Module" in cbn_lab.check_batch_norm(lambda *a, **k: 3)["output"].found
    with pytest.raises(TypeError, match="expected factory to be callable, got int"):
        cbn_lab.check_batch_norm(3)
    with pytest.raises(ValueError, match="'real' or 'complex', got 'quaternion'"):
        cbn_lab.check_batch_norm(nn.BatchNorm2d, "quaternion")


def test_reports_and_no_side_effects():
    state = torch.get_rng_state()
    result = cbn_lab.check_batch_norm(lambda c, **k: copy.deepcopy(nn.InstanceNorm2d(c, **k)))
    assert torch.equal(state, torch.get_rng_state())
    assert not result.ok
    text, page = str(result), result._repr_html_()
    assert f"{len(result.failures)} of {len(result.rows)} checks failed" in text
    assert "FAIL  output" in text and page.count(">✗ fail<") == len(result.failures)
    assert result.to_dict()["ok"] is False


def test_a_layer_for_the_other_kind_of_input_is_named_at_once():
    with pytest.raises(ValueError, match='takes complex input only; pass kind="complex"'):
        cbn_lab.check_batch_norm(cbn_lab.ComplexBatchNorm2d)
    with pytest.raises(ValueError, match='takes real input only; pass kind="real"'):
        cbn_lab.check_batch_norm(nn.BatchNorm2d, kind="complex")
