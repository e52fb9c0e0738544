"""Exercises of notebook 3."""

from collections.abc import Callable

import torch
from torch import Tensor

from cbn_lab.exercises.checking import TODO, StillToDo, Wrong, exercise

DIMS = (0, 2, 3)
SHAPE = (1, -1, 1, 1)
EPS = 1e-3


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mean(values: Tensor) -> Tensor:
    return values.mean(DIMS, keepdim=True)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, DIMS, correction=0, keepdim=True)
    inv_std = torch.rsqrt(var + EPS)
    return (x - mean) * inv_std, inv_std


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _normalised(x)[0] * weight.view(SHAPE) + bias.view(SHAPE)


@exercise("gradients of weight and bias")
def parameter_gradients(function) -> str:
    g, x_hat = _normal(4, 3, 5, 2) + 0.5, _normalised(_normal(4, 3, 5, 2, seed=1))[0]
    got = function(g.clone(), x_hat.clone())
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong("Return two tensors: return grad_weight, grad_bias.")
    _judge_parameters(*got, g, x_hat)
    return "Sums over the channel, because all its values share γ and β."


def _judge_parameters(grad_weight, grad_bias, g: Tensor, x_hat: Tensor) -> None:
    weight, bias = (g * x_hat).sum(DIMS), g.sum(DIMS)
    for name, value in (("weight", grad_weight), ("bias", grad_bias)):
        if value is None:
            raise Wrong(f"The gradient of the {name} is None: autograd would take it for 0.")
        shape = tuple(getattr(value, "shape", ("not a tensor",)))
        if shape != weight.shape:
            raise Wrong(
                f"The gradient of the {name} has shape {shape}, but the {name} has shape "
                f"{tuple(weight.shape)}: add up over samples and pixels."
            )
    if torch.allclose(grad_weight, bias) and torch.allclose(grad_bias, weight):
        raise Wrong("The right two gradients, in the wrong order: first the weight's.")
    if torch.allclose(grad_bias, g.mean(DIMS)) or torch.allclose(grad_weight, weight / _count(g)):
        raise Wrong("A mean where a sum is due: each value contributes, and contributions add up.")
    if torch.allclose(grad_weight, bias):
        raise Wrong("y = γ·x̂ + β: the derivative with respect to γ is x̂, which is missing.")
    for name, value, want in (("weight", grad_weight, weight), ("bias", grad_bias, bias)):
        if not torch.allclose(value, want):
            raise Wrong(f"The gradient of the {name} is {value.tolist()}, not {want.tolist()}.")


def _count(g: Tensor) -> int:
    return g.numel() // g.shape[1]


@exercise("gradient of the input")
def input_gradient(function) -> str:
    g = _normal(4, 3, 5, 2) + 0.5
    x_hat, inv_std = _normalised(3 * _normal(4, 3, 5, 2, seed=1))
    g = g + 0.5 * x_hat
    weight = torch.tensor([2.0, 0.5, -1.5], dtype=torch.float64).view(SHAPE)
    got = function(g.clone(), x_hat.clone(), inv_std.clone(), weight.clone())
    _judge_input(got, g, x_hat, inv_std, weight)
    return "It agrees with the formula, and is orthogonal to 1 and to x̂."


def _judge_input(got, g: Tensor, x_hat: Tensor, inv_std: Tensor, weight: Tensor) -> None:
    if not isinstance(got, Tensor) or got.shape != g.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else repr(got)
        raise Wrong(f"The input's gradient has the input's shape {tuple(g.shape)}. Got: {shape}")

    def whole(g: Tensor, mean: Callable[[Tensor], Tensor] = _mean) -> Tensor:
        return (g - mean(g) - x_hat * mean(g * x_hat)) * inv_std

    wg = weight * g
    mistakes = {
        "Only the straight path. The mean and σ depend on the input too: two terms are missing.": (
            wg * inv_std
        ),
        "The path through σ is missing: the part along x̂ is still there.": (
            (wg - _mean(wg)) * inv_std
        ),
        "The path through μ is missing: the gradients of a channel must add up to 0.": (
            (wg - x_hat * _mean(wg * x_hat)) * inv_std
        ),
        "γ is missing: what arrives at x̂ is γ·g.": whole(g),
        "Not divided by σ: multiply by inv_std.": whole(wg) / inv_std,
        "Divided by inv_std, which is 1/σ already: multiply by it.": whole(wg) / inv_std**2,
        "Sums where means are due: the 1/n of the mean's own derivative is missing.": whole(
            wg, lambda values: values.sum(DIMS, keepdim=True)
        ),
        "The signs: both paths through the statistics take something away.": (
            (wg + _mean(wg) + x_hat * _mean(wg * x_hat)) * inv_std
        ),
        "The means were taken over the batch only. The pixels belong to the channel too.": whole(
            wg, lambda values: values.mean(0, keepdim=True)
        ),
    }
    for message, value in mistakes.items():
        if torch.allclose(got, value):
            raise Wrong(message)
    if not torch.allclose(got, whole(wg)):
        off = (got - whole(wg)).norm() / whole(wg).norm()
        raise Wrong(f"The input's gradient is off by {off:.0%} of its length.")


@exercise("a Function of your own")
def own_function(function) -> str:
    if not isinstance(function, type) or not issubclass(function, torch.autograd.Function):
        raise Wrong(f"Expected the class, derived from torch.autograd.Function. Got: {function!r}")
    x = (3 * _normal(4, 3, 5, 2) + 1).requires_grad_()
    weight = torch.tensor([2.0, 0.5, -1.5], dtype=torch.float64).requires_grad_()
    bias = torch.tensor([0.3, -1.0, 0.0], dtype=torch.float64).requires_grad_()
    output, kept = _run(function, x, weight, bias)
    if not torch.allclose(output, _formula(x, weight, bias)):
        raise Wrong(
            "The forward is not batch norm yet: biased variance, eps inside the root, γ, β."
        )
    x_hat, inv_std = (values.detach() for values in _normalised(x))
    g = _normal(4, 3, 5, 2, seed=2) + 0.5 + 0.5 * x_hat
    grad_x, grad_weight, grad_bias = _gradients(output, (x, weight, bias), g)
    _judge_input(grad_x, g, x_hat, inv_std, weight.detach().view(SHAPE))
    _judge_parameters(grad_weight, grad_bias, g, x_hat)
    if kept > 1.5 * x.nbytes:
        raise Wrong(
            f"Right, but it keeps {kept / x.nbytes:.1f} times the input's size for the backward. "
            "Save the input, and make x̂ again from it."
        )
    if not torch.autograd.gradcheck(
        lambda *args: function.apply(*args, EPS), (x, weight, bias), raise_exception=False
    ):
        raise Wrong("gradcheck says no: does the backward change a tensor that it was given?")
    return f"gradcheck agrees, and {kept / x.nbytes:.1f} times the input's size is kept."


def _run(function, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes kept for the backward beside weight and bias."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function.apply(x, weight, bias, EPS)
    if output is TODO:
        raise StillToDo
    if not isinstance(output, Tensor) or output.shape != x.shape:
        raise Wrong(f"forward returns an output of the input's shape {tuple(x.shape)}.")
    if output.grad_fn is None:
        raise Wrong("The output has no history: was it computed under no_grad or detached?")
    loose = [name for name, value in vars(output.grad_fn).items() if isinstance(value, Tensor)]
    if loose:
        raise Wrong(
            f"ctx.{loose[0]} holds a tensor. Hand tensors to ctx.save_for_backward: autograd then "
            "frees them in time, and notices if one is changed in between."
        )
    return output, sum(storages.values())


def _gradients(output: Tensor, leaves: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(output, leaves, g, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "number of gradients" in str(error):
            raise Wrong(
                "backward returns one value for each argument of forward after ctx: four, the last "
                "of them None, for eps."
            ) from error
        if "invalid gradient" in str(error) or "shape" in str(error):
            raise Wrong(f"A gradient has another shape than its tensor: {error}") from error
        raise
    except TypeError as error:
        if "TODO" in str(error) or "_Todo" in str(error):
            raise StillToDo from error
        raise
